"""What the instruction about to run touches: worked out from its operands and the registers."""

from __future__ import annotations

from labkit.arch import find_arch
from labkit.look.access import Operands, Read, Regs
from labkit.look.touch_text import operands_in_text
from labkit.look.touch_x86 import operands_of_x86

__all__ = ["operands"]


def operands(arch: str, data: bytes, regs: Regs, pc: int, read: Read) -> Operands:
    """Decode one instruction and work out its operands; an empty answer for bytes that are none.

    data: the instruction and perhaps what follows it, at gva pc. regs: of the vCPU before it runs.
    read(gva, size): its memory, which is only read; where it raises a LabError nothing is known.
    """
    facts = find_arch(arch)
    if facts.reading is None:
        return operands_of_x86(arch, data, regs, pc, read)
    return operands_in_text(facts, facts.reading, data, regs, pc, read)
