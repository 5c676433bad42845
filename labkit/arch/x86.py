"""x86-64 as data (Intel SDM vol. 3A 4.5, AMD APM vol. 2 5.3)."""

from __future__ import annotations

from dataclasses import replace

from labkit.arch.desc import HUGE, LAST, Field, Level, Match, PagingMode
from labkit.bits import bit, genmask

__all__ = ["X86_PXXV48_4K", "X86_PXXV57_4K"]

# Four levels. PS (bit 7) is reserved in a PML4 entry; bit 12 of a huge leaf is PAT.
X86_PXXV48_4K = PagingMode(
    name="x86/PXXV48_4K",
    levels=(
        Level("PML4", 39, 9),
        Level("PDPT", 30, 9, leaf=HUGE),
        Level("PD", 21, 9, leaf=HUGE),
        Level("PT", 12, 9, leaf=LAST),
    ),
    present=Match(bit(0)),
    pa=Field(genmask(51, 12)),
    flags={"writable": bit(1), "user": bit(2), "accessed": bit(5), "dirty": bit(6), "nx": bit(63)},
    table=Match(bit(7), 0),
    huge=bit(7),
    pat_huge=bit(12),
    all_of=("writable", "user"),
    any_of=("nx",),
)

# Five levels (CR4.LA57).
X86_PXXV57_4K = replace(
    X86_PXXV48_4K, name="x86/PXXV57_4K", levels=(Level("PML5", 48, 9), *X86_PXXV48_4K.levels)
)
