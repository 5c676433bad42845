"""A VM of /dev/kvm: memslots with a dirty log, and vCPUs."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from labkit.arch.x86_cpu import CpuModel
from labkit.engines.base import Capability, Exit, Trace
from labkit.engines.interrupt import shield
from labkit.engines.kvm.abi import CAPS, CONSTANTS, IOCTLS, call, cpuid2, enter, msrs, struct
from labkit.engines.kvm.lanes import Lanes
from labkit.engines.kvm.places import SAVED_MSRS
from labkit.engines.kvm.probe import probe
from labkit.engines.kvm.vcpu import KvmVcpu
from labkit.errors import InvalidState, NotAvailable

__all__ = ["KvmVm"]

DEVICE = "/dev/kvm"
DEADLINE = 20.0  # seconds; a run that lasts longer ends in a DeadlineExit and can go on
NEEDED = (
    "USER_MEMORY",
    "SYNC_REGS",
    "IMMEDIATE_EXIT",
    "SET_GUEST_DEBUG",
    "VCPU_EVENTS",
    "DEBUGREGS",
    "XSAVE",
    "XCRS",
)
_INDEXED = (4, 7, 0xB, 0xD)  # CPUID leaves with subleaves
_TSS_ADDR = 0xFFFB_D000  # three pages that VMX without unrestricted guests keeps for itself; above all memory of ours
_FOUND: dict[str, str] = {}  # device -> what it lacks


class KvmVm:
    """The engine's side of one VM."""

    name = "kvm"

    def __init__(
        self, arch: str, cpu: CpuModel, capabilities: tuple[Capability, ...] | None = None
    ) -> None:
        if arch != os.uname().machine or arch != "x86_64":
            raise NotAvailable(
                f"the kvm engine runs guests of its own machine, which is {os.uname().machine}; labkit knows x86_64 there, "
                f"not {arch}",
                arch=arch,
            )
        self.arch, self.cpu, self.shield, self.deadline = arch, cpu, shield(), DEADLINE
        self.slots: list[tuple[int, int, int]] = []
        self._logs: list[ctypes.Array[ctypes.c_uint64]] = []  # a bit a page for each slot
        self.vcpus: list[KvmVcpu] = []
        self._known = capabilities
        self.lanes, self._caps = Lanes(self), dict[str, int]()
        self.fd, self._saved = -1, dict[int, int]()
        device = _open()
        try:
            self.run_size = enter(device, IOCTLS["KVM_GET_VCPU_MMAP_SIZE"], 0)
            self.fd = enter(device, IOCTLS["KVM_CREATE_VM"], 0)
        except OSError as err:
            raise NotAvailable(f"{DEVICE} makes no VM: {err.strerror}") from err
        finally:
            os.close(device)
        call(self.fd, "KVM_SET_TSS_ADDR", _TSS_ADDR)
        reasons = CONSTANTS["KVM_MSR_EXIT_REASON_UNKNOWN"] | CONSTANTS["KVM_MSR_EXIT_REASON_INVAL"]
        self._enable("KVM_CAP_X86_USER_SPACE_MSR", reasons)

    def _enable(self, cap: str, value: int) -> None:
        """Turn a capability on where there is one."""
        if self.has(cap):
            wish = struct("kvm_enable_cap", cap=CAPS[cap])
            wish.args[0] = value
            call(self.fd, "KVM_ENABLE_CAP", wish)

    def has(self, cap: str) -> int:
        """What KVM_CHECK_EXTENSION says: 0 for a capability that it lacks."""
        if cap not in self._caps:
            self._caps[cap] = enter(self.fd, IOCTLS["KVM_CHECK_EXTENSION"], CAPS[cap])
        return self._caps[cap]

    def cpuid(self, index: int) -> ctypes.Structure:
        """The VM's CPUID table as KVM wants it, for one vCPU."""
        entries = []
        for (leaf, sub), (a, b, c, d) in sorted(self.cpu.cpuid.items()):
            if leaf == 1:
                b = b & 0x00FFFFFF | index << 24
            entries.append(
                (
                    leaf,
                    sub,
                    CONSTANTS["KVM_CPUID_FLAG_SIGNIFCANT_INDEX"] if leaf in _INDEXED else 0,
                    a,
                    b,
                    c,
                    d,
                )
            )
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
        self._logs.append((ctypes.c_uint64 * -(-size // (64 * 4096)))())
        self.slots.append((gpa, hva, size))

    def create_vcpu(self, index: int, trace: Trace) -> KvmVcpu:
        """Make one vCPU in its reset state."""
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
            call(
                self.fd,
                "KVM_GET_DIRTY_LOG",
                struct("kvm_dirty_log", slot=slot, dirty_bitmap=ctypes.addressof(log)),
            )
            for i, word in enumerate(log):
                while word:
                    low = word & -word
                    pages.append(gpa + (64 * i + low.bit_length() - 1 << 12))
                    word ^= low
        return pages

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this machine's KVM can do, probed once."""
        return probe() if self._known is None else self._known

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Let these vCPUs run, each on its own thread, until one exits; the others go on until they are touched, or `pause`."""
        return self.lanes.run(indices)

    def pause(self) -> None:
        """Bring all vCPUs that run in parallel out of the guest."""
        if self.lanes.lanes:
            self.lanes.end()

    @property
    def saved_msrs(self) -> dict[int, int]:
        """The MSRs of a snapshot: those of the names, and others that guests change, as far as this KVM has them."""
        if not self._saved:
            fd = self.vcpus[0].fd
            self._saved = {
                index: 0 for index in SAVED_MSRS if call(fd, "KVM_GET_MSRS", msrs({index: 0})) == 1
            }
        return self._saved

    def hva(self, gpa: int) -> int:
        """The host address of a gpa, 0 for a hole."""
        return next(
            (
                hva + gpa - start
                for start, hva, length in self.slots
                if start <= gpa < start + length
            ),
            0,
        )

    def check_interrupt(self) -> None:
        """Raise the KeyboardInterrupt that a run held back until its exit was recorded."""
        if self.shield.interrupted:
            self.shield.check()

    def retired(self) -> int:
        """The VM's clock: counted instructions, and in free runs those that left the guest."""
        return sum(vcpu.insns for vcpu in self.vcpus)

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: nothing to forget, KVM's guests see the very pages."""

    def close(self) -> None:
        """Release every vCPU and the VM; a second call does nothing. Raises InvalidState while another thread runs it."""
        if any(vcpu.entered and vcpu.home[0] != threading.get_ident() for vcpu in self.vcpus):
            raise InvalidState(
                "this VM runs on another thread, which alone may close it: give it a shorter deadline, or wait for it"
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


def _open() -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotAvailable(
            f"there is no {DEVICE}: load kvm_intel, kvm_amd or kvm_pvm, or give the container the device "
            f"(--device {DEVICE}); the default engine needs none of this",
            backend="kvm",
        ) from None
    except OSError as err:
        advice = (
            ": add yourself to the group kvm (usermod -aG kvm USER), log in again"
            * isinstance(err, PermissionError)
        )
        raise NotAvailable(f"{DEVICE}: {err.strerror}{advice}", backend="kvm") from err
    if device_lacks := _lacking(device):
        os.close(device)
        raise NotAvailable(
            f"{DEVICE} {device_lacks}: labkit needs KVM's API version {CONSTANTS['KVM_API_VERSION']} with "
            f"{', '.join(NEEDED)}, which Linux has had since 4.19",
            backend="kvm",
        )
    return device


def _lacking(device: int) -> str:
    """What makes this KVM unusable, "" when nothing does; asked once in a process."""
    if _FOUND.get(DEVICE) is None:
        try:
            version = enter(device, IOCTLS["KVM_GET_API_VERSION"], 0)
            missing = [
                name
                for name in NEEDED
                if not enter(device, IOCTLS["KVM_CHECK_EXTENSION"], CAPS[f"KVM_CAP_{name}"])
            ]
        except OSError as err:
            return f"is no KVM ({err.strerror})"
        if version != CONSTANTS["KVM_API_VERSION"]:
            return f"has API version {version}"
        _FOUND[DEVICE] = f"lacks {', '.join(missing)}" if missing else ""
    return _FOUND[DEVICE]
