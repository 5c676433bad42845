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

ZERO = ("xzr", "wzr", "zero")  # they always read as zero


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
    if size < 8:
        return size
    nr_registers = size // 8
    letter = _data_register(reading, mnemonic, words)[0]
    return nr_registers * reading.widths.get(letter, 8)


def _data_register(reading: Reading, mnemonic: str, words: list[str]) -> str:
    """The register that is loaded or stored, the first of a pair."""
    if _is_exclusive_store(reading, mnemonic):
        return words[1]  # the first will say whether it succeeded
    return words[0]


def _is_exclusive_store(reading: Reading, mnemonic: str) -> bool:
    return mnemonic in reading.stores and "x" in mnemonic


def _gva(address: re.Match[str], regs: Regs) -> int:
    """The address that the groups of a match name: base, disp, index and shift, if there."""
    parts = address.groupdict()
    gva = _register(parts["base"], regs) + int(parts.get("disp") or "0", 0)
    if parts.get("index"):
        gva += _register(parts["index"], regs) << int(parts.get("shift") or 0)
    return gva & MASK64


def _stored(reading: Reading, insn: Decoded, words: list[str], size: int, regs: Regs) -> int | None:
    """What a store leaves in memory; known of one from one register that was read."""
    mnemonic = insn.mnemonic
    if mnemonic not in reading.stores or mnemonic in reading.loads:
        return None
    is_pair = reading.stores[mnemonic] > 8
    if is_pair or _is_exclusive_store(reading, mnemonic):
        return None
    stored = _value(words[0], regs)
    return None if stored is None else stored & (1 << 8 * size) - 1


# --- registers


def _register(name: str, regs: Regs) -> int:
    """What a register holds; 0 for one that is not in regs."""
    return _value(name, regs) or 0


def _value(name: str, regs: Regs) -> int | None:
    """What a register holds as the disassembler names it (%r1, w3); None when nobody read it."""
    name = name.lstrip("%")
    if name in ZERO:
        return 0
    if name.startswith("w"):  # the lower half of an x register of arm64
        whole = regs.get("x" + name[1:])
        return None if whole is None else whole & 0xFFFFFFFF
    return regs.get(name)
