"""What matters of an x86-64 instruction before it is stepped: its count, its faults, its way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from labkit.engines.disasm import disassemble

__all__ = ["GP", "NP", "PF", "SS", "UD", "Kind", "kind_of"]

DE, DB, BP, UD, NP, SS, GP, PF, MF, XM = 0, 1, 3, 6, 11, 12, 13, 14, 16, 19  # SDM vol. 3A 6.3.1

PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
OPERAND_SIZE, ADDRESS_SIZE, LOCK = 0x66, 0x67, 0xF0
REPS = (0xF2, 0xF3)
TWO_BYTES = 0x0F  # begins opcodes of two bytes
HLT = 0xF4
STRINGS = frozenset(b"\x6c\x6d\x6e\x6f\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
COMPARES = frozenset(b"\xa6\xa7\xae\xaf")
XCHG = (0x86, 0x87)
MOV_TO_SEGMENT = 0x8E
# RET to another segment, IRET: RIP lies on top of the stack, CS behind it.
FAR = frozenset(b"\xca\xcb\xcf")
SYSRET_SYSEXIT = (b"\x07", b"\x35")  # behind 0F
# Behind 0F: SWAPGS, ENDBR64, the groups of the fences and of RDRAND. Behind them kvm_pvm stops one
# instruction too late.
LATE = (b"\x01", b"\x1e", b"\xae", b"\xc7")


class Kind(NamedTuple):
    """An instruction as the stepper sees it."""

    length: int  # of prefixes and opcode: of a string instruction and of HLT, all of it
    halts: bool
    string: bool
    rep: int  # 0, 0xF2 or 0xF3 of a string instruction
    compares: bool
    narrow: bool  # counts in ECX
    vector: int  # of an exception that it may raise beside #UD #GP #PF
    # Where on the stack it finds its next CS; 0 for what leads to CPL3 whatever lies there, -1 for
    # what stays in its ring
    selector: int
    behind: int  # bytes of all of it, where KVM may not stop behind it or must not; else 0
    shadow: bool  # it loads SS
    locked: bool

    @property
    def mask(self) -> int:
        """The bits of RCX that count iterations."""
        return 0xFFFFFFFF if self.narrow else (1 << 64) - 1


class _Prefixes(NamedTuple):
    length: int  # with a REX prefix
    rep: int
    narrow: bool
    wide: int  # bytes of an operand on the stack
    locked: bool


@lru_cache(4096)
def kind_of(code: bytes) -> Kind:
    """From the first bytes of an instruction; of none, what a fetch that faults is."""
    prefixes = _prefixes_of(code)
    at = prefixes.length
    opcode = code[at] if code else 0
    second = code[at + 1 : at + 2]

    string = opcode in STRINGS
    loads_ss = opcode == MOV_TO_SEGMENT and bool(second) and second[0] & 0x38 == 0x10
    is_late = opcode == TWO_BYTES and second in LATE
    swaps_memory = opcode in XCHG and bool(second) and second[0] < 0xC0  # which locks by itself
    return Kind(
        length=at + 1,
        halts=opcode == HLT,
        string=string,
        rep=prefixes.rep if string else 0,
        compares=opcode in COMPARES,
        narrow=prefixes.narrow,
        vector=_vector(opcode, second),
        selector=_selector(opcode, second, prefixes.wide),
        behind=_size(code) if loads_ss or is_late else 0,
        shadow=loads_ss,
        locked=prefixes.locked or swaps_memory,
    )


def _prefixes_of(code: bytes) -> _Prefixes:
    """Legacy prefixes in any order and number, then at most one REX; the last byte is no prefix.

    SDM vol. 2A 2.1.1 and 2.2.1.
    """
    at = 0
    while at < len(code) - 1 and code[at] in PREFIXES:
        at += 1
    legacy = code[:at]

    wide = 2 if OPERAND_SIZE in legacy else 4
    if at < len(code) - 1 and code[at] >> 4 == 4:  # REX
        if code[at] & 8:  # W
            wide = 8
        at += 1
    return _Prefixes(at, _last_rep(legacy), ADDRESS_SIZE in legacy, wide, LOCK in legacy)


def _last_rep(legacy: Sequence[int]) -> int:
    reps = [prefix for prefix in legacy if prefix in REPS]
    return reps[-1] if reps else 0


def _size(code: bytes) -> int:
    """Bytes of the whole instruction; 0 for bytes that are none."""
    insn = next(disassemble("x86_64", code, 0), None)
    return 0 if insn is None else insn.size


def _selector(opcode: int, second: bytes, wide: int) -> int:
    if opcode in FAR:
        return wide
    if opcode == TWO_BYTES and second in SYSRET_SYSEXIT:
        return 0
    return -1


def _vector(opcode: int, second: bytes) -> int:
    match opcode:
        case 0xF6 | 0xF7:
            return DE
        case 0xCC:
            return BP
        case 0xCD:
            return second[0] if second else GP
        case 0xF1:
            return DB
        case 0x8E | 0xCA | 0xCB | 0xCF:
            return NP
        case 0x9B | 0xD8 | 0xD9 | 0xDA | 0xDB | 0xDC | 0xDD | 0xDE | 0xDF:
            return MF
        case 0x0F:
            return XM
        case _:
            return SS
