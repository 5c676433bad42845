"""The whole VM as one snapshot: what the dashboard draws."""

from __future__ import annotations

from dataclasses import replace

from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap
from labkit.look.memory import look_at_memory
from labkit.look.secrets import look_at_encryption, look_at_launch, look_through_both
from labkit.look.snapshots import (
    EventMark,
    Selection,
    VcpuBrief,
    VcpuSnapshot,
    VmSnapshot,
)
from labkit.look.vcpu import look_at_vcpu, status_of
from labkit.machine.memory import PAGE
from labkit.machine.vm import STACK_PAGES
from labkit.session.events import Happened
from labkit.session.vm import Vm
from labkit.ucall.calls import Ucall
from labkit.ucall.snapshot import PoolSnapshot

__all__ = ["look_at_vm"]

LETTERS = {"SYNC": "S", "PRINTF": "P", "DONE": "D", "ABORT": "A", "UNHANDLED": "A"}


def look_at_vm(vm: Vm, front: int = 0, selection: Selection | None = None) -> VmSnapshot:
    """Everything the dashboard draws; raises InvalidState for a vCPU in front that is not there.

    Only the vCPU in front is looked at in full, so that a look costs the same with 1 and with 16.
    What only a protected VM has comes with it: the encryption map, the launch, and one page
    through both eyes.
    """
    if not 0 <= front < max(len(vm.vcpus), 1):
        raise InvalidState(f"there is no vCPU {front}")
    in_front = look_at_vcpu(vm, vm.vcpus[front]) if vm.vcpus else None
    vcpus = tuple(VcpuBrief(vcpu.index, vcpu.step_count, vcpu.state) for vcpu in vm.vcpus)
    states = sorted({vcpu.state for vcpu in vcpus})

    seen = VmSnapshot(
        name=vm.name,
        arch=vm.arch.name,
        engine=vm.backend,
        protection="no encryption",
        state=", ".join(states) or "no vCPU",
        schedule=vm.schedule.name.replace("_", " "),
        step=vm.step,
        vcpu=front,
        vcpus=vcpus,
        pool=_pool(vm, None if in_front is None else in_front.next_slot),
        page_table=vm.page_table(vm.vcpus[front] if vm.vcpus else None),
        memory=look_at_memory(vm),
        selection=selection,
        events=tuple(_mark(happened) for happened in vm.log),
        status=_status(vm, in_front),
        front=in_front,
    )
    if vm.guest is None:
        return seen
    return _with_secrets(vm, seen)


def _status(vm: Vm, in_front: VcpuSnapshot | None) -> str:
    """What the vCPU in front is about to do; of a VM that runs for long, how far it is."""
    if in_front is None:
        return ""
    running = vm.running
    if running is None or not running.is_long:
        return status_of(in_front)
    where = "" if in_front.sealed else f", now at {in_front.where}"
    return f"Running: {running}, at step {vm.step}{where}."


def _pool(vm: Vm, next_slot: int | None) -> PoolSnapshot | None:
    """The pool, with the slot that the vCPU in front is about to take."""
    if vm.host_pool is None:
        return None
    return replace(vm.pool, next_slot=next_slot)


def _mark(happened: Happened) -> EventMark:
    letter = "X"
    if isinstance(happened, Ucall):
        letter = LETTERS.get(happened.cmd, "N")
    return EventMark(happened.step, happened.vcpu, letter, happened.what)


def _with_secrets(vm: Vm, seen: VmSnapshot) -> VmSnapshot:
    """What a protected VM has beside."""
    found = look_at_encryption(vm, seen.page_table)
    launch = look_at_launch(vm)
    page = _page_to_show(vm, seen, found)
    return replace(
        seen,
        protection=", ".join((found.protection, found.facts[-1], launch.state.name)),
        encryption=found,
        launch=launch,
        eyes=look_through_both(vm, page, seen.page_table),
    )


def _page_to_show(vm: Vm, seen: VmSnapshot, found: EncryptionMap) -> int:
    """The gpa of the selected page; without one that of a page to which something is the matter.

    Such is a page that disagrees, else the top of the stack of the vCPU in front, else the first.
    """
    places = []
    if seen.selection is not None:
        places.append(seen.selection.gpa)
    if found.disagreements:
        places.append(found.disagreements[0].gpa)
    if seen.vcpu < len(vm.machine.stacks):
        top = vm.machine.stacks[seen.vcpu] + STACK_PAGES * PAGE
        places.append(seen.page_table.walk(top - 1).gpa)
    places.append(vm.memory.slots[0].gpa)

    for gpa in places:
        if gpa is not None and vm.memory.slot(gpa) is not None:
            return gpa
    return 0
