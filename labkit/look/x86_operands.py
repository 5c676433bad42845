"""The operands of an x86 instruction as capstone decodes them, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from labkit.look.access import MASK64, Regs

__all__ = [
    "OP_IMM",
    "OP_MEM",
    "OP_REG",
    "READS",
    "WRITES",
    "X86Insn",
    "X86Memory",
    "X86Operand",
    "address",
    "is_memory",
    "value",
]

# Operand types of capstone (x86_op_type in capstone/x86.h) and what an operand's `access` says
# (cs_ac_type in capstone.h): bits.
OP_REG, OP_IMM, OP_MEM = 1, 2, 3
READS, WRITES = 1, 2


class X86Memory(Protocol):
    """A memory operand of capstone's X86Op: registers by number, 0 for none."""

    segment: int
    base: int
    index: int
    scale: int
    disp: int


class X86Operand(Protocol):
    """What is used of capstone's X86Op; reg, imm and mem are there for their type only."""

    type: int
    size: int  # bytes
    access: int
    reg: int
    imm: int
    mem: X86Memory


class X86Insn(Protocol):
    """What is used of capstone's CsInsn, decoded with details."""

    @property
    def address(self) -> int: ...  # gva
    @property
    def size(self) -> int: ...  # bytes
    @property
    def mnemonic(self) -> str: ...  # with its prefix: "lock bts"
    @property
    def addr_size(self) -> int: ...  # bytes of its addresses: 8, or 4 behind a 67h prefix
    @property
    def operands(self) -> Sequence[X86Operand]: ...
    def reg_name(self, reg_id: int) -> str: ...


def is_memory(operand: X86Operand) -> bool:
    """Whether an operand is memory that the instruction accesses."""
    return operand.type == OP_MEM and bool(operand.access)


def value(insn: X86Insn, operand: X86Operand, regs: Regs) -> int | None:
    """What a register or an immediate holds; None for memory, and for a register not in regs."""
    if operand.type == OP_IMM:
        return operand.imm
    if operand.type == OP_REG:
        return _register(insn.reg_name(operand.reg), regs)
    return None


def address(insn: X86Insn, memory: X86Memory, regs: Regs) -> int:
    """The gva of a memory operand; registers that are not in regs count as 0."""
    gva = memory.disp
    if memory.base:
        base = insn.reg_name(memory.base)
        gva += _register(base, regs) or 0
        if base in ("rip", "eip"):  # relative to the end of the instruction
            gva += insn.size
    if memory.index:
        gva += (_register(insn.reg_name(memory.index), regs) or 0) * memory.scale
    gva &= (1 << 8 * insn.addr_size) - 1
    if memory.segment:
        gva += regs.get(f"{insn.reg_name(memory.segment)}_base", 0)
    return gva & MASK64


# --- registers and their parts


def _parts() -> dict[str, tuple[str, int, int]]:
    """Name of a part -> whole register, how far to shift it down, mask (SDM vol. 1, 3.4.1.1)."""
    parts: dict[str, tuple[str, int, int]] = {"eip": ("rip", 0, 0xFFFFFFFF)}
    for letter in "abcd":
        parts[f"{letter}l"] = (f"r{letter}x", 0, 0xFF)
        parts[f"{letter}h"] = (f"r{letter}x", 8, 0xFF)
    for name in ("si", "di", "bp", "sp"):
        parts[f"{name}l"] = (f"r{name}", 0, 0xFF)
    for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
        parts[f"e{name}"] = (f"r{name}", 0, 0xFFFFFFFF)
        parts[name] = (f"r{name}", 0, 0xFFFF)
    for name in (f"r{number}" for number in range(8, 16)):
        parts[f"{name}d"] = (name, 0, 0xFFFFFFFF)
        parts[f"{name}w"] = (name, 0, 0xFFFF)
        parts[f"{name}b"] = (name, 0, 0xFF)
    return parts


_PARTS = _parts()


def _register(name: str, regs: Regs) -> int | None:
    """A register of any width by its name (rax, eax, r8d, cl); None when regs lacks it."""
    if name in regs:
        return regs[name]
    if name not in _PARTS:
        return None
    whole, shift, mask = _PARTS[name]
    if whole not in regs:
        return None
    return regs[whole] >> shift & mask
