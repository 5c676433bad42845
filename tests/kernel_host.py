"""The small words of a KVM selftest's host half, for tests that host the kernel's own binaries."""

from __future__ import annotations

from labkit.ucall.pool import Ucall

__all__ = ["BUDGET", "MASK64", "clear_cpuid", "hole", "run", "synced", "value_at"]

BUDGET = 3_000_000  # instructions: far beyond what any of these guests needs, so that a mistake does not hang
MASK64 = (1 << 64) - 1


def run(vcpu):
    """The next ucall or exit; a guest assertion fails the test with the kernel's own words."""
    came = vcpu.run(BUDGET)
    assert not (isinstance(came, Ucall) and came.cmd == "ABORT"), repr(came)
    return came


def synced(vcpu, stage):
    """The next ucall, which must be GUEST_SYNC(stage)."""
    uc = run(vcpu)
    assert isinstance(uc, Ucall) and (uc.cmd, uc.args[1]) == ("SYNC", stage), uc
    return uc


def hole(vm, gpa, gva=None):
    """Map a guest-physical page where no memslot is, identically unless told otherwise: accesses become MMIO exits."""
    vm.machine.space.map(gpa if gva is None else gva, gpa)


def value_at(vm, gva, size):
    """A little-endian number in guest memory."""
    return int.from_bytes(vm.read(gva, size), "little")


def clear_cpuid(vm, leaf, register, bit):
    """Take a feature out of the VM's CPUID (vcpu_clear_cpuid_feature); registers are 0 to 3 for EAX to EDX."""
    regs = list(vm.cpu.cpuid[leaf, 0])
    regs[register] &= ~(1 << bit)
    vm.cpu.cpuid[leaf, 0] = tuple(regs)
