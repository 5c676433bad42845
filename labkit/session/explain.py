"""One sentence for what ended a guest: which vCPU, which instruction, which source line, which address."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from labkit.engines.base import BudgetExit, Exit
from labkit.session.events import Event
from labkit.session.listing import Listing
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
    return _explain(vm, came) + _chain(vm, came)


def _explain(vm: Any, came: Ucall | Exit) -> str:
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


def _exceptions(vm: Any, came: Ucall | Exit) -> tuple[Any, list[Any]]:
    """The event of what came, and the exceptions of its vCPU with nothing in between, the newest first, if the engine tells of them."""
    past = iter(reversed(vm._events))
    end: Any = next(
        (
            event
            for event in past
            if event is came or (isinstance(event, Event) and event.facts.get("exit") is came)
        ),
        None,
    )
    mine = (event for event in past if end is not None and event.vcpu == end.vcpu)
    return end, list(takewhile(lambda event: event.kind == "exception", mine))


def _chain(vm: Any, came: Ucall | Exit) -> str:
    """What a chain of exceptions began with, each met on the way into the handler of the one before: a stack that overflowed."""
    if (
        isinstance(came, BudgetExit)
        or (isinstance(came, Ucall) and came.cmd != "UNHANDLED")
        or vm.program is None
    ):
        return ""
    end, before = _exceptions(vm, came)
    entry = vm.program.symbol_at(vm.machine.vectors_gva)
    chain = list(
        takewhile(
            lambda event: (
                entry is not None
                and (vm.program.symbol_at(event.facts["pc"]) or [0])[0] == entry[0]
            ),
            before,
        )
    )
    if not chain or len(chain) == len(before):
        return ""
    first = before[len(chain)].facts
    began = f"{_named(vm, first['vector'])} at {place(vm, first['pc'])}{_insn(vm, end.vcpu, first['pc'])}"
    return f"; the last of {len(chain) + 1} exceptions in a row, which began with {began}"


def _named(vm: Any, vector: int) -> str:
    return str(vm.arch.vectors.get(vector, f"vector {vector}"))


def _insn(vm: Any, vcpu: int, pc: int) -> str:
    insn = next(
        iter(Listing.at(vm.arch.name, vm.program, vm.vcpus[vcpu].peek, pc, 1, pc).insns), None
    )
    return f": {insn.text}" if insn is not None else ", where no instruction is"


def _unhandled(vm: Any, came: Ucall) -> str:
    """An exception that the guest had no handler for: its arguments are vector, error code, program counter, fault address."""
    vector, error, pc, fault = came.args[:4]
    for met in _exceptions(vm, came)[1][
        :1
    ]:  # the engine's own word: s390x tells its handlers where to go on, not where it was
        pc = met.facts["pc"] if met.facts["vector"] == vector else pc
    touched = f"; fault address {fault:#x}" if vector in vm.arch.page_faults else ""
    return (
        f"vCPU {came.vcpu}: {_named(vm, vector)} (error code {error:#x}) and no handler, at {place(vm, pc)}"
        f"{_insn(vm, came.vcpu, pc)}{touched}"
    )
