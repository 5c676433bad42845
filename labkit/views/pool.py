"""The ucall pool as a grid: who holds which slot, what changed, what will never come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labkit.look.snapshots import Selection
from labkit.ucall.pool import PoolSnapshot, Slot
from labkit.views.show import View, columns, header, pane, rail, status_line

# isort: off
from labkit.views.draw import (
    DIGITS,
    Html,
    Lattice,
    Row,
    aligned,
    bar,
    cat,
    cross,
    dashes,
    el,
    esc,
    grid,
    hx,
    key,
    label,
    num,
    path,
    plain,
    rect,
    select,
    squares,
    svg,
    table,
    text,
)

__all__ = ["counts", "marks", "render", "status"]

LEFT = 40  # room for the slot numbers
BIG = 512  # above this a cell has no room for a digit
HELD = 8  # rows of the table of held slots
HEAD = ["slot", "vCPU", "since", "cmd", "args", "text", "state"]
STATE = {
    "free": "free",
    "held": "in use",
    "done": "held by a DONE ucall",
    "leaked": "leaked, its vCPU is done",
}


def render(
    pool: PoolSnapshot,
    previous: PoolSnapshot | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
    taker: int | None = None,
    fold: bool = False,
) -> View:
    """The pool as a view; changes are marked against previous when it is given, else as the snapshot says.

    taker is the vCPU about to take pool.next_slot; fold leaves out trailing rows never used, and the card.
    """
    if previous is not None and previous.nr_slots == pool.nr_slots:
        pool = replace(pool, changed=pool.in_use != previous.in_use, changed_since=previous.step)
    chosen = None if selection is None else selection.slot
    size = f"{num(pool.nr_slots)} slots of {pool.slot_size} bytes"
    facts = [size, Html("gva ") + el("span", hx(pool.gva), cls="mono"), f"{pool.nr_pages} pages"]
    panes = {
        "title": header("ucall pool", facts, pool.step),
        "pool": label("Pool", counts(pool)) + _draw(pool, width - 26, chosen, taker, fold),
        "card": Html() if chosen is None or fold else _card(pool, chosen),
        "poolkey": _key(pool, chosen),
        "rail": rail(selection),
        "held": Html() if fold else _held_table(pool),
        "status": status_line(status(pool, chosen)),
    }
    title = f"ucall pool, {pool.nr_slots} slots, step {num(pool.step)}"
    return View(title, status(pool, chosen), panes, cat(map(pane, panes)), lambda: _lines(pool))


def counts(pool: PoolSnapshot) -> str:
    """The figures in words: "6 of 512 in use, 3 of them leaked; 2 changed since step 1 180"."""
    leaked, changed = int(pool.leaked.sum()), int(pool.changed.sum())
    words = (
        f"{num(int(pool.in_use.sum()))} of {num(pool.nr_slots)} in use"
        + f", {num(leaked)} of them leaked" * bool(leaked)
    )
    if pool.changed_since is None:
        return words
    return f"{words}; {num(changed) if changed else 'none'} changed since step {num(pool.changed_since)}"


def status(pool: PoolSnapshot, chosen: int | None = None) -> str:
    """The status sentence: the chosen slot, or the counts."""
    if chosen is None:
        return f"{counts(pool)}."
    slot = _slot_at(pool, chosen)
    if slot is not None and slot.state != "free":
        return f"Slot {chosen}, {_what(slot)}."
    return (
        f"Slot {chosen} is free, used {pool.uses[chosen]} times."
        if slot
        else f"Slot {chosen} is free, never used."
    )


def marks(pool: PoolSnapshot) -> str:
    """One character per slot: . free, the owner's digit (? unknown), x leaked, D held by a DONE ucall."""
    known = (pool.owner >= 0) & (pool.owner < len(DIGITS))
    out = np.where(known, np.array(list(DIGITS))[np.where(known, pool.owner, 0)], "?")
    out = np.where(pool.leaked, "x", np.where(pool.done, "D", out))
    return "".join(np.where(pool.in_use, out, ".").tolist())


def _slot_at(pool: PoolSnapshot, index: int) -> Slot | None:
    return next((slot for slot in pool.held if slot.index == index), None)


def _owner(slot: Slot) -> str:
    return "owner unknown" if slot.vcpu is None else f"vCPU {slot.vcpu}"


def _what(slot: Slot) -> str:
    said = f' "{plain(slot.text, 60)}"' if slot.text else ""
    since = "" if slot.since is None else f", since step {num(slot.since)}"
    tail = {"done": ", held by design", "leaked": ", leaked"}.get(slot.state, "")
    return f"{_owner(slot)}, {plain(slot.cmd, 20)}{said}{since}{tail}"


