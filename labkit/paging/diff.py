"""What changed between two snapshots of an address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from labkit.errors import InvalidState
from labkit.paging.entries import MASK64, U64, Bools, Indices, runs

if TYPE_CHECKING:
    import pandas as pd

    from labkit.paging.scan import PageTable

__all__ = ["diff"]

LEVEL_MASK = 15  # the low bits of a key, which hold a level


class _Side(NamedTuple):
    """One snapshot seen from the changed leaves."""

    there: Bools
    gpa: U64  # the gva where a leaf is absent, so that runs go on
    flags: U64


class _Changes(NamedTuple):
    """The leaves that differ, ordered by gva, then by size."""

    gva: U64
    size: U64
    old: _Side
    new: _Side


def diff(before: PageTable, after: PageTable) -> pd.DataFrame:
    """Changed ranges, by gva: sign, gva, gva_end, nr_pages, page_size (bytes), before, after.

    "+" is mapped now and was not, "-" was mapped and is not, "~" maps another gpa or gives other
    rights (accessed and dirty count). A page of another size is a "-" and a "+". Raises
    InvalidState between unlike formats.
    """
    from labkit.hexed import HexFrame

    if before.mode != after.mode:
        raise InvalidState(
            f"cannot compare {before.mode.name} with {after.mode.name}",
            before=before.mode,
            after=after.mode,
        )
    gva, size, old, new = _changes(before, after)
    sign = np.where(old.there, np.where(new.there, "~", "-"), "+")
    first, last = runs(gva, size, (old.gpa, new.gpa), (old.flags, new.flags, sign))
    return HexFrame(
        {
            "sign": sign[first],
            "gva": gva[first],
            "gva_end": gva[last] + (size[last] - np.uint64(1)),
            "nr_pages": last - first + 1,
            "page_size": size[first],
            "before": _words(before, old, first),
            "after": _words(after, new, first),
        }
    )


def _changes(before: PageTable, after: PageTable) -> _Changes:
    keys = np.unique(np.concatenate([_keys(before), _keys(after)]))
    old = _side(before, keys)
    new = _side(after, keys)
    differs = (old.there != new.there) | (old.gpa != new.gpa) | (old.flags != new.flags)

    keys = keys[differs]
    shifts = np.array([level.shift for level in before.mode.levels], np.uint64)
    level = (keys & np.uint64(LEVEL_MASK)).astype(np.intp)
    return _Changes(
        gva=_gvas(keys),
        size=np.uint64(1) << shifts[level],
        old=_Side(*(column[differs] for column in old)),
        new=_Side(*(column[differs] for column in new)),
    )


def _keys(table: PageTable) -> U64:
    """gva and level in one number: pages are aligned, so the low bits are free."""
    return table.gva | table.level.astype(np.uint64)


def _gvas(keys: U64) -> U64:
    return keys & np.uint64(~LEVEL_MASK & MASK64)


def _side(table: PageTable, keys: U64) -> _Side:
    """What one snapshot has for each key."""
    own = _keys(table)
    gva = _gvas(keys)
    if not len(own):
        return _Side(np.zeros(len(keys), np.bool_), gva, np.zeros_like(keys))
    at = np.minimum(np.searchsorted(own, keys), len(own) - 1)
    there = own[at] == keys
    flags = table.rights & np.uint64(table.mode.flag_mask)
    return _Side(
        there,
        gpa=np.where(there, table.gpa[at], gva),
        flags=np.where(there, flags[at], np.uint64(0)),
    )


def _words(table: PageTable, side: _Side, at: Indices) -> list[str]:
    """What some leaves map and grant, "" where there is none."""
    words = []
    for index in at:
        if side.there[index]:
            flags = table.mode.letters(int(side.flags[index]))
            words.append(f"gpa {int(side.gpa[index]):#x} P {flags}".rstrip())
        else:
            words.append("")
    return words
