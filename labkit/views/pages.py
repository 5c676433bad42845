"""Page tables: the walk of one address, the entry bit by bit, the mapped ranges, and what changed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk, describe
from labkit.ucall.pool import PoolSnapshot
from labkit.views import ruler
from labkit.views.draw import Cell, Html, Row, cat, el, hx, label, num, plain, swatch, table
from labkit.views.show import View, columns, header, pane, status_line
from labkit.views.walk import PageObject, draw, size_name, walk_key

__all__ = ["changes", "gva_of", "pool_objects", "ranges", "render", "render_walk", "walk_panes"]

MAX_ROWS = 40


def render(found: PageTable, previous: PageTable | None = None, *, width: int = 940, gva: int | None = None,
           objects: Iterable[PageObject] = (), pinned: int | None = None) -> View:
    """An address space as a view: the mapped ranges, what changed since previous, and the walk of gva when one is asked for."""
    if gva is not None:
        return render_walk(found.walk(gva), found, previous, width=width, objects=objects, pinned=pinned)
    said = f"{_changed_words(found, previous)}{found.status}"
    panes = {"title": header("Page tables", _facts(found.mode.name, found.root), _step(found.step)), "ranges": ranges(found),
             "changes": changes(found, previous), "problems": _problems(found), "status": status_line(said)}
    return View(f"page tables, {found.mode.name}, root {hx(found.root)}", said, panes, cat(pane(name) for name in panes),
                lambda: found.text.splitlines()[2:] + _change_lines(found, previous))


def render_walk(walk: Walk, found: PageTable | None = None, previous: PageTable | None = None, *, width: int = 940,
                objects: Iterable[PageObject] = (), pinned: int | None = None) -> View:
    """One walk as a view; the other entries of its tables need the table they come from, the change marks the previous one."""
    step = None if found is None else found.step
    panes = {"title": header("Page walk", _facts(walk.mode.name, walk.root), _step(step)),
             **walk_panes(walk, found, previous, width - 26, objects, pinned),
             "ranges": Html() if found is None else ranges(found, walk), "changes": Html() if found is None else changes(found, previous),
             "status": status_line(walk.status)}
    layout = cat([pane("title"), pane("walk"), pane("ruler"), columns("r2", pane("ranges"), pane("changes")), pane("status")])
    return View(f"page walk of gva {hx(walk.gva)}, {walk.mode.name}", walk.status, panes, layout, lambda: walk.text.splitlines()[:-1])


def walk_panes(walk: Walk, found: PageTable | None, previous: PageTable | None, width: float, objects: Iterable[PageObject] = (),
               pinned: int | None = None) -> dict[str, Html]:
    """The picture with its key and its error, and the ruler."""
    name = found.labels(walk.gva) if found is not None and found.labels is not None else ""
    picture = draw(walk, found, width, before=previous, objects=objects, name=name)
    problem = Html() if walk.problem is None else el("div", walk.problem + ".", cls="hole")
    since = None if previous is None else previous.step
    return {"walk": picture + walk_key(walk, found, since) + problem, "ruler": _ruler(walk, found, width, pinned)}


def _ruler(walk: Walk, found: PageTable | None, width: float, pinned: int | None) -> Html:
    rows = [(other.steps[-1], note + (describe(other.flags) if other.flags else other.steps[-1].kind))
            for note, other in [("", walk)] + ([(f"pinned, gva {hx(pinned)}: ", found.walk(pinned))] if found is not None and pinned is not None else [])
            if other.steps]
    return ruler.draw(walk.mode, rows, width) if rows else Html()


def _facts(mode: str, root: int) -> list[str]:
    return [mode, Html("root ") + el("span", hx(root), cls="mono")]


def _step(step: int | None) -> Html:
    return Html() if step is None else Html("step ") + el("b", num(step))


def _access(found: PageTable, rights: int) -> str:
    """Rights as r-x, with u where the guest's user mode may."""
    flags = found.mode.rights(rights)
    return "r" + ("w" if flags.get("writable") else "-") + ("-" if flags.get("nx") else "x") + ("u" if flags.get("user") else "")


def ranges(found: PageTable, walk: Walk | None = None) -> Html:
    """The mapped ranges; a click walks to the first page of one."""
    first, last = found.ranges(tuple(name for name in ("accessed", "dirty") if name in found.mode.flags))
    rows: list[Row] = []
    for low, high in zip(first.tolist()[:MAX_ROWS], last.tolist()[:MAX_ROWS], strict=True):
        gva, end, size = int(found.gva[low]), int(found.gva[high]) + int(found.size[high]) - 1, int(found.size[low])
        count = num(high - low + 1) + ("" if size == 4096 else f" × {size_name(size)}")
        cells: list[Cell] = [f"{hx(gva)} – {hx(end)}", ("r", count), ("hn", hx(int(found.gpa[low]))), _access(found, int(found.rights[low]))]
        if found.mode.c_bit is not None:
            cells.append(swatch("encrypted" if found.mode.rights(int(found.rights[low]))["c"] else "shared"))
        here = walk is not None and gva <= walk.gva <= end
        rows.append(([*cells, _what(found, gva, end)], {"data_act": "select", "data_kind": "byte", "data_value": hx(gva), "cls": "sel" if here else None}))
    head: list[Cell] = ["gva", ("r", "pages"), ("hn", "gpa"), "access", *(["C-bit"] if found.mode.c_bit is not None else []), "what lies there"]
    more = "" if len(first) <= MAX_ROWS else f"; the first {MAX_ROWS} of {num(len(first))}"
    return label("Mapped ranges", f"{num(len(found))} pages in {num(len(first))} ranges, neighbours with equal access merged{more}") + el(
        "div", table("mapped ranges", rows, head), cls="tbx")


