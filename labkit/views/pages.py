"""Page tables: the walk of one address, the entry bit by bit, mapped ranges, and what changed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from labkit.look.snapshots import Selection
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, describe
from labkit.ucall.snapshot import PoolSnapshot
from labkit.views.drawing.markup import Html, cat, el, hx
from labkit.views.mappings import (
    MAX_ROWS,
    Change,
    change_table,
    changes_between,
    range_table,
    summary,
)
from labkit.views.pictures import ruler
from labkit.views.pictures.walk import PageObject, draw_walk, walk_key
from labkit.views.show import FRAME, View, columns, header, pane, rail, status_line

__all__ = ["gva_of", "pool_objects", "render", "render_walk", "title"]

MAX_PROBLEMS = 5
MAX_OBJECTS = 40  # in a page; of more the pool is shown as one
LAYOUT = cat(
    [
        *map(pane, ("title", "walk", "ruler", "rail")),
        columns("r2", pane("ranges"), pane("changes")),
        pane("status"),
    ]
)


def render(
    found: PageTable,
    previous: PageTable | None = None,
    *,
    width: float = 940,
    gva: int | None = None,
    objects: Iterable[PageObject] = (),
    pinned: int | None = None,
) -> View:
    """An address space as a view: the mapped ranges, and what changed since previous.

    With a gva the walk of it, as render_walk() draws it.
    """
    if gva is not None:
        walk = found.walk(gva)
        return render_walk(walk, found, previous, width=width, objects=objects, pinned=pinned)

    changes = changes_between(previous, found)
    said = found.status
    if changes:
        said = f"{summary(changes, previous)}: {said}"
    problems = cat(el("div", problem, cls="hole") for problem in found.problems[:MAX_PROBLEMS])
    panes = {
        "title": title(None, found),
        "ranges": range_table(found) + problems,
        "changes": change_table(changes, found, previous),
        "status": status_line(said),
    }
    name = f"page tables, {found.mode.name}, root {hx(found.root)}"
    return View(name, said, panes, cat(map(pane, panes)), lambda: _lines(found, changes))


def render_walk(
    walk: Walk,
    found: PageTable | None = None,
    previous: PageTable | None = None,
    *,
    width: float = 940,
    objects: Iterable[PageObject] = (),
    pinned: int | None = None,
    selection: Selection | None = None,
) -> View:
    """One walk as a view; pinned is the gva of a second ruler.

    Entries beside the walked ones need the table they come from, change marks the previous one.
    """
    inner = width - FRAME
    before = None
    if previous is not None and found is not None and previous.tables != found.tables:
        before = previous
    what = "" if found is None else found.label(walk.gva)
    picture = draw_walk(walk, found, inner, before=before, objects=objects, name=what)
    picture += walk_key(walk, found, None if before is None else before.step)
    if walk.problem is not None:
        picture += el("div", walk.problem + ".", cls="hole")

    ranges = changes = Html()
    if found is not None:
        ranges = range_table(found, walk.gva)
        changes = change_table(changes_between(previous, found), found, previous)
    panes = {
        "title": title(walk, found),
        "walk": picture,
        "ruler": _ruler(walk, found, inner, pinned),
        "rail": rail(selection, walk.flags.get("c")),
        "ranges": ranges,
        "changes": changes,
        "status": status_line(walk.status),
    }
    name = f"page walk of gva {hx(walk.gva)}, {walk.mode.name}"
    return View(name, walk.status, panes, LAYOUT, lambda: walk.text.splitlines()[:-1])


def title(walk: Walk | None, found: PageTable | None) -> Html:
    """The header of both."""
    known = walk or found
    facts = []
    if known is not None:
        root = el("span", hx(known.root), cls="mono")
        facts = [known.mode.name, Html("root ") + root]
    step = None if found is None else found.step
    return header("Page tables" if walk is None else "Page walk", facts, step)


def _ruler(walk: Walk, found: PageTable | None, width: float, pinned: int | None) -> Html:
    """The last entry of the walk bit by bit, and of the pinned address."""
    rows = [("", walk)]
    if found is not None and pinned is not None:
        rows.append((f"pinned, gva {hx(pinned)}: ", found.walk(pinned)))

    shown = []
    for note, other in rows:
        if other.steps:
            last = other.steps[-1]
            says = describe(walk.mode, other.flags) if other.flags else last.kind
            shown.append((last, note + says))
    return ruler.draw(walk.mode, shown, width) if shown else Html()


def _lines(found: PageTable, changes: list[Change]) -> list[str]:
    lines = found.text.splitlines()[2:]
    for change in changes[:MAX_ROWS]:
        lines.append(
            f"{change.sign} {hx(change.gva)}..{hx(change.gva_end)} {change.nr_pages} pages: "
            f"{change.before or 'nothing'} -> {change.after or 'nothing'}"
        )
    return lines


def gva_of(found: PageTable, gva: int, level: int, index: int) -> int:
    """Where entry `index` leads, of the table at depth `level` of the walk of gva.

    The first page mapped below the entry, else the start of what it covers.
    """
    mode = found.mode
    this = mode.levels[min(level, len(mode.levels) - 1)]
    if this.index(gva) == index:
        return gva

    above = gva & ((1 << mode.va_bits) - 1) & -(this.size << this.bits)  # what leads to the table
    start = mode.extend(above | (index & (this.nr_entries - 1)) << this.shift)
    at = int(np.searchsorted(found.gva, np.uint64(start)))
    if at < len(found) and int(found.gva[at]) < start + this.size:
        return int(found.gva[at])
    return start


def pool_objects(
    pool: PoolSnapshot | None, walk: Walk, chosen: int | None = None
) -> list[PageObject]:
    """The slots of the pool that lie in the page at the end of a walk, the chosen one marked."""
    if pool is None or walk.gpa is None:
        return []
    page = (walk.gpa & -walk.page_size) - pool.gpa  # counted from the start of the pool
    size = pool.slot_size
    first = max((page - pool.slots_offset) // size, 0)
    last = min((page + walk.page_size - 1 - pool.slots_offset) // size, pool.nr_slots - 1)
    if last - first > MAX_OBJECTS:
        return [PageObject(-page, pool.slots_offset + pool.nr_slots * size, "ucall pool")]

    out = []
    if 0 <= -page < walk.page_size:
        out.append(PageObject(-page, pool.slots_offset, "in_use"))
    for slot in range(first, last + 1):
        offset = pool.slots_offset - page + slot * size
        out.append(PageObject(offset, size, f"slot {slot}", slot == chosen))
    return out
