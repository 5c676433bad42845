"""What an engine offers: a VM, its vCPUs, and Protocols for what only some engines can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from labkit.engines.exits import Exit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from labkit.arch.desc import PagingMode

__all__ = [
    "Capability",
    "Cipher",
    "EngineVcpu",
    "EngineVm",
    "GuestFault",
    "LoggingVm",
    "MonitorVcpu",
    "Ownership",
    "ParallelVm",
    "PatientVcpu",
    "ProtectingVm",
    "Regs",
    "Trace",
]

Regs = dict[str, int]
# (kind, facts): what an engine reports without ending the run
Trace = Callable[[str, dict[str, object]], None]


@dataclass(frozen=True)
class Capability:
    """One thing an engine can or cannot do, with the reason; `labkit doctor` prints them."""

    name: str
    have: bool
    why: str = ""


class Cipher(Protocol):
    """What stands between the guest's view of a page and DRAM's.

    It keeps the length, and works by blocks of 16 bytes at system physical addresses.
    """

    def encrypt_into(self, spa: int, data: memoryview, out: memoryview) -> None:
        """Encrypt from one buffer into another, which may be the same."""

    def decrypt_into(self, spa: int, data: memoryview, out: memoryview) -> None:
        """Decrypt from one buffer into another, which may be the same."""


class GuestFault(Protocol):
    """What a guest's access to a page that is not its own meets."""

    @property
    def kind(self) -> str:
        """What is raised: "#VC" in the guest, or "#NPF" at the host."""

    @property
    def error_code(self) -> int:
        """Of that exception, or of the nested page fault."""

    @property
    def why(self) -> str:
        """In words."""


class Ownership(Cipher, Protocol):
    """A cipher beside which pages have owners (SNP's RMP)."""

    def guest_fault(self, gpa: int, private: bool, is_write: bool) -> GuestFault | None:
        """What an access of the guest to its page meets."""

    def pvalidate(self, gpa: int, size: int, validate: bool) -> tuple[int, bool] | GuestFault:
        """The instruction, on a page of its own: (EAX, CF), or what it meets."""


class EngineVcpu(Protocol):
    """One virtual CPU; the caller owns guest memory."""

    insns: int  # retired so far: one instruction, one REP iteration or one exception delivery each
    exact: bool  # insns is exact; False behind a run that the engine did not count
    # Step of the VM at the last run's last locked instruction; -1 when it had none, or the engine
    # cannot tell
    locked_at: int

    def get_regs(self) -> Regs:
        """All registers by their architectural names."""

    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers; raises InvalidState for a name or a value that does not fit."""

    def read_reg(self, name: str) -> int:
        """One register."""

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""

    def complete(self, value: int) -> None:
        """Give the value that the last IN, MMIO read or hypercall returns."""

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""

    def save(self) -> bytes:
        """The whole CPU state, to be given to `restore` of any vCPU of the same engine."""

    def restore(self, state: bytes) -> None:
        """Put a saved state back, bit for bit."""

    def close(self) -> None:
        """Release what the engine holds."""


@runtime_checkable
class PatientVcpu(Protocol):
    """The vCPU of an engine that can put off what has to be done before it first runs."""

    def begin_with(self, regs: Regs) -> None:
        """As `set_regs`, with names and values that this engine is known to take."""


@runtime_checkable
class MonitorVcpu(Protocol):
    """The vCPU of an engine that says what becomes of an exclusive monitor between two runs."""

    monitor_survives: bool


class EngineVm(Protocol):
    """The engine's side of one VM: memory slots in, vCPUs out."""

    name: str
    # Called once `ask` was, on the thread that runs the guest, with the guest between two
    # instructions: others look meanwhile. When it returns True the run ends (StopExit).
    between: Callable[[], bool]

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this engine can and cannot do."""

    def ask(self) -> None:
        """Have `between` called soon by the run that is on, if one is; from any thread."""

    def add_memslot(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory at `gpa`; the caller keeps it alive."""

    def create_vcpu(self, index: int, trace: Trace) -> EngineVcpu:
        """Make one vCPU in its reset state."""

    def check_interrupt(self) -> None:
        """Raise the KeyboardInterrupt that a run held back until its exit was recorded."""

    def retired(self) -> int:
        """Instructions retired by all vCPUs: the VM's clock."""

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: forget translations and code translated from it."""

    def close(self) -> None:
        """Release what the engine holds."""


@runtime_checkable
class ParallelVm(Protocol):
    """The VM of an engine with the capability parallel_vcpus."""

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run, each on its own thread, until one exits.

        The others go on until they are touched, or `pause`.
        """

    def pause(self) -> None:
        """Bring all of them out of the guest."""


@runtime_checkable
class LoggingVm(Protocol):
    """The VM of an engine that knows which pages its guests wrote (capability dirty_log)."""

    def pages_written(self) -> list[int]:
        """The gpas of the pages that guests, not the host, wrote since the last call."""


@runtime_checkable
class ProtectingVm(Protocol):
    """The VM of an engine whose guests can be encrypted (capability protect)."""

    def protect(self, mode: PagingMode, cipher: Ownership, inverted: bool, level: int) -> None:
        """Let the guest see memory through its key where an entry's encryption bit says so.

        Called before there is any vCPU. `inverted`: where the bit does not say so. `level` 1:
        memory only; 2: registers are encrypted too, and what the guest cannot do alone is #VC and
        VMGEXIT; 3: pages have owners (`own_pages`).
        """

    def own_pages(self, gpa: int, assigned: NDArray[np.bool_], usable: NDArray[np.bool_]) -> None:
        """Set owners of the pages from gpa on.

        `assigned`: the page is a guest's, so that nobody writes it as shared; `usable`: this guest
        may use it privately.
        """

    def memory_needed(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to look at guest memory, or to write a part of it."""

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the guest's key shows it, as far as the memslot goes."""

    def write_plain(self, gpa: int, data: bytes) -> None:
        """Write memory through the guest's key, as the guest itself would."""

    def swap(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table."""

    def written(self) -> list[tuple[int, NDArray[np.bool_], NDArray[np.bool_]]]:
        """How the guest wrote each page last, for each memslot.

        The slot's gpa, and two arrays with an element a page: last through its key, last without.
        """

    def views_state(self) -> list[tuple[bytes, bytes]]:
        """What a snapshot keeps beside the bytes of memory, for each memslot.

        Which page of DRAM is where, and how the guest wrote each last.
        """

    def set_views_state(self, state: list[tuple[bytes, bytes]]) -> None:
        """Put it back."""
