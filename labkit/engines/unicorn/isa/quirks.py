"""What one architecture adds to the run loop: the Protocol that its quirk file implements.

`Core` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from labkit.engines.base import Capability, GuestFault, Regs
from labkit.engines.exits import Exit

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core
    from labkit.engines.unicorn.isa.traps import Trap

__all__ = ["FaultTrace", "Quirks", "QuirksOf"]

FaultTrace = tuple[Callable[[], int], Callable[[int], object]]
"""Read and set what tells the guest where its last fault was: a failed look of ours changes it."""


class QuirksOf(Protocol):
    """Makes the quirks of an architecture for one vCPU: a class of them."""

    uc_arch: int
    uc_mode: int
    settings: tuple[tuple[int, int], ...]  # of libunicorn, before anything else
    capabilities: tuple[Capability, ...]  # beside those that all architectures share

    def __call__(self, core: Core) -> Quirks: ...


class Quirks(Protocol):
    """What one architecture adds to the run loop.

    An Exit ends the run; None means that it goes on.
    """

    awaits: list[int] | None  # what `complete` sets, None when the last exit reads nothing
    two_blocks: bytes  # code of two blocks that do nothing and end the run
    two_blocks_count: int  # or that many instructions of them do (0: the code itself)
    fault_trace: FaultTrace | None  # where looks leave a trace
    owed: int  # a trap for what ran before is due (0: none)
    pc_name: str
    longest: int  # bytes of an instruction

    # The program counter. `leave` gives the one to run from, and what was known of registers is
    # void; `arrive` reads it after a run, with other registers that a trap will ask for
    def pc(self) -> int: ...
    def leave(self) -> int: ...
    def arrive(self) -> int: ...
    def set_pc(self, gva: int) -> None: ...

    # Sensitive instructions: those of a block, and one carried out
    def scan(self, data: bytes, gva: int) -> Mapping[int, Trap]: ...
    def trap(self, trap: Trap) -> Exit | None: ...
    def complete(self, value: int) -> bool: ...
    def refuses(self, trap: Trap) -> bool: ...  # one that only corrects the count
    def refused(self) -> Exit | None: ...  # and what comes of that

    # What Unicorn reported: an exception by its number, an instruction that it does not have,
    # one at pc that wants what no memslot holds
    def exception(self, vector: int) -> Exit | None: ...
    def invalid(self) -> Exit | None: ...
    def hole(self, pc: int) -> Exit | None: ...
    def is_fetch_fault(self, vector: int | None) -> bool: ...
    def came_before(self, vector: int | None) -> bool: ...  # the instruction there never began
    def deliver_owed(self) -> Exit | None: ...  # the trap for what ran before
    def forget_exception(self) -> object: ...

    # What labkit's own walker found: a page fault at gva (no error: it is no address); a page with
    # another owner
    def miss(self, error: int | None, gva: int) -> Exit | None: ...
    def not_yours(self, fault: GuestFault, gva: int, gpa: int, private: bool) -> Exit | None: ...
    def ring(self) -> int: ...  # the privilege level that memory is accessed with

    # How instructions are counted and blocks cut
    def is_drained(self) -> bool: ...  # a REP has no iteration left
    def shorten_block(self) -> None: ...  # the next block that runs is one instruction long
    def wants_short_block(self) -> bool: ...  # the CPU itself wants it so
    def strange_mode(self) -> str: ...  # why code cannot be run as the CPU stands, or ""

    # What a hook or a run must leave as it was
    def drop_resume_flag(self) -> None: ...  # if the instruction that it is for has run
    def restore_flags(self) -> None: ...  # of an instruction that has a hook and faulted
    def monitor_offset(
        self,
    ) -> int: ...  # of the last load-exclusive's address in a CPU state, or 0

    # Registers, and what a snapshot keeps beside Unicorn's own state
    def read_all(self) -> Regs: ...
    def read(self, name: str) -> int: ...
    def write_many(self, regs: Mapping[str, int]) -> None: ...
    def extra_state(self) -> dict[str, object]: ...
    def set_extra_state(self, state: dict[str, Any]) -> None: ...
    def strange_state(self, context: bytes) -> str: ...  # why it is no state of a guest, or ""
