"""The whole state of a VM as one value: taken, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.errors import InvalidState
from labkit.machine.schedule import Schedule, ScheduleState
from labkit.machine.vm import MachineState
from labkit.session.events import Happened
from labkit.session.shifts import ShiftsState
from labkit.sev.guest import ProtectedState
from labkit.ucall.pool import PoolState

if TYPE_CHECKING:
    from labkit.session.vm import Vm

__all__ = ["VmState", "put_state", "take_state"]


@dataclass(frozen=True)
class VmState:
    """A snapshot of a VM: memory, CPUs, allocators, pool history, schedule and events."""

    step: int
    shape: str  # what a VM must be like to take it, in words
    machine: MachineState
    pool: PoolState | None  # what the host knows of the pool beyond guest memory
    schedule: ScheduleState
    events: tuple[Happened, ...]
    states: tuple[str, ...]  # of each vCPU: "running", "done", ...
    shifts: ShiftsState  # which vCPU ran when
    guest: ProtectedState | None = None  # of a protected VM: its key and how far its launch is

    def __repr__(self) -> str:
        size = sum(len(data) for _, data in self.machine.slots) >> 10
        return (
            f"<VmState step {self.step}, {len(self.states)} vCPUs, {size} KiB, "
            f"{len(self.events)} events>"
        )


def _shape(vm: Vm) -> str:
    """The mode of its page tables, which names the architecture too, its protection, its pool."""
    pool = "no" if vm.host_pool is None else "a"
    return f"{vm.machine.space.mode.name} and protect={vm.protect!r}, {pool} ucall pool"


def take_state(vm: Vm) -> VmState:
    """The VM as it is, bit for bit."""
    return VmState(
        step=vm.step,
        shape=_shape(vm),
        machine=vm.machine.state(),
        pool=None if vm.host_pool is None else vm.host_pool.state(),
        schedule=vm.schedule.save(),
        events=tuple(vm.log),
        states=tuple(vcpu.state for vcpu in vm.vcpus),
        shifts=vm.shifts.state(),
        guest=None if vm.guest is None else vm.guest.save(),
    )


def put_state(vm: Vm, state: VmState) -> None:
    """Make the VM what it was; raises InvalidState for the state of a VM of another shape.

    Then nothing is changed.
    """
    if _shape(vm) != state.shape:
        raise InvalidState(
            f"{vm.name} is a VM with {_shape(vm)}, and the snapshot is of one with {state.shape}"
        )
    vm.machine.set_state(state.machine)
    if vm.guest is not None and state.guest is not None:
        vm.guest.restore(state.guest)
        vm.machine.seal(vm.guest.why_sealed)
    if vm.host_pool is not None and state.pool is not None:
        vm.host_pool.set_state(state.pool)
    vm.schedule = Schedule.restored(state.schedule)
    vm.log.replace(state.events)
    vm.turn.came_at = state.step
    vm.shifts.set_state(state.shifts)
    for vcpu, was in zip(vm.vcpus, state.states, strict=True):
        vcpu.state = was
