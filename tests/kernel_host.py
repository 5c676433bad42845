"""The small words of a KVM selftest's host half, for tests that host the kernel's own binaries."""

from __future__ import annotations

from labkit.hosts.hosting import clear_cpuid, hole, value_at
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
