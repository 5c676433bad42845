"""Stepping by source line."""

from __future__ import annotations

from typing import Any

from labkit.errors import BudgetExceeded

__all__ = ["step_line"]


def step_line(vcpu: Any, max_insns: int) -> Any:
    """Step until another source line begins; an exit on the way ends it and is returned.

    Code without line information is run through. Raises BudgetExceeded when max_insns did not reach another line.
    """
    start = vcpu.source_line()
    begin = (start.file, start.line) if start else None
    for _ in range(max_insns):
        came = vcpu.step()
        if came is not None:
            return came
        line = vcpu.source_line()
        if line is not None and (line.file, line.line) != begin:
            return None
    raise BudgetExceeded(
        f"vCPU {vcpu.index}: {max_insns} instructions and still no other source line, at {vcpu.where()}",
        vcpu=vcpu.index,
        insns=max_insns,
    )
