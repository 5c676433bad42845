"""arm64 as data: Arm ARM DDI 0487, D8 for page tables, D1 for exceptions.

In the state of the selftests' aarch64_vcpu_setup().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from labkit.arch.desc import HUGE, LAST, Field, Level, Match, PagingMode
from labkit.arch.model import Arch, BootTables, Reading, UcallExit
from labkit.bits import bit, genmask

__all__ = ["ARM64", "ARM64_PXXV48_4K"]

_VALID = bit(0)
_TABLE = bit(1)

# 4 KiB granule, 48 bits. At the last level bit 1 must be set too; anything else there is as good as
# nothing.
ARM64_PXXV48_4K = PagingMode(
    name="arm64/P40V48_4K",
    levels=(
        Level("L0", 39, 9),
        Level("L1", 30, 9, leaf=HUGE),
        Level("L2", 21, 9, leaf=HUGE),
        Level("L3", 12, 9, leaf=LAST, present=Match(_VALID | _TABLE)),
    ),
    present=Match(_VALID),
    table=Match(_TABLE),
    pa=Field(genmask(47, 12)),
    pat_huge=genmask(29, 12),
    flags={"writable": bit(7), "user": bit(6), "accessed": bit(10), "nx": bit(53), "uxn": bit(54)},
    inverted=bit(7),
    denies={"writable": bit(62), "user": bit(61), "nx": bit(59), "uxn": bit(60)},
    all_of=("writable", "user"),
    any_of=("nx", "uxn"),
    made=bit(10) | 4 << 2,  # the access flag, and attribute 4 of MAIR_EL1: normal memory
    signed=False,  # TTBR0 translates the lower half only
)

MAIR = 0xFF440C0400  # nGnRnE, nGnRE, GRE, normal non-cacheable, normal
# T0SZ, IRGN0, ORGN0, SH0, EPD1, IPS 40 bits
TCR = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32
SCTLR = 0x30D00800 | 1 << 0 | 1 << 2 | 1 << 12  # RES1; M, C, I
PSTATE = 0x3C5  # DAIF masked, EL1h
FLAGS = {"N": 31, "Z": 30, "C": 29, "V": 28, "PAN": 22, "SS": 21, "D": 9, "A": 8, "I": 7, "F": 6}

# Where a synchronous exception comes from: the first vector of each group of four.
_SYNC = ("current EL, SP_EL0", "current EL", "lower EL", "lower EL, AArch32")

# Exception classes: ESR_EL1.EC.
_CLASSES = {
    0x00: "unknown",
    0x07: "FP trap",
    0x0E: "illegal state",
    0x15: "SVC",
    0x18: "MSR/MRS trap",
    0x20: "instruction abort, lower EL",
    0x21: "instruction abort",
    0x22: "PC alignment",
    0x24: "data abort, lower EL",
    0x25: "data abort",
    0x26: "SP alignment",
    0x30: "breakpoint, lower EL",
    0x31: "breakpoint",
    0x32: "step, lower EL",
    0x33: "step",
    0x34: "watchpoint, lower EL",
    0x35: "watchpoint",
    0x3C: "BRK",
}

# Handlers are numbered as in the selftests' struct handlers: 64 exception classes for each of the
# 16 vectors.
VECTORS = {
    64 * 4 * i + ec: f"{name} ({source})"
    for i, source in enumerate(_SYNC)
    for ec, name in _CLASSES.items()
}


def _reset(tables: BootTables) -> dict[str, int]:
    plain = {f"x{i}": 0 for i in range(31)}
    return {
        "pstate": PSTATE,
        "cpacr_el1": 3 << 20,
        "mair_el1": MAIR,
        "tcr_el1": TCR,
        "ttbr0_el1": tables.root,
        "sctlr_el1": SCTLR,
        "vbar_el1": tables.vectors,
        **plain,
    }


def _level(regs: Mapping[str, int]) -> str:
    mmu = "on" if regs["sctlr_el1"] & 1 else "off"
    return f"EL{regs['pstate'] >> 2 & 3}, AArch64, MMU {mmu}"


_CONDITIONS: dict[str, Callable[[bool, bool, bool, bool], bool]] = {  # Arm ARM C1.2.4
    "eq": lambda n, z, c, v: z,
    "hs": lambda n, z, c, v: c,
    "mi": lambda n, z, c, v: n,
    "vs": lambda n, z, c, v: v,
    "hi": lambda n, z, c, v: c and not z,
    "ge": lambda n, z, c, v: n == v,
    "gt": lambda n, z, c, v: n == v and not z,
}
_OPPOSITE = {"ne": "eq", "lo": "hs", "pl": "mi", "vc": "vs", "ls": "hi", "lt": "ge", "le": "gt"}


def _condition(mnemonic: str, operands: Sequence[str], read: Callable[[str], int]) -> bool | None:
    """Whether a branch on a register, on a bit of one, or on the flags will be taken."""
    if mnemonic in ("cbz", "cbnz"):
        is_zero = read(operands[0]) == 0
        return is_zero == (mnemonic == "cbz")
    if mnemonic in ("tbz", "tbnz"):
        number = int(operands[1].lstrip("#"), 0)
        is_set = bool(read(operands[0]) >> number & 1)
        return is_set == (mnemonic == "tbnz")

    name = mnemonic.removeprefix("b.")
    known = _OPPOSITE.get(name, name)
    if name == mnemonic or known not in _CONDITIONS:
        return None
    pstate = read("pstate")
    n, z, c, v = (bool(pstate >> FLAGS[flag] & 1) for flag in "NZCV")
    holds = _CONDITIONS[known](n, z, c, v)
    return holds == (name == known)


READING = Reading(
    address=r"\[(?P<base>\w+)(, (#(?P<disp>-?\w+)|(?P<index>x\w+)(, lsl #(?P<shift>\d+))?))?\]",
    loads={
        "ldr": 8,
        "ldur": 8,
        "ldrb": 1,
        "ldurb": 1,
        "ldrsb": 1,
        "ldrh": 2,
        "ldurh": 2,
        "ldrsh": 2,
        "ldrsw": 4,
        "ldp": 16,
        "ldxr": 8,
        "ldaxr": 8,
        "ldar": 8,
    },
    stores={
        "str": 8,
        "stur": 8,
        "strb": 1,
        "sturb": 1,
        "strh": 2,
        "sturh": 2,
        "stp": 16,
        "stxr": 8,
        "stlxr": 8,
        "stlr": 8,
    },
    condition=_condition,
    widths={"x": 8, "w": 4, "b": 1, "h": 2, "s": 4, "d": 8, "q": 16},
)

ARM64 = Arch(
    name="arm64",
    modes=(ARM64_PXXV48_4K,),
    pc="pc",
    sp="sp",
    flags="pstate",
    shown=("pc", *(f"x{i}" for i in range(31)), "sp", "pstate", "ttbr0_el1"),
    arguments=tuple(f"x{i}" for i in range(8)),
    root="ttbr0_el1",
    root_field=Field(genmask(47, 12)),
    ucall=UcallExit("mmio", 0, symbol="ucall_exit_mmio_addr"),
    flag_names=FLAGS,
    vectors=VECTORS,
    page_faults=frozenset(i for i in VECTORS if i % 64 in (0x20, 0x21, 0x24, 0x25)),
    stubs="vectors",
    nr_vectors=16 * 64,
    stack_bias=0,
    level=_level,
    reset=_reset,
    cpu_id="tpidr_el1",
    reading=READING,
)
