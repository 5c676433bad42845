"""What an exit of an engine means to its VM: a ucall, or something that happened; it is recorded either way."""

from __future__ import annotations

from typing import Any

from labkit.engines.base import BudgetExit, Exit, InterruptExit, VmgexitExit
from labkit.sev.vmgexit import answer
from labkit.ucall.pool import BadUcallExit, Ucall

__all__ = ["arrived"]

_ENDS = {
    "halted": "halted",
    "shutdown": "shutdown",
    "internal-error": "stuck",
    "terminated": "terminated",
}
_FINAL = {"DONE": "done", "ABORT": "aborted", "UNHANDLED": "unhandled"}


def arrived(vm: Any, vcpu: Any, exit: Exit) -> Ucall | Exit:
    """An engine's exit becomes a ucall when it is one; it is recorded, and a held-back Ctrl-C is raised."""
    came: Ucall | Exit = exit
    engine, ucalls, cpu = vm.machine.engine, vm._ucalls, vcpu._cpu
    if vcpu.state == "not started" and ucalls is not None:
        ucalls.begins(vcpu.index)
    if type(exit) is VmgexitExit and vm.guest is not None:
        came, value = answer(vm.guest, vcpu.index, cpu, exit.ghcb, vm.door.number)
    else:
        value = vm.door.value(exit, cpu.read_reg)
    if value:
        if ucalls is None:
            came = BadUcallExit(
                value, "no pool", "this VM was created without a ucall pool", vcpu.index
            )
        else:
            came = ucalls.take(value, vcpu.index, engine.retired(), cpu.locked_at, vm._string)
    elif value is not None:
        came = Ucall("NONE", (0,) * 7, None, vcpu.index, None, engine.retired())
    elif ucalls is not None:
        ucalls.saw(vcpu.index, cpu.locked_at, engine.retired())
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
    engine.check_interrupt()
    return came
