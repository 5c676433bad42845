"""The operands of one x86-64 instruction, and where in guest memory they lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from labkit.engines.disasm import X86_OP_MEM, decoder

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86_regs import X86Registers

__all__ = ["Place", "place", "registers", "wide"]

MASK64 = (1 << 64) - 1
X86_OP_REG = 1  # capstone's x86_op_type


@dataclass(frozen=True)
class Place:
    """A memory operand: size in bytes, and the parts of its address; "" for no register."""

    size: int
    base: str
    index: str
    scale: int
    displacement: int  # from a base of RIP, the address behind the instruction is already in it
    segment: str
    mask: int  # of an address: 32 bits with prefix 0x67

    def gva(self, regs: X86Registers) -> int:
        """Where it lies now."""
        offset = self.displacement
        if self.base:
            offset += regs.read(wide(self.base))
        if self.index:
            offset += self.scale * regs.read(wide(self.index))
        offset &= self.mask
        if self.segment in ("fs", "gs"):
            offset += regs.read(f"{self.segment}_base")
        return offset & MASK64

    @property
    def is_stack(self) -> bool:
        """Whether an address that is not canonical is #SS and not #GP."""
        return self.base in ("rsp", "rbp", "esp", "ebp") and self.segment not in ("fs", "gs")


def wide(name: str) -> str:
    """The 64-bit register of which one of 16 bits or more is a part."""
    if name[1:2].isdigit():  # r8d, r10w
        return name.rstrip("dw")
    return name if name[0] == "r" else "r" + name.removeprefix("e")


@lru_cache(1 << 12)
def place(data: bytes, gva: int) -> Place | None:
    """The memory operand that an instruction at gva names; None when it names none."""
    engine = decoder("x86_64", detail=True)
    insn = next(iter(engine.disasm(data, gva)), None)
    if insn is None:
        return None
    for operand in insn.operands:
        if operand.type == X86_OP_MEM:
            memory = operand.mem
            base = engine.reg_name(memory.base) or ""
            displacement = memory.disp
            if base in ("rip", "eip"):
                base, displacement = "", displacement + gva + insn.size
            return Place(
                operand.size,
                base,
                engine.reg_name(memory.index) or "",
                memory.scale,
                displacement,
                engine.reg_name(memory.segment) or "",
                0xFFFFFFFF if insn.addr_size == 4 else MASK64,
            )
    return None


@lru_cache(1 << 12)
def registers(data: bytes) -> tuple[tuple[str, int], ...]:
    """(name, size in bytes) of the register operands of an instruction, in their order."""
    engine = decoder("x86_64", detail=True)
    insn = next(iter(engine.disasm(data, 0)), None)
    if insn is None:
        return ()
    return tuple(
        (engine.reg_name(operand.reg), operand.size)
        for operand in insn.operands
        if operand.type == X86_OP_REG
    )
