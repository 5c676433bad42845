"""What changed between two snapshots of an address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.errors import InvalidState
from labkit.paging.entries import U64, Bools, runs

if TYPE_CHECKING:
    import pandas as pd

    from labkit.paging.scan import PageTable

__all__ = ["diff"]


class _Side(NamedTuple):
    """One snapshot seen from the changed leaves: there or not, gpa (gva where absent, so that runs go on), flags."""

    there: Bools
    gpa: U64
    flags: U64


def diff(before: PageTable, after: PageTable) -> pd.DataFrame:
    """Changed ranges, by gva: sign, gva, gva_end, nr_pages, page_size, before, after.

    "+" is mapped now and was not, "-" was mapped and is not, "~" maps another gpa or gives other rights (accessed
    and dirty count). A page of another size is a "-" and a "+". Raises InvalidState between unlike formats.
    """
    import pandas as pd

    if before.mode != after.mode:
        raise InvalidState(
            f"cannot compare {before.mode.name} with {after.mode.name}",
            before=before.mode,
            after=after.mode,
        )
    gva, size, old, new = _changes(before, after)
    sign = np.where(old.there, np.where(new.there, "~", "-"), "+")
    first, last = runs(gva, size, (old.gpa, new.gpa), (old.flags, new.flags, sign))
    return pd.DataFrame(
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


def _changes(before: PageTable, after: PageTable) -> tuple[U64, U64, _Side, _Side]:
    """The leaves that differ, ordered by gva, then by size."""
    keys = np.unique(np.concatenate([_keys(before), _keys(after)]))
    old, new = _side(before, keys), _side(after, keys)
    differs = (old.there != new.there) | (old.gpa != new.gpa) | (old.flags != new.flags)
    keys = keys[differs]
    shifts = np.array([level.shift for level in before.mode.levels], np.uint64)
    gva, size = (
        keys & np.uint64(-16 & (1 << 64) - 1),
        np.uint64(1) << shifts[(keys & np.uint64(15)).astype(np.intp)],
    )
    return (
        gva,
        size,
        _Side(*(column[differs] for column in old)),
        _Side(*(column[differs] for column in new)),
    )


def _keys(table: PageTable) -> U64:
    """gva and level in one number: pages are aligned, so the low bits are free."""
    return table.gva | table.level.astype(np.uint64)


def _side(table: PageTable, keys: U64) -> _Side:
    own = _keys(table)
    gva = keys & np.uint64(-16 & (1 << 64) - 1)
    if not len(own):
        return _Side(np.zeros(len(keys), np.bool_), gva, np.zeros_like(keys))
    at = np.minimum(np.searchsorted(own, keys), len(own) - 1)
    there = own[at] == keys
    flags = table.rights & np.uint64(table.mode.flag_mask)
    return _Side(
        there, np.where(there, table.gpa[at], gva), np.where(there, flags[at], np.uint64(0))
    )


def _words(table: PageTable, side: _Side, at: NDArray[np.intp]) -> list[str]:
    return [
        f"gpa {int(side.gpa[i]):#x} P {table.mode.letters(int(side.flags[i]))}".rstrip()
        if side.there[i]
        else ""
        for i in at
    ]
