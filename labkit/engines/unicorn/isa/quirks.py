"""What one architecture adds to the run loop: the Protocol that its quirk file implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from labkit.engines.base import Capability, GuestFault, Regs
from labkit.engines.exits import Exit

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["Quirks", "QuirksOf"]


class QuirksOf(Protocol):
    """Makes the quirks of an architecture for one vCPU: a class of them."""

    uc_arch: int
    uc_mode: int
    settings: tuple[tuple[int, int], ...]  # of libunicorn, before anything else
    capabilities: tuple[Capability, ...]  # beside those that all architectures share

    def __call__(self, vcpu: UnicornVcpu) -> Quirks: ...


class Quirks(Protocol):
    """What one architecture adds to the run loop."""

    awaits: list[int] | None
    two_blocks: bytes  # code of two blocks that do nothing and end the run
    two_blocks_count: int  # or that many instructions of them do (0: the code itself)
    fault_trace: (
        tuple[Callable[[], int], Callable[[int], object]] | None
    )  # reads, sets what says where a fault was, if looks do
    pc_name: str
    longest: int  # bytes of an instruction

    def pc(self) -> int: ...
    def leave(
        self,
    ) -> int: ...  # the program counter to run from; what was known of registers is void
    def arrive(
        self,
    ) -> int: ...  # the program counter after a run, and other registers that a trap will ask for
    def set_pc(self, gva: int) -> None: ...
    def scan(self, data: bytes, gva: int) -> Mapping[int, Trap]: ...
    def trap(self, trap: Trap) -> Exit | None: ...
    def exception(self, vector: int) -> Exit | None: ...
    def invalid(self) -> Exit | None: ...
    def hole(self, pc: int) -> Exit | None: ...  # the instruction there wants what no memslot holds
    def complete(self, value: int) -> bool: ...
    def is_drained(self) -> bool: ...
    def is_fetch_fault(self, vector: int | None) -> bool: ...
    def forget_exception(self) -> object: ...
    def monitor_offset(
        self,
    ) -> int: ...  # where a CPU state has the address of the last load-exclusive; 0: there are none
    def shorten_block(self) -> None: ...  # the next block that runs is one instruction long
    def wants_short_block(self) -> bool: ...  # the CPU itself wants it so
    def ring(self) -> int: ...  # the privilege level that memory is accessed with
    def miss(
        self, error: int | None, gva: int
    ) -> Exit | None: ...  # deliver a page fault at gva, None: it is no address
    def not_yours(
        self, fault: GuestFault, gva: int, gpa: int, private: bool
    ) -> Exit | None: ...  # SNP: a page with another owner
    def drop_resume_flag(
        self,
    ) -> None: ...  # if there is one, and the instruction that it is for has run
    def restore_flags(self) -> None: ...  # of an instruction that has a hook and faulted
    def strange_mode(self) -> str: ...  # why code cannot be run as the CPU stands, or ""
    def read_all(self) -> Regs: ...
    def read(self, name: str) -> int: ...
    def write_many(self, regs: Mapping[str, int]) -> None: ...
    def extra_state(self) -> dict[str, object]: ...
    def set_extra_state(self, state: dict[str, object]) -> None: ...