def _what(found: PageTable, gva: int, end: int) -> str:
    if found.labels is None:
        return ""
    low, high = plain(found.labels(gva), 60), plain(found.labels(end), 60)
    return low if low == high or not high else f"{low} .. {high}"


def _diff(found: PageTable, previous: PageTable | None) -> list[tuple[str, int, int, int, str, str]]:
    """(sign, gva, gva_end, nr_pages, before, after); empty where there is nothing to compare."""
    if previous is None or previous.mode != found.mode or previous.tables == found.tables:
        return []
    rows = found.diff(previous)
    return [(str(row.sign), int(row.gva), int(row.gva_end), int(row.nr_pages), str(row.before), str(row.after)) for row in rows.itertuples()]


def changes(found: PageTable, previous: PageTable | None) -> Html:
    """What changed since previous, as rows of + - ~ with the removed ones struck out."""
    if previous is None:
        return Html()
    diff = _diff(found, previous)
    since = f"since step {num(previous.step)}" if previous.step is not None else "since then"
    if not diff:
        return label("Changes", f"none {since}")
    cls = {"+": "chg", "~": "chg", "-": "del"}
    rows: list[Row] = [((("sg", sign.replace("-", "−")), f"{hx(gva)} – {hx(end)}", ("r", num(count)), before, after),
                        {"cls": cls[sign], "data_act": "select", "data_kind": "byte", "data_value": hx(gva)})
                       for sign, gva, end, count, before, after in diff[:MAX_ROWS]]
    more = "" if len(diff) <= MAX_ROWS else f"; the first {MAX_ROWS} of {len(diff)}"
    return label("Changes", f"{_sum(diff)} {since}{more}") + el("div", table("changes", rows, ("", "gva", ("r", "pages"), "before", "after")), cls="tbx")


def _sum(diff: list[tuple[str, int, int, int, str, str]]) -> str:
    total = {sign: sum(count for one, _, _, count, _, _ in diff if one == sign) for sign in "+-~"}
    return ", ".join(f"{num(total[sign])} {word}" for sign, word in (("+", "added"), ("-", "removed"), ("~", "changed")) if total[sign])


def _changed_words(found: PageTable, previous: PageTable | None) -> str:
    diff = _diff(found, previous)
    return f"Pages: {_sum(diff)} since step {num(previous.step or 0)}. " if diff and previous is not None else ""


def _change_lines(found: PageTable, previous: PageTable | None) -> list[str]:
    return [f"{sign} {hx(gva)}..{hx(end)} {count} pages: {before or 'nothing'} -> {after or 'nothing'}" for sign, gva, end, count, before, after
            in _diff(found, previous)[:MAX_ROWS]]


def _problems(found: PageTable) -> Html:
    return cat(el("div", problem, cls="hole") for problem in found.problems[:5])


def gva_of(found: PageTable, gva: int, level: int, index: int) -> int:
    """Where a click on entry index of the table at this depth of the walk of gva leads: the first page mapped below it, else its start."""
    mode, this = found.mode, found.mode.levels[min(level, len(found.mode.levels) - 1)]
    if this.index(gva) == index:
        return gva
    index &= this.nr_entries - 1
    above = gva & ((1 << mode.va_bits) - 1) & -(this.size << this.bits)
    start = mode.extend(above | index << this.shift)
    at = int(np.searchsorted(found.gva, np.uint64(start)))
    return int(found.gva[at]) if at < len(found) and int(found.gva[at]) < start + this.size else start


def pool_objects(pool: PoolSnapshot | None, walk: Walk, chosen: int | None = None) -> list[PageObject]:
    """The slots of the pool that lie in the page at the end of a walk."""
    if pool is None or walk.gpa is None:
        return []
    base = (walk.gpa & -walk.page_size) - pool.gpa - pool.slots_offset  # of the page, counted from slot 0
    first, last = max(base // pool.slot_size, 0), min((base + walk.page_size - 1) // pool.slot_size, pool.nr_slots - 1)
    if last - first > 40:
        return [PageObject(-base - pool.slots_offset, pool.slots_offset + pool.nr_slots * pool.slot_size, "ucall pool")]
    head = [PageObject(-base - pool.slots_offset, pool.slots_offset, "in_use")] if -pool.slots_offset <= base < 0 else []
    return head + [PageObject(slot * pool.slot_size - base, pool.slot_size, f"slot {slot}", slot == chosen) for slot in range(first, last + 1)]
