"""Through which exit a VM's guests make their ucalls.

Each architecture has another one, and each arm64 VM an address of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from labkit.arch.model import UcallExit
from labkit.engines.exits import Exit
from labkit.guest.globals import write_guest_global
from labkit.guest.program import Program
from labkit.machine.space import AddressSpace

__all__ = ["UcallDoor"]


class UcallDoor:
    """What tells a ucall from other exits.

    `number` (a port, a gpa, an extension, a function code) may be set, as to the one address for
    all VMs that the kernel once had.
    """

    def __init__(self, exit: UcallExit, number: int | None = None) -> None:
        self.kind = exit.kind
        self.register = exit.register
        self.symbol = exit.symbol
        self.number = exit.number if number is None else number

    def open(self, program: Program, space: AddressSpace) -> None:
        """Map a page for guests that leave through memory, and tell them where (ucall_arch_init()).

        It lies behind slot 0, where no memslot is, so that a write to it exits. Programs without
        the symbol leave otherwise, and nothing is done.
        """
        if self.symbol not in program.symbols:
            return
        slot = space.memory.slots[0]
        gva = space.unused_gva(1)
        self.number = slot.gpa + slot.size
        space.map(gva, self.number, nx=True)
        write_guest_global(program, self.symbol, gva, space.write)

    def value(self, exit: Exit, read_reg: Callable[[str], int]) -> int | None:
        """The hva that a guest handed over; None for an exit that is no ucall."""
        if exit.end != self.kind or exit.number != self.number:
            return None
        return read_reg(self.register) if self.register else exit.hva
