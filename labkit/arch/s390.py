"""s390x as data (z/Architecture Principles of Operation SA22-7832: chapter 3 for DAT, 4 and 6 for PSWs and interruptions).

The state is that of the selftests' vm_arch_vcpu_add(), but for a lowcore of its own for every vCPU, by way of its prefix.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence

from labkit.arch.desc import LAST, Field, Level, Match, PagingMode
from labkit.arch.model import Arch, BootTables, Reading, UcallExit
from labkit.bits import bit, genmask

__all__ = ["LOWCORE_SIZE", "S390X", "S390_PXXV64_4K"]

_INVALID, _PROTECT, _PAGE_INVALID = bit(5), bit(9), bit(10)
_TYPE, _LENGTH = 3 << 2, 3


def _region(name: str, shift: int, kind: int) -> Level:
    return Level(
        name,
        shift,
        11,
        must=Match(_TYPE | _LENGTH, kind << 2 | _LENGTH),
        empty=_INVALID | kind << 2,
    )


# Three region tables, a segment table, a page table: 16 KiB each, the last 2 KiB. No large pages: Unicorn walks none.
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
LOWCORE_SIZE, PGM_NEW_PSW = 0x2000, 0x1D0
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
    return {
        PGM_NEW_PSW: struct.pack(">2Q", PSW_MASK, tables.vectors) if tables.vectors else bytes(16)
    }


def _level(regs: Mapping[str, int]) -> str:
    return f"{'problem' if regs['pswm'] >> 48 & 1 else 'supervisor'} state, DAT {'on' if regs['pswm'] >> 58 & 1 else 'off'}"


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
}  # condition codes 0 to 3 as bits 8 to 1
_COMPARE = re.compile(r"c(l)?(g)?(f)?([ir])(j)(\w+)")


def _condition(mnemonic: str, operands: Sequence[str], read: Callable[[str], int]) -> bool | None:
    """Branches on the condition code, on a count, and on a comparison of their own (Principles of Operation, chapter 7)."""
    if mnemonic in ("brct", "brctg"):
        return read(operands[0]) - 1 & (1 << (64 if mnemonic == "brctg" else 32)) - 1 != 0
    if mnemonic.removeprefix("j").removeprefix("g") in _CODES and mnemonic[0] == "j":
        return bool(_CODES[mnemonic[1:].removeprefix("g")] << (read("pswm") >> 44 & 3) & 8)
    match = _COMPARE.fullmatch(mnemonic)
    if match is None or match[6] not in _CODES:
        return None
    bits = 64 if match[2] else 32
    pair = [
        value & (1 << bits) - 1
        for value in (
            read(operands[0]),
            read(operands[1]) if match[4] == "r" else int(operands[1], 0),
        )
    ]
    a, b = pair if match[1] else [(value ^ 1 << bits - 1) - (1 << bits - 1) for value in pair]
    return bool(_CODES[match[6]] & (8 if a == b else 4 if a < b else 2))


_BYTES = {"": 4, "y": 4, "g": 8, "h": 2, "hy": 2, "c": 1, "cy": 1}
_ATOMIC = {"laog": 8, "lang": 8, "laag": 8}
READING = Reading(
    r"(?P<disp>-?\w+)\(((?P<index>%\w+), )?(?P<base>%\w+)\)",
    {
        **{f"l{kind}": size for kind, size in _BYTES.items() if "c" not in kind},
        **dict.fromkeys(("lgf", "llgf", "a"), 4),
        **dict.fromkeys(("llgc", "llc", "lgb", "ic"), 1),
        **dict.fromkeys(("llgh", "llh", "lgh"), 2),
        **dict.fromkeys(("ag", "sg", "ng", "og", "xg", "cg", "clg", "ltg"), 8),
        **_ATOMIC,
    },
    {**{f"st{kind}": size for kind, size in _BYTES.items()}, **_ATOMIC},
    _condition,
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
