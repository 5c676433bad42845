"""How a native run ended: every way in which Unicorn can come back, and who can tell.

Unicorn returns from `uc_emu_start` with a status and says little more. These are all the ways, in
the order in which the run loop (vcpu.py) tells them apart.

Ended by us, status 0, `Ending.by` says by whom:

  "edge"        a block was translated that needs hooks; nothing of it has run (guards.py)
  "breakpoint"  the instruction at the program counter has one, and has not run (guards.py)
  "refused"     an instruction that only corrects the count would load what it may not (guards.py)
  "hole"        an instruction that is carried out with pages of ours touched another (mmio.py)

Ended by the guest:

  exception     UC_HOOK_INTR was called; `Ending.exception` is the architecture's number (isa/).
                Of these a page fault on a fetch means that the instruction never began (misses.py)
  EXCEPTION     a walker of our own says in `Mmu.facts.why` which page, and why (misses.py)
  FETCH_*       no memslot there: it is the instruction, or only the rest of its block (misses.py)
  READ_*, WRITE_*
                no memslot there: a device's (mmio.py)
  INSN_INVALID  Unicorn does not have this instruction, or takes it for none (isa/)
  any other     an InternalErrorExit with Unicorn's own words

Ended by a count, status 0:

  each          Unicorn's counter is over the limit
  tally         the hook at the start of a block stopped before it (STOPPED): it would go beyond the
                limit, the table does not know it, or another thread has set the limit to 0

Ended by C's `uc_emu_stop` as a hook, status 0: the program counter is at a trap that stops (isa/).
What comes back with status 0 and none of this has run to the end of a block, and goes on.
"""

from __future__ import annotations

from functools import cache

from unicorn import unicorn_const as uc

from labkit.engines.disasm import disassemble
from labkit.engines.exits import BudgetExit, InternalErrorExit

__all__ = ["FETCHES", "HOLES", "Ending", "budget_exit", "refusal"]

FETCHES = (uc.UC_ERR_FETCH_UNMAPPED, uc.UC_ERR_FETCH_PROT)
HOLES = (
    *FETCHES,
    uc.UC_ERR_READ_UNMAPPED,
    uc.UC_ERR_WRITE_UNMAPPED,
    uc.UC_ERR_READ_PROT,
    uc.UC_ERR_WRITE_PROT,
)


class Ending:
    """How the present native run of one vCPU ended, or the last one; hooks note it here."""

    def __init__(self) -> None:
        self.by = ""  # "edge", "breakpoint", "hole", or nobody of ours
        self.exception: int | None = None  # the number that Unicorn gave it


@cache
def budget_exit(insns: int) -> BudgetExit:
    """The one exit object for a budget: stepping makes one a step."""
    return BudgetExit(insns)


def refusal(arch: str, why: str, pc: int, data: bytes) -> InternalErrorExit:
    """The exit for an instruction that is not run; data are the bytes at pc, as many as it has."""
    insn = next(disassemble(arch, data, pc), None)
    if insn is None:
        return InternalErrorExit(why, pc, data)
    return InternalErrorExit(why, pc, data[: insn.size], insn.text)
