"""Page tables: the walk of one address, the entry bit by bit, the mapped ranges, and what changed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from labkit.look.snapshots import Selection
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, describe
from labkit.ucall.pool import PoolSnapshot
from labkit.views import ruler
from labkit.views.draw import Cell, Html, Row, cat, el, hx, label, num, plain, select, swatch, table
from labkit.views.show import View, columns, header, pane, rail, status_line
from labkit.views.walk import PageObject, draw, size_name, walk_key

__all__ = ["gva_of", "pool_objects", "render", "render_walk", "title"]

MAX_ROWS = 40
LAYOUT = cat(
    [
        *map(pane, ("title", "walk", "ruler", "rail")),
        columns("r2", pane("ranges"), pane("changes")),
        pane("status"),
    ]
)
SIGNS = {"+": ("added", "chg"), "-": ("removed", "del"), "~": ("changed", "chg")}
Change = tuple[str, int, int, int, str, str]  # sign, gva, gva_end, nr_pages, before, after


def render(
    found: PageTable,
    previous: PageTable | None = None,
    *,
    width: float = 940,
    gva: int | None = None,
    objects: Iterable[PageObject] = (),
    pinned: int | None = None,
) -> View:
    """An address space as a view: the mapped ranges, what changed since previous, and the walk of gva when one is asked for."""
    if gva is not None:
        return render_walk(
            found.walk(gva), found, previous, width=width, objects=objects, pinned=pinned
        )
    diff = _diff(found, previous)
    said = f"{_sum(diff, previous)}: " * bool(diff) + found.status
    problems = cat(el("div", problem, cls="hole") for problem in found.problems[:5])
    panes = {
        "title": title(None, found),
        "ranges": _ranges(found) + problems,
        "changes": _changes(diff, found, previous),
        "status": status_line(said),
    }
    lines = [
        f"{sign} {hx(low)}..{hx(high)} {count} pages: {old or 'nothing'} -> {new or 'nothing'}"
        for sign, low, high, count, old, new in diff[:MAX_ROWS]
    ]
    name = f"page tables, {found.mode.name}, root {hx(found.root)}"
    return View(
        name, said, panes, cat(map(pane, panes)), lambda: found.text.splitlines()[2:] + lines
    )


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
    """One walk as a view; entries beside the walked ones need the table they come from, change marks the previous one."""
    what = found.labels(walk.gva) if found is not None and found.labels is not None else ""
    problem = Html() if walk.problem is None else el("div", walk.problem + ".", cls="hole")
    marks = (
        previous
        if previous is not None and found is not None and previous.tables != found.tables
        else None
    )
    picture = draw(walk, found, width - 26, before=marks, objects=objects, name=what)
    panes = {
        "title": title(walk, found),
        "walk": picture + walk_key(walk, found, None if marks is None else marks.step) + problem,
        "ruler": _ruler(walk, found, width - 26, pinned),
        "rail": rail(selection, walk.flags.get("c")),
        "ranges": Html() if found is None else _ranges(found, walk.gva),
        "changes": Html() if found is None else _changes(_diff(found, previous), found, previous),
        "status": status_line(walk.status),
    }
    name = f"page walk of gva {hx(walk.gva)}, {walk.mode.name}"
    return View(name, walk.status, panes, LAYOUT, lambda: walk.text.splitlines()[:-1])


def title(walk: Walk | None, found: PageTable | None) -> Html:
    """The header of both."""
    known = walk or found
    facts = (
        []
        if known is None
        else [known.mode.name, Html("root ") + el("span", hx(known.root), cls="mono")]
    )
    return header(
        "Page tables" if walk is None else "Page walk", facts, None if found is None else found.step
    )


def _ruler(walk: Walk, found: PageTable | None, width: float, pinned: int | None) -> Html:
    rows = [("", walk)]
    if found is not None and pinned is not None:
        rows.append((f"pinned, gva {hx(pinned)}: ", found.walk(pinned)))
    shown = [
        (last, note + (describe(walk.mode, other.flags) if other.flags else last.kind))
        for note, other in rows
        for last in other.steps[-1:]
    ]
    return ruler.draw(walk.mode, shown, width) if shown else Html()


def _ranges(found: PageTable, here: int | None = None) -> Html:
    """The mapped ranges; a click walks to the first page of one."""
    first, last = found.ranges(
        tuple(name for name in ("accessed", "dirty") if name in found.mode.flags)
    )
    secret, rows = found.mode.c_bit is not None, list[Row]()
    for low, high in zip(first.tolist()[:MAX_ROWS], last.tolist()[:MAX_ROWS], strict=True):
        gva, size, flags = (
            int(found.gva[low]),
            int(found.size[low]),
            found.mode.rights(int(found.rights[low])),
        )
        end = int(found.gva[high]) + size - 1
        access = (
            "r"
            + "-w"[flags.get("writable", False)]
            + "x-"[flags.get("nx", False)]
            + "u" * flags.get("user", False)
        )
        count = num(high - low + 1) + ("" if size == 4096 else f" × {size_name(size)}")
        cells: list[Cell] = [
            f"{hx(gva)} – {hx(end)}",
            ("r", count),
            ("hn", hx(int(found.gpa[low]))),
            access,
        ]
        cells += [swatch(flags["c"], found.mode.c_word(flags["c"]))] if secret else []
        cls = "sel" if here is not None and gva <= here <= end else None
        rows.append(([*cells, _what(found, gva, end)], select("byte", hx(gva), cls)))
    bit = [f"{found.mode.c_name}-bit"] if secret else []
    head: list[Cell] = ["gva", ("r", "pages"), ("hn", "gpa"), "access", *bit, "what lies there"]
    more = f"; the first {MAX_ROWS} ranges" if len(first) > MAX_ROWS else ""
    said = f"{num(len(found))} pages in {num(len(first))} ranges, neighbours with equal access merged{more}"
    return label("Mapped ranges", said) + el("div", table("mapped ranges", rows, head), cls="tbx")


def _what(found: PageTable, gva: int, end: int) -> str:
    low, high = (
        plain(found.labels(at), 60) if found.labels is not None else "" for at in (gva, end)
    )
    return low if low == high or not high else f"{low} .. {high}"


def _diff(found: PageTable, previous: PageTable | None) -> list[Change]:
    if previous is None or previous.mode != found.mode or previous.tables == found.tables:
        return []
    return [
        (
            str(row.sign),
            int(row.gva),
            int(row.gva_end),
            int(row.nr_pages),
            str(row.before),
            str(row.after),
        )
        for row in found.diff(previous).itertuples()
    ]


def _sum(diff: list[Change], previous: PageTable | None) -> str:
    total = {sign: sum(change[3] for change in diff if change[0] == sign) for sign in SIGNS}
    counts = (
        ", ".join(f"{num(total[sign])} {word}" for sign, (word, _) in SIGNS.items() if total[sign])
        or "none"
    )
    return counts + (
        f" since step {num(previous.step)}"
        if previous is not None and previous.step is not None
        else ""
    )


def _bit(found: PageTable | None, gva: int) -> Html:
    """What a snapshot says of one page's encryption."""
    flags = {} if found is None else found.walk(gva).flags
    return (
        swatch(flags["c"], found.mode.c_word(flags["c"]))
        if found is not None and "c" in flags
        else Html()
    )


