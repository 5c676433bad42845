"""What every engine offers, and the exits it can end a run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from labkit.arch.desc import PagingMode

__all__ = [
    "BudgetExit",
    "Capability",
    "Cipher",
    "DeadlineExit",
    "DebugExit",
    "DiagExit",
    "EngineVcpu",
    "EngineVm",
    "Exit",
    "GuestFault",
    "HaltExit",
    "HypercallExit",
    "InternalErrorExit",
    "InterruptExit",
    "LoggingVm",
    "MemoryFaultExit",
    "MmioExit",
    "MonitorVcpu",
    "Ownership",
    "ParallelVm",
    "PioExit",
    "ProtectingVm",
    "Regs",
    "SbiExit",
    "ShutdownExit",
    "SystemEventExit",
    "Trace",
    "VmgexitExit",
]

Regs = dict[str, int]
Trace = Callable[
    [str, dict[str, object]], None
]  # (kind, facts): what an engine reports without ending the run


@dataclass(frozen=True)
class Exit:
    """Why a vCPU came back to the host; `end` is the word that `labkit run` prints."""

    end = "exit"
    number = -1  # what tells a ucall from other exits of its kind: a port, a gpa, an extension
    hva = 0  # of a ucall whose hva is in the exit itself

    def __str__(self) -> str:
        facts = (f"{k}={v:#x}" if type(v) is int else f"{k}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__.removesuffix('Exit').lower()} {' '.join(facts)}".strip()


@dataclass(frozen=True)
class PioExit(Exit):
    """IN or OUT (KVM_EXIT_IO); the instruction is complete, an IN has read 0 until `complete()` says otherwise."""

    port: int
    size: int  # bytes
    is_write: bool
    data: int
    end = "pio"
    number = property(attrgetter("port"))


@dataclass(frozen=True)
class MmioExit(Exit):
    """An access to a GPA without memslot (KVM_EXIT_MMIO); a read ends at the next run with what `complete()` gave."""

    gpa: int
    size: int  # bytes
    is_write: bool
    data: int
    end = "mmio"
    hva = property(attrgetter("data"))

    @property
    def number(self) -> int:  # type: ignore[override]
        """The gpa of a write: only those are ucalls."""
        return self.gpa if self.is_write else -1


@dataclass(frozen=True)
class HaltExit(Exit):
    """HLT at CPL0 (KVM_EXIT_HLT); the program counter is behind it."""

    end = "halted"


@dataclass(frozen=True)
class ShutdownExit(Exit):
    """Triple fault (KVM_EXIT_SHUTDOWN, SDM 3A 6.15 #DF): which vectors led there, and the page-fault address."""

    vectors: tuple[int, ...]
    pc: int
    cr2: int
    why: str
    end = "shutdown"

    def __str__(self) -> str:
        return f"triple fault at pc {self.pc:#x}: {self.why} (vectors {list(self.vectors)}, cr2 {self.cr2:#x})"


@dataclass(frozen=True)
class SbiExit(Exit):
    """RISC-V ECALL from S-mode (KVM_EXIT_RISCV_SBI); a0 holds SBI_ERR_NOT_SUPPORTED until `complete()` says otherwise."""

    extension: int
    function: int
    args: tuple[int, ...]
    end = "sbi"
    number = property(
        lambda self: self.function << 64 | self.extension
    )  # the function above the extension's 64 bits
    hva = property(lambda self: self.args[0])


@dataclass(frozen=True)
class DiagExit(Exit):
    """s390x DIAGNOSE (KVM_EXIT_S390_SIEIC with intercept code 4): its function code and what its first register holds."""

    code: int
    data: int
    end = "diag"
    number, hva = property(attrgetter("code")), property(attrgetter("data"))


@dataclass(frozen=True)
class HypercallExit(Exit):
    """VMCALL, VMMCALL, HVC or SMC; the result register holds -KVM_ENOSYS until `complete()` says otherwise."""

    nr: int
    args: tuple[int, ...]
    end = "hypercall"


@dataclass(frozen=True)
class VmgexitExit(Exit):
    """VMGEXIT of a guest whose registers are encrypted: MSR 0xc0010130; from a host that answered, what was asked and its answer."""

    ghcb: int
    request: str = ""
    answer: str = ""
    end = "vmgexit"

    def __str__(self) -> str:
        return (
            f"vmgexit {self.request} (ghcb {self.ghcb:#x}): {self.answer}"
            if self.request
            else f"vmgexit ghcb {self.ghcb:#x}"
        )


@dataclass(frozen=True)
class SystemEventExit(Exit):
    """The guest asked for the end of its VM (KVM_EXIT_SYSTEM_EVENT)."""

    type: int  # KVM_SYSTEM_EVENT_SEV_TERM is 6
    data: tuple[int, ...]
    why: str
    end = "terminated"

    def __str__(self) -> str:
        return f"{self.why} (system event {self.type}, data {', '.join(map(hex, self.data))})"


@dataclass(frozen=True)
class MemoryFaultExit(Exit):
    """An access that the nested tables refuse (KVM_EXIT_MEMORY_FAULT): the host changes what it wants and runs the instruction again."""

    gpa: int
    is_private: bool
    error_code: int  # of the nested page fault
    why: str
    end = "memory-fault"

    def __str__(self) -> str:
        return (
            f"nested page fault at gpa {self.gpa:#x} (error code {self.error_code:#x}): {self.why}"
        )


@dataclass(frozen=True)
class DebugExit(Exit):
    """A breakpoint: the instruction at `pc` has not run yet (KVM_EXIT_DEBUG)."""

    pc: int
    end = "debug"


@dataclass(frozen=True)
class BudgetExit(Exit):
    """The instruction budget of this run is used up."""

    insns: int
    end = "budget"

    def __str__(self) -> str:
        return f"{self.insns} instructions run"


@dataclass(frozen=True)
class InterruptExit(Exit):
    """Ctrl-C; the caller records what there is to record and raises KeyboardInterrupt."""

    end = "interrupted"


@dataclass(frozen=True)
class DeadlineExit(Exit):
    """The guest ran for so long without leaving: it spins, or wants more time than the engine's `deadline` gives."""

    seconds: float
    pc: int
    end = "deadline"

    def __str__(self) -> str:
        return (
            f"no exit in {self.seconds:g} s, now at pc {self.pc:#x}; the next run goes on from here"
        )


@dataclass(frozen=True)
class InternalErrorExit(Exit):
    """The engine cannot go on faithfully (KVM_EXIT_INTERNAL_ERROR): what, where, and the bytes it would not run."""

    why: str
    pc: int
    data: bytes = b""
    disassembly: str = ""
    end = "internal-error"

    def __str__(self) -> str:
        shown = f": {self.disassembly} ({self.data.hex(' ')})" if self.data else ""
        return f"{self.why} at pc {self.pc:#x}{shown}"


@dataclass(frozen=True)
class Capability:
    """One thing an engine can or cannot do, with the reason; `labkit doctor` prints them."""

    name: str
    have: bool
    why: str = ""


class Cipher(Protocol):
    """What stands between the guest's view of a page and DRAM's: length-preserving, by 16-byte blocks at system physical addresses."""

    def encrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Encrypt from one buffer into another."""

    def decrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Decrypt from one buffer into another."""


class GuestFault(Protocol):
    """What a guest's access to a page that is not its own meets: "#VC" in the guest, "#NPF" at the host."""

    @property
    def kind(self) -> str: ...
    @property
    def error_code(self) -> int: ...
    @property
    def why(self) -> str: ...


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
    locked_at: int  # step of the VM at the last run's last locked instruction, -1 when it had none or the engine cannot tell

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
class MonitorVcpu(Protocol):
    """The vCPU of an engine that can say what becomes of an exclusive monitor between two runs."""

    monitor_survives: bool


class EngineVm(Protocol):
    """The engine's side of one VM: memory slots in, vCPUs out."""

    name: str

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this engine can and cannot do."""

    def add_memslot(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory at `gpa`; the caller keeps it alive."""

    def create_vcpu(self, index: int, trace: Trace) -> EngineVcpu:
        """Make one vCPU in its reset state."""

    def check_interrupt(self) -> None:
        """Raise the KeyboardInterrupt that a run held back until its exit was recorded."""

    def retired(self) -> int:
        """Instructions retired by all vCPUs: the VM's clock."""

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: forget translations and translated code that depend on it."""

    def close(self) -> None:
        """Release what the engine holds."""


@runtime_checkable
class ParallelVm(Protocol):
    """The VM of an engine with the capability parallel_vcpus."""

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run, each on its own thread, until one exits; the others go on until they are touched, or `pause`."""

    def pause(self) -> None:
        """Bring all of them out of the guest."""


@runtime_checkable
class LoggingVm(Protocol):
    """The VM of an engine that knows which pages its guests wrote (capability dirty_log)."""

    def pages_written(self) -> list[int]:
        """The gpas of the pages that guests wrote since the last call; what the host wrote is not among them."""


@runtime_checkable
class ProtectingVm(Protocol):
    """The VM of an engine whose guests can be encrypted (capability protect)."""

    def protect(self, mode: PagingMode, cipher: Ownership, inverted: bool, level: int) -> None:
        """Before any vCPU: the guest sees memory through the key where an entry's encryption bit says so (inverted: where not).

        level 2: registers are encrypted too, what the guest cannot do alone is #VC and VMGEXIT; 3: pages have owners (`own_pages`).
        """

    def own_pages(self, gpa: int, assigned: Any, usable: Any) -> None:
        """From now on, for pages from gpa on, arrays of bool: it is a guest's, so no shared write; this guest may use it privately."""

    def memory_needed(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to look at guest memory, or to write a part of it."""

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the guest's key shows it, as far as the memslot goes."""

    def write_plain(self, gpa: int, data: bytes) -> None:
        """Write memory through the guest's key, as the guest itself would."""

    def swap(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table."""

    def written(self) -> list[tuple[int, Any, Any]]:
        """For each memslot its gpa, and arrays of bool, one a page: the guest wrote it last through its key; last without."""

    def views_state(self) -> list[tuple[bytes, bytes]]:
        """What a snapshot keeps beside the bytes of memory: which page of DRAM is where, how the guest wrote each last."""

    def set_views_state(self, state: list[tuple[bytes, bytes]]) -> None:
        """Put it back."""
