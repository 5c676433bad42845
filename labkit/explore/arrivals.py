"""What an exit of an engine means to its VM: a ucall, or something that happened; it is recorded either way."""

from __future__ import annotations

from typing import Any

from labkit.engines.base import BudgetExit, Exit, InterruptExit, VmgexitExit
from labkit.sev.vmgexit import answer
from labkit.ucall.pool import BadUcallExit, Ucall

__all__ = ["arrived"]

_ENDS = {"halted": "halted", "shutdown": "shutdown", "internal-error": "stuck", "terminated": "terminated"}
_FINAL = {"DONE": "done", "ABORT": "aborted", "UNHANDLED": "unhandled"}


def arrived(vm: Any, vcpu: Any, exit: Exit) -> Ucall | Exit:
    """An engine's exit becomes a ucall when it is one; it is recorded, and a held-back Ctrl-C is raised."""
    came: Ucall | Exit = exit
    if vcpu.state == "not started" and vm._ucalls is not None:
        vm._ucalls.begins(vcpu.index)
    if type(exit) is VmgexitExit and vm.guest is not None:
        came, ucall = answer(vm.guest, vcpu.index, vcpu._cpu, exit.ghcb, vm.door.number)
    else:
        ucall = vm.door.value(exit, vcpu._cpu.read_reg)
    if ucall is not None:
        came = _take(vm, vcpu, ucall)
    elif vm._ucalls is not None:
        vm._ucalls.saw(vcpu.index, vcpu._cpu.locked_at, vm.machine.engine.retired())
    if isinstance(came, Ucall):
        vcpu.state = _FINAL.get(came.cmd, "running")
        vm._events.append(came)
    elif isinstance(came, BudgetExit):
        vcpu.state = "running"
    else:
        vcpu.state = _ENDS.get(came.end, "running")
        if not isinstance(came, InterruptExit):
            vm._trace(vcpu.index, came.end, {"exit": came, "where": vcpu.where()})
    if vm._observers:
        vm.changed()
    vm.machine.engine.check_interrupt()
    return came


def _take(vm: Any, vcpu: Any, value: int) -> Ucall | BadUcallExit:
    step = vm.machine.engine.retired()
    if value == 0:
        return Ucall("NONE", (0,) * 7, None, vcpu.index, None, step)
    if vm._ucalls is None:
        return BadUcallExit(value, "no pool", "this VM was created without a ucall pool", vcpu.index)
    found: Ucall | BadUcallExit = vm._ucalls.take(value, vcpu.index, step, vcpu._cpu.locked_at, vm._string)
    return found
