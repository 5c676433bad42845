"""What the instruction about to run will read, write and decide, worked out from its operands and the registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from labkit.arch import find_arch
from labkit.arch.model import Reading
from labkit.engines.disasm import Decoded, branch_target, decoder, disassemble
from labkit.errors import LabError

__all__ = ["Access", "Operands", "operands"]

MASK64 = (1 << 64) - 1
Read = Callable[[int, int], bytes]
Regs = Mapping[str, int]

_BINARY: dict[str, Callable[[int, int], int]] = {
    "mov": lambda _, b: b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "xchg": lambda _, b: b,
    "inc": lambda a, _: a + 1,
    "dec": lambda a, _: a - 1,
    "neg": lambda a, _: -a,
    "not": lambda a, _: ~a,
    "xadd": lambda a, b: a + b,
    "movabs": lambda _, b: b,
}
_BITS = {
    "bt": lambda a, m: a,
    "bts": lambda a, m: a | m,
    "btr": lambda a, m: a & ~m,
    "btc": lambda a, m: a ^ m,
}
_FLAG = {"cf": 0, "pf": 2, "zf": 6, "sf": 7, "of": 11}
_CONDITIONS: dict[str, Callable[[Mapping[str, int]], int]] = {
    "o": lambda f: f["of"],
    "b": lambda f: f["cf"],
    "e": lambda f: f["zf"],
    "be": lambda f: f["cf"] | f["zf"],
    "s": lambda f: f["sf"],
    "p": lambda f: f["pf"],
    "l": lambda f: f["sf"] ^ f["of"],
    "le": lambda f: f["zf"] | (f["sf"] ^ f["of"]),
}
_NEGATED = {"no": "o", "ae": "b", "ne": "e", "a": "be", "ns": "s", "np": "p", "ge": "l", "g": "le"}


@dataclass(frozen=True)
class Access:
    """One memory operand."""

    gva: int
    size: int  # bytes
    reads: bool
    writes: bool
    before: int | None  # None when the page tables do not map it
    after: int | None  # None when it is not written, or not known


@dataclass(frozen=True)
class Operands:
    """The instruction at the program counter, understood as far as a reader needs it."""

    accesses: tuple[Access, ...] = ()
    target: int | None = None  # of a direct jump or call
    taken: bool | None = None  # of a conditional jump
    bit: tuple[int, int, bool] | None = (
        None  # of a BT family instruction: (gva of the bitmap word, bit in it, is set)
    )


def operands(arch: str, data: bytes, regs: Regs, pc: int, read: Read) -> Operands:
    """Decode one instruction and work out its operands; an empty answer for bytes that are no instruction."""
    if (reading := find_arch(arch).reading) is not None:
        plain = next(iter(disassemble(arch, data, pc)), None)
        return (
            _read(
                reading,
                plain,
                branch_target(arch, plain),
                regs,
                read,
                find_arch(arch).mode.byteorder,
            )
            if plain
            else Operands()
        )
    insn = next(iter(decoder(arch, detail=True).disasm(data, pc)), None)
    if insn is None or insn.mnemonic in (
        "nop",
        "lea",
    ):  # they have a memory operand that nobody touches
        return Operands()
    taken = _condition(insn.mnemonic, regs["rflags"])
    target = (
        insn.operands[0].imm
        if len(insn.operands) == 1 and insn.operands[0].type == 2 and insn.mnemonic[0] in "jc"
        else None
    )
    found = [_access(insn, op, regs, read) for op in insn.operands if op.type == 3 and op.access]
    return Operands((*found, *_stack(insn, regs, read)), target, taken, _bit(insn, regs, read))


def _read(
    how: Reading,
    insn: Decoded,
    target: int | None,
    regs: Regs,
    read: Read,
    order: Literal["little", "big"],
) -> Operands:
    """What the text of an instruction says; a value that is stored is known of a store from one register."""
    parts = [part.strip() for part in insn.op_str.split(",")]
    asked = how.condition(insn.mnemonic, parts, lambda name: _plain_register(name, regs))
    where, size = (
        re.search(how.address, insn.op_str),
        how.loads.get(insn.mnemonic, 0) or how.stores.get(insn.mnemonic, 0),
    )
    if where is None or not size:
        return Operands(target=target, taken=asked)
    words = where.groupdict()
    gva = _plain_register(words["base"], regs) + int(words.get("disp") or "0", 0)
    gva += (
        _plain_register(words.get("index") or "zero", regs) << int(words.get("shift") or 0) & MASK64
    )
    size //= 2 if parts[0][0] == "w" and size in (8, 16) else 1
    writes, before = insn.mnemonic in how.stores, _load(read, gva & MASK64, size, order)
    known = (
        writes
        and before is not None
        and size <= 8
        and insn.mnemonic not in how.loads
        and "x" not in insn.mnemonic
    )
    after = (
        _plain_register(parts[0], regs) & (1 << 8 * size) - 1
        if known and parts[0].lstrip("%")[:1].isalpha()
        else None
    )
    return Operands(
        (Access(gva & MASK64, size, insn.mnemonic in how.loads, writes, before, after),),
        target,
        asked,
    )


def _plain_register(name: str, regs: Regs) -> int:
    """A register as the disassembler names it: %r1, w3; one that reads as zero has no value of its own."""
    name = name.lstrip("%")
    return regs.get("x" + name[1:], 0) & 0xFFFFFFFF if name[0] == "w" else regs.get(name, 0)


def _condition(mnemonic: str, flags: int) -> bool | None:
    if mnemonic[0] != "j" or mnemonic in ("jmp", "jrcxz", "jecxz"):
        return None
    values = {name: flags >> at & 1 for name, at in _FLAG.items()}
    name = mnemonic[1:]
    if name in _NEGATED:
        return not _CONDITIONS[_NEGATED[name]](values)
    return bool(_CONDITIONS[name](values)) if name in _CONDITIONS else None


def _value(insn: Any, op: Any, regs: Regs) -> int | None:
    if op.type == 2:
        return int(op.imm)
    if op.type == 1:
        return _register(insn.reg_name(op.reg), regs)
    return None


def _register(name: str, regs: Regs) -> int | None:
    """A register of any width by its part's name (eax, r8d, cl)."""
    if name in regs:
        return regs[name]
    if name.startswith("r") and name[-1] in "dwb" and name[:-1] in regs:
        return int(regs[name[:-1]] & {"d": 0xFFFFFFFF, "w": 0xFFFF, "b": 0xFF}[name[-1]])
    if name.startswith("e") and "r" + name[1:] in regs:
        return int(regs["r" + name[1:]] & 0xFFFFFFFF)
    if "r" + name in regs:
        return int(regs["r" + name] & 0xFFFF)
    wide = f"r{name[0]}x" if len(name) == 2 else f"r{name[:-1]}"  # al, ah; dil
    if name[-1] in "lh" and wide in regs:
        return int(regs[wide] >> (8 if name[-1] == "h" else 0) & 0xFF)
    return None


