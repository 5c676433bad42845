"""Page-table entries by the thousand: what walk.py does for one, with numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import LAST, NONE, Field, Level, Match, PagingMode

__all__ = [
    "MASK64",
    "U64",
    "Bools",
    "Indices",
    "Kinds",
    "classify_all",
    "frames",
    "grants",
    "match_all",
    "runs",
]

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

MASK64 = (1 << 64) - 1


class Kinds(NamedTuple):
    """walk.Kind for an array of entries; what is present and neither table nor leaf is reserved."""

    present: Bools
    table: Bools
    leaf: Bools


def classify_all(mode: PagingMode, level: Level, entries: U64) -> Kinds:
    """walk.classify() for many entries of one level."""
    present = match_all(mode.present_at(level), entries)
    good = present
    if level.must.mask:
        good = good & match_all(level.must, entries)
    if mode.bad is not None:
        good = good & ~match_all(mode.bad, entries)
    table = good & match_all(mode.table_at(level), entries)

    leaf = np.zeros_like(present)
    if level.leaf is not NONE:
        leaf = good & ~table & _all_clear(mode.leaf_reserved(level), entries)

    table_reserved = mode.reserved | mode.table_reserved
    if level.leaf is LAST:
        table = np.zeros_like(present)
    elif table_reserved:
        table = table & _all_clear(table_reserved, entries)
    return Kinds(present, table, leaf)


def match_all(match: Match, entries: U64) -> Bools:
    """Match.__call__() for many entries."""
    hits: Bools = (entries & np.uint64(match.mask)) == np.uint64(match.value)
    return hits


def _all_clear(mask: int, entries: U64) -> Bools:
    """Whether none of the bits of mask is set."""
    clear: Bools = (entries & np.uint64(mask)) == 0
    return clear


def frames(field: Field, entries: U64) -> U64:
    """The frame, or the next table, that every entry holds in a field, as a gpa."""
    found: U64 = entries & np.uint64(field.mask)
    if field.shift >= 0:
        found >>= np.uint64(field.shift)
    else:
        found <<= np.uint64(-field.shift)
    return found


def grants(mode: PagingMode, entries: U64, table: Bools) -> U64:
    """PagingMode.grants() for many entries; table says which of them point to tables."""
    plain = entries ^ np.uint64(mode.flip)
    if mode.denies is None:
        return plain
    left = np.full_like(entries, MASK64)
    for name, mask in mode.denies.items():
        taken = np.where(entries & np.uint64(mask), np.uint64(mode.flags[name]), np.uint64(0))
        left &= ~taken
    return np.where(table, left, plain)


def runs(
    gva: U64, size: U64, running: tuple[U64, ...], equal: tuple[NDArray[np.generic], ...]
) -> tuple[Indices, Indices]:
    """First and last index of each run of neighbouring pages.

    Within a run gva and every running column advance by the page size; size and every equal column
    stay.
    """
    if not len(gva):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    cut = size[1:] != size[:-1]
    for column in (gva, *running):
        cut |= column[1:] != column[:-1] + size[:-1]
    for other in equal:
        cut |= other[1:] != other[:-1]
    first = np.concatenate([[0], np.flatnonzero(cut) + 1])
    last = np.concatenate([first[1:], [len(gva)]]) - 1
    return first, last
