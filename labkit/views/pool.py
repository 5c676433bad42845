"""The ucall pool as a grid: who holds which slot, what changed, what will never come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labkit.explore.inspect import Selection
from labkit.ucall.pool import PoolSnapshot, Slot
from labkit.views.draw import (
    NUMBERED, Cell, Html, Lattice, Says, aligned, bar, cat, dashes, el, esc, grid, hx, key, label, line, num, path, plain, rect, squares, svg,
    table, text,
)
from labkit.views.show import View, columns, header, pane, status_line

__all__ = ["card", "compare", "counts", "draw", "marks", "pool_key", "render", "rows_used", "slot_at", "status"]

LEFT = 40  # room for the slot numbers
HELD = 8  # rows of the table of held slots
BIG = 512  # above this a cell has no room for a digit
STATE = {"free": "free", "held": "in use", "done": "held by a DONE ucall", "leaked": "leaked, its vCPU is done"}


def render(pool: PoolSnapshot, previous: PoolSnapshot | None = None, *, width: int = 940, selection: Selection | None = None) -> View:
    """The pool as a view; changes are marked against previous when it is given, else as the snapshot says."""
    pool = compare(pool, previous)
    chosen = None if selection is None else selection.slot
    facts = [f"{num(pool.nr_slots)} slots of {pool.slot_size} bytes", Html("gva ") + el("span", hx(pool.gva), cls="mono"), f"{pool.nr_pages} pages"]
    said = status(pool, chosen)
    panes = {
        "title": header("ucall pool", facts, Html("step ") + el("b", num(pool.step))),
        "pool": label("Slots", counts(pool)) + draw(pool, width - 26, chosen=chosen, leader=chosen is not None),
        "card": Html() if chosen is None else card(pool, chosen),
        "poolkey": pool_key(pool, chosen),
        "held": _held_table(pool),
        "status": status_line(said),
    }
    title = f"ucall pool, {pool.nr_slots} slots, step {num(pool.step)}"
    return View(title, said, panes, cat(pane(name) for name in panes), lambda: _lines(pool))


def compare(pool: PoolSnapshot, previous: PoolSnapshot | None) -> PoolSnapshot:
    """The same pool with its change marks taken against previous."""
    if previous is None or previous.nr_slots != pool.nr_slots:
        return pool
    return replace(pool, changed=pool.in_use != previous.in_use, changed_since=previous.step)


def counts(pool: PoolSnapshot) -> str:
    """The figures in words: "6 of 512 in use, 3 of them leaked; 2 changed since step 1 180"."""
    leaked, changed = int(pool.leaked.sum()), int(pool.changed.sum())
    words = f"{num(int(pool.in_use.sum()))} of {num(pool.nr_slots)} in use" + (f", {num(leaked)} of them leaked" if leaked else "")
    if pool.changed_since is not None:
        words += f"; {num(changed) if changed else 'none'} changed since step {num(pool.changed_since)}"
    return words


def status(pool: PoolSnapshot, chosen: int | None = None) -> str:
    """The status sentence: the chosen slot, or the counts."""
    if chosen is None:
        return f"{counts(pool)}."
    slot = slot_at(pool, chosen)
    if slot is None or slot.state == "free":
        return f"Slot {chosen} is free" + (f", used {pool.uses[chosen]} times." if pool.uses[chosen] else ", never used.")
    return f"Slot {chosen}, {_what(slot)}."


def _what(slot: Slot) -> str:
    said = f' "{plain(slot.text, 60)}"' if slot.text else ""
    since = "" if slot.since is None else f", since step {num(slot.since)}"
    tail = {"done": ", held by design", "leaked": ", leaked"}.get(slot.state, "")
    return f"{_owner(slot)}, {plain(slot.cmd, 20)}{said}{since}{tail}"


def _owner(slot: Slot) -> str:
    return "owner unknown" if slot.vcpu is None else f"vCPU {slot.vcpu}"


def slot_at(pool: PoolSnapshot, index: int) -> Slot | None:
    """What the host knows of one slot, None when it was never used."""
    return next((slot for slot in pool.held if slot.index == index), None)


def marks(pool: PoolSnapshot) -> str:
    """One character per slot: . free, the owner's digit (? unknown), x leaked, D held by a DONE ucall."""
    digits = np.array(list(NUMBERED + "?"))
    out = np.where(pool.in_use, digits[np.where((pool.owner < 0) | (pool.owner >= len(NUMBERED)), len(NUMBERED), pool.owner)], ".")
    out = np.where(pool.done & pool.in_use, "D", out)
    return "".join(np.where(pool.leaked & pool.in_use, "x", out).tolist())


def rows_used(pool: PoolSnapshot, cols: int, chosen: int | None = None) -> int:
    """Rows worth drawing: up to the last that holds a slot ever used, changed, chosen or next."""
    alive = np.flatnonzero(pool.in_use | pool.changed | (pool.uses > 0)).tolist()[-1:]
    return max([0, *alive, *([] if chosen is None else [chosen]), *([] if pool.next_slot is None else [pool.next_slot])]) // cols + 1


