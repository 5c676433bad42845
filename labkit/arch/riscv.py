"""riscv64 as data: Privileged Architecture 12.1, 12.3 to 12.5.

In the state of the selftests' vm_arch_vcpu_add().
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from labkit.arch.desc import HUGE, LAST, Field, Level, Match, PagingMode
from labkit.arch.model import Arch, BootTables, Reading, UcallExit
from labkit.bits import bit, genmask

__all__ = ["RISCV64", "RISCV_SV39", "RISCV_SV48"]

_V, _R, _W, _X, _U, _A, _D = (bit(n) for n in (0, 1, 2, 3, 4, 6, 7))
_POINTER = Match(_R | _W | _X, 0)
_LEVELS = (
    Level("L3", 39, 9, leaf=HUGE),
    Level("L2", 30, 9, leaf=HUGE),
    Level("L1", 21, 9, leaf=HUGE),
    Level("L0", 12, 9, leaf=LAST, table=_POINTER),
)

# An entry without R, W and X points to a table; W without R is reserved; a pointer has neither A,
# D nor U.
RISCV_SV48 = PagingMode(
    name="riscv/SV48_4K",
    levels=_LEVELS,
    present=Match(_V),
    table=_POINTER,
    pa=Field(genmask(53, 10), -2),
    flags={"readable": _R, "writable": _W, "user": _U, "accessed": _A, "dirty": _D, "nx": _X},
    inverted=_X,
    denies={},
    made=_R,
    reserved=genmask(63, 54),
    table_reserved=_U | _A | _D,
    bad=Match(_R | _W, _W),
    selector=9 << 60,
)
RISCV_SV39 = replace(RISCV_SV48, name="riscv/SV39_4K", levels=_LEVELS[1:], selector=8 << 60)

CAUSES = {
    0: "instruction address misaligned",
    1: "instruction access fault",
    2: "illegal instruction",
    3: "breakpoint",
    4: "load address misaligned",
    5: "load access fault",
    6: "store address misaligned",
    7: "store access fault",
    8: "ecall from U-mode",
    9: "ecall from S-mode",
    12: "instruction page fault",
    13: "load page fault",
    15: "store page fault",
}
FLAGS = {"SIE": 1, "SPIE": 5, "SPP": 8, "SUM": 18, "MXR": 19}
GPRS = (
    "zero",
    "ra",
    "sp",
    "gp",
    "tp",
    "t0",
    "t1",
    "t2",
    "s0",
    "s1",
    *(f"a{i}" for i in range(8)),
    *(f"s{i}" for i in range(2, 12)),
    "t3",
    "t4",
    "t5",
    "t6",
)


def _reset(tables: BootTables) -> dict[str, int]:
    return {
        "priv": 1,
        "satp": tables.root,
        "stvec": tables.vectors,
        "sstatus": 0,
        **dict.fromkeys(GPRS[1:], 0),
    }


def _level(regs: Mapping[str, int]) -> str:
    paging = {0: "MMU off", 8: "Sv39", 9: "Sv48"}.get(regs["satp"] >> 60, "?")
    return f"{'USHM'[regs['priv']]}-mode, {paging}"


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "beq": operator.eq,
    "bne": operator.ne,
    "blt": operator.lt,
    "bge": operator.ge,
    "bgt": operator.gt,
    "ble": operator.le,
}


def _condition(mnemonic: str, operands: Sequence[str], read: Callable[[str], int]) -> bool | None:
    """BEQ to BGEU, also with a zero in the name; unsigned where it ends in u."""
    name = mnemonic.removeprefix("c.")
    compare = _COMPARISONS.get(name[:3])
    if compare is None:
        return None
    left = read(operands[0])
    right = 0 if name.endswith("z") else read(operands[1])
    if name.endswith("u"):
        return compare(left, right)
    return compare(_signed(left), _signed(right))


def _signed(value: int) -> int:
    """A 64-bit register as a signed number."""
    return (value ^ 1 << 63) - (1 << 63)


_WIDTHS = {"b": 1, "h": 2, "w": 4, "d": 8}


def _accesses(letter: str, suffixes: Sequence[str]) -> dict[str, int]:
    """Bytes by mnemonic: of one letter and a width, compressed or not, with these suffixes."""
    found = {}
    for prefix in ("", "c."):
        for width, size in _WIDTHS.items():
            for suffix in suffixes:
                found[f"{prefix}{letter}{width}{suffix}"] = size
    return found


READING = Reading(
    address=r"(?P<disp>-?\w+)\((?P<base>\w+)\)",
    loads=_accesses("l", ("", "u", "sp")),
    stores=_accesses("s", ("", "sp")),
    condition=_condition,
)

RISCV64 = Arch(
    name="riscv64",
    modes=(RISCV_SV48, RISCV_SV39),
    pc="pc",
    sp="sp",
    flags="sstatus",
    shown=("pc", *GPRS[1:], "sstatus", "satp"),
    arguments=tuple(f"a{i}" for i in range(8)),
    root="satp",
    root_field=Field(genmask(43, 0), -12),
    ucall=UcallExit("sbi", 0x08FFFFFF),  # KVM_RISCV_SELFTESTS_SBI_EXT, function 0
    flag_names=FLAGS,
    vectors=CAUSES,
    page_faults=frozenset({1, 5, 7, 12, 13, 15}),
    stubs="exception_vectors",
    nr_vectors=2 * 32,
    stack_bias=0,
    level=_level,
    reset=_reset,
    cpu_id="sscratch",
    reading=READING,
    globals={"gp": "__global_pointer$"},
)
