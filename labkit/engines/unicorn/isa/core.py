"""What the files of an architecture may ask of the vCPU that they belong to: nothing else.

`Quirks` is the way back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from unicorn import unicorn_const as uc

if TYPE_CHECKING:
    from labkit.arch.x86_cpu import CpuModel
    from labkit.engines.base import Trace
    from labkit.engines.exits import Exit, InternalErrorExit
    from labkit.engines.unicorn.counting import Counting
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.mmu import Mmu
    from labkit.engines.unicorn.native.lib import Handle

__all__ = ["Core", "Machine", "Memory"]


class Machine(Protocol):
    """Facts of the VM, and its memory by gpa."""

    arch: str
    cpu: CpuModel
    level: int  # of protection: 1 memory, 2 registers, 3 ownership of pages
    mmu: Mmu | None  # where memory is encrypted

    def retired(self) -> int: ...  # by all vCPUs: the VM's clock
    def read(self, gpa: int, size: int) -> bytes: ...  # as far as memslots go
    def write(self, gpa: int, data: bytes) -> None: ...
    def overlaps(self, gpa: int, size: int) -> bool: ...  # whether a range touches a memslot


class Memory(Protocol):
    """Memory by gva, with the rights that the guest has now.

    None and False mean that the guest would fault.
    """

    def translate(self, gva: int, access: int = uc.UC_PROT_READ) -> int | None: ...
    def read(self, gva: int, size: int) -> bytes | None: ...
    def write(self, gva: int, data: bytes) -> bool: ...
    def fetch(self, gva: int, size: int) -> bytes: ...  # code, up to the first byte that faults


class Core(Protocol):
    """One vCPU, as its quirks see it."""

    index: int
    handle: Handle
    counting: Counting
    trace: Trace
    insns: int  # retired so far; only `retire`, `unretire` and `recount` change it
    resumed: int | None  # `insns` behind what may have set the flag RF

    @property
    def vm(self) -> Machine: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def ended_by(self) -> str: ...  # who of ours ended the last native run, see ending.py

    # The instruction count
    def retire(self, insns: int = 1) -> None: ...
    def unretire(self) -> None: ...  # the last one did not retire after all
    def recount(self, insns: int) -> None: ...  # what just ran was counted wrongly

    # Runs within a run: None when nothing ended them early
    def run_one(self) -> Exit | None: ...  # until one instruction more has retired
    def run_natively(self, trap: Trap) -> Exit | None: ...  # that trap, by Unicorn after all
    def run_each(self, insns: int) -> Exit | None: ...  # one native run, counted by Unicorn
    def end_refused(self) -> None: ...  # the run, at the instruction under way, which is refused
    def meet_hole(self) -> Exit | None: ...  # the instruction that touches what no memslot holds

    # What changes for the runs that follow
    def guard(self, trap: Trap) -> None: ...  # one more sensitive instruction
    def unguard(self, gva: int) -> None: ...  # that one may run in Unicorn again
    def passing(self, trap: Trap) -> AbstractContextManager[None]: ...  # and that one, for once
    def resume_here(self) -> None: ...  # the run ends between two iterations of a REP
    # page tables, or where they are, have changed; (code) and what an instruction does
    def forget_translations(self, code: bool = False) -> None: ...
    def sync(self) -> None: ...  # and do so at once

    def refuse(self, why: str) -> InternalErrorExit: ...  # the exit for what cannot be run