def draw(pool: PoolSnapshot, width: float, *, chosen: int | None = None, taker: int | None = None, fold: bool = False, leader: bool = False) -> Html:
    """The grid; taker is the vCPU about to take pool.next_slot, fold leaves out trailing rows never used."""
    small = pool.nr_slots > BIG
    cols = min(pool.nr_slots, (64 if width < 700 else 128) if small else (32 if width < 700 else 64))
    pitch = min(10 if small else 20, (width - LEFT) / cols)
    pitch = max(int(pitch * 2) / 2, 4)
    lattice = Lattice(LEFT, 14, cols, pitch, pitch if small else max(pitch, 16))
    total = -(-pool.nr_slots // cols)
    shown = min(total, max(rows_used(pool, cols, chosen), 8 if small else 2)) if fold else total
    nr = min(pool.nr_slots, shown * cols)
    body = _cells(pool, marks(pool)[:nr], lattice, small) + _next(pool, lattice, taker)
    says = Says("Slot {i}, {v}, gva {a}", "Slot {i}: free, gva {a}", _says(pool, small), pool.gva + pool.slots_offset, pool.slot_size)
    picture = _axes(lattice, nr, small) + grid("slot", f"Pool of {pool.nr_slots} slots", body, says, rows=lattice.rows(nr),
                                               x=LEFT, pitch=pitch, h=lattice.tall - 1, at=chosen)
    height = 16 + shown * lattice.tall
    if shown < total:
        end = LEFT + cols * pitch
        picture += line(LEFT, height + 7, end - 1, height + 7, "c-fold")
        picture += text((LEFT + end) / 2, height + 11, f"slots {num(nr)} to {num(pool.nr_slots - 1)}: never used", "s d halo", "middle")
        height += 14
    if chosen is not None and chosen < nr:
        x, y = lattice.at(chosen)
        picture += rect(x - 1.5, y - 1.5, pitch + 2, lattice.tall + 2, "c-sel")
        if leader:
            picture += line(x + (pitch - 1) / 2, y + lattice.tall + 1, x + (pitch - 1) / 2, height + 7, "c-now")
            height += 7
    return svg(width, height, picture, f"Pool: {counts(pool)}", "group")


def _axes(lattice: Lattice, nr: int, small: bool) -> Html:
    across = cat(text(lattice.x + col * lattice.pitch, 9, str(col), "s d") for col in range(0, lattice.cols, 16 if small else 8))
    down = lattice.rows(nr)[::8 if small else 1]
    return across + cat(text(lattice.x - 8, y + (8 if small else 12), str(first), "s d", "end") for y, first, _ in down)


def _cells(pool: PoolSnapshot, states: str, lattice: Lattice, small: bool) -> Html:
    """All cells, each kind of mark as one path and the digits as one text per row."""
    w, h = lattice.pitch - 1, lattice.tall - 1
    where: dict[str, list[int]] = {"x": [], "D": [], "use": []}
    for i, state in enumerate(states):
        if state != ".":
            where[state if state in "xD" else "use"].append(i)
    leaks = [lattice.at(i) for i in where["x"]]
    hollow = squares(((x + 0.75, y + 0.75) for x, y in map(lattice.at, where["D"])), w - 1.5, h - 1.5)
    out = dashes(lattice.x, [(y + h / 2, 0, count) for y, _, count in lattice.rows(len(states))], lattice.pitch, w, h, "c-cell")
    out += path(squares(map(lattice.at, where["use"]), w, h), "c-use") + path(hollow, "c-done")
    changed = [i for i in np.flatnonzero(pool.changed).tolist() if i < len(states)]
    if small:
        out += path("".join(f"M{x:g} {y:g}v{h:g}h{w:g}z" for x, y in leaks), "c-flt")
    else:
        cross, side = w - 5, (h - w + 5) / 2
        out += path(squares(leaks, w, h), "c-flt")
        out += path("".join(f"M{x + 2.5:g} {y + side:g}l{cross:g} {cross:g}m0 {-cross:g}l{-cross:g} {cross:g}" for x, y in leaks), "c-x")
        out += _digits(states, where["use"], lattice, "own", set(changed)) + _digits(states, where["D"], lattice, "own dn", set(changed))
    return out + bar([lattice.foot(i) for i in changed], w, 2 if small else 3)


def _digits(states: str, cells: list[int], lattice: Lattice, cls: str, changed: set[int]) -> Html:
    """Owner digits; one text element per row and height, with a list of places."""
    rows: dict[float, list[int]] = {}
    for i in cells:
        rows.setdefault(lattice.foot(i)[1] - (5.5 if i in changed else 4), []).append(i)
    middle = (lattice.pitch - 1) / 2
    return cat(text(" ".join(f"{lattice.at(i)[0] + middle:g}" for i in row), y, "".join(states[i] for i in row), cls, "middle")
               for y, row in rows.items())


def _next(pool: PoolSnapshot, lattice: Lattice, taker: int | None) -> Html:
    if pool.next_slot is None or pool.nr_slots > BIG:
        return Html()
    x, y = lattice.at(pool.next_slot)
    digit = "" if taker is None else NUMBERED[taker % len(NUMBERED)]
    return rect(x + 1, y + 1, lattice.pitch - 3, lattice.tall - 3, "c-next") + text(x + (lattice.pitch - 1) / 2, y + lattice.tall - 5, digit, "nxt", "middle")


def _says(pool: PoolSnapshot, small: bool) -> list[tuple[int, int, str]]:
    return [(slot.index, 1, _owner(slot) if small else _what(slot)) for slot in pool.held if slot.state != "free"]


def pool_key(pool: PoolSnapshot, chosen: int | None = None) -> Html:
    """The key: only marks that occur."""
    small, leaked, used = pool.nr_slots > BIG, bool(pool.leaked.any()), pool.in_use & ~pool.leaked & ~pool.done
    return key(("k-free", "free"),
               ("k-use", "in use" if small else "in use, digit = vCPU") if used.any() else None,
               ("k-done", "held by a DONE ucall") if pool.done.any() else None,
               ("k-tri" if small else "k-flt", "leaked: its vCPU is done") if leaked else None,
               ("k-chg", "changed") if pool.changed.any() else None,
               ("k-next", "taken by the next step") if pool.next_slot is not None else None,
               ("k-sel", "selected") if chosen is not None else None)


def card(pool: PoolSnapshot, index: int) -> Html:
    """Everything about one slot; docks under the grid."""
    slot = slot_at(pool, index)
    if slot is None:
        return el("div", el("b", f"slot {index}"), el("span", " free, never used", cls="d"), cls="card")
    uses = int(pool.uses[index])
    since = "" if slot.since is None else f" since step {num(slot.since)}"
    what = f" {STATE[slot.state]}" + (f", {_owner(slot)}{since}" if slot.state != "free" else "") + (f" · used {uses} times" if uses > 1 else "")
    said = "" if slot.text is None else f'"{plain(slot.text, 160)}"'
    ok = el("span", " slot says the same ✓", cls="d") if slot.hva_ok else el("span", " ✗ not this slot's: the guest wrote it", cls="ft")
    holds = [("cmd", plain(slot.cmd, 40)), ("args", ", ".join(map(hx, slot.args))), *([("text", said)] if said else [])]
    lies = [("gva", f"{hx(slot.gva)} ucalls[{index}]"), ("gpa", hx(slot.gpa)), ("hva", esc(hx(slot.hva)) + ok)]
    sides = (table(f"slot {index}", [((("d", name), value), {}) for name, value in rows]) for rows in (holds, lies))
    return el("div", el("div", f"slot {index}", el("span", what, cls="sub"), cls="t"), columns("c2e", *sides), cls="card")


def _held_table(pool: PoolSnapshot) -> Html:
    held = [slot for slot in pool.held if slot.state != "free"]
    if not held:
        return Html()
    rows = [(_held_row(slot), {"data_act": "select", "data_kind": "slot", "data_value": slot.index}) for slot in held[:HELD]]
    more = f"the first {HELD} of {len(held)}" if len(held) > HELD else f"{len(held)}"
    return label("Held slots", more) + el("div", table("held slots", rows, ("slot", "vCPU", "since", "cmd", "args", "text", "state")), cls="tbx")


def _held_row(slot: Slot) -> list[Cell]:
    args = list(slot.args)
    while args and not args[-1]:
        args.pop()
    return [str(slot.index), "?" if slot.vcpu is None else str(slot.vcpu), "" if slot.since is None else num(slot.since), plain(slot.cmd, 20),
            ", ".join(map(hx, args)), "" if slot.text is None else plain(slot.text, 60), ("ft" if slot.state == "leaked" else "d", STATE[slot.state])]


def _lines(pool: PoolSnapshot) -> list[str]:
    states = marks(pool)
    nr = rows_used(pool, 64) * 64
    out = [f"{first:>6} {states[first:first + 64]}" for first in range(0, min(nr, pool.nr_slots), 64)]
    if nr < pool.nr_slots:
        out.append(f"{'':>6} slots {nr} to {pool.nr_slots - 1}: never used")
    held = [slot for slot in pool.held if slot.state != "free"]
    rows = [[cell if isinstance(cell, str) else cell[1] for cell in _held_row(slot)] for slot in held[:HELD]]
    return out + aligned([["slot", "vCPU", "since", "cmd", "args", "text", "state"], *rows] if rows else []) + (
        [f"... and {len(held) - HELD} more"] if len(held) > HELD else [])
