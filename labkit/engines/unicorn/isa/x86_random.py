"""RDRAND and RDSEED of x86-64 guests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.isa.x86_operands import registers, wide

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["RANDOM"]


def _do_random(cpu: X86, trap: Trap) -> Exit | None:
    """RDRAND and RDSEED from a seeded generator, so that runs repeat.

    CF says that there was a number.
    """
    name, size = registers(trap.data)[0]
    value = cpu.random.getrandbits(8 * size)
    if size == 2:  # the rest of the register stays
        value |= cpu.regs.read(wide(name)) & ~0xFFFF
    flags = cpu.regs.read("rflags") & ~0x8D5 | 1
    return cpu.retire(trap, **{wide(name): value}, rflags=flags)


RANDOM: dict[str, Callable[[X86, Trap], Exit | None]] = {"random": _do_random}
"""By the kind of trap."""
