"""The ucall pool as a grid: bit order is reading order."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from labkit.ucall.snapshot import PoolSnapshot
from labkit.views.drawing.cells import Lattice, dashes, grid
from labkit.views.drawing.markup import Html, cat
from labkit.views.drawing.shapes import NARROW, bar, cross, path, rect, squares, svg, text
from labkit.views.pool_words import DIGITS, about, counts, marks, owner, taken
from labkit.words import num

__all__ = ["draw_pool", "is_big", "rows_used"]

LEFT = 40  # room for the slot numbers
TOP = 14  # room for the column numbers
BIG = 512  # above this a cell has no room for a digit


def is_big(pool: PoolSnapshot) -> bool:
    """Whether cells are too small for digits, and leaks are triangles."""
    return pool.nr_slots > BIG


def rows_used(pool: PoolSnapshot, cols: int, chosen: int | None = None) -> int:
    """Rows worth drawing: up to the last with a slot ever used, changed, chosen or next."""
    last = 0
    alive = np.flatnonzero(pool.in_use | pool.changed | (pool.uses > 0))
    if len(alive):
        last = int(alive[-1])
    for slot in (pool.next_slot, chosen):
        if slot is not None:
            last = max(last, slot)
    return last // cols + 1


def draw_pool(
    pool: PoolSnapshot, width: float, chosen: int | None, taker: int | None, fold: bool
) -> Html:
    """The grid; fold leaves out trailing rows that were never used, and the leader to the card."""
    lattice = _lattice(pool, width)
    total = -(-pool.nr_slots // lattice.cols)
    shown = total
    if fold:
        least = 8 if is_big(pool) else 2
        shown = min(total, max(rows_used(pool, lattice.cols, chosen), least))
    nr = min(pool.nr_slots, shown * lattice.cols)

    out = _numbers(lattice, nr, is_big(pool)) + _grid(pool, lattice, nr, chosen, taker)
    height = 16 + shown * lattice.tall
    if shown < total:
        right = LEFT + lattice.cols * lattice.pitch
        unused = f"slots {num(nr)} to {num(pool.nr_slots - 1)}: never used"
        out += path(f"M{LEFT} {height + 7}H{right}", "c-fold")
        out += text((LEFT + right) / 2, height + 11, unused, "s d halo", "middle")
        height += 14

    if chosen is not None and chosen < nr:
        x, y = lattice.at(chosen)
        out += rect(x - 1.5, y - 1.5, lattice.pitch + 2, lattice.tall + 2, "c-sel")
        if not fold:  # a leader to the card
            out += path(f"M{x + lattice.pitch / 2} {y + lattice.tall + 1}V{height + 7}", "c-now")
            height += 7
    return svg(width, height, out, f"Pool: {counts(pool)}")


def _lattice(pool: PoolSnapshot, width: float) -> Lattice:
    """The cells, as large as the width allows."""
    small = is_big(pool)
    cols = 64 if small else 32
    if width >= NARROW:
        cols *= 2
    cols = min(pool.nr_slots, cols)
    room = min(10 if small else 20, (width - LEFT) / cols)
    pitch = max(int(room * 2) / 2, 4)
    return Lattice(LEFT, TOP, cols, pitch, pitch if small else max(pitch, 16))


def _numbers(lattice: Lattice, nr: int, small: bool) -> Html:
    """Over the columns and left of the rows; not every row of small cells has room for its own."""
    columns = range(0, lattice.cols, 16 if small else 8)
    out = cat(text(LEFT + col * lattice.pitch, 9, str(col), "s d") for col in columns)

    down, every = (8, 8) if small else (12, 1)
    rows = lattice.rows(nr, down)[::every]
    return out + cat(text(LEFT - 8, y, str(first), "s d", "end") for y, first, _ in rows)


def _grid(
    pool: PoolSnapshot, lattice: Lattice, nr: int, chosen: int | None, taker: int | None
) -> Html:
    """The first nr cells, and what is said of each."""
    says = owner if is_big(pool) else about
    return grid(
        "slot",
        f"Pool of {pool.nr_slots} slots",
        _cells(pool, marks(pool)[:nr], lattice, taker),
        rows=lattice.rows(nr),
        x=LEFT,
        pitch=lattice.pitch,
        h=lattice.tall - 1,
        at=chosen,
        each="Slot {i}, {v}, gva {a}",
        none="Slot {i}: free, gva {a}",
        values=[(slot.index, 1, says(slot)) for slot in taken(pool)],
        base=pool.gva + pool.slots_offset,
        size=pool.slot_size,
    )


def _cells(pool: PoolSnapshot, states: str, lattice: Lattice, taker: int | None) -> Html:
    """All cells: each kind of mark is one path, the digits of a row are one text."""
    w, h = lattice.pitch - 1, lattice.tall - 1
    at = lattice.at
    leaks = [i for i, state in enumerate(states) if state == "x"]
    done = [i for i, state in enumerate(states) if state == "D"]
    in_use = [i for i, state in enumerate(states) if state not in ".xD"]
    changed = np.flatnonzero(pool.changed[: len(states)]).tolist()
    small = is_big(pool)

    out = dashes(lattice.rows(len(states), h / 2), lattice.x, lattice.pitch, w, h, "c-cell")
    out += path(squares(map(at, in_use), w, h), "c-use")
    out += path(squares((at(i, 0.75) for i in done), w - 1.5, h - 1.5), "c-done")
    if small:
        corners = [f"M{x:g} {y:g}v{h:g}h{w:g}z" for x, y in map(at, leaks)]
        out += path("".join(corners), "c-flt")
    else:
        moved = frozenset(changed)
        out += path(squares(map(at, leaks), w, h), "c-flt")
        out += cross(((x + 2.5, y + (h - w + 5) / 2) for x, y in map(at, leaks)), w - 5)
        out += _digits(states, in_use, lattice, "own", moved)
        out += _digits(states, done, lattice, "own dn", moved)
        out += _next(pool, lattice, taker)
    return out + bar(((x, y + h) for x, y in map(at, changed)), w, 2 if small else 3)


def _next(pool: PoolSnapshot, lattice: Lattice, taker: int | None) -> Html:
    """The slot that the next step will take, with the digit of its taker."""
    if pool.next_slot is None:
        return Html()
    w, h = lattice.pitch - 1, lattice.tall - 1
    x, y = lattice.at(pool.next_slot)
    digit = "" if taker is None else DIGITS[taker % len(DIGITS)]
    cell = rect(x + 1, y + 1, w - 2, h - 2, "c-next")
    return cell + text(x + w / 2, y + h - 4, digit, "nxt", "middle")


def _digits(
    states: str, cells: Sequence[int], lattice: Lattice, cls: str, changed: Container[int]
) -> Html:
    """The digits of some cells, a text per height: those over a change bar stand a bit higher."""
    rows: dict[float, list[int]] = {}
    for i in cells:
        _, top = lattice.at(i)
        up = 6.5 if i in changed else 5
        rows.setdefault(top + lattice.tall - up, []).append(i)

    half = (lattice.pitch - 1) / 2
    out = Html()
    for y, row in rows.items():
        middles = " ".join(f"{lattice.at(i)[0] + half:g}" for i in row)
        out += text(middles, y, "".join(states[i] for i in row), cls, "middle")
    return out
