"""Stepping by source line."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from labkit.errors import BudgetExceeded
from labkit.outside import printable

if TYPE_CHECKING:
    from labkit.session.running import Came
    from labkit.session.vcpu import Vcpu

__all__ = ["step_line"]

LONG = 2.0  # seconds after which a person is told that it takes long
LOOK_UP = 1024  # instructions between two looks at the clock


def step_line(vcpu: Vcpu, max_insns: int) -> Came | None:
    """Step until another source line begins; an exit on the way ends it and is returned.

    Code without line information is run through. Raises BudgetExceeded when max_insns
    instructions did not reach another line.
    """
    program = vcpu.vm.program
    begin = None if program is None else program.row_at(vcpu.pc)
    pc_name = vcpu.vm.arch.pc
    row = begin
    word = _Word(vcpu)
    for done in range(1, max_insns + 1):
        came = vcpu.step()
        if came is not None:
            return came
        pc = vcpu.cpu.read_reg(pc_name)
        if row is not None and row.gva <= pc < row.end:
            word.after(done)
            continue  # as most instructions are, in the code of the one before
        row = None if program is None else program.row_at(pc)
        if row is not None and (begin is None or row[2:4] != begin[2:4]):
            return None
        word.after(done)
    raise BudgetExceeded(
        f"vCPU {vcpu.index}: {max_insns} instructions and still no other source line, "
        f"at {vcpu.where()}",
        vcpu=vcpu.index,
        insns=max_insns,
    )


class _Word:
    """Says once that it takes long, to whoever waits for it at a terminal or a cell."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._due = time.monotonic() + LONG

    def after(self, insns: int) -> None:
        """So many instructions are done."""
        if insns % LOOK_UP or time.monotonic() < self._due:
            return
        self._due = math.inf
        said = f"step_line: {insns} instructions and still the same line, {self._vcpu.where()}"
        print(printable(f"{said}; Ctrl-C ends it"), file=sys.stderr, flush=True)
