"""The whole state of a VM as one value: taken, put back, and carried over to a twin."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from labkit.errors import InvalidState
from labkit.machine.schedule import Schedule
from labkit.machine.vm import MachineState
from labkit.session.events import Event
from labkit.session.vcpu import Vcpu
from labkit.ucall.pool import Ucall

__all__ = ["VmState", "fork", "put_state", "take_state"]


@dataclass(frozen=True)
class VmState:
    """A snapshot of a VM: memory, CPUs, allocators, pool history, schedule and events."""

    step: int
    shape: str  # its page tables' mode, which names the architecture too, its protection, and whether it has a pool
    machine: MachineState
    pool: dict[str, object] | None
    schedule: tuple[Any, ...]
    events: tuple[Event | Ucall, ...]
    states: tuple[str, ...]
    guest: dict[str, Any] | None = None  # of a protected VM: its key and how far its launch is

    def __repr__(self) -> str:
        size = sum(len(data) for _, data in self.machine.slots) >> 10
        return f"<VmState step {self.step}, {len(self.states)} vCPUs, {size} KiB, {len(self.events)} events>"


def _shape(vm: Any) -> str:
    return f"{vm.machine.space.mode.name} and protect={vm.protect!r}, {'a' if vm._pool else 'no'} ucall pool"


def take_state(vm: Any) -> VmState:
    """The VM as it is, bit for bit."""
    return VmState(
        vm.step,
        _shape(vm),
        vm.machine.state(),
        vm._pool.state() if vm._pool else None,
        vm.schedule.save(),
        tuple(vm._events),
        tuple(vcpu.state for vcpu in vm.vcpus),
        vm.guest.save() if vm.guest else None,
    )


def put_state(vm: Any, state: VmState) -> None:
    """Make the VM what it was; raises InvalidState for the state of a VM of another shape, and changes nothing then."""
    if _shape(vm) != state.shape:
        raise InvalidState(
            f"{vm.name} is a VM with {_shape(vm)}, and the snapshot is of one with {state.shape}"
        )
    vm.machine.set_state(state.machine)
    if vm.guest is not None:
        vm.guest.restore(state.guest)
        vm.machine.seal(vm.guest.why_sealed)
    if vm._pool is not None and state.pool is not None:
        vm._pool.set_state(state.pool)
    vm.schedule = Schedule.restored(state.schedule)
    vm._events = list(state.events)
    for vcpu, was in zip(vm.vcpus, state.states, strict=True):
        vcpu.state = was


def fork(vm: Any, twin: Any) -> None:
    """Make an empty VM of the same shape one that goes on from where the first is."""
    state = take_state(vm)
    twin.door, twin._ucalls = (
        copy(vm.door),
        vm._ucalls.twin(twin.machine.space) if vm._ucalls is not None else None,
    )
    for vcpu in vm.vcpus:
        twin.machine.adopt_vcpu(partial(twin._trace, vcpu.index))
        twin.vcpus.append(Vcpu(twin, vcpu.index))
    twin.restore(state)
