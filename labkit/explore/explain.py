"""One sentence for what ended a guest: which vCPU, which instruction, which source line, which address."""

from __future__ import annotations

from typing import Any

from labkit.engines.base import BudgetExit, Exit
from labkit.explore.listing import Listing
from labkit.ucall.pool import BadUcallExit, Ucall

__all__ = ["ending", "explain", "place"]

ENDS = {"ABORT": "abort", "UNHANDLED": "unhandled"}


def place(vm: Any, gva: int) -> str:
    """A gva as symbol+offset with its source line."""
    if vm.program is None:
        return f"{gva:#x}"
    line = vm.program.line_at(gva)
    return str(vm.program.describe(gva)) + (f" ({line.file}:{line.line})" if line else "")


def explain(vm: Any, came: Ucall | Exit) -> str:
    """What came back from a run, for a person who has to find the cause."""
    match came:
        case Ucall(cmd="UNHANDLED"):
            return _unhandled(vm, came)
        case Ucall(cmd="ABORT"):
            return f"vCPU {came.vcpu}: {came.text or 'an ABORT without words'} ({came.file or 'its file has no readable name'}:{came.line})"
        case Ucall():
            return repr(came)[1:-1]
        case BadUcallExit():
            return f"{came}; {_states(vm)}"
        case BudgetExit(insns=insns):
            return f"the budget of {insns} instructions is used up; {_states(vm)}"
        case _:
            return f"{came}; {_states(vm)}"


def ending(vm: Any, last: Ucall | Exit | None) -> tuple[str, str]:
    """How a VM's run ended, in one word, and why ("" when every vCPU is done); `last` is what came last."""
    if all(vcpu.state == "done" for vcpu in vm.vcpus):
        return "done", ""
    if isinstance(last, Ucall):
        return ENDS.get(last.cmd, last.cmd.lower()), explain(vm, last)
    return (last.end, explain(vm, last)) if last is not None else ("nothing", "no vCPU ran")


def _states(vm: Any) -> str:
    return ", ".join(f"vCPU {vcpu.index} {vcpu.state} at {vcpu.where()}" for vcpu in vm.vcpus)


def _unhandled(vm: Any, came: Ucall) -> str:
    """An exception that the guest had no handler for: its arguments are vector, error code, program counter, fault address."""
    vector, error, pc, fault = came.args[:4]
    name = vm.arch.vectors.get(vector, f"vector {vector}")
    read = vm.vcpus[came.vcpu].peek
    insn = next(iter(Listing.at(vm.arch.name, vm.program, read, pc, 1, pc).insns), None)
    what = f": {insn.text}" if insn is not None else ", where no instruction is"
    touched = f"; fault address {fault:#x}" if vector in vm.arch.page_faults else ""
    return f"vCPU {came.vcpu}: {name} (error code {error:#x}) and no handler, at {place(vm, pc)}{what}{touched}"
