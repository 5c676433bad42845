"""One table on a walk: its entries as cells, the changed ones with a bar."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import Level, PagingMode
from labkit.paging.entries import classify_all
from labkit.paging.scan import PageTable
from labkit.paging.walk import WalkStep
from labkit.views.drawing.cells import Lattice, dashes, grid
from labkit.views.drawing.markup import Html, cat, hx
from labkit.views.drawing.shapes import Point, bar, cross, path, squares, text
from labkit.views.pictures.walk_plan import TOP, Plan, size_name

__all__ = ["TableSeen", "draw_table"]

Entries = NDArray[np.uint64]


class TableSeen(NamedTuple):
    """A table as a walk came through it, and all its entries where a snapshot has them."""

    gpa: int
    entry_index: int  # of the entry that the walk read
    entry: int
    now: bytes  # b"" when nobody has them
    before: bytes

    @classmethod
    def at(
        cls,
        step: WalkStep,
        mode: PagingMode,
        found: PageTable | None,
        before: PageTable | None,
    ) -> TableSeen:
        """The table of a step, in the snapshots now and before; without one before no change."""
        gpa = step.entry_gpa - step.index * mode.entry_size
        now = _raw(mode, step.level, found, gpa)
        old = now if before is None else _raw(mode, step.level, before, gpa)
        return cls(gpa, step.index, step.entry, now, old)


def _raw(mode: PagingMode, level: Level, found: PageTable | None, gpa: int) -> bytes:
    """The bytes of a table, b"" when the snapshot has not all of them."""
    if found is None:
        return b""
    size = level.nr_entries * mode.entry_size
    data = found.tables.get(gpa, b"")
    return data[:size] if len(data) >= size else b""


# Of all that is painted this takes longest, and from step to step most tables stay what they are.
@lru_cache(maxsize=64)
def draw_table(plan: Plan, mode: PagingMode, column: int, level: Level, seen: TableSeen) -> Html:
    """The table in its column; without its entries only the one that the walk read is shown."""
    lattice = plan.lattice(column, level)
    nr = level.nr_entries
    if seen.now:
        entries = np.frombuffer(seen.now, mode.dtype).astype(np.uint64)
    else:
        entries = np.zeros(nr, np.uint64)
        entries[seen.entry_index] = seen.entry
    present = np.flatnonzero(classify_all(mode, level, entries).present).tolist()

    foot = size_name(level.size)
    if seen.now and not plan.narrow:
        foot = f"{len(present)} of {nr}, {foot} each"
    head = _head(plan, column, level, seen)
    if not plan.narrow and column == 0:
        head += _row_numbers(lattice, nr)
    cells = grid(
        "entry",
        f"{level.name} at gpa {hx(seen.gpa)}, {len(present)} present",
        _cells(mode, level, entries, lattice, _changed(mode, seen, entries)),
        column,
        rows=lattice.rows(nr),
        x=lattice.x,
        pitch=plan.pitch,
        h=lattice.tall,
        at=seen.entry_index,
        each=f"{level.name}[{{h}}] = {{v}}",
        none=f"{level.name}[{{h}}]: not present",
        values=[(i, 1, hx(int(entries[i]))) for i in present],
    )
    return head + text(lattice.x, TOP + plan.tall + 13, foot, "s d") + cells


def _changed(mode: PagingMode, seen: TableSeen, entries: Entries) -> list[int]:
    """The numbers of the entries that are not what they were."""
    if not seen.now or seen.now == seen.before:
        return []
    old = np.zeros_like(entries)  # of a table that was not there
    if seen.before:
        old = np.frombuffer(seen.before, mode.dtype).astype(np.uint64)
    changed: list[int] = np.flatnonzero(entries != old).tolist()
    return changed


def _head(plan: Plan, column: int, level: Level, seen: TableSeen) -> Html:
    """What the table is, the index into it, and where it lies."""
    x = plan.x(column)
    where = f"[{hx(seen.entry_index, 3)}]"
    out = text(x, 64, level.name, "b")
    if plan.narrow:
        out += text(x, 52, where, "m s")
        out += text(x, 78, hx(seen.gpa), "m s d")
    else:
        out += text(x + 8 * len(level.name) + 8, 64, where, "m")
        out += text(x, 78, f"gpa {hx(seen.gpa)}", "m s d")
    return out


def _row_numbers(lattice: Lattice, nr: int) -> Html:
    """The first index of every eighth row."""
    rows = lattice.rows(nr)[::8]
    return cat(text(lattice.x - 12, y + 8, f"{first:03x}", "m s d", "end") for y, first, _ in rows)


def _cells(
    mode: PagingMode, level: Level, entries: Entries, lattice: Lattice, changed: list[int]
) -> Html:
    """All entries of a table: each kind of mark is one path."""
    w, h = lattice.pitch - 1, lattice.tall - 1
    kinds = classify_all(mode, level, entries)
    bad = kinds.present & ~kinds.table & ~kinds.leaf

    def at(which: NDArray[np.bool_], inset: float = 0) -> list[Point]:
        return [lattice.at(i, inset) for i in np.flatnonzero(which).tolist()]

    middles = lattice.rows(len(entries), lattice.tall / 2)
    out = dashes(middles, lattice.x + lattice.pitch / 2 - 0.9, lattice.pitch, 1.2, 1.2, "c-dot")
    out += path(squares(at(kinds.table, 1), w - 2, h - 2), "c-tab")
    if mode.c_bit is None:
        out += path(squares(at(kinds.leaf), w, h), "c-mem")
    else:
        bit = np.uint64(mode.flags.get("c", 0))
        secret = (entries ^ np.uint64(mode.inverted)) & bit != 0
        out += path(squares(at(kinds.leaf & secret), w, h), "c-enc")
        out += path(squares(at(kinds.leaf & ~secret, 0.6), w - 1.2, h - 1.2), "c-shr thin")
    out += path(squares(at(bad), w, h), "c-flt")
    out += cross(at(bad, 1), w - 2)

    corners = map(lattice.at, changed)
    return out + bar(((x, y + h) for x, y in corners), w, 2)
