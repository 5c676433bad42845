"""Page-table entries by the thousand: what walk.py does for one, with numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import LAST, NONE, Level, PagingMode

__all__ = ["U64", "Bools", "Kinds", "classify_all", "frames", "runs"]

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


class Kinds(NamedTuple):
    """walk.Kind for an array of entries; what is present and neither table nor leaf is reserved."""

    present: Bools
    table: Bools
    leaf: Bools


def classify_all(mode: PagingMode, level: Level, entries: U64) -> Kinds:
    """walk.classify() for many entries of one level."""
    present = (entries & np.uint64(mode.present.mask)) == np.uint64(mode.present.value)
    table = leaf = np.zeros_like(present)
    if level.leaf is not LAST:
        table = present & ((entries & np.uint64(mode.table.mask)) == np.uint64(mode.table.value))
    if level.leaf is not NONE:
        leaf = present & ~table & ((entries & np.uint64(mode.leaf_reserved(level))) == 0)
    if mode.reserved:
        table = table & ((entries & np.uint64(mode.reserved)) == 0)
    return Kinds(present, table, leaf)


def frames(mode: PagingMode, entries: U64) -> U64:
    """The frame of every entry, as a gpa."""
    low = entries & np.uint64(mode.pa.mask)
    return low >> np.uint64(mode.pa.shift) if mode.pa.shift >= 0 else low << np.uint64(-mode.pa.shift)


def runs(gva: U64, size: U64, running: tuple[U64, ...], equal: tuple[NDArray[np.generic], ...]) -> tuple[Indices, Indices]:
    """First and last index of each run of neighbouring pages.

    Within a run gva and every running column advance by the page size; size and every equal column stay.
    """
    if not len(gva):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    cut = size[1:] != size[:-1]
    for column in (gva, *running):
        cut |= column[1:] != column[:-1] + size[:-1]
    for other in equal:
        cut |= other[1:] != other[:-1]
    first = np.concatenate([[0], np.flatnonzero(cut) + 1])
    return first, np.concatenate([first[1:], [len(gva)]]) - 1
