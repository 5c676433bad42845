"""The ways in which guests can talk to their hosts.

The pool is what labkit uses; others are kept to show why the pool is as it is.
"""

from __future__ import annotations

from labkit.errors import InvalidState
from labkit.guest.program import Program
from labkit.machine.space import AddressSpace
from labkit.ucall.designs.stack import MARK, StackUcalls
from labkit.ucall.pool import Pool

__all__ = ["DESIGNS", "make_ucalls"]

DESIGNS = ("pool", "stack")


def make_ucalls(design: str, program: Program, space: AddressSpace) -> Pool | StackUcalls:
    """The host's side of one of DESIGNS for a VM.

    Raises InvalidState when the program was compiled for the other one.
    """
    is_for_stack = MARK in program.symbols
    if is_for_stack != (design == "stack"):
        raise InvalidState(
            f"ucall={design!r}, but {program.name} was compiled for the other design: "
            'Program.compile(..., defines=("LABKIT_UCALL_ON_STACK",)) is what "stack" takes'
        )
    if design == "stack":
        return StackUcalls(space)
    return Pool.make(space)
