"""The whole VM as one snapshot: what the dashboard draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap
from labkit.look.holds import look_at_holds
from labkit.look.memory import look_at_memory
from labkit.look.said import look_at_last, mark
from labkit.look.secrets import look_at_encryption, look_at_launch, look_through_both
from labkit.look.snapshots import (
    Marks,
    Said,
    Selection,
    VcpuBrief,
    VcpuSnapshot,
    VmSnapshot,
)
from labkit.look.vcpu import look_at_vcpu, status_of
from labkit.machine.memory import PAGE
from labkit.machine.vm import STACK_PAGES
from labkit.session.vm import Vm
from labkit.ucall.snapshot import PoolSnapshot

__all__ = ["Looking", "look_at_vm"]


@dataclass(frozen=True)
class Looking:
    """What a person wants in front."""

    vcpu: int = 0
    selection: Selection | None = None
    frame: int = 0  # of the vCPU: the one whose source is shown
    log_of: int | None = None  # the vCPU whose events the log shows; None for all


FROM_OUTSIDE = Looking()


def look_at_vm(vm: Vm, looking: Looking = FROM_OUTSIDE) -> VmSnapshot:
    """Everything the dashboard draws; raises InvalidState for a vCPU in front that is not there.

    Only the vCPU in front is looked at in full, so that a look costs the same with 1 and with 16.
    What only a protected VM has comes with it: the encryption map, the launch, and one page
    through both eyes.
    """
    front = looking.vcpu
    if not 0 <= front < max(len(vm.vcpus), 1):
        raise InvalidState(f"there is no vCPU {front}")
    in_front = look_at_vcpu(vm, vm.vcpus[front], looking.frame) if vm.vcpus else None
    said = look_at_last(vm)
    vcpus = tuple(VcpuBrief(vcpu.index, vcpu.step_count, vcpu.state) for vcpu in vm.vcpus)

    seen = VmSnapshot(
        name=vm.name,
        arch=vm.arch.name,
        engine=vm.backend,
        protection="no encryption",
        state=_state(vm),
        schedule=vm.schedule.name.replace("_", " "),
        step=vm.step,
        vcpu=front,
        vcpus=vcpus,
        pool=_pool(vm, None if in_front is None else in_front.next_slot),
        page_table=vm.page_table(vm.vcpus[front] if vm.vcpus else None),
        memory=look_at_memory(vm),
        selection=looking.selection,
        events=Marks(vm.log.entries, len(vm.log), mark),
        status=_status(vm, in_front, said),
        front=in_front,
        said=said,
        shifts=vm.shifts.until(vm.step),
        log_of=looking.log_of,
        holds=look_at_holds(vm),
    )
    if vm.guest is None:
        return seen
    return _with_secrets(vm, seen)


def _state(vm: Vm) -> str:
    """The states of its vCPUs; while it runs, that it does."""
    if not vm.vcpus:
        return "no vCPU"
    if vm.running is not None:
        return "running"
    return ", ".join(sorted({vcpu.state for vcpu in vm.vcpus}))


def _status(vm: Vm, in_front: VcpuSnapshot | None, said: Said | None) -> str:
    """What just happened, and what the vCPU in front is about to do; of a long run, how far it is.

    What ended a guest stands there as the command line would say it.
    """
    if in_front is None:
        return ""
    running = vm.running
    if running is not None and running.is_long:
        where = "" if in_front.sealed else f", now at {in_front.where}"
        return f"Running: {running}{where}."
    if said is None or not said.is_now:
        return status_of(in_front)
    if said.is_end:
        return f"{said.words}."
    return f"{_in_words(said)} {status_of(in_front)}"


def _in_words(said: Said) -> str:
    """A ucall or an exit as a short sentence."""
    if said.words:
        return f"{said.words}."
    args = ", ".join(map(hex, said.args))
    what = said.kind if said.text is None else f"{said.kind} {said.text!r}"
    slot = "" if said.slot is None else f" in slot {said.slot}"
    return f"vCPU {said.vcpu} said {what}({args}){slot}."


def _pool(vm: Vm, next_slot: int | None) -> PoolSnapshot | None:
    """The pool, with the slot that the vCPU in front is about to take."""
    if vm.host_pool is None:
        return None
    return replace(vm.pool, next_slot=next_slot)


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
