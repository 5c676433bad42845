"""Stepping by source line."""

from __future__ import annotations

from typing import Any, Protocol

from labkit.errors import BudgetExceeded

__all__ = ["Steppable", "step_line"]


class Steppable(Protocol):
    """What line stepping needs of a vCPU."""

    index: int

    @property
    def pc(self) -> int: ...
    def source_line(self) -> Any: ...
    def step(self, count: int = 1) -> Any: ...
    def where(self) -> str: ...


def step_line(vcpu: Steppable, max_insns: int) -> Any:
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
    raise BudgetExceeded(f"vCPU {vcpu.index}: {max_insns} instructions and still no other source line, at {vcpu.where()}",
                         vcpu=vcpu.index, insns=max_insns)
