"""s390x instructions that Unicorn carries out wrongly without a word.

The host carries them out (Principles of Operation, chapter 7). They were found by comparing with a
later QEMU. The condition code of signed additions and subtractions is wrong in two cases only:
the smallest number added to itself, or taken from zero, is an overflow. They are common, so only
those are looked after whose condition code may tell: a branch behind them takes overflow for
something else, or their block ends before the code is set anew.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from labkit.engines.unicorn.isa.plain import PlainQuirks

if TYPE_CHECKING:
    from labkit.engines.exits import Exit
    from labkit.engines.unicorn.isa.traps import Trap

__all__ = ["CC", "HostInsns", "host_kind", "key", "size_of"]

MASK64 = (1 << 64) - 1
CC = 3 << 44
_KINDS = {
    0xEC51: "insert",
    0xEC5D: "insert",
    0xB9E0: "load_high",
    0xC604: "compare_half",
    0xC605: "compare_half",
}  # by `key`
_SELECT = frozenset({0xEC54, 0xEC56, 0xEC57})  # RNSBG, ROSBG, RXSBG; wrong where they only test
_ICM, _BAD_MASKS = frozenset({0xBF, 0xEB80, 0xEB81}), frozenset({5, 7, 9, 10, 11, 13, 14})
# key: (whether it subtracts, bits, where its first operand is); 0 bits: the high half.
# What has a short immediate cannot overflow so
_SUMS = {
    0x1A: (0, 32, "rr"),
    0x1B: (1, 32, "rr"),
    0x5A: (0, 32, "rx"),
    0x5B: (1, 32, "rx"),
    0xE35A: (0, 32, "rx"),
    0xE35B: (1, 32, "rx"),
    0xE308: (0, 64, "rx"),
    0xE309: (1, 64, "rx"),
    0xB908: (0, 64, "rr"),
    0xB909: (1, 64, "rr"),
    0xB9F8: (0, 32, "rrr"),
    0xB9F9: (1, 32, "rrr"),
    0xB9E8: (0, 64, "rrr"),
    0xB9E9: (1, 64, "rrr"),
    0xC209: (0, 32, "imm"),
    0xCC08: (0, 0, "imm"),
    0xB9C8: (0, 0, "rrr"),
    0xB9C9: (1, 0, "rrr"),
    0xB9D8: (0, 0, "low"),
    0xB9D9: (1, 0, "low"),
}
_SETTERS = frozenset(
    {
        *range(0x10, 0x18),
        0x19,
        0x1E,
        0x1F,
        0x49,
        *range(0x54, 0x5A),
        0x5E,
        0x5F,
        0x95,
        *range(0xD4, 0xD8),
        0xA70A,
        0xA70B,
        0xA70E,
        0xA70F,
        0xB902,
        0xB912,
        0xB920,
        0xB921,
        0xB930,
        0xB931,
        *range(0xC20C, 0xC210),
        0xE302,
        0xE312,
        0xE320,
        0xE321,
        0xE30A,
        0xE30B,
        *range(0xE380, 0xE383),
        *(
            0xEB00 | code
            for code in (0x14, 0x30, 0xE4, 0xE6, 0xE7, 0xE8, 0xEA, 0xF4, 0xF6, 0xF7, 0xF8, 0xFA)
        ),
        *_SUMS,
    }
)
_MASKED = frozenset(
    {
        0x07,
        0x47,
        0xA704,
        0xC004,
        0xB9E0,
        0xB9E2,
        0xB9F2,
        *range(0xEBE0, 0xEBE4),
        0xEBF2,
        0xEBF3,
        0xEC42,
        0xEC46,
        0xEC4E,
    }
)
_READERS = frozenset(
    {0xB222, 0xB98D, 0xB988, 0xB989, 0xB998, 0xB999, 0xE388, 0xE389, 0xE398, 0xE399}
)  # IPM, EPSW; ALC, SLB
_BRANCHES = frozenset(
    {
        0x05,
        0x06,
        0x07,
        0x0D,
        0x46,
        0x47,
        0x4D,
        0x84,
        0x85,
        *range(0xA704, 0xA708),
        0xC004,
        0xC005,
        *(0xEC00 | code for code in (0x44, 0x45, 0x64, 0x65, 0x76, 0x77, *range(0x7C, 0x80))),
    }
)


def size_of(first: int) -> int:
    """Bytes of the instruction that begins with this byte."""
    return (2, 4, 4, 6)[first >> 6]


def key(insn: bytes) -> int:
    """The operation code: one byte, or that and what its format adds."""
    first = insn[0]
    if first in (0xB2, 0xB9):
        return first << 8 | insn[1]
    if first in (0xA5, 0xA7, 0xC0, 0xC2, 0xC4, 0xC6, 0xCC):
        return first << 8 | insn[1] & 15
    return first << 8 | insn[-1] if first in (0xE3, 0xEB, 0xEC) else first


def host_kind(data: bytes, at: int) -> str | None:
    """How the host carries out the instruction at an offset of a block; None when Unicorn may."""
    insn = data[at : at + size_of(data[at])]
    code = key(insn)
    if code in _SELECT and insn[2] & 0x80:
        return "test_bits"
    if code in _ICM and insn[1] & 15 in _BAD_MASKS:
        return "insert_bytes"
    if code in _SUMS and _tells(data, at, _SUMS[code][0]):
        return "sum"
    return _KINDS.get(code)


def _tells(data: bytes, at: int, wrong: int) -> bool:
    """Whether what follows in a block could tell the condition code 3 from ours.

    Ours is the one that Unicorn sets instead.
    """
    at += size_of(data[at])
    while at < len(data):
        insn = data[at : at + size_of(data[at])]
        code = key(insn)
        if code in _READERS:
            return True
        # A mask that chooses both condition codes, or neither, cannot tell them apart
        mask = _mask(insn)
        if code in _MASKED and mask & 1 != mask >> 3 - wrong & 1:
            return True
        if code in _SETTERS or code in _BRANCHES:
            return False
        at += len(insn)
    return True


def _mask(insn: bytes) -> int:
    """The four bits by which a conditional instruction chooses condition codes."""
    if insn[0] == 0xB9:
        return insn[2] >> 4
    if insn[0] in (0xEB, 0xEC):
        return insn[1] & 15
    return insn[1] >> 4


class HostInsns(PlainQuirks):
    """What those instructions do."""

    def _set(self, trap: Trap, cc: int, **regs: int) -> None:
        self.retire(trap, pswm=self.was[1] & ~CC | cc << 44, **regs)

    def _address(self, data: bytes, index: int = 0) -> int:
        """Base, index, and a displacement of 12 bits or, in six bytes, 20."""
        high = _signed(data[4], 8) if len(data) == 6 else 0
        gva = high << 12 | (data[2] & 15) << 8 | data[3]
        for register in (data[2] >> 4, index):
            if register:  # 0 stands for none
                gva += self.was[2 + register]
        return gva & MASK64

    def _number(self, gva: int, size: int) -> int | None:
        data = self.core.memory.read(gva, size)
        return None if data is None else int.from_bytes(data, "big", signed=True)

    def _do_unicorns(self, trap: Trap) -> Exit | None:
        """Let Unicorn carry it out."""
        core = self.core
        with core.passing(trap):
            exit = core.run_one()
            if exit is None and self.pc() == trap.gva:
                after = core.insns
                exit = core.run_one()
                core.recount(after)
        return exit

    def _do_insert(self, trap: Trap) -> None:
        """ROTATE THEN INSERT SELECTED BITS HIGH and LOW, of which Unicorn makes something else.

        LLVM likes them.
        """
        registers, first, last, turns, opcode = trap.data[1:]
        target, source = registers >> 4, self.was[2 + (registers & 15)]
        low = 32 if opcode == 0x5D else 0  # HIGH: where the half that is changed begins
        half = 0xFFFFFFFF << low

        mask = sum(1 << 31 - bit + low for bit in _bits(first, last, 32))
        turned = source << (turns & 63) | source >> 64 - (turns & 63)
        sets_rest_to_zero = last & 0x80
        kept = half ^ MASK64 if sets_rest_to_zero else ~mask
        self.retire(trap, **{f"r{target}": self.was[2 + target] & kept | turned & mask})

    def _do_test_bits(self, trap: Trap) -> None:
        """ROTATE THEN AND, OR, XOR SELECTED BITS that keep nothing but the condition code."""
        registers, first, last, turns, opcode = trap.data[1:]
        left, right = self.was[2 + (registers >> 4)], self.was[2 + (registers & 15)]
        right = right << (turns & 63) | right >> 64 - (turns & 63)
        if opcode == 0x54:
            result = left & right
        elif opcode == 0x56:
            result = left | right
        else:
            result = left ^ right

        is_not_zero = any(result >> 63 - bit & 1 for bit in _bits(first, last, 64))
        self._set(trap, int(is_not_zero))

    def _do_load_high(self, trap: Trap) -> None:
        """LOAD HIGH ON CONDITION of a register, for which Unicorn takes its low half."""
        mask, target = trap.data[2] >> 4, trap.data[3] >> 4
        source = self.was[2 + (trap.data[3] & 15)]
        value = self.was[2 + target]
        condition = self.was[1] >> 44 & 3
        if mask >> 3 - condition & 1:
            value = source >> 32 << 32 | value & 0xFFFFFFFF
        self.retire(trap, **{f"r{target}": value})

    def _do_compare_half(self, trap: Trap) -> Exit | None:
        """COMPARE HALFWORD RELATIVE LONG: Unicorn reads more than a halfword."""
        half = self._number(trap.gva + 2 * struct.unpack(">i", trap.data[2:])[0] & MASK64, 2)
        if half is None:
            return self._do_unicorns(trap)
        bits = 32 if trap.data[1] & 15 == 5 else 64
        value = _signed(self.was[2 + (trap.data[1] >> 4)], bits)
        self._set(trap, _sign(value - half))
        return None

    def _do_insert_bytes(self, trap: Trap) -> Exit | None:
        """INSERT CHARACTERS UNDER MASK, where Unicorn looks for the sign in the wrong place."""
        target, mask = trap.data[1] >> 4, trap.data[1] & 15
        places = [i for i in range(4) if mask >> 3 - i & 1]
        data = self.core.memory.read(self._address(trap.data), len(places))
        if data is None:
            return self._do_unicorns(trap)
        value = self.was[2 + target]
        low = 32 if key(trap.data) == 0xEB80 else 0  # ICMH
        for byte, place in zip(data, places, strict=True):
            left = low + 24 - 8 * place
            value = value & ~(0xFF << left) | byte << left
        self._set(trap, _sign(int.from_bytes(data, "big", signed=True)), **{f"r{target}": value})
        return None

    def _do_sum(self, trap: Trap) -> Exit | None:
        """Signed ADD and SUBTRACT, of registers, memory, or a number."""
        minus, bits, form = _SUMS[key(trap.data)]
        low = 0 if bits else 32
        width = bits or 32
        target, first, second = self._operands(trap.data, form, low, width)
        if second is None:
            return self._do_unicorns(trap)
        exact = _signed(self.was[2 + first] >> low, width) + (-second if minus else second)
        result = _signed(exact, width)
        mask = (1 << width) - 1 << low
        value = self.was[2 + target] & ~mask | result << low & mask
        overflows = result != exact
        self._set(trap, 3 if overflows else _sign(result), **{f"r{target}": value})
        return None

    def _operands(
        self, data: bytes, form: str, low: int, width: int
    ) -> tuple[int, int, int | None]:
        """(number of the target, number of the first operand's register, the second operand).

        The second operand is None where it cannot be read.
        """
        target = data[1] >> 4
        if form == "rx":
            return target, target, self._number(self._address(data, data[1] & 15), width // 8)
        if form == "imm":
            return target, target, int.from_bytes(data[2:], "big", signed=True)

        target = data[-1] >> 4
        if form == "rr":
            first, second = target, data[-1] & 15
        else:
            first, second = data[-1] & 15, data[2] >> 4
        shift = 0 if form == "low" else low
        return target, first, _signed(self.was[2 + second] >> shift, width)


def _bits(first: int, last: int, width: int) -> set[int]:
    """The bits from one to another, counted from the left; they may wrap around."""
    first, last = first % width, last % width
    if first <= last:
        return set(range(first, last + 1))
    return {*range(first, width), *range(last + 1)}


def _sign(value: int) -> int:
    """The condition code of a result: 0 zero, 1 negative, 2 positive."""
    if value < 0:
        return 1
    return 2 if value else 0


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (value >> bits - 1 << bits)
