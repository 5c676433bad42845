"""Pages that are not there.

What a fetch that found none means, and what labkit's own walker had to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.disasm import disassemble
from labkit.engines.exits import Exit, InternalErrorExit
from labkit.engines.unicorn.mmu import FETCH, NEED, NONCANONICAL, NOT_YOURS

if TYPE_CHECKING:
    from labkit.engines.unicorn.counting import Counting
    from labkit.engines.unicorn.ending import Ending
    from labkit.engines.unicorn.isa.quirks import Quirks
    from labkit.engines.unicorn.mmu import Mmu
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["Misses"]


class Misses:
    """What one vCPU did not find.

    Unicorn fetches a whole block before it runs the first instruction, so a fetch that fails may be
    of one that is far away: then the next block is made one instruction long.
    """

    def __init__(
        self, vcpu: UnicornVcpu, quirks: Quirks, counting: Counting, ending: Ending
    ) -> None:
        self.vcpu, self.quirks, self.counting, self.ending = vcpu, quirks, counting, ending
        self._stood_at = (-1, -1)  # (pc, insns) where a native run did nothing the last time
        self._shortened = (-1, -1)  # (pc, insns) where a block was made short the last time

    def unexplained(self) -> Exit | None:
        """Unicorn came back, without a word, before it did anything: it may do so once."""
        here = self.quirks.pc(), self.vcpu.insns
        if self._stood_at == here:
            return self.vcpu.refuse("Unicorn comes back without a run, and does not say why")
        self._stood_at = here
        return None

    def fetch(self, pc: int, limit: int) -> Exit | None:
        """Code ends here, or further on; the instruction at pc was never begun."""
        ran = self.counting.begun()
        self.vcpu.retire(ran - self.counting.extra)

        code = self.vcpu.memory.fetch(pc, self.quirks.longest)
        if self._is_whole(code):
            if self._shortened == (pc, self.vcpu.insns):
                return self.vcpu.refuse(
                    "Unicorn cannot fetch this instruction and does not say why"
                )
            self._shortened = (pc, self.vcpu.insns)
            self.quirks.shorten_block()
        elif ran < limit:
            if self.ending.exception is not None:
                return self.quirks.exception(self.ending.exception)
            gpa = self.vcpu.memory.translate(pc + len(code), uc.UC_PROT_EXEC)
            return InternalErrorExit(
                f"instruction fetch from gpa {gpa or 0:#x}, where no memslot is", pc
            )

        self.quirks.forget_exception()
        return None

    def walk(self, mmu: Mmu, pc: int, limit: int) -> Exit | None:
        """The walker found no page, or one whose view must be made anew first."""
        facts = mmu.facts
        why, gva, code = facts.why, facts.gva, facts.code
        is_fetch = facts.type == FETCH
        ran = self.counting.begun() if is_fetch else self.counting.finished(pc)
        self.vcpu.retire(ran - self.counting.extra)

        if why == NEED:
            self.vcpu.vm.forget_translations(code=mmu.settle(facts.gpa))
            self.vcpu.sync()
            return None
        if is_fetch and self._is_whole(self.vcpu.memory.fetch(pc, self.quirks.longest)):
            self.quirks.shorten_block()
            return None
        if is_fetch and ran >= limit:
            return None
        if why == NOT_YOURS:
            return self._not_yours(mmu, pc)

        at = max(pc, gva) if is_fetch else mmu.where(self.vcpu.handle, pc, gva)
        return self.quirks.miss(None if why == NONCANONICAL else code, at)

    def _not_yours(self, mmu: Mmu, pc: int) -> Exit | None:
        """A page that this guest may not use so."""
        facts = mmu.facts
        gva, gpa, private = facts.gva, facts.gpa, facts.code != 0
        is_fetch = facts.type == FETCH
        fault = mmu.not_yours()

        at = max(pc, gva) if is_fetch else mmu.where(self.vcpu.handle, pc, gva)
        return self.quirks.not_yours(fault, at, gpa, private)

    def _is_whole(self, code: bytes) -> bool:
        """Whether the first instruction in code is all there.

        Then it is a later one that cannot be fetched.
        """
        if len(code) == self.quirks.longest:
            return True
        return next(disassemble(self.vcpu.vm.arch, code, 0), None) is not None