def _address(insn: Any, op: Any, regs: Regs) -> int:
    mem = op.mem
    base = _register(insn.reg_name(mem.base), regs) if mem.base else 0
    index = _register(insn.reg_name(mem.index), regs) if mem.index else 0
    segment = insn.reg_name(mem.segment) if mem.segment else ""
    at = (
        (base or 0)
        + (index or 0) * mem.scale
        + mem.disp
        + (insn.size if mem.base and insn.reg_name(mem.base) == "rip" else 0)
    )
    return int(at + regs.get(f"{segment}_base", 0)) & MASK64


def _load(
    read: Read, gva: int, size: int, order: Literal["little", "big"] = "little"
) -> int | None:
    try:
        return int.from_bytes(read(gva, size), order)
    except LabError:
        return None


def _access(insn: Any, op: Any, regs: Regs, read: Read) -> Access:
    gva, size = _address(insn, op, regs), op.size
    name = insn.mnemonic.split()[-1]
    mask = 0
    if name in _BITS and len(insn.operands) == 2 and insn.operands[1].type == 1:
        gva, bit = _bit_word(gva, size, _value(insn, insn.operands[1], regs) or 0)
        mask = 1 << bit
    before = _load(read, gva, size)
    writes = bool(op.access & 2) and name not in ("bt", "cmp", "test")
    after = None
    if writes and before is not None:
        other = next((_value(insn, o, regs) for o in insn.operands if o.type != 3), 0)
        if name in _BITS:
            after = _BITS[name](before, mask or 1 << ((other or 0) % (8 * size)))
        elif name in _BINARY and other is not None:
            after = _BINARY[name](before, other) & (1 << 8 * size) - 1
    return Access(gva, size, bool(op.access & 1) or name in _BITS, writes, before, after)


def _bit_word(gva: int, size: int, index: int) -> tuple[int, int]:
    """The word that a BT with a register index really touches: the index reaches beyond the operand (SDM vol. 2A BT)."""
    signed = index - (1 << 64) if index >> 63 else index
    return (gva + (signed // (8 * size)) * size) & MASK64, signed % (8 * size)


def _bit(insn: Any, regs: Regs, read: Read) -> tuple[int, int, bool] | None:
    if (
        insn.mnemonic.split()[-1] not in _BITS
        or len(insn.operands) != 2
        or insn.operands[0].type != 3
    ):
        return None
    op, size = insn.operands[0], insn.operands[0].size
    index = _value(insn, insn.operands[1], regs) or 0
    gva = _address(insn, op, regs)
    gva, bit = (
        _bit_word(gva, size, index) if insn.operands[1].type == 1 else (gva, index % (8 * size))
    )
    word = _load(read, gva, size)
    return None if word is None else (gva, bit, bool(word >> bit & 1))


def _stack(insn: Any, regs: Regs, read: Read) -> list[Access]:
    """The implicit stack access of PUSH, POP, CALL and RET."""
    name, rsp = insn.mnemonic, regs["rsp"]
    if name in ("push", "call"):
        value = insn.address + insn.size if name == "call" else _value(insn, insn.operands[0], regs)
        gva = (rsp - 8) & MASK64
        return [
            Access(
                gva, 8, False, True, _load(read, gva, 8), None if value is None else value & MASK64
            )
        ]
    if name in ("pop", "ret"):
        return [Access(rsp, 8, True, False, _load(read, rsp, 8), None)]
    return []
