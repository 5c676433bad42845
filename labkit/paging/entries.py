"""Page-table entries by the thousand: what walk.py does for one, with numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import LAST, NONE, Field, Level, Match, PagingMode

__all__ = ["U64", "Bools", "Kinds", "classify_all", "frames", "grants", "runs"]

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
    present = _match(mode.present_at(level), entries)
    good = present if level.must.mask == 0 else present & _match(level.must, entries)
    if mode.bad is not None:
        good = good & ~_match(mode.bad, entries)
    table = good & _match(mode.table_at(level), entries)
    leaf = np.zeros_like(present)
    if level.leaf is not NONE:
        leaf = good & ~table & ((entries & np.uint64(mode.leaf_reserved(level))) == 0)
    reserved = mode.reserved | mode.table_reserved
    if level.leaf is LAST:
        table = np.zeros_like(present)
    elif reserved:
        table = table & ((entries & np.uint64(reserved)) == 0)
    return Kinds(present, table, leaf)


def _match(match: Match, entries: U64) -> Bools:
    hits: Bools = (entries & np.uint64(match.mask)) == np.uint64(match.value)
    return hits


def frames(field: Field, entries: U64) -> U64:
    """The frame, or the next table, that every entry holds in a field, as a gpa."""
    low = entries & np.uint64(field.mask)
    return low >> np.uint64(field.shift) if field.shift >= 0 else low << np.uint64(-field.shift)


def grants(mode: PagingMode, entries: U64, table: Bools) -> U64:
    """PagingMode.grants() for many entries."""
    plain = entries ^ np.uint64(mode.flip)
    if mode.denies is None:
        return plain
    left = np.full_like(entries, (1 << 64) - 1)
    for name, mask in mode.denies.items():
        left &= ~np.where(entries & np.uint64(mask), np.uint64(mode.flags[name]), np.uint64(0))
    return np.where(table, left, plain)


def runs(
    gva: U64, size: U64, running: tuple[U64, ...], equal: tuple[NDArray[np.generic], ...]
) -> tuple[Indices, Indices]:
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
