"""A VM of /dev/kvm: memslots with a dirty log, and vCPUs."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from labkit.arch.x86_cpu import CpuModel
from labkit.engines.base import Capability, Trace
from labkit.engines.exits import Exit
from labkit.engines.interrupt import shield
from labkit.engines.kvm.abi import CAPS, CONSTANTS, IOCTLS, call, cpuid2, enter, msrs, struct
from labkit.engines.kvm.device import open_device
from labkit.engines.kvm.lanes import Lanes
from labkit.engines.kvm.places import SAVED_MSRS
from labkit.engines.kvm.probe import probe
from labkit.engines.kvm.vcpu import KvmVcpu
from labkit.errors import InvalidState, NotAvailable

__all__ = ["KvmVm"]

DEVICE = "/dev/kvm"
DEADLINE = 20.0  # seconds; a run that lasts longer ends in a DeadlineExit and can go on
INDEXED_LEAVES = (4, 7, 0xB, 0xD)  # of CPUID: those with subleaves
# Three pages that VMX without unrestricted guests keeps for itself; above all memory of ours
TSS_GPA = 0xFFFB_D000
PAGE = 4096


class KvmVm:
    """The engine's side of one VM."""

    name = "kvm"

    def __init__(
        self, arch: str, cpu: CpuModel, capabilities: tuple[Capability, ...] | None = None
    ) -> None:
        host = os.uname().machine
        if arch != host or arch != "x86_64":
            raise NotAvailable(
                f"the kvm engine runs guests of its own machine, which is {host}; labkit knows "
                f"x86_64 there, not {arch}",
                arch=arch,
            )
        self.arch = arch
        self.cpu = cpu
        self.shield = shield()
        self.deadline = DEADLINE
        self.slots: list[tuple[int, int, int]] = []  # gpa, hva, bytes
        self.vcpus: list[KvmVcpu] = []
        self.lanes = Lanes(self)
        self.between: Callable[[], bool] = lambda: False
        self.asked = False  # somebody wants `between` to be called
        self.fd = -1
        self._logs: list[ctypes.Array[ctypes.c_uint64]] = []  # a bit a page for each slot
        self._known = capabilities
        self._caps: dict[str, int] = {}
        self._saved_msrs: dict[int, int] = {}
        self._create()

    def _create(self) -> None:
        device = open_device(DEVICE)
        try:
            self.run_size = enter(device, IOCTLS["KVM_GET_VCPU_MMAP_SIZE"], 0)
            self.fd = enter(device, IOCTLS["KVM_CREATE_VM"], 0)
        except OSError as err:
            raise NotAvailable(f"{DEVICE} makes no VM: {err.strerror}") from err
        finally:
            os.close(device)
        call(self.fd, "KVM_SET_TSS_ADDR", TSS_GPA)
        reasons = CONSTANTS["KVM_MSR_EXIT_REASON_UNKNOWN"] | CONSTANTS["KVM_MSR_EXIT_REASON_INVAL"]
        self._enable("KVM_CAP_X86_USER_SPACE_MSR", reasons)

    def _enable(self, cap: str, value: int) -> None:
        """Turn a capability on where there is one."""
        if not self.has(cap):
            return
        wish = struct("kvm_enable_cap", cap=CAPS[cap])
        wish.args[0] = value
        call(self.fd, "KVM_ENABLE_CAP", wish)

    def has(self, cap: str) -> int:
        """What KVM_CHECK_EXTENSION says: 0 for a capability that it lacks."""
        if cap not in self._caps:
            self._caps[cap] = enter(self.fd, IOCTLS["KVM_CHECK_EXTENSION"], CAPS[cap])
        return self._caps[cap]

    def cpuid(self, index: int) -> ctypes.Structure:
        """The VM's CPUID table as KVM wants it (struct kvm_cpuid2), for one vCPU."""
        has_subleaves = CONSTANTS["KVM_CPUID_FLAG_SIGNIFCANT_INDEX"]
        entries = []
        for (leaf, subleaf), (eax, ebx, ecx, edx) in sorted(self.cpu.cpuid.items()):
            if leaf == 1:
                ebx = ebx & 0x00FFFFFF | index << 24  # the initial APIC ID
            flags = has_subleaves if leaf in INDEXED_LEAVES else 0
            entries.append((leaf, subleaf, flags, eax, ebx, ecx, edx))
        return cpuid2(entries)  # type: ignore[no-any-return]

    def add_memslot(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory at `gpa`; the caller keeps it alive."""
        region = struct(
            "kvm_userspace_memory_region",
            slot=len(self.slots),
            flags=CONSTANTS["KVM_MEM_LOG_DIRTY_PAGES"],
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
        )
        call(self.fd, "KVM_SET_USER_MEMORY_REGION", region)
        nr_words = -(-size // (64 * PAGE))
        self._logs.append((ctypes.c_uint64 * nr_words)())
        self.slots.append((gpa, hva, size))

    def create_vcpu(self, index: int, trace: Trace) -> KvmVcpu:
        """Make one vCPU in its reset state; KVM tells nothing between two exits, so no `trace`."""
        if self.fd < 0:
            raise InvalidState("this VM is closed")
        try:
            self.vcpus.append(KvmVcpu(self, index))
        except OSError as err:
            raise NotAvailable(f"{DEVICE} makes no vCPU {index}: {err.strerror}") from err
        return self.vcpus[-1]

    def pages_written(self) -> list[int]:
        """The gpas of the pages that guests wrote since the last call, from KVM's dirty log."""
        pages: list[int] = []
        for slot, (gpa, _, _) in enumerate(self.slots):
            log = self._logs[slot]
            wish = struct("kvm_dirty_log", slot=slot, dirty_bitmap=ctypes.addressof(log))
            call(self.fd, "KVM_GET_DIRTY_LOG", wish)
            pages += (gpa + PAGE * page for page in _bits(log))
        return pages

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this machine's KVM can do, probed once."""
        return probe() if self._known is None else self._known

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run, each on its own thread, until one exits.

        The others go on until they are touched, or `pause`.
        """
        return self.lanes.run(indices)

    def pause(self) -> None:
        """Bring all vCPUs that run in parallel out of the guest."""
        if self.lanes.lanes:
            self.lanes.end()

    @property
    def saved_msrs(self) -> dict[int, int]:
        """The MSRs of a snapshot as far as this KVM has them, each with the value 0."""
        if not self._saved_msrs:
            fd = self.vcpus[0].fd
            for index in SAVED_MSRS:
                if call(fd, "KVM_GET_MSRS", msrs({index: 0})) == 1:
                    self._saved_msrs[index] = 0
        return self._saved_msrs

    def hva(self, gpa: int) -> int:
        """The host address of a gpa, 0 for a hole."""
        for start, hva, size in self.slots:
            if start <= gpa < start + size:
                return hva + gpa - start
        return 0

    def check_interrupt(self) -> None:
        """Raise the KeyboardInterrupt that a run held back until its exit was recorded."""
        if self.shield.interrupted:
            self.shield.check()

    def ask(self) -> None:
        """Have `between` called soon by the run that is on, if one is; from any thread."""
        self.asked = True
        for vcpu in self.vcpus:
            if vcpu.is_running:
                vcpu.kick()

    def retired(self) -> int:
        """The VM's clock: counted instructions, and in free runs those that left the guest."""
        return sum(vcpu.insns for vcpu in self.vcpus)

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: nothing to forget, KVM's guests see the very pages."""

    def close(self) -> None:
        """Release every vCPU and the VM; a second call does nothing.

        Raises InvalidState while another thread runs it.
        """
        here = threading.get_ident()
        if any(vcpu.entered and vcpu.home[0] != here for vcpu in self.vcpus):
            raise InvalidState(
                "this VM runs on another thread, which alone may close it: give it a shorter "
                "deadline, or wait for it"
            )
        with self.shield.held():
            self.pause()
            for vcpu in self.vcpus:
                vcpu.close()
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # nobody closed it: descriptors are scarcer than memory
            try:
                self.close()
            except KeyboardInterrupt:
                self.shield.later()


def _bits(words: Iterable[int]) -> Iterator[int]:
    """The numbers of the bits that are set in words of 64, from the lowest on."""
    for i, word in enumerate(words):
        while word:
            lowest = word & -word
            yield 64 * i + lowest.bit_length() - 1
            word ^= lowest
