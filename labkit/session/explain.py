"""One sentence for what ended a guest: which vCPU, instruction, source line, address."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from labkit.engines.exits import BudgetExit, Exit
from labkit.outside import printable
from labkit.session.events import Event, Happened
from labkit.session.listing import Listing
from labkit.ucall.calls import BadUcallExit, Ucall

if TYPE_CHECKING:
    from labkit.session.vm import Vm

__all__ = ["ending", "explain"]

_ENDS = {"ABORT": "abort", "UNHANDLED": "unhandled"}


def ending(vm: Vm, last: Ucall | Exit | None) -> tuple[str, str]:
    """How a VM's run ended, in one word, and why; `last` is what came last.

    The reason is "" when every vCPU is done.
    """
    if all(vcpu.state == "done" for vcpu in vm.vcpus):
        return "done", ""
    if last is None:
        return "nothing", "no vCPU ran"
    if isinstance(last, Ucall):
        return _ENDS.get(last.cmd, last.cmd.lower()), explain(vm, last)
    return last.end, explain(vm, last)


def explain(vm: Vm, came: Ucall | Exit) -> str:
    """What came back from a run, for a person who has to find the cause."""
    said = _said(vm, came)
    if _may_have_a_chain(vm, came):
        said += _chain(vm, came)
    return printable(said)


def _said(vm: Vm, came: Ucall | Exit) -> str:
    match came:
        case Ucall(cmd="UNHANDLED"):
            return _unhandled(vm, came)
        case Ucall(cmd="ABORT"):
            text = came.text or "an ABORT without words"
            file = came.file or "its file has no readable name"
            return f"vCPU {came.vcpu}: {text} ({file}:{came.line})"
        case Ucall():
            return repr(came)[1:-1]
        case BudgetExit(insns=insns):
            return f"the budget of {insns} instructions is used up; {_states(vm)}"
        case BadUcallExit() | _:
            return f"{came}; {_states(vm)}"


def _states(vm: Vm) -> str:
    return ", ".join(f"vCPU {vcpu.index} {vcpu.state} at {vcpu.where()}" for vcpu in vm.vcpus)


def _unhandled(vm: Vm, came: Ucall) -> str:
    """An exception that the guest had no handler for.

    Its arguments are vector, error code, program counter and fault address. Where the engine told
    of the exception, its word for the program counter counts: s390x tells its handlers where to go
    on, not where it was.
    """
    vector, error, pc, fault = came.args[:4]
    _, exceptions = _exceptions(vm, came)
    if exceptions and exceptions[0].facts["vector"] == vector:
        pc = cast(int, exceptions[0].facts["pc"])

    said = f"vCPU {came.vcpu}: {_vector_name(vm, vector)} (error code {error:#x}) and no handler, "
    said += f"at {vm.names.place(pc)}{_insn(vm, came.vcpu, pc)}"
    if vector in vm.arch.page_faults:
        said += f"; fault address {fault:#x}"
    return said


def _vector_name(vm: Vm, vector: int) -> str:
    return vm.arch.vectors.get(vector, f"vector {vector}")


def _insn(vm: Vm, vcpu: int, pc: int) -> str:
    listing = Listing.at(vm.arch.name, vm.program, vm.vcpus[vcpu].peek, pc, 1, pc)
    if not listing.insns:
        return ", where no instruction is"
    return f": {listing.insns[0].text}"


# --- exceptions that were met on the way into a handler


def _exceptions(vm: Vm, came: Ucall | Exit) -> tuple[Happened | None, list[Event]]:
    """The log's entry for what came, and the exceptions of its vCPU just before it, newest first.

    Nothing of that vCPU lies between them. Only some engines tell of exceptions.
    """
    past = iter(reversed(vm.log.entries))
    end = None
    for happened in past:
        if happened is came or (isinstance(happened, Event) and happened.facts.get("exit") is came):
            end = happened
            break
    if end is None:
        return None, []

    found = []
    for happened in past:
        if happened.vcpu != end.vcpu:
            continue
        if not isinstance(happened, Event) or happened.kind != "exception":
            break
        found.append(happened)
    return end, found


def _may_have_a_chain(vm: Vm, came: Ucall | Exit) -> bool:
    if vm.program is None or isinstance(came, BudgetExit):
        return False
    return not isinstance(came, Ucall) or came.cmd == "UNHANDLED"


def _chain(vm: Vm, came: Ucall | Exit) -> str:
    """What a chain of exceptions began with; "" when there is none.

    Each is met on the way into the handler of the one before, as when a stack overflows.
    """
    end, exceptions = _exceptions(vm, came)
    length = 0
    while length < len(exceptions) and _is_in_entry(vm, exceptions[length]):
        length += 1
    if end is None or length == 0 or length == len(exceptions):
        return ""

    first = exceptions[length].facts
    vector, pc = cast(int, first["vector"]), cast(int, first["pc"])
    where = f"{vm.names.place(pc)}{_insn(vm, end.vcpu, pc)}"
    began = f"{_vector_name(vm, vector)} at {where}"
    return f"; the last of {length + 1} exceptions in a row, which began with {began}"


def _is_in_entry(vm: Vm, exception: Event) -> bool:
    """Whether an exception was met in the code through which exceptions enter the guest."""
    program = vm.names.program
    entry = program.symbol_at(vm.machine.vectors_gva)
    here = program.symbol_at(cast(int, exception.facts["pc"]))
    return entry is not None and here is not None and here[0] == entry[0]
