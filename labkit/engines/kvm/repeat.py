"""One iteration of a REP instruction at a time (SDM vol. 2B, REP), where KVM does many at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from labkit.engines.kvm.abi import call, struct
from labkit.engines.kvm.kinds import Kind
from labkit.engines.kvm.places import GPR

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["events_of", "one_iteration"]

RIP, RCX, FLAGS = GPR["rip"], GPR["rcx"], GPR["rflags"]
ZF, RF = 1 << 6, 1 << 16
REPE = 0xF3


@contextmanager
def one_iteration(vcpu: KvmVcpu, kind: Kind) -> Iterator[None]:
    """Around what runs an iteration of the REP instruction at which the guest stands.

    The instruction is told that it is the last; behind it the guest stands where one leads.
    """
    gprs = vcpu.gprs
    start = gprs[RIP]
    left = gprs[RCX] & kind.mask
    gprs[RCX] = 1
    vcpu.page.registers_changed()

    yield
    if gprs[RCX] & kind.mask:
        _nothing_done(vcpu, left)
    else:
        _one_done(vcpu, kind, start, left)


def _one_done(vcpu: KvmVcpu, kind: Kind, start: int, left: int) -> None:
    """The iteration is over, `left` counts it too."""
    gprs = vcpu.gprs
    equal = bool(gprs[FLAGS] & ZF)
    differs_from_wanted = kind.compares and equal != (kind.rep == REPE)
    over = left == 1 or differs_from_wanted

    gprs[RCX] = left - 1
    if over:
        gprs[RIP] = start + kind.length
        gprs[FLAGS] &= ~RF
    else:
        gprs[RIP] = start
        gprs[FLAGS] |= RF  # SDM vol. 3B 17.3.1.1
    vcpu.waiting.inside_rep = not over
    vcpu.page.registers_changed()


def _nothing_done(vcpu: KvmVcpu, left: int) -> None:
    """A fault, or a read from a hole; KVM_SET_REGS drops a fault that is not delivered yet."""
    events = events_of(vcpu)
    vcpu.gprs[RCX] = left
    call(vcpu.fd, "KVM_SET_REGS", vcpu.page.fields.s.regs)
    call(vcpu.fd, "KVM_SET_VCPU_EVENTS", events)


def events_of(vcpu: KvmVcpu) -> Any:
    """What KVM has still to deliver to the guest: struct kvm_vcpu_events."""
    events = struct("kvm_vcpu_events")
    call(vcpu.fd, "KVM_GET_VCPU_EVENTS", events)
    return events
