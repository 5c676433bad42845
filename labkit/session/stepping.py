"""Stepping by source line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.errors import BudgetExceeded

if TYPE_CHECKING:
    from labkit.guest.lines import Line
    from labkit.session.running import Came
    from labkit.session.vcpu import Vcpu

__all__ = ["step_line"]


def step_line(vcpu: Vcpu, max_insns: int) -> Came | None:
    """Step until another source line begins; an exit on the way ends it and is returned.

    Code without line information is run through. Raises BudgetExceeded when max_insns
    instructions did not reach another line.
    """
    begin = _place(vcpu.source_line())
    for _ in range(max_insns):
        came = vcpu.step()
        if came is not None:
            return came
        here = _place(vcpu.source_line())
        if here is not None and here != begin:
            return None
    raise BudgetExceeded(
        f"vCPU {vcpu.index}: {max_insns} instructions and still no other source line, "
        f"at {vcpu.where()}",
        vcpu=vcpu.index,
        insns=max_insns,
    )


def _place(line: Line | None) -> tuple[str, int] | None:
    if line is None:
        return None
    return line.file, line.line
