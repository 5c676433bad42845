"""A VM of the default engine.

Its memslots are shared without a copy, its vCPUs run one after the other on the caller's thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from labkit.arch.x86_cpu import CpuModel
from labkit.engines.base import Capability, Ownership, Trace
from labkit.engines.interrupt import shield
from labkit.engines.unicorn.isa.arm64 import Arm64
from labkit.engines.unicorn.isa.riscv import Riscv64
from labkit.engines.unicorn.isa.s390 import S390x
from labkit.engines.unicorn.isa.x86 import X86
from labkit.engines.unicorn.monitor import Monitors
from labkit.engines.unicorn.vcpu import UnicornVcpu
from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.arch.desc import PagingMode
    from labkit.engines.unicorn.isa.quirks import QuirksOf
    from labkit.engines.unicorn.mmu import Mmu

__all__ = ["CAPABILITIES", "UnicornVm"]

_QUIRKS: dict[str, QuirksOf] = {"x86_64": X86, "arm64": Arm64, "riscv64": Riscv64, "s390x": S390x}

CAPABILITIES = (
    Capability("step", True, "one instruction, one REP iteration, one exception delivery"),
    Capability("snapshot", True, "bit-exact, memory and CPU"),
    Capability("deterministic", True, "one thread, a virtual clock, seeded random numbers"),
    Capability("exceptions", True, "each one that a guest meets is an event"),
    Capability("triple_fault_vectors", True, "a shutdown says which exceptions led there"),
    Capability("hypercalls", True, "VMCALL and VMMCALL are exits"),
    Capability("cpuid", True, "a guest sees the VM's own table"),
    Capability("msr_table", True, "a guest has the MSRs of the VM's own table and no others"),
    Capability("breakpoints", True, "any number, exact"),
    Capability("tsc", True, "a guest's TSC can be set and moved"),
    Capability("huge_pages", True, "leaves of every size that a page-table format has"),
    Capability(
        "parallel_vcpus",
        False,
        "locked instructions are not atomic between two Unicorn engines on two threads",
    ),
    Capability("native_speed", False, "an emulator"),
    Capability(
        "protect",
        True,
        "sev, sev-es, snp and the paging of tdx: memory behind a key, registers in a VMSA, an RMP",
    ),
    Capability("avx", False, "Unicorn executes VEX instructions wrongly; they are refused"),
)


class UnicornVm:
    """The engine's side of one VM."""

    name = "unicorn"

    def __init__(self, arch: str, cpu: CpuModel) -> None:
        if arch not in _QUIRKS:
            raise NotAvailable(
                f"the unicorn engine has no {arch} yet, only {', '.join(_QUIRKS)}", arch=arch
            )
        self.arch, self.cpu, self.shield = arch, cpu, shield()
        self.quirks = _QUIRKS[arch]
        self.capabilities = CAPABILITIES + self.quirks.capabilities
        self.slots: list[tuple[int, int, int]] = []
        self._end = 0  # of the last one
        self.vcpus: list[UnicornVcpu] = []
        self.closed = False
        self.between: Callable[[], bool] = lambda: False
        self.asked = False  # somebody wants `between` to be called
        self.runner: UnicornVcpu | None = None
        self.mmu: Mmu | None = None
        self.level = 0  # of protection: 1 memory, 2 registers, 3 ownership of pages
        self.monitors = Monitors()

    def protect(self, mode: PagingMode, cipher: Ownership, inverted: bool, level: int) -> None:
        """Let the guest see memory through the key where an entry's encryption bit says so.

        Inverted: where it does not say so.
        """
        from labkit.engines.unicorn.mmu import Mmu

        if self.arch != "x86_64":
            raise NotAvailable(f"encrypted guests are x86-64's, not {self.arch}'s", arch=self.arch)
        if self.vcpus or self.mmu is not None:
            raise InvalidState("a VM is protected once, before it has vCPUs")
        self.mmu, self.level = Mmu(mode, cipher, inverted), level
        for slot in self.slots:
            self.mmu.add(*slot)

    def ask(self) -> None:
        """Have `between` called soon by the run that is on, if one is; from any thread."""
        self.asked = True
        for vcpu in self.made:
            vcpu.stop()

    def add_memslot(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory at `gpa`; the caller keeps it alive."""
        self.slots.append((gpa, hva, size))
        self._end = max(self._end, gpa + size)
        if self.mmu is not None:
            self.mmu.add(gpa, hva, size)
        for vcpu in self.made:
            vcpu.map(gpa, hva, size)

    def create_vcpu(self, index: int, trace: Trace) -> UnicornVcpu:
        """Make one vCPU in its reset state."""
        self.check_open()
        vcpu = UnicornVcpu(self, index, trace)
        self.vcpus.append(vcpu)
        return vcpu

    def check_open(self) -> None:
        """Raise InvalidState for a VM that is closed."""
        if self.closed:
            raise InvalidState("this VM is closed")

    @property
    def made(self) -> list[UnicornVcpu]:
        """The vCPUs that have an engine: what others miss, they find when theirs is made."""
        return [vcpu for vcpu in self.vcpus if vcpu.is_made]

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: translations may be stale, and code if it lay there."""
        if self.mmu is not None:
            self.mmu.host_wrote(gpa, size)
        made = self.made
        if made and made[0].quirks.monitor_offset():
            self.monitors.host_wrote(self.runner, gpa, size)
        for vcpu in made:
            vcpu.memory_written(gpa, size)

    def memory_needed(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to look at guest memory, or to write a part of it."""
        if self.mmu is not None and self.mmu.publish(gpa, size):
            self.forget_translations()

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the guest's key shows it, as far as the memslot goes."""
        assert self.mmu is not None, "protect comes first"
        return self.mmu.plain(gpa, size)

    def write_plain(self, gpa: int, data: bytes) -> None:
        """Write memory through the guest's key, as the guest itself would."""
        assert self.mmu is not None, "protect comes first"
        self.mmu.write_plain(gpa, data)
        self.forget_translations(code=True)

    def swap(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table."""
        assert self.mmu is not None, "protect comes first"
        self.mmu.swap(gpa, other)
        self.forget_translations(code=True)

    def own_pages(self, gpa: int, assigned: Any, usable: Any) -> None:
        """Say who owns pages from gpa on.

        Arrays of bool, one a page: it is a guest's, and this guest may use it privately.
        """
        assert self.mmu is not None, "protect comes first"
        self.mmu.own(gpa, assigned, usable)
        self.forget_translations()

    def written(self) -> list[tuple[int, Any, Any]]:
        """For each memslot its gpa, and arrays of bool, one a page.

        They say: the guest wrote it last through its key; last without.
        """
        assert self.mmu is not None, "protect comes first"
        return self.mmu.written()

    def views_state(self) -> list[tuple[bytes, bytes]]:
        """What a snapshot keeps beside the bytes of memory.

        Which page of DRAM is where, how the guest wrote each last.
        """
        return self.mmu.state() if self.mmu is not None else []

    def set_views_state(self, state: list[tuple[bytes, bytes]]) -> None:
        """Put it back."""
        if self.mmu is not None:
            self.mmu.set_state(state)
            self.forget_translations(code=True)

    def forget_translations(self, code: bool = False) -> None:
        """No vCPU may go on with what it knows of page tables, nor (code) of instructions."""
        for vcpu in self.made:
            vcpu.forget_translations(code)

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory by gpa as it is executed, as far as memslots go."""
        if self.mmu is not None:
            return self.mmu.plain(gpa, size)
        for start, hva, length in self.slots:
            if start <= gpa < start + length:
                return ctypes.string_at(hva + gpa - start, min(size, start + length - gpa))
        return b""

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory by gpa, as the CPU itself does at an interruption.

        What no memslot holds is lost.
        """
        for start, hva, length in self.slots:
            if start <= gpa and gpa + len(data) <= start + length:
                ctypes.memmove(hva + gpa - start, data, len(data))

    def overlaps(self, gpa: int, size: int) -> bool:
        """Whether a range touches a memslot."""
        return gpa < self._end and any(
            gpa < start + length and start < gpa + size for start, _, length in self.slots
        )

    def check_interrupt(self) -> None:
        """Raise the KeyboardInterrupt that a run held back until its exit was recorded."""
        if self.shield.interrupted:
            self.shield.check()

    def retired(self) -> int:
        """Instructions retired by all vCPUs: the VM's clock."""
        if len(self.vcpus) == 1:
            return self.vcpus[0].insns
        return sum(vcpu.insns for vcpu in self.vcpus)

    def close(self) -> None:
        """Release every vCPU."""
        self.closed = True
        for vcpu in self.vcpus:
            vcpu.close()
