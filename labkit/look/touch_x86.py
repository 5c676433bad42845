"""What an instruction of x86 touches, as a decoder says: explicit operands, the stack, a bit."""

from __future__ import annotations

from collections.abc import Callable

from labkit.engines.disasm import decoder
from labkit.look.access import MASK64, Access, Operands, Read, Regs, TestedBit, number_at
from labkit.look.x86_jumps import will_jump
from labkit.look.x86_operands import (
    OP_IMM,
    OP_MEM,
    OP_REG,
    READS,
    WRITES,
    X86Insn,
    X86Operand,
    address,
    is_memory,
    value,
)

__all__ = ["operands_of_x86"]

STACK_SLOT = 8  # bytes that PUSH, POP, CALL and RET move, but for a 16-bit PUSH or POP
UNTOUCHED = ("nop", "lea")  # they have a memory operand that nobody touches
COMPARES = ("bt", "cmp", "test")  # they write no operand, whatever the decoder says

# What is left in memory that held `a` when the other operand is `b`, before it is cut to its size.
_STORES: dict[str, Callable[[int, int], int]] = {
    "mov": lambda a, b: b,
    "movabs": lambda a, b: b,
    "xchg": lambda a, b: b,
    "add": lambda a, b: a + b,
    "xadd": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "inc": lambda a, b: a + 1,
    "dec": lambda a, b: a - 1,
    "neg": lambda a, b: -a,
    "not": lambda a, b: ~a,
}
# The same for the BT family, whose `mask` has the one bit set that is tested.
_BIT_STORES: dict[str, Callable[[int, int], int]] = {
    "bt": lambda word, mask: word,
    "bts": lambda word, mask: word | mask,
    "btr": lambda word, mask: word & ~mask,
    "btc": lambda word, mask: word ^ mask,
}


def operands_of_x86(arch: str, data: bytes, regs: Regs, pc: int, read: Read) -> Operands:
    """The operands of the first instruction in data; empty for bytes that are no instruction.

    regs needs rflags and rsp; what else is missing counts as 0, or makes a value unknown.
    """
    insn: X86Insn | None = next(decoder(arch, detail=True).disasm(data, pc), None)
    if insn is None:
        return Operands()
    mnemonic = insn.mnemonic
    if mnemonic in UNTOUCHED:
        return Operands()

    name = mnemonic.split()[-1]  # without a prefix
    memory = [operand for operand in insn.operands if is_memory(operand)]
    bit = None
    if name in _BIT_STORES and memory:
        access, bit = _bit_access(insn, name, memory[0], regs, read)
        accesses = [access]
    else:
        accesses = [_access(insn, name, operand, regs, read) for operand in memory]
    stack = _stack_access(insn, mnemonic, regs, read)
    if stack is not None:
        accesses.append(stack)

    return Operands(
        accesses=tuple(accesses),
        target=_target(insn, mnemonic),
        taken=will_jump(mnemonic, regs["rflags"]),
        bit=bit,
    )


def _target(insn: X86Insn, mnemonic: str) -> int | None:
    """Where a direct jump or call goes."""
    if mnemonic[0] not in "jc" or len(insn.operands) != 1:
        return None
    operand = insn.operands[0]
    return operand.imm if operand.type == OP_IMM else None


def _access(insn: X86Insn, name: str, operand: X86Operand, regs: Regs, read: Read) -> Access:
    """What happens to a memory operand."""
    gva = address(insn, operand.mem, regs)
    before = number_at(read, gva, operand.size)
    writes = bool(operand.access & WRITES) and name not in COMPARES
    after = None
    if writes and before is not None and name in _STORES:
        other = _other_value(insn, regs)
        if other is not None:
            after = _STORES[name](before, other) & (1 << 8 * operand.size) - 1
    return Access(gva, operand.size, bool(operand.access & READS), writes, before, after)


def _other_value(insn: X86Insn, regs: Regs) -> int | None:
    """What the operand beside the memory operand holds; 0 when there is none, None if unknown."""
    for operand in insn.operands:
        if operand.type != OP_MEM:
            return value(insn, operand, regs)
    return 0


# --- one bit


def _bit_access(
    insn: X86Insn, name: str, operand: X86Operand, regs: Regs, read: Read
) -> tuple[Access, TestedBit | None]:
    """What the BT family does to memory, and the bit that it tests; None when it is not mapped.

    An index in a register reaches beyond the operand, to words before it too; an immediate one
    does not (SDM vol. 2A, BT).
    """
    gva = address(insn, operand.mem, regs)
    width = 8 * operand.size
    other = insn.operands[1]
    index = value(insn, other, regs) or 0
    if other.type == OP_REG:
        if index >> width - 1:  # it has a sign
            index -= 1 << width
        gva = (gva + index // width * operand.size) & MASK64
    bit = index % width

    before = number_at(read, gva, operand.size)
    writes = bool(operand.access & WRITES) and name not in COMPARES
    if before is None:
        return Access(gva, operand.size, True, writes, None, None), None
    after = _BIT_STORES[name](before, 1 << bit) if writes else None
    tested = TestedBit(gva, bit, is_set=bool(before >> bit & 1))
    return Access(gva, operand.size, True, writes, before, after), tested


# --- the stack


def _stack_access(insn: X86Insn, mnemonic: str, regs: Regs, read: Read) -> Access | None:
    """The implicit access of PUSH, POP, CALL and RET; None for any other instruction."""
    rsp = regs["rsp"]
    size = STACK_SLOT
    if mnemonic in ("push", "pop") and insn.operands[0].size == 2:
        size = 2
    if mnemonic in ("pop", "ret"):
        return Access(rsp, size, True, False, number_at(read, rsp, size), None)
    if mnemonic not in ("push", "call"):
        return None

    gva = (rsp - size) & MASK64
    if mnemonic == "call":
        pushed: int | None = insn.address + insn.size
    else:
        pushed = value(insn, insn.operands[0], regs)
    before = number_at(read, gva, size)
    after = None if pushed is None else pushed & (1 << 8 * size) - 1
    return Access(gva, size, False, True, before, after)
