"""RDRAND and RDSEED of x86-64 guests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["RANDOM"]


def _do_random(cpu: X86, trap: Trap) -> Exit | None:
    """RDRAND and RDSEED from a seeded generator, so that runs repeat.

    CF says that there was a number.
    """
    wide, bits = _wide(trap.op_str)
    value = cpu.random.getrandbits(bits)
    if bits == 16:  # the rest of the register stays
        value |= cpu.regs.read(wide) & ~0xFFFF
    flags = cpu.regs.read("rflags") & ~0x8D5 | 1
    return cpu.retire(trap, **{wide: value}, rflags=flags)


def _wide(name: str) -> tuple[str, int]:
    """The 64-bit register behind a name, and the bits that are meant: ("rax", 16) for ax."""
    if name.endswith("d") or name[0] == "e":
        bits = 32
    elif name[0] == "r" and not name.endswith("w"):
        bits = 64
    else:
        bits = 16

    if name[1:2].isdigit():  # r8d, r10w
        return name.rstrip("dw"), bits
    return "r" + (name if bits == 16 else name[1:]), bits


RANDOM: dict[str, Callable[[X86, Trap], Exit | None]] = {"random": _do_random}
"""By the kind of trap."""
