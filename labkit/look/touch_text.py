"""What an instruction touches, as its text says: for architectures whose loads and stores are few.

Which mnemonics load and store, how an address is written and when a branch is taken is data of the
architecture (`Reading`).
"""

from __future__ import annotations

import re

from labkit.arch.model import Arch, Reading
from labkit.engines.disasm import Decoded, branch_target, disassemble
from labkit.look.access import MASK64, Access, Operands, Read, Regs, number_at

__all__ = ["operands_in_text"]


def operands_in_text(
    arch: Arch, reading: Reading, data: bytes, regs: Regs, pc: int, read: Read
) -> Operands:
    """The operands of the first instruction in data; empty for bytes that are no instruction."""
    insn = next(disassemble(arch.name, data, pc), None)
    if insn is None:
        return Operands()

    words = [word.strip() for word in insn.op_str.split(",")]
    target = branch_target(arch.name, insn)
    taken = reading.condition(insn.mnemonic, words, lambda name: _register(name, regs))

    address = re.search(reading.address, insn.op_str)
    if address is None:
        return Operands(target=target, taken=taken)
    size = _size(reading, insn.mnemonic, words)
    if not size:
        return Operands(target=target, taken=taken)
    gva = _gva(address, regs)
    before = number_at(read, gva, size, arch.mode.byteorder)
    access = Access(
        gva=gva,
        size=size,
        reads=insn.mnemonic in reading.loads,
        writes=insn.mnemonic in reading.stores,
        before=before,
        after=None if before is None else _stored(reading, insn, words, size, regs),
    )
    return Operands((access,), target, taken)


def _size(reading: Reading, mnemonic: str, words: list[str]) -> int:
    """How many bytes an instruction loads or stores; 0 for one that does neither."""
    size = reading.loads.get(mnemonic, 0) or reading.stores.get(mnemonic, 0)
    # arm64 has one mnemonic for x registers, whose size the table gives, and w registers
    if words[0].startswith("w") and size in (8, 16):
        return size // 2
    return size


def _gva(address: re.Match[str], regs: Regs) -> int:
    """The address that the groups of a match name: base, disp, index and shift, if there."""
    parts = address.groupdict()
    gva = _register(parts["base"], regs) + int(parts.get("disp") or "0", 0)
    if parts.get("index"):
        gva += _register(parts["index"], regs) << int(parts.get("shift") or 0)
    return gva & MASK64


def _stored(reading: Reading, insn: Decoded, words: list[str], size: int, regs: Regs) -> int | None:
    """What a store leaves in memory; known of one from one register."""
    if insn.mnemonic not in reading.stores or insn.mnemonic in reading.loads:
        return None
    if size > 8 or "x" in insn.mnemonic:  # a pair; a store-exclusive, which may fail
        return None
    if not words[0].lstrip("%")[:1].isalpha():
        return None
    return _register(words[0], regs) & (1 << 8 * size) - 1


def _register(name: str, regs: Regs) -> int:
    """A register as the disassembler names it (%r1, w3); 0 for one that always reads as zero."""
    name = name.lstrip("%")
    if name.startswith("w"):  # the lower half of an x register of arm64
        return regs.get("x" + name[1:], 0) & 0xFFFFFFFF
    return regs.get(name, 0)
