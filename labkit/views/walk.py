"""The walk of one address as a picture: index bits over their tables, a curve from entry to table, the page at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import Level, PagingMode
from labkit.paging.entries import classify_all
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, WalkStep
from labkit.views.draw import Html, Lattice, Says, bar, cat, dashes, grid, hx, key, line, num, path, plain, rect, squares, svg, text

__all__ = ["PageObject", "draw", "size_name", "walk_key"]

TOP = 88  # where the tables begin, under the address
COLS = 16  # a row of entries is one hex digit


@dataclass(frozen=True)
class PageObject:
    """Something that lies in the page at the end of a walk; offset from the start of the page, may be negative."""

    offset: int
    size: int
    name: str
    chosen: bool = False


@dataclass(frozen=True)
class _Plan:
    """Where the columns are: as many as the format has levels, and one for the page."""

    width: float
    pitch: float
    left: float
    page: float  # width of the page column
    gap: float

    @property
    def table(self) -> float:
        return COLS * self.pitch

    def x(self, column: int) -> float:
        return self.left + column * (self.table + self.gap)

    @property
    def narrow(self) -> bool:
        return self.width < 700

    @property
    def tall(self) -> float:
        return 32 * self.pitch


def _plan(width: float, levels: int) -> _Plan:
    narrow, wide = width < 700, width > 1100
    left, page = (10, 60) if narrow else (34, 190 if wide else 110)
    for pitch in (10, 8, 7, 5.5, 4.5, 3.5):
        gap = (width - left - levels * COLS * pitch - page) / levels
        if gap >= (18 if narrow else 30) and not (pitch > 8 and not wide):
            break
    return _Plan(width, pitch, left, page, max(gap, 8))


def size_name(size: int) -> str:
    """4096 as "4 KiB"."""
    for unit, name in ((1 << 50, "PiB"), (1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def draw(walk: Walk, table: PageTable | None, width: float, *, before: PageTable | None = None, objects: Iterable[PageObject] = (), name: str = "") -> Html:
    """The picture; entries beside the walked ones need the table, change bars the table as it was before."""
    plan, mode = _plan(width, len(walk.mode.levels)), walk.mode
    out = text(0, 11, "gva", "d") + text(26, 11, hx(walk.gva, 16), "m b")
    if not plan.narrow:
        out += text(176, 11, plain(name, 60), "m d")
        out += text(width, 11, f"bits 63:{mode.va_bits} repeat bit {mode.va_bits - 1}: canonical" if mode.canonical(walk.gva) else "not canonical", "s d", "end")
    for column, level in enumerate(mode.levels):
        step = walk.steps[column] if column < len(walk.steps) else None
        if step is None and walk.gpa is not None:
            break
        out += _bits(plan, column, level, walk.gva, dim=step is None)
        if step is not None:
            out += _table(plan, walk, column, table, before)
    if walk.gpa is not None:
        out += _page(plan, walk, tuple(objects))
    for column, step in enumerate(walk.steps):
        out += _link(plan, column, step)
    return svg(width, TOP + plan.tall + 18, out, f"Walk: {walk.status}", "group")


def _bits(plan: _Plan, column: int, level: Level, gva: int, dim: bool) -> Html:
    x, w, ramp = plan.x(column), plan.table, min(level.shift // 9, 5)
    digits = f"{level.index(gva):0{level.bits}b}"
    if not plan.narrow:
        digits = " ".join(digits[max(at - 4, 0):at] for at in range(len(digits) % 4 or 4, len(digits) + 1, 4))
    out = rect(x, 20, w, 4, f"l{ramp}") + text(x, 37, digits, "m d" if dim else "m")
    if not plan.narrow:
        out += text(x + w, 37, f"{level.shift + level.bits - 1}:{level.shift}", "s d", "end")
    return out + (text(x, 64, level.name, "d") if dim else Html())


def _entries(mode: PagingMode, level: Level, data: bytes | None) -> NDArray[np.uint64] | None:
    wants = level.nr_entries * mode.entry_size
    if data is None or len(data) < wants:
        return None
    return np.frombuffer(data, mode.dtype, level.nr_entries).astype(np.uint64)


def _table(plan: _Plan, walk: Walk, column: int, table: PageTable | None, before: PageTable | None) -> Html:
    step, mode, x = walk.steps[column], walk.mode, plan.x(column)
    gpa = step.entry_gpa - step.index * mode.entry_size
    lattice = Lattice(x, TOP, COLS, plan.pitch, plan.pitch * 512 / step.level.nr_entries)
    entries = _entries(mode, step.level, table.tables.get(gpa) if table is not None else None)
    name = text(x, 64, step.level.name, "b") + text(x + (0 if plan.narrow else 8 * len(step.level.name) + 8), 52 if plan.narrow else 64,
                                                    f"[{hx(step.index, 3)}]", "m s" if plan.narrow else "m")
    name += text(x, 78, ("" if plan.narrow else "gpa ") + hx(gpa), "m s d")
    if column == 0 and not plan.narrow:
        nr = step.level.nr_entries
        name += cat(text(x - 12, y + 8, f"{first:03x}", "m s d", "end") for y, first, _ in lattice.rows(nr)[::8])
    known = np.zeros(step.level.nr_entries, np.uint64) if entries is None else entries
    if entries is None:
        known[step.index] = step.entry
    old = None if before is None or entries is None else _entries(mode, step.level, before.tables.get(gpa))
    changed = known != (old if old is not None else 0) if before is not None and entries is not None else np.zeros(len(known), np.bool_)
    cells = _cells(mode, step.level, known, lattice, np.flatnonzero(changed).tolist())
    kinds = classify_all(mode, step.level, known)
    values = [(i, 1, hx(int(known[i]))) for i in np.flatnonzero(kinds.present).tolist()]
    says = Says(f"{step.level.name}[{{h}}] = {{v}}", f"{step.level.name}[{{h}}]: not present", values)
    size, nr = size_name(step.level.size), len(values)
    foot = size.replace(" ", "").replace("iB", "") if plan.narrow else f"{nr} of {len(known)}, {size} each" if entries is not None else f"{size} each"
    return name + grid("entry", f"{step.level.name} at gpa {hx(gpa)}, {nr} present", cells, says, rows=lattice.rows(len(known)), x=x, pitch=plan.pitch,
                       h=lattice.tall, arg=column, at=step.index) + text(x, TOP + plan.tall + 13, foot, "s d")


def _cells(mode: PagingMode, level: Level, entries: NDArray[np.uint64], lattice: Lattice, changed: list[int]) -> Html:
    w, h = lattice.pitch - 1, lattice.tall - 1
    kinds = classify_all(mode, level, entries)
    secret = (entries & np.uint64(1 << mode.c_bit)) != 0 if mode.c_bit is not None else np.zeros(len(entries), np.bool_)

    def at(which: NDArray[np.bool_], inset: float) -> Iterable[tuple[float, float]]:
        return ((x + inset, y + inset) for x, y in map(lattice.at, np.flatnonzero(which).tolist()))

    dots = [(y + lattice.tall / 2, first, count) for y, first, count in lattice.rows(len(entries))]
    out = dashes(lattice.x + lattice.pitch / 2 - 0.9, dots, lattice.pitch, 1.2, 1.2, "c-dot")
    out += path(squares(at(kinds.table, 1), w - 2, h - 2), "c-tab")
    if mode.c_bit is None:
        out += path(squares(at(kinds.leaf, 0), w, h), "c-mem")
    else:
        out += path(squares(at(kinds.leaf & secret, 0), w, h), "c-enc") + path(squares(at(kinds.leaf & ~secret, 0.6), w - 1.2, h - 1.2), "c-shr thin")
    bad = list(at(kinds.present & ~kinds.table & ~kinds.leaf, 0))
    out += path(squares(bad, w, h), "c-flt") + path("".join(f"M{x + 1:g} {y + 1:g}l{w - 2:g} {h - 2:g}m0 {2 - h:g}l{2 - w:g} {h - 2:g}" for x, y in bad), "c-x")
    return out + bar([lattice.foot(i) for i in changed], w, 2)


def _link(plan: _Plan, column: int, step: WalkStep) -> Html:
    """The rule from the index bits down to the entry, its outline, and the curve to where it points, or a cross."""
    tall = plan.pitch * 512 / step.level.nr_entries
    x, y = Lattice(plan.x(column), TOP, COLS, plan.pitch, tall).at(step.index)
    ramp = f"r{min(step.level.shift // 9, 5)}"
    middle, left = y + tall / 2, plan.x(column)
    out = path(f"M{left:.1f} 22H{left - 7:.1f}V{middle:.1f}H{x - 2:.1f}", f"c-ruler {ramp}") + rect(x - 2, y - 2, plan.pitch + 3, tall + 3, "c-sel")
    start, edge = x + plan.pitch + 1, left + plan.table
    if step.kind in ("table", "leaf"):
        end, top = plan.x(column + 1) - (11 if step.kind == "table" else 4), 74
        curve = f"M{start:.1f} {middle:.1f}C{edge + plan.gap * .55:.1f} {middle:.1f} {edge + plan.gap * .15:.1f} {top} {end - 4:.1f} {top}"
        return out + path(curve, "c-halo") + path(curve, "c-walk") + path(f"M{end + 1:.1f} {top}l-7 -3.5v7z", "c-tip")
    end = edge + min(plan.gap * .5, 20)
    curve = f"M{start:.1f} {middle:.1f}H{end - 5:.1f}"
    return out + path(curve, "c-halo") + path(curve, "c-walk") + path(f"M{end - 5:.1f} {middle - 5:.1f}l10 10m0 -10l-10 10", "c-cross")


def _page(plan: _Plan, walk: Walk, objects: tuple[PageObject, ...]) -> Html:
    """The page with the objects in it; the one that holds the address is outlined, or a line marks the address."""
    x, size = plan.x(len(walk.steps)), walk.page_size
    w, offset = plan.page, walk.gva & (size - 1)
    nr_bits = size.bit_length() - 1
    digits = hx(offset, nr_bits // 4) if plan.narrow or nr_bits > 12 else " ".join(f"{offset:012b}"[at:at + 4] for at in (0, 4, 8))
    out = rect(x + 0.5, 20.5, w - 1, 3, "c-off") + text(x, 37, digits, "m")
    if not plan.narrow and w >= 150:
        out += text(x + w, 37, f"{nr_bits - 1}:0", "s d", "end")
    out += text(x, 64, "page", "b") + (Html() if plan.narrow else text(x + 36, 64, f"+{hx(offset, 3)}", "m"))
    out += text(x, 78, ("" if plan.narrow else "gpa ") + hx((walk.gpa or 0) & -size), "m s d")
    secret = walk.flags.get("c") if walk.mode.c_bit is not None else None
    out += rect(x + 0.75, TOP + 0.75, w - 1.5, plan.tall - 1.5, {None: "c-page", True: "c-epage", False: "c-shr"}[secret])
    chosen = Html()
    scale = plan.tall / size
    for thing in objects:
        low, high = max(thing.offset, 0), min(thing.offset + thing.size, size)
        y, tall = TOP + low * scale, (high - low) * scale
        out += line(x + 1, y, x + w - 1, y, "c-part") if low else Html()
        if tall > 13:
            out += text(x + 7, y + 13, ("… " if thing.offset < 0 else "") + plain(thing.name, 24), "s b" if thing.chosen else "s d")
        if thing.chosen:
            chosen = rect(x, y, w, max(tall, 3), "c-sel")
    return out + (chosen or rect(x, TOP + offset * scale - 1, w, 2, "c-ink"))


def walk_key(walk: Walk, table: PageTable | None, changed_since: int | None = None) -> Html:
    """The key of the picture."""
    leaf = [("k-mem", "maps a page")] if walk.mode.c_bit is None else [("k-enc", "leaf, C=1 encrypted"), ("k-shr", "leaf, C=0 shared")]
    changed = None if changed_since is None else ("k-chg", f"changed since step {num(changed_since)}")
    return key(("k-tab", "points to a table"), *leaf, ("k-dot", "not present") if table is not None else None, ("k-sel", "on the walk"), changed)
