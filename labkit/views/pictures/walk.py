"""The walk of one address as a picture.

Index bits stand over their tables, a curve leads from an entry to the next table, and the page with
the objects in it is at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from labkit.arch.desc import Level
from labkit.outside import plain
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, WalkStep
from labkit.views.drawing.markup import Html, cat, hx
from labkit.views.drawing.shapes import path, rect, svg, text
from labkit.views.drawing.tables import key
from labkit.views.pictures.walk_plan import TOP, Plan, ramp
from labkit.views.pictures.walk_table import TableSeen, draw_table
from labkit.words import num

__all__ = ["PageObject", "draw_walk", "walk_key"]

TIP = 74  # height at which the curves arrive: the line with a table's address
DIGIT = 7  # width of a digit of the index


class PageObject(NamedTuple):
    """Something that lies in the page at the end of a walk.

    offset counts from the start of the page and may be negative: it begins in the page before.
    """

    offset: int
    size: int
    name: str
    chosen: bool = False


def draw_walk(
    walk: Walk,
    found: PageTable | None,
    width: float,
    *,
    before: PageTable | None = None,
    objects: Iterable[PageObject] = (),
    name: str = "",
) -> Html:
    """The picture of a walk; name says what lies at its address.

    Entries beside the walked ones need the table, change bars the table as it was before.
    """
    mode = walk.mode
    plan = Plan.of(width, len(mode.levels))
    out = _address(plan, walk, name)
    for column, level in enumerate(mode.levels):
        if column < len(walk.steps):
            step = walk.steps[column]
            seen = TableSeen.at(step, mode, found, before)
            out += _index_bits(plan, column, level, walk.gva, "m")
            out += draw_table(plan, mode, column, level, seen)
        elif walk.gpa is None:  # not read: the walk ended before it
            out += _index_bits(plan, column, level, walk.gva, "m d")
            out += text(plan.x(column), 64, level.name, "d")
    if walk.gpa is not None:
        out += _page(plan, walk, walk.gpa, objects)

    out += cat(_link(plan, column, step) for column, step in enumerate(walk.steps))
    return svg(width, TOP + plan.tall + 18, out, f"Walk: {walk.status}")


def _address(plan: Plan, walk: Walk, name: str) -> Html:
    """The address on top, and whether it is canonical: what its upper bits have to be."""
    mode = walk.mode
    out = text(0, 11, "gva", "d") + text(26, 11, hx(walk.gva, 16), "m b")
    if plan.narrow:
        return out

    if not mode.canonical(walk.gva):
        upper = "not canonical"
    elif mode.va_bits >= 64:
        upper = "all bits translated"
    else:
        rest = f"repeat bit {mode.va_bits - 1}" if mode.signed else "are 0"
        upper = f"bits 63:{mode.va_bits} {rest}: canonical"
    out += text(176, 11, plain(name, 60), "m d")
    return out + text(plan.width, 11, upper, "s d", "end")


def _index_bits(plan: Plan, column: int, level: Level, gva: int, ink: str) -> Html:
    """The bits of the address that are the index into a table, over it."""
    x = plan.x(column)
    digits = f"{level.index(gva):0{level.bits}b}"
    if not plan.narrow:
        digits = _in_fours(digits)
    place = ""
    if not plan.narrow and DIGIT * len(digits) + 30 <= plan.table:
        place = f"{level.shift + level.bits - 1}:{level.shift}"

    out = rect(x, 20, plan.table, 4, f"l{ramp(level)}")
    out += text(x, 37, digits, ink)
    return out + text(x + plan.table, 37, place, "s d", "end")


def _in_fours(digits: str) -> str:
    """Digits in groups of four, counted from the right."""
    first = len(digits) % 4 or 4
    ends = range(first, len(digits) + 1, 4)
    return " ".join(digits[max(end - 4, 0) : end] for end in ends)


def _link(plan: Plan, column: int, step: WalkStep) -> Html:
    """From the index bits down to the entry, its outline, and on to where it points.

    A curve where there is a next table or page, a cross where the walk ends.
    """
    lattice = plan.lattice(column, step.level)
    x, y = lattice.at(step.index)
    middle = y + lattice.tall / 2
    rule = f"M{lattice.x:.1f} 22H{lattice.x - 7:.1f}V{middle:.1f}H{x - 2:.1f}"
    out = path(rule, f"c-ruler r{ramp(step.level)}")
    out += rect(x - 2, y - 2, plan.pitch + 3, lattice.tall + 3, "c-sel")

    start = x + plan.pitch + 1
    edge = lattice.x + plan.table  # the right edge of the table
    if step.kind in ("table", "leaf"):
        end = plan.x(column + 1) - (11 if step.kind == "table" else 4)
        bend, rise = edge + plan.gap * 0.55, edge + plan.gap * 0.15
        bow = f"C{bend:.1f} {middle:.1f} {rise:.1f} {TIP} {end - 4:.1f} {TIP}"
        line = f"M{start:.1f} {middle:.1f}{bow}"
        tip = path(f"M{end + 1:.1f} {TIP}l-7 -3.5v7z", "c-ink")
    else:
        end = edge + min(plan.gap * 0.5, 20)
        line = f"M{start:.1f} {middle:.1f}H{end - 5:.1f}"
        tip = path(f"M{end - 5:.1f} {middle - 5:.1f}l10 10m0 -10l-10 10", "c-cross")
    return out + path(line, "c-halo") + path(line, "c-walk") + tip


def _page(plan: Plan, walk: Walk, gpa: int, objects: Iterable[PageObject]) -> Html:
    """The page with the objects in it.

    The one that holds the address is outlined; without one a line marks the address.
    """
    x, w = plan.x(len(walk.steps)), plan.page
    size = walk.page_size
    offset = walk.gva & (size - 1)
    scale = plan.tall / size  # pixels a byte
    secret = walk.flags.get("c")
    if secret is None:
        fill = "c-page"
    else:
        fill = "c-epage" if secret else "c-shr"

    out = _page_head(plan, x, offset, size, hx(gpa & -size))
    out += rect(x + 0.75, TOP + 0.75, w - 1.5, plan.tall - 1.5, fill)
    mark = rect(x, TOP + offset * scale - 1, w, 2, "c-ink")
    for thing in objects:
        low = max(thing.offset, 0)
        high = min(thing.offset + thing.size, size)
        y = TOP + low * scale
        tall = (high - low) * scale
        if low:
            out += path(f"M{x + 1} {y}h{w - 2}", "c-part")
        if tall > 13:
            goes_on = "… " if thing.offset < 0 else ""
            ink = "s b" if thing.chosen else "s d"
            out += text(x + 7, y + 13, goes_on + plain(thing.name, 24), ink)
        if thing.chosen:
            mark = rect(x, y, w, max(tall, 3), "c-sel")
    return out + mark


def _page_head(plan: Plan, x: float, offset: int, size: int, base: str) -> Html:
    """Over the page: the bits of the offset into it, and where it lies."""
    bits = size.bit_length() - 1
    if plan.narrow or bits > 12:
        digits = hx(offset, bits // 4)
    else:
        digits = _in_fours(f"{offset:012b}")

    out = rect(x + 0.5, 20.5, plan.page - 1, 3, "c-off")
    out += text(x, 37, digits, "m")
    out += text(x, 64, "page", "b")
    if not plan.narrow:
        place = f"{bits - 1}:0" if plan.page >= 150 else ""
        out += text(x + 36, 64, f"+{hx(offset, 3)}", "m")
        out += text(x + plan.page, 37, place, "s d", "end")
    return out + text(x, 78, base if plan.narrow else f"gpa {base}", "m s d")


def walk_key(walk: Walk, found: PageTable | None, changed_since: int | None = None) -> Html:
    """The key of the picture."""
    mode = walk.mode
    if mode.c_bit is None:
        leaf = [("k-mem", "maps a page")]
    else:
        leaf = [
            ("k-enc", f"leaf, {mode.c_word(True)} encrypted"),
            ("k-shr", f"leaf, {mode.c_word(False)} shared"),
        ]
    dot = None if found is None else ("k-dot", "not present")
    changed = None
    if changed_since is not None:
        changed = ("k-chg", f"changed since step {num(changed_since)}")
    return key(("k-tab", "points to a table"), *leaf, dot, ("k-sel", "on the walk"), changed)