def _changes(diff: list[Change], found: PageTable, previous: PageTable | None) -> Html:
    """What changed, as rows of + - ~ with the removed ones struck out."""
    if previous is None:
        return Html()
    secret = found.mode.c_bit is not None
    more = f"; the first {MAX_ROWS} of {num(len(diff))} ranges" if len(diff) > MAX_ROWS else ""
    rows, head = list[Row](), [f"{found.mode.c_name}-bit"] if secret else []
    for sign, gva, end, count, before, after in diff[:MAX_ROWS]:
        cells: list[Cell] = [
            ("sg", sign.replace("-", "−")),
            f"{hx(gva)} – {hx(end)}",
            ("r", num(count)),
            before,
            after,
        ]
        if secret:
            bits = [
                _bit(previous if sign in "-~" else None, gva),
                _bit(found if sign in "+~" else None, gva),
            ]
            cells.insert(3, Html(" → ".join(dict.fromkeys(filter(None, bits)))))
        rows.append((cells, select("byte", hx(gva), SIGNS[sign][1])))
    shown = (
        el(
            "div",
            table("changes", rows, ("", "gva", ("r", "pages"), *head, "before", "after")),
            cls="tbx",
        )
        if rows
        else Html()
    )
    return label("Changes", f"pages: {_sum(diff, previous)}{more}") + shown


def gva_of(found: PageTable, gva: int, level: int, index: int) -> int:
    """Where entry index of the table at this depth of the walk of gva leads: the first page mapped below it, else its start."""
    mode, this = found.mode, found.mode.levels[min(level, len(found.mode.levels) - 1)]
    if this.index(gva) == index:
        return gva
    above = gva & ((1 << mode.va_bits) - 1) & -(this.size << this.bits)
    start = mode.extend(above | (index & (this.nr_entries - 1)) << this.shift)
    at = int(np.searchsorted(found.gva, np.uint64(start)))
    return (
        int(found.gva[at]) if at < len(found) and int(found.gva[at]) < start + this.size else start
    )


def pool_objects(
    pool: PoolSnapshot | None, walk: Walk, chosen: int | None = None
) -> list[PageObject]:
    """The slots of the pool that lie in the page at the end of a walk."""
    if pool is None or walk.gpa is None:
        return []
    page, size = (
        (walk.gpa & -walk.page_size) - pool.gpa,
        pool.slot_size,
    )  # the page, counted from the start of the pool
    first = max((page - pool.slots_offset) // size, 0)
    last = min((page + walk.page_size - 1 - pool.slots_offset) // size, pool.nr_slots - 1)
    if last - first > 40:
        return [PageObject(-page, pool.slots_offset + pool.nr_slots * size, "ucall pool")]
    head = [PageObject(-page, pool.slots_offset, "in_use")] if 0 <= -page < walk.page_size else []
    start = pool.slots_offset - page
    return head + [
        PageObject(start + slot * size, size, f"slot {slot}", slot == chosen)
        for slot in range(first, last + 1)
    ]
