"""The walk of one address as a picture: index bits over their tables, a curve from entry to table, the page at the end."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import Level, PagingMode
from labkit.paging.entries import classify_all
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, WalkStep
from labkit.views.draw import (
    Html,
    Lattice,
    Point,
    bar,
    cat,
    cross,
    dashes,
    grid,
    hx,
    key,
    num,
    path,
    plain,
    rect,
    squares,
    svg,
    text,
)

__all__ = ["PageObject", "draw", "size_name", "walk_key"]

TOP = 88  # where the tables begin, under the address
COLS = 16  # a row of entries is one hex digit
Entries = NDArray[np.uint64]


class PageObject(NamedTuple):
    """Something that lies in the page at the end of a walk; offset from the start of the page, may be negative."""

    offset: int
    size: int
    name: str
    chosen: bool = False


class _Plan(NamedTuple):
    """Where the columns are: as many as the format has levels, and one for the page."""

    width: float
    pitch: float
    left: float
    page: float  # width of the page column
    gap: float

    def x(self, column: int) -> float:
        return self.left + column * (self.table + self.gap)

    @property
    def table(self) -> float:
        return COLS * self.pitch

    @property
    def tall(self) -> float:
        return 32 * self.pitch

    @property
    def narrow(self) -> bool:
        return self.width < 700


def _plan(width: float, levels: int) -> _Plan:
    narrow, wide = width < 700, width > 1100
    left, page = (10, 60) if narrow else (34, 190 if wide else 110)
    for pitch in (10, 8, 7, 5.5, 4.5, 3.5):
        gap = (width - left - levels * COLS * pitch - page) / levels
        if gap >= (18 if narrow else 30) and (wide or pitch < 10):
            break
    return _Plan(width, pitch, left, page, max(gap, 8))


def size_name(size: int) -> str:
    """4096 as "4 KiB"."""
    unit = min((size.bit_length() - 1) // 10, 5)
    return f"{size >> 10 * unit} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[unit]}"


def draw(
    walk: Walk,
    found: PageTable | None,
    width: float,
    *,
    before: PageTable | None = None,
    objects: Iterable[PageObject] = (),
    name: str = "",
) -> Html:
    """The picture; entries beside the walked ones need the table, change bars the table as it was before."""
    plan, mode = _plan(width, len(walk.mode.levels)), walk.mode
    out = text(0, 11, "gva", "d") + text(26, 11, hx(walk.gva, 16), "m b")
    if not plan.narrow:
        rest = (
            f"bits 63:{mode.va_bits} {f'repeat bit {mode.va_bits - 1}' if mode.signed else 'are 0'}"
        )
        upper = f"{rest}: canonical" if mode.va_bits < 64 else "all bits translated"
        out += text(176, 11, plain(name, 60), "m d")
        out += text(width, 11, upper if mode.canonical(walk.gva) else "not canonical", "s d", "end")
    for column, level in enumerate(mode.levels):
        step = walk.steps[column] if column < len(walk.steps) else None
        if step is not None or walk.gpa is None:
            out += _bits(plan, column, level, walk.gva, step is None)
        if step is not None:
            gpa = step.entry_gpa - step.index * mode.entry_size
            now, old = (_entries(mode, level, table, gpa) for table in (found, before))
            out += _table(
                plan,
                mode,
                column,
                level,
                gpa,
                step.index,
                step.entry,
                now,
                old if before is not None else now,
            )
    if walk.gpa is not None:
        out += _page(plan, walk, objects)
    links = cat(_link(plan, column, step) for column, step in enumerate(walk.steps))
    return svg(width, TOP + plan.tall + 18, out + links, f"Walk: {walk.status}")


def _bits(plan: _Plan, column: int, level: Level, gva: int, unread: bool) -> Html:
    x, digits = plan.x(column), f"{level.index(gva):0{level.bits}b}"
    if not plan.narrow:
        digits = " ".join(
            digits[max(at - 4, 0) : at] for at in range(len(digits) % 4 or 4, len(digits) + 1, 4)
        )
    out = rect(x, 20, plan.table, 4, f"l{min(level.shift // 9, 5)}") + text(
        x, 37, digits, "m d" if unread else "m"
    )
    place = (
        ""
        if plan.narrow or 7 * len(digits) + 30 > plan.table
        else f"{level.shift + level.bits - 1}:{level.shift}"
    )
    out += text(x + plan.table, 37, place, "s d", "end")
    return out + text(x, 64, level.name if unread else "", "d")


def _entries(mode: PagingMode, level: Level, found: PageTable | None, gpa: int) -> bytes:
    data = b"" if found is None else found.tables.get(gpa, b"")
    size = level.nr_entries * mode.entry_size
    return data[:size] if len(data) >= size else b""


@lru_cache(
    maxsize=64
)  # of all that is painted this takes longest, and from step to step most tables stay what they are
def _table(
    plan: _Plan,
    mode: PagingMode,
    column: int,
    level: Level,
    gpa: int,
    index: int,
    entry: int,
    now: bytes,
    before: bytes,
) -> Html:
    x, nr, size, where = (
        plan.x(column),
        level.nr_entries,
        size_name(level.size),
        f"[{hx(index, 3)}]",
    )
    lattice = Lattice(x, TOP, COLS, plan.pitch, plan.tall / nr * COLS)
    known = np.frombuffer(now, mode.dtype).astype(np.uint64) if now else None
    entries, changed = np.zeros(nr, np.uint64) if known is None else known, list[int]()
    if known is None:
        entries[index] = entry
    elif now != before:
        old = np.frombuffer(before, mode.dtype).astype(np.uint64) if before else 0
        changed = np.flatnonzero(known != old).tolist()
    present = np.flatnonzero(classify_all(mode, level, entries).present).tolist()
    foot = size if known is None or plan.narrow else f"{len(present)} of {nr}, {size} each"
    out = text(x, 64, level.name, "b")
    if plan.narrow:
        out += text(x, 52, where, "m s") + text(x, 78, hx(gpa), "m s d")
    else:
        out += text(x + 8 * len(level.name) + 8, 64, where, "m") + text(
            x, 78, f"gpa {hx(gpa)}", "m s d"
        )
        out += cat(
            text(x - 12, y + 8, f"{first:03x}", "m s d", "end")
            for y, first, _ in lattice.rows(nr)[::8]
            if not column
        )
    cells, words = (
        _cells(mode, level, entries, lattice, changed),
        f"{level.name} at gpa {hx(gpa)}, {len(present)} present",
    )
    return (
        out
        + text(x, TOP + plan.tall + 13, foot, "s d")
        + grid(
            "entry",
            words,
            cells,
            column,
            rows=lattice.rows(nr),
            x=x,
            pitch=plan.pitch,
            h=lattice.tall,
            at=index,
            each=f"{level.name}[{{h}}] = {{v}}",
            none=f"{level.name}[{{h}}]: not present",
            values=[(i, 1, hx(int(entries[i]))) for i in present],
        )
    )


def _cells(
    mode: PagingMode, level: Level, entries: Entries, lattice: Lattice, changed: list[int]
) -> Html:
    w, h, kinds = lattice.pitch - 1, lattice.tall - 1, classify_all(mode, level, entries)
    secret = (entries ^ np.uint64(mode.inverted)) & np.uint64(mode.flags.get("c", 0)) != 0
    bad = kinds.present & ~kinds.table & ~kinds.leaf

    def at(which: NDArray[np.bool_], inset: float = 0) -> list[Point]:
        return [lattice.at(i, inset) for i in np.flatnonzero(which).tolist()]

    middles = lattice.rows(len(entries), lattice.tall / 2)
    out = dashes(middles, lattice.x + lattice.pitch / 2 - 0.9, lattice.pitch, 1.2, 1.2, "c-dot")
    out += path(squares(at(kinds.table, 1), w - 2, h - 2), "c-tab")
    if mode.c_bit is None:
        out += path(squares(at(kinds.leaf), w, h), "c-mem")
    else:
        out += path(squares(at(kinds.leaf & secret), w, h), "c-enc")
        out += path(squares(at(kinds.leaf & ~secret, 0.6), w - 1.2, h - 1.2), "c-shr thin")
    out += path(squares(at(bad), w, h), "c-flt") + cross(at(bad, 1), w - 2)
    return out + bar(((x, y + h) for x, y in map(lattice.at, changed)), w, 2)


def _link(plan: _Plan, column: int, step: WalkStep) -> Html:
    """The rule from the index bits down to the entry, its outline, and the curve to where it points, or a cross."""
    left, tall = plan.x(column), plan.tall / step.level.nr_entries * COLS
    x, y = Lattice(left, TOP, COLS, plan.pitch, tall).at(step.index)
    middle, start, edge = y + tall / 2, x + plan.pitch + 1, left + plan.table
    out = path(
        f"M{left:.1f} 22H{left - 7:.1f}V{middle:.1f}H{x - 2:.1f}",
        f"c-ruler r{min(step.level.shift // 9, 5)}",
    )
    out += rect(x - 2, y - 2, plan.pitch + 3, tall + 3, "c-sel")
    if step.kind in ("table", "leaf"):
        end, top = plan.x(column + 1) - (11 if step.kind == "table" else 4), 74
        bend, rise = edge + plan.gap * 0.55, edge + plan.gap * 0.15
        curve = f"M{start:.1f} {middle:.1f}C{bend:.1f} {middle:.1f} {rise:.1f} {top} {end - 4:.1f} {top}"
        tip = path(f"M{end + 1:.1f} {top}l-7 -3.5v7z", "c-ink")
    else:
        end = edge + min(plan.gap * 0.5, 20)
        curve = f"M{start:.1f} {middle:.1f}H{end - 5:.1f}"
        tip = path(f"M{end - 5:.1f} {middle - 5:.1f}l10 10m0 -10l-10 10", "c-cross")
    return out + path(curve, "c-halo") + path(curve, "c-walk") + tip


def _page(plan: _Plan, walk: Walk, objects: Iterable[PageObject]) -> Html:
    """The page with the objects in it; the one that holds the address is outlined, or a line marks the address."""
    x, w, size, offset = (
        plan.x(len(walk.steps)),
        plan.page,
        walk.page_size,
        walk.gva & (walk.page_size - 1),
    )
    bits, scale, base = size.bit_length() - 1, plan.tall / size, hx((walk.gpa or 0) & -size)
    digits = (
        hx(offset, bits // 4)
        if plan.narrow or bits > 12
        else " ".join(f"{offset:012b}"[at : at + 4] for at in (0, 4, 8))
    )
    out = (
        rect(x + 0.5, 20.5, w - 1, 3, "c-off") + text(x, 37, digits, "m") + text(x, 64, "page", "b")
    )
    if not plan.narrow:
        out += text(x + 36, 64, f"+{hx(offset, 3)}", "m") + text(
            x + w, 37, f"{bits - 1}:0" if w >= 150 else "", "s d", "end"
        )
    out += text(x, 78, base if plan.narrow else f"gpa {base}", "m s d")
    fill = {None: "c-page", True: "c-epage", False: "c-shr"}[walk.flags.get("c")]
    out += rect(x + 0.75, TOP + 0.75, w - 1.5, plan.tall - 1.5, fill)
    mark = rect(x, TOP + offset * scale - 1, w, 2, "c-ink")
    for thing in objects:
        low, high = max(thing.offset, 0), min(thing.offset + thing.size, size)
        y, tall = TOP + low * scale, (high - low) * scale
        name = ("… " if thing.offset < 0 else "") + plain(thing.name, 24)
        out += path(f"M{x + 1} {y}h{w - 2}" if low else "", "c-part")
        out += text(x + 7, y + 13, name if tall > 13 else "", "s b" if thing.chosen else "s d")
        mark = rect(x, y, w, max(tall, 3), "c-sel") if thing.chosen else mark
    return out + mark


def walk_key(walk: Walk, found: PageTable | None, changed_since: int | None = None) -> Html:
    """The key of the picture."""
    secret = [
        ("k-enc", f"leaf, {walk.mode.c_word(True)} encrypted"),
        ("k-shr", f"leaf, {walk.mode.c_word(False)} shared"),
    ]
    leaf = [("k-mem", "maps a page")] if walk.mode.c_bit is None else secret
    changed = (
        None if changed_since is None else ("k-chg", f"changed since step {num(changed_since)}")
    )
    dot = None if found is None else ("k-dot", "not present")
    return key(("k-tab", "points to a table"), *leaf, dot, ("k-sel", "on the walk"), changed)
