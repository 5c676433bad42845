"""How a CPU translates addresses now, as its registers say: the format of its tables, the root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from labkit.arch.desc import Level, PagingMode
from labkit.bits import genmask

__all__ = ["PAGING", "Paging", "Translation", "as_levels"]

ReadRegister = Callable[[str], int]


@dataclass(frozen=True)
class Translation:
    """A format of page tables, the gpa of the root table, and the registers that say so."""

    mode: PagingMode
    root: int
    said_by: str


@dataclass(frozen=True)
class Paging:
    """What the registers say: so many levels; None for a format that is not known here.

    top_bits is what the first of them translates (0: as always).
    """

    levels: int | None
    root: int
    said_by: str
    top_bits: int = 0


def as_levels(mode: PagingMode, paging: Paging) -> PagingMode:
    """The same format with another number of levels, or a first one of another width."""
    levels = mode.levels
    wanted = paging.levels or len(levels)
    if wanted < len(levels):
        levels = levels[len(levels) - wanted :]
    while len(levels) < wanted:
        top = levels[0]
        name = f"PML{len(levels) + 1}" if top.name.startswith("PML") else f"L{len(levels)}"
        levels = (Level(name, top.shift + top.bits, 9, leaf=top.leaf), *levels)
    if paging.top_bits and paging.top_bits != levels[0].bits:
        levels = (replace(levels[0], bits=paging.top_bits), *levels[1:])
    if levels == mode.levels:
        return mode
    bits = levels[0].shift + levels[0].bits
    return replace(mode, name=f"{mode.name}, {bits} bits in {len(levels)} levels", levels=levels)


def _x86(read: ReadRegister) -> Paging | None:
    """CR0.PG, CR4.LA57 and CR3 (SDM vol. 3A 4.5)."""
    if not read("cr0") >> 31 & 1:
        return None
    la57, cr3 = read("cr4") >> 12 & 1, read("cr3")
    return Paging(4 + la57, cr3 & genmask(51, 12), f"CR3 {cr3:#x}, CR4.LA57={la57}")


def _arm64(read: ReadRegister) -> Paging | None:
    """SCTLR_EL1.M, TCR_EL1.T0SZ and TTBR0_EL1 (Arm ARM D8.2): the lower half, 4 KiB granule."""
    if not read("sctlr_el1") & 1:
        return None
    tcr, ttbr0 = read("tcr_el1"), read("ttbr0_el1")
    size, granule = tcr & 0x3F, tcr >> 14 & 3
    bits = 64 - min(max(size, 16), 39)
    levels = -(-(bits - 12) // 9)
    said = f"TTBR0_EL1 {ttbr0:#x}, TCR_EL1.T0SZ={size}"
    if granule:
        return Paging(None, ttbr0 & genmask(47, 1), f"{said}, TG0={granule:#b}: no 4 KiB granule")
    return Paging(levels, ttbr0 & genmask(47, 1), said, bits - 12 - 9 * (levels - 1))


_SATP_LEVELS = {8: 3, 9: 4, 10: 5}


def _riscv64(read: ReadRegister) -> Paging | None:
    """satp (Privileged Architecture 12.1.11)."""
    satp = read("satp")
    mode = satp >> 60
    if not mode:
        return None
    said = f"satp {satp:#x}, MODE={mode}"
    return Paging(_SATP_LEVELS.get(mode), (satp & genmask(43, 0)) << 12, said)


def _s390x(read: ReadRegister) -> Paging | None:
    """PSW bit 5 and the primary ASCE's designation type (Principles of Operation 3.11.3)."""
    asce = read("cr1")
    if not read("pswm") >> 58 & 1 or asce & 1 << 5:  # no DAT, or a real space
        return None
    kind = asce >> 2 & 3
    return Paging(2 + kind, asce & genmask(63, 12), f"CR1 {asce:#x}, DT={kind:#04b}")


PAGING: dict[str, Callable[[ReadRegister], Paging | None]] = {
    "x86_64": _x86,
    "arm64": _arm64,
    "riscv64": _riscv64,
    "s390x": _s390x,
}
"""By architecture: what the registers say, None while paging is off."""
