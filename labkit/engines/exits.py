"""The exits that a run can end with, named after KVM's (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "BudgetExit",
    "DeadlineExit",
    "DebugExit",
    "DiagExit",
    "Exit",
    "HaltExit",
    "HypercallExit",
    "InternalErrorExit",
    "InterruptExit",
    "MemoryFaultExit",
    "MmioExit",
    "PioExit",
    "SbiExit",
    "ShutdownExit",
    "StopExit",
    "SystemEventExit",
    "VmgexitExit",
]


@dataclass(frozen=True)
class Exit:
    """Why a vCPU came back to the host.

    A ucall is an exit too: of a kind that the architecture chose (labkit.arch.model.UcallExit), and
    among those of its kind told by one number, which `number` is:

        x86-64   PioExit    the port
        arm64    MmioExit   the gpa of a store; a load is never a ucall
        riscv64  SbiExit    the function above the 64 bits of the extension
        s390x    DiagExit   the function code

    Every other exit has -1, which no ucall has. What the guest hands over, the hva of its struct
    ucall, is in `hva` where the exit itself carries it; on x86-64 it is in a register, and here 0.
    """

    end: ClassVar[str] = "exit"
    """The word of `labkit run` for a run that ended so."""

    @property
    def number(self) -> int:
        """What tells a ucall from other exits of its kind."""
        return -1

    @property
    def hva(self) -> int:
        """What a ucall hands over in the exit itself."""
        return 0

    def __str__(self) -> str:
        words = [type(self).__name__.removesuffix("Exit").lower()]
        for name, value in vars(self).items():
            words.append(f"{name}={value:#x}" if type(value) is int else f"{name}={value}")
        return " ".join(words)


@dataclass(frozen=True)
class PioExit(Exit):
    """IN or OUT (KVM_EXIT_IO).

    The instruction is complete; an IN has read 0 until `complete()` says otherwise.
    """

    port: int
    size: int  # bytes
    is_write: bool
    data: int
    end = "pio"

    @property
    def number(self) -> int:
        """The port."""
        return self.port


@dataclass(frozen=True)
class MmioExit(Exit):
    """An access to a GPA without memslot (KVM_EXIT_MMIO).

    A read ends at the next run, with what `complete()` gave.
    """

    gpa: int
    size: int  # bytes
    is_write: bool
    data: int
    end = "mmio"

    @property
    def number(self) -> int:
        """The gpa of a write: only those are ucalls."""
        return self.gpa if self.is_write else -1

    @property
    def hva(self) -> int:
        """What was written."""
        return self.data


@dataclass(frozen=True)
class HaltExit(Exit):
    """HLT at CPL0 (KVM_EXIT_HLT); the program counter is behind it."""

    end = "halted"


@dataclass(frozen=True)
class ShutdownExit(Exit):
    """A triple fault (KVM_EXIT_SHUTDOWN; SDM 3A 6.15, #DF)."""

    vectors: tuple[int, ...]  # which led there
    pc: int
    cr2: int  # the page-fault address
    why: str
    end = "shutdown"

    def __str__(self) -> str:
        facts = f"vectors {list(self.vectors)}, cr2 {self.cr2:#x}"
        return f"triple fault at pc {self.pc:#x}: {self.why} ({facts})"


@dataclass(frozen=True)
class SbiExit(Exit):
    """RISC-V ECALL from S-mode (KVM_EXIT_RISCV_SBI).

    a0 holds SBI_ERR_NOT_SUPPORTED until `complete()` says otherwise.
    """

    extension: int
    function: int
    args: tuple[int, ...]
    end = "sbi"

    @property
    def number(self) -> int:
        """The function above the extension's 64 bits."""
        return self.function << 64 | self.extension

    @property
    def hva(self) -> int:
        """The first argument."""
        return self.args[0]


@dataclass(frozen=True)
class DiagExit(Exit):
    """s390x DIAGNOSE (KVM_EXIT_S390_SIEIC with intercept code 4)."""

    code: int  # the function code
    data: int  # what the instruction's first register holds
    end = "diag"

    @property
    def number(self) -> int:
        """The function code."""
        return self.code

    @property
    def hva(self) -> int:
        """What the first register holds."""
        return self.data


@dataclass(frozen=True)
class HypercallExit(Exit):
    """VMCALL, VMMCALL, HVC or SMC.

    The result register holds -KVM_ENOSYS until `complete()` says otherwise.
    """

    nr: int
    args: tuple[int, ...]
    end = "hypercall"


@dataclass(frozen=True)
class VmgexitExit(Exit):
    """VMGEXIT of a guest whose registers are encrypted."""

    ghcb: int  # MSR 0xc0010130
    request: str = ""  # what was asked, from a host that answered
    answer: str = ""
    end = "vmgexit"

    def __str__(self) -> str:
        if not self.request:
            return f"vmgexit ghcb {self.ghcb:#x}"
        return f"vmgexit {self.request} (ghcb {self.ghcb:#x}): {self.answer}"


@dataclass(frozen=True)
class SystemEventExit(Exit):
    """The guest asked for the end of its VM (KVM_EXIT_SYSTEM_EVENT)."""

    type: int  # KVM_SYSTEM_EVENT_SEV_TERM is 6
    data: tuple[int, ...]
    why: str
    end = "terminated"

    def __str__(self) -> str:
        data = ", ".join(map(hex, self.data))
        return f"{self.why} (system event {self.type}, data {data})"


@dataclass(frozen=True)
class MemoryFaultExit(Exit):
    """An access that the nested tables refuse (KVM_EXIT_MEMORY_FAULT).

    The host changes what it wants and runs the instruction again.
    """

    gpa: int
    is_private: bool
    error_code: int  # of the nested page fault
    why: str
    end = "memory-fault"

    def __str__(self) -> str:
        where = f"gpa {self.gpa:#x} (error code {self.error_code:#x})"
        return f"nested page fault at {where}: {self.why}"


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
class StopExit(Exit):
    """Somebody asked for the end of this run (vm.stop()); the next one goes on from here."""

    end = "stopped"


@dataclass(frozen=True)
class DeadlineExit(Exit):
    """The guest ran for so long without leaving: it spins, or needs a longer `deadline`."""

    seconds: float
    pc: int
    end = "deadline"

    def __str__(self) -> str:
        return (
            f"no exit in {self.seconds:g} s, now at pc {self.pc:#x}; the next run goes on from here"
        )


@dataclass(frozen=True)
class InternalErrorExit(Exit):
    """The engine cannot go on faithfully (KVM_EXIT_INTERNAL_ERROR)."""

    why: str
    pc: int
    data: bytes = b""  # the bytes that it would not run
    disassembly: str = ""
    end = "internal-error"

    def __str__(self) -> str:
        shown = f": {self.disassembly} ({self.data.hex(' ')})" if self.data else ""
        return f"{self.why} at pc {self.pc:#x}{shown}"
