"""What an exit of an engine means to its VM: a ucall, or something that happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.engines.exits import (
    BudgetExit,
    DebugExit,
    Exit,
    InterruptExit,
    StopExit,
    VmgexitExit,
)
from labkit.sev.vmgexit import answer
from labkit.ucall.calls import BadUcallExit, Ucall

if TYPE_CHECKING:
    from labkit.session.vcpu import Vcpu
    from labkit.session.vm import Vm

__all__ = ["arrived"]

# What a vCPU is in afterwards: by the exit's word, and by the ucall's command.
_ENDS = {
    "halted": "halted",
    "shutdown": "shutdown",
    "internal-error": "stuck",
    "terminated": "terminated",
}
_FINAL = {"DONE": "done", "ABORT": "aborted", "UNHANDLED": "unhandled"}


def arrived(vm: Vm, vcpu: Vcpu, exit: Exit) -> Ucall | Exit:
    """What an exit of a vCPU is: the ucall that it carries, or the exit itself.

    Either is recorded in the VM's log and in the vCPU's state; a VMGEXIT is answered. Raises the
    KeyboardInterrupt that the engine held back until now.
    """
    if vcpu.state == "not started" and vm.ucalls is not None:
        vm.ucalls.begins(vcpu.index)

    came = exit
    if type(exit) is VmgexitExit and vm.guest is not None:
        came, value = answer(vm.guest, vcpu.index, vcpu.cpu, exit.ghcb, vm.door.number)
    else:
        value = vm.door.value(exit, vcpu.cpu.read_reg)
    met = _through_door(vm, vcpu, came, value)

    _record(vm, vcpu, met)
    if vm.observers:
        vm.changed()
    vm.machine.engine.check_interrupt()
    return met


def _through_door(vm: Vm, vcpu: Vcpu, came: Exit, value: int | None) -> Ucall | Exit:
    """The ucall behind a value that came through the door; `came` itself when none did (None).

    Zero is what ucall() hands over for no command at all: a ucall NONE, without a slot.
    """
    ucalls, step = vm.ucalls, vm.machine.engine.retired()
    vm.turn.came_at = step
    if value is None:
        if ucalls is not None:
            ucalls.saw(vcpu.index, vcpu.cpu.locked_at, step)
        return came
    if value == 0:
        return Ucall("NONE", (0,) * 7, None, vcpu.index, None, step)
    if ucalls is None:
        why = "this VM was created without a ucall pool"
        return BadUcallExit(value, "no pool", why, vcpu.index)
    return ucalls.take(value, vcpu.index, step, vcpu.cpu.locked_at, vm.string_at)


def _record(vm: Vm, vcpu: Vcpu, came: Ucall | Exit) -> None:
    """Note what came, and what it leaves its vCPU in."""
    if isinstance(came, Ucall):
        vcpu.state = _FINAL.get(came.cmd, "running")
        vm.log.entries.append(came)
    elif isinstance(came, BudgetExit):
        vcpu.state = "running"
    else:
        vcpu.state = _ENDS.get(came.end, "running")
        if not _is_the_hosts(vcpu, came):
            vm.trace(vcpu.index, came.end, {"exit": came, "where": vcpu.where()})


def _is_the_hosts(vcpu: Vcpu, came: Exit) -> bool:
    """Whether an exit is something that the host alone wanted: nothing happened in the guest."""
    if isinstance(came, DebugExit):
        return vcpu.is_passing()
    return isinstance(came, InterruptExit | StopExit)
