"""Steps that people think in: to another line, over a call, out of a function, up to a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.arch.dwarf import CFA_ABOVE_SP, RETURNS_IN
from labkit.engines.exits import BudgetExit, DebugExit
from labkit.errors import BudgetExceeded, InvalidState, LabError

if TYPE_CHECKING:
    from labkit.session.running import Came
    from labkit.session.vcpu import Vcpu

__all__ = ["finish", "next_line", "run_to", "step_line"]


def step_line(vcpu: Vcpu, max_insns: int) -> Came | None:
    """Step until another source line begins; an exit on the way ends it and is returned.

    Code without line information is run through. Raises BudgetExceeded when max_insns
    instructions did not reach another line.
    """
    return _to_another_line(vcpu, max_insns, over_calls=False)


def next_line(vcpu: Vcpu, max_insns: int) -> Came | None:
    """The same, but what the line calls is run through to its return."""
    return _to_another_line(vcpu, max_insns, over_calls=True)


def _to_another_line(vcpu: Vcpu, max_insns: int, over_calls: bool) -> Came | None:
    program = vcpu.vm.program
    pc_name = vcpu.vm.arch.pc
    begin = None if program is None else program.row_at(vcpu.pc)
    row = begin
    end = vcpu.cpu.insns + max_insns
    while vcpu.cpu.insns < end:
        back = _next_gva(vcpu) if over_calls else None
        sp = _sp(vcpu) if over_calls else 0
        came = vcpu.step()
        if came is None and back is not None and _was_called_from(vcpu, back):
            came = run_to(vcpu, frozenset({back}), end - vcpu.cpu.insns, least_sp=sp)
        if came is not None:
            return came
        pc = vcpu.cpu.read_reg(pc_name)
        if row is not None and row.gva <= pc < row.end:
            continue  # as most instructions are, in the code of the one before
        row = None if program is None else program.row_at(pc)
        if row is not None and (begin is None or row[2:4] != begin[2:4]):
            return None
    raise _too_long(vcpu, max_insns, "still no other source line")


def _next_gva(vcpu: Vcpu) -> int | None:
    """Where the next instruction ends; None where there is none."""
    insn = vcpu.insn
    return None if insn is None else insn.gva + insn.size


def _was_called_from(vcpu: Vcpu, back: int) -> bool:
    """Whether the last instruction was a call that returns to `back`."""
    if vcpu.pc == back:
        return False
    arch = vcpu.vm.arch
    register = RETURNS_IN.get(arch.name)
    if register is not None:
        return vcpu.cpu.read_reg(register) == back
    try:
        word = vcpu.peek(_sp(vcpu), 8)
    except LabError:
        return False  # a jump to where the stack is none of this one's
    return int.from_bytes(word, arch.mode.byteorder) == back


def finish(vcpu: Vcpu, max_insns: int | None) -> Came | None:
    """Run until the function in front has returned; an exit on the way ends it and is returned."""
    trace = vcpu.backtrace()
    cfa = trace[0].cfa
    if len(trace) < 2 or cfa is None:
        why = trace.why or "it is the function that the vCPU began with"
        raise InvalidState(
            f"vCPU {vcpu.index}: {trace[0].where} returns to nobody that is known: {why}"
        )
    above = CFA_ABOVE_SP.get(vcpu.vm.arch.name, 0)
    return run_to(vcpu, frozenset({trace[1].pc}), max_insns, least_sp=cfa - above)


def run_to(
    vcpu: Vcpu, gvas: frozenset[int], max_insns: int | None, least_sp: int = 0
) -> Came | None:
    """Run until one of these instructions is next, with the stack no deeper than least_sp.

    The vCPU's own breakpoints hold on the way: one of them is a DebugExit that is returned.
    Raises BudgetExceeded after max_insns instructions.
    """
    end = None if max_insns is None else vcpu.cpu.insns + max_insns
    with vcpu.passing(gvas):
        while True:
            left = None if end is None else max(end - vcpu.cpu.insns, 0)
            came = vcpu.run(left)
            if isinstance(came, BudgetExit):
                raise _too_long(vcpu, max_insns or 0, "not there yet")
            if not isinstance(came, DebugExit) or vcpu.pc in vcpu.breakpoints:
                return came
            if vcpu.pc in gvas and _sp(vcpu) >= least_sp:
                return None


def _sp(vcpu: Vcpu) -> int:
    return vcpu.cpu.read_reg(vcpu.vm.arch.sp)


def _too_long(vcpu: Vcpu, max_insns: int, what: str) -> BudgetExceeded:
    return BudgetExceeded(
        f"vCPU {vcpu.index}: {max_insns} instructions and {what}, at {vcpu.where()}",
        vcpu=vcpu.index,
        insns=max_insns,
    )