def _rows_used(pool: PoolSnapshot, cols: int, chosen: int | None = None) -> int:
    """Rows worth drawing: up to the last with a slot ever used, changed, chosen or next."""
    alive = np.flatnonzero(pool.in_use | pool.changed | (pool.uses > 0)).tolist()[-1:]
    return (
        max(0, 0, *alive, *(slot for slot in (pool.next_slot, chosen) if slot is not None)) // cols
        + 1
    )


def _draw(
    pool: PoolSnapshot, width: float, chosen: int | None, taker: int | None, fold: bool
) -> Html:
    small = pool.nr_slots > BIG
    cols = min(pool.nr_slots, (64 if small else 32) * (1 if width < 700 else 2))
    pitch = max(int(min(10 if small else 20, (width - LEFT) / cols) * 2) / 2, 4)
    lattice = Lattice(LEFT, 14, cols, pitch, pitch if small else max(pitch, 16))
    total = -(-pool.nr_slots // cols)
    shown = min(total, max(_rows_used(pool, cols, chosen), 8 if small else 2)) if fold else total
    nr, right, height = (
        min(pool.nr_slots, shown * cols),
        LEFT + cols * pitch,
        16 + shown * lattice.tall,
    )
    out = cat(
        text(LEFT + col * pitch, 9, str(col), "s d") for col in range(0, cols, 16 if small else 8)
    )
    down, skip = (8, 8) if small else (12, 1)
    out += cat(
        text(LEFT - 8, y, str(first), "s d", "end")
        for y, first, _ in lattice.rows(nr, down)[::skip]
    )
    out += grid(
        "slot",
        f"Pool of {pool.nr_slots} slots",
        _cells(pool, marks(pool)[:nr], lattice, taker),
        rows=lattice.rows(nr),
        x=LEFT,
        pitch=pitch,
        h=lattice.tall - 1,
        at=chosen,
        each="Slot {i}, {v}, gva {a}",
        none="Slot {i}: free, gva {a}",
        values=[
            (slot.index, 1, _owner(slot) if small else _what(slot))
            for slot in pool.held
            if slot.state != "free"
        ],
        base=pool.gva + pool.slots_offset,
        size=pool.slot_size,
    )
    if shown < total:
        unused = f"slots {num(nr)} to {num(pool.nr_slots - 1)}: never used"
        out += path(f"M{LEFT} {height + 7}H{right}", "c-fold")
        out += text((LEFT + right) / 2, height + 11, unused, "s d halo", "middle")
        height += 14
    if chosen is not None and chosen < nr:
        x, y = lattice.at(chosen)
        out += rect(x - 1.5, y - 1.5, pitch + 2, lattice.tall + 2, "c-sel")
        if not fold:  # a leader to the card
            out += path(f"M{x + pitch / 2} {y + lattice.tall + 1}V{height + 7}", "c-now")
            height += 7
    return svg(width, height, out, f"Pool: {counts(pool)}")


def _cells(pool: PoolSnapshot, states: str, lattice: Lattice, taker: int | None) -> Html:
    """All cells: each kind of mark is one path, the digits of a row are one text."""
    w, h, small, at = lattice.pitch - 1, lattice.tall - 1, pool.nr_slots > BIG, lattice.at
    leaks, done = ([i for i, state in enumerate(states) if state == mark] for mark in "xD")
    use = [i for i, state in enumerate(states) if state not in ".xD"]
    changed = [i for i in np.flatnonzero(pool.changed).tolist() if i < len(states)]
    out = dashes(lattice.rows(len(states), h / 2), lattice.x, lattice.pitch, w, h, "c-cell")
    out += path(squares(map(at, use), w, h), "c-use") + path(
        squares((at(i, 0.75) for i in done), w - 1.5, h - 1.5), "c-done"
    )
    if small:
        out += path("".join(f"M{x:g} {y:g}v{h:g}h{w:g}z" for x, y in map(at, leaks)), "c-flt")
    else:
        out += path(squares(map(at, leaks), w, h), "c-flt")
        out += cross(((x + 2.5, y + (h - w + 5) / 2) for x, y in map(at, leaks)), w - 5)
        out += _digits(states, use, lattice, "own", changed) + _digits(
            states, done, lattice, "own dn", changed
        )
    if pool.next_slot is not None and not small:
        x, y = at(pool.next_slot)
        out += rect(x + 1, y + 1, w - 2, h - 2, "c-next")
        out += text(
            x + w / 2,
            y + h - 4,
            "" if taker is None else DIGITS[taker % len(DIGITS)],
            "nxt",
            "middle",
        )
    return out + bar(((x, y + h) for x, y in map(at, changed)), w, 2 if small else 3)


def _digits(states: str, cells: list[int], lattice: Lattice, cls: str, changed: list[int]) -> Html:
    rows: dict[float, list[int]] = {}
    for i in cells:
        rows.setdefault(lattice.at(i)[1] + lattice.tall - (6.5 if i in changed else 5), []).append(
            i
        )
    half = (lattice.pitch - 1) / 2
    return cat(
        text(
            " ".join(f"{lattice.at(i)[0] + half:g}" for i in row),
            y,
            "".join(states[i] for i in row),
            cls,
            "middle",
        )
        for y, row in rows.items()
    )


def _key(pool: PoolSnapshot, chosen: int | None) -> Html:
    small, plainly = pool.nr_slots > BIG, pool.in_use & ~pool.leaked & ~pool.done
    return key(
        ("k-free", "free"),
        ("k-use", "in use" if small else "in use, digit = vCPU") if plainly.any() else None,
        ("k-done", "held by a DONE ucall") if pool.done.any() else None,
        ("k-tri" if small else "k-flt", "leaked: its vCPU is done") if pool.leaked.any() else None,
        ("k-chg", "changed") if pool.changed.any() else None,
        ("k-next", "taken by the next step") if pool.next_slot is not None and not small else None,
        ("k-sel", "selected") if chosen is not None else None,
    )


def _card(pool: PoolSnapshot, index: int) -> Html:
    """Everything about one slot; docks under the grid."""
    slot = _slot_at(pool, index)
    if slot is None:
        return el(
            "div", el("b", f"slot {index}"), el("span", " free, never used", cls="d"), cls="card"
        )
    owner = (
        ""
        if slot.state == "free"
        else f", {_owner(slot)}" + ("" if slot.since is None else f" since step {num(slot.since)}")
    )
    said = [] if slot.text is None else [("text", f'"{plain(slot.text, 160)}"')]
    wrong = el("span", " ✗ not this slot's: the guest wrote it", cls="ft")
    ok = el("span", " slot says the same ✓", cls="d") if slot.hva_ok else wrong
    holds = [("cmd", plain(slot.cmd, 40)), ("args", ", ".join(map(hx, slot.args))), *said]
    lies = [
        ("gva", f"{hx(slot.gva)} ucalls[{index}]"),
        ("gpa", hx(slot.gpa)),
        ("hva", esc(hx(slot.hva)) + ok),
    ]
    sides = (
        table(f"slot {index}", [((("d", name), value), {}) for name, value in rows])
        for rows in (holds, lies)
    )
    what = el("span", f" {STATE[slot.state]}{owner} · used {pool.uses[index]} times", cls="sub")
    return el("div", el("div", f"slot {index}", what, cls="t"), columns("c2e", *sides), cls="card")


def _held(pool: PoolSnapshot) -> tuple[list[list[str]], str]:
    """The cells of the first held slots, and how many there are."""
    held = [slot for slot in pool.held if slot.state != "free"]
    rows = [
        [
            str(slot.index),
            "?" if slot.vcpu is None else str(slot.vcpu),
            "" if slot.since is None else num(slot.since),
            plain(slot.cmd, 20),
            ", ".join(map(hx, slot.args)).removesuffix(", 0x0" * 6),
            plain(slot.text or "", 60),
            STATE[slot.state],
        ]
        for slot in held[:HELD]
    ]
    return rows, f"the first {HELD} of {num(len(held))}" if len(held) > HELD else str(len(held))


def _held_table(pool: PoolSnapshot) -> Html:
    rows, more = _held(pool)
    leaked = STATE["leaked"]
    cells: list[Row] = [
        ([*row[:-1], ("ft" if row[-1] == leaked else "d", row[-1])], select("slot", row[0]))
        for row in rows
    ]
    return (
        label("Held slots", more) + el("div", table("held slots", cells, HEAD), cls="tbx")
        if rows
        else Html()
    )


def _lines(pool: PoolSnapshot) -> list[str]:
    states, (rows, more) = marks(pool), _held(pool)
    nr = min(_rows_used(pool, 64) * 64, pool.nr_slots)
    out = [f"{first:>6} {states[first : min(first + 64, nr)]}" for first in range(0, nr, 64)]
    out += [f"{'':>6} slots {nr} to {pool.nr_slots - 1}: never used"] * (nr < pool.nr_slots)
    return out + (aligned([HEAD, *rows]) + [f"({more})"] * (not more.isdigit()) if rows else [])
