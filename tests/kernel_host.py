"""The small words of a KVM selftest's host half, for tests that host the kernel's own binaries."""

from __future__ import annotations

from labkit.hosts.halves.memory import hole
from labkit.session.running import Came
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm
from labkit.ucall.calls import Ucall

__all__ = ["BUDGET", "MASK64", "hole", "run", "synced", "value_at"]

# Instructions: far beyond what any of these guests needs, so that a mistake does not hang.
BUDGET = 3_000_000
MASK64 = (1 << 64) - 1


def run(vcpu: Vcpu) -> Came:
    """The next ucall or exit; a guest assertion fails the test with the kernel's own words."""
    came = vcpu.run(BUDGET)
    assert not (isinstance(came, Ucall) and came.cmd == "ABORT"), repr(came)
    return came


def synced(vcpu: Vcpu, stage: int) -> Ucall:
    """The next ucall, which must be GUEST_SYNC(stage)."""
    uc = run(vcpu)
    assert isinstance(uc, Ucall) and (uc.cmd, uc.args[1]) == ("SYNC", stage), uc
    return uc


def value_at(vm: Vm, gva: int, size: int) -> int:
    """A little-endian number in guest memory."""
    return int.from_bytes(vm.read(gva, size), "little")
