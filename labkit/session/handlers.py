"""Handlers of exceptions inside the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.errors import InvalidState
from labkit.guest.globals import GlobalVar

if TYPE_CHECKING:
    from labkit.session.vm import Vm

__all__ = ["install_handler"]


def install_handler(vm: Vm, vector: int, gva: int) -> None:
    """Let the guest function at a gva handle an exception, by the table of the guest library.

    Raises InvalidState for a number that the architecture has not.
    """
    if not 0 <= vector < vm.arch.nr_vectors:
        raise InvalidState(
            f"{vm.arch.name} has no exception {vector}, only 0 to {vm.arch.nr_vectors - 1}"
        )
    pointer = GlobalVar(
        name="a handler's address",
        gva=vm.machine.handlers_gva + 8 * vector,
        size=8,
        is_int=True,
        signed=False,
        byteorder=vm.arch.mode.byteorder,
    )
    vm.write(pointer.gva, pointer.encode(gva))
