"""s390x as data: z/Architecture Principles of Operation SA22-7832.

Chapter 3 for DAT, 4 and 6 for PSWs and interruptions. The state is that of the selftests'
vm_arch_vcpu_add(), but for a lowcore of its own for every vCPU, by way of its prefix.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence

from labkit.arch.desc import LAST, Field, Level, Match, PagingMode
from labkit.arch.model import Arch, BootTables, Reading, UcallExit
from labkit.bits import bit, genmask

__all__ = ["LOWCORE_SIZE", "S390X", "S390_PXXV64_4K"]

_INVALID = bit(5)
_PROTECT = bit(9)
_PAGE_INVALID = bit(10)
_TYPE = 3 << 2
_LENGTH = 3


def _region(name: str, shift: int, kind: int) -> Level:
    """A region table: its entries say which kind it is, and that the table below is whole."""
    return Level(
        name,
        shift,
        11,
        must=Match(_TYPE | _LENGTH, kind << 2 | _LENGTH),
        empty=_INVALID | kind << 2,
    )


# Three region tables, a segment table, a page table: 16 KiB each, the last 2 KiB. No large pages:
# Unicorn walks none.
S390_PXXV64_4K = PagingMode(
    name="s390/P44V64_4K",
    levels=(
        _region("R1", 53, 3),
        _region("R2", 42, 2),
        _region("R3", 31, 1),
        Level("SEG", 20, 11, must=Match(_TYPE, 0), empty=_INVALID, pa=Field(genmask(63, 11))),
        Level(
            "PAGE",
            12,
            8,
            leaf=LAST,
            present=Match(_PAGE_INVALID, 0),
            table=Match(_PAGE_INVALID),
            must=Match(bit(11), 0),
            empty=_PAGE_INVALID,
        ),
    ),
    present=Match(_INVALID, 0),
    pa=Field(genmask(63, 12)),
    flags={"writable": _PROTECT},
    inverted=_PROTECT,
    all_of=("writable",),
    absent=("user", "nx"),
    selector=0xF,
    signed=False,
    byteorder="big",
)

PSW_MASK = 0x0400000180000000  # DAT, 64-bit addressing
CR0 = 0x40000  # AFP
LOWCORE_SIZE = 0x2000  # bytes
PGM_NEW_PSW = 0x1D0  # in the lowcore

# Program interruption codes.
PROGRAM = {
    0x01: "operation",
    0x02: "privileged operation",
    0x03: "execute",
    0x04: "protection",
    0x05: "addressing",
    0x06: "specification",
    0x07: "data",
    0x08: "fixed-point overflow",
    0x09: "fixed-point divide",
    0x10: "segment translation",
    0x11: "page translation",
    0x12: "translation specification",
    0x13: "special operation",
    0x38: "ASCE type",
    0x39: "region-first translation",
    0x3A: "region-second translation",
    0x3B: "region-third translation",
}

FLAGS = {
    "PER": 62,
    "DAT": 58,
    "I/O": 57,
    "EXT": 56,
    "MCHK": 50,
    "WAIT": 49,
    "PROBLEM": 48,
    "CC2": 45,
    "CC1": 44,
    "EA": 32,
    "BA": 31,
}


def _reset(tables: BootTables) -> dict[str, int]:
    return {
        "pswm": PSW_MASK,
        "cr0": CR0,
        "cr1": tables.root,
        "prefix": tables.area,
        **{f"r{i}": 0 for i in range(16)},
    }


def _lowcore(tables: BootTables) -> dict[int, bytes]:
    """Where a program interruption goes on; without vectors, to a PSW that is none."""
    new_psw = bytes(16)
    if tables.vectors:
        new_psw = struct.pack(">2Q", PSW_MASK, tables.vectors)
    return {PGM_NEW_PSW: new_psw}


def _level(regs: Mapping[str, int]) -> str:
    state = "problem" if regs["pswm"] >> FLAGS["PROBLEM"] & 1 else "supervisor"
    dat = "on" if regs["pswm"] >> FLAGS["DAT"] & 1 else "off"
    return f"{state} state, DAT {dat}"


# The condition codes 0 to 3 on which a branch is taken, as bits 8 to 1.
_CODES = {
    "e": 8,
    "ne": 7,
    "h": 2,
    "nh": 13,
    "l": 4,
    "nl": 11,
    "he": 10,
    "nhe": 5,
    "le": 12,
    "nle": 3,
    "lh": 6,
    "nlh": 9,
    "o": 1,
    "no": 14,
    "z": 8,
    "nz": 7,
    "p": 2,
    "np": 13,
    "m": 4,
    "nm": 11,
}

# COMPARE AND BRANCH: logical (unsigned), 64 bits, 32 sign-extended, immediate or register, code.
_COMPARE = re.compile(r"c(?P<logical>l)?(?P<long>g)?(?P<extended>f)?(?P<form>[ir])j(?P<code>\w+)")


def _condition(mnemonic: str, operands: Sequence[str], read: Callable[[str], int]) -> bool | None:
    """Whether a branch will be taken (Principles of Operation, chapter 7).

    There are branches on a count, on the condition code, and on a comparison of their own.
    """
    if mnemonic in ("brct", "brctg"):
        bits = 64 if mnemonic == "brctg" else 32
        return _low_bits(read(operands[0]) - 1, bits) != 0

    code = mnemonic.removeprefix("j").removeprefix("g")
    if mnemonic.startswith("j") and code in _CODES:
        return _is_taken(code, read("pswm") >> FLAGS["CC1"] & 3)

    compare = _COMPARE.fullmatch(mnemonic)
    if compare is None or compare["code"] not in _CODES:
        return None
    return _is_taken(compare["code"], _compared(compare, operands, read))


def _is_taken(code: str, condition: int) -> bool:
    return bool(_CODES[code] << condition & 8)


def _compared(compare: re.Match[str], operands: Sequence[str], read: Callable[[str], int]) -> int:
    """The condition code of a comparison: 0 equal, 1 the first is lower, 2 it is higher."""
    bits = 64 if compare["long"] else 32
    first = _low_bits(read(operands[0]), bits)
    second = read(operands[1]) if compare["form"] == "r" else int(operands[1], 0)
    second = _low_bits(second, bits)
    if not compare["logical"]:
        first = _signed(first, bits)
        second = _signed(second, bits)
    if first == second:
        return 0
    return 1 if first < second else 2


def _low_bits(value: int, bits: int) -> int:
    return value & (1 << bits) - 1


def _signed(value: int, bits: int) -> int:
    sign = 1 << bits - 1
    return (value ^ sign) - sign


_BYTES = {"": 4, "y": 4, "g": 8, "h": 2, "hy": 2, "c": 1, "cy": 1}
_ATOMIC = {"laog": 8, "lang": 8, "laag": 8}  # which load and store
READING = Reading(
    address=r"(?P<disp>-?\w+)\(((?P<index>%\w+), )?(?P<base>%\w+)\)",
    loads={
        **{f"l{kind}": size for kind, size in _BYTES.items() if "c" not in kind},
        **dict.fromkeys(("lgf", "llgf", "a"), 4),
        **dict.fromkeys(("llgc", "llc", "lgb", "ic"), 1),
        **dict.fromkeys(("llgh", "llh", "lgh"), 2),
        **dict.fromkeys(("ag", "sg", "ng", "og", "xg", "cg", "clg", "ltg"), 8),
        **_ATOMIC,
    },
    stores={**{f"st{kind}": size for kind, size in _BYTES.items()}, **_ATOMIC},
    condition=_condition,
)

S390X = Arch(
    name="s390x",
    modes=(S390_PXXV64_4K,),
    pc="pc",
    sp="r15",
    flags="pswm",
    shown=("pc", *(f"r{i}" for i in range(16)), "pswm", "cr1"),
    arguments=tuple(f"r{i}" for i in range(2, 7)),
    root="cr1",
    root_field=Field(genmask(63, 12)),
    ucall=UcallExit("diag", 0x501),
    flag_names=FLAGS,
    vectors=PROGRAM,
    page_faults=frozenset({0x04, 0x10, 0x11, 0x39, 0x3A, 0x3B}),
    stubs="pgm_check_handler",
    nr_vectors=128,
    stack_bias=160,
    level=_level,
    reset=_reset,
    area=LOWCORE_SIZE,
    area_image=_lowcore,
    reading=READING,
)
