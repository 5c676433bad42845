"""The ucall pool: who holds which slot, what changed, what will never come back."""

from __future__ import annotations

from labkit.look.snapshots import Selection
from labkit.outside import plain
from labkit.ucall.calls import given
from labkit.ucall.snapshot import PoolSnapshot, Slot
from labkit.views.drawing.markup import Html, cat, el, esc, hx
from labkit.views.drawing.tables import Row, aligned, boxed, key, label, select, table
from labkit.views.pictures.pool import draw_pool, is_big, rows_used
from labkit.views.pool_words import STATE, counts, marks, owner, slot_at, status, taken
from labkit.views.show import FRAME, View, columns, header, pane, rail, status_line
from labkit.words import num

__all__ = ["render"]

HELD = 8  # rows of the table of held slots
TEXT_COLS = 64  # slots a line in a terminal
HEAD = ["slot", "vCPU", "since", "cmd", "args", "text", "state"]


def render(
    pool: PoolSnapshot,
    previous: PoolSnapshot | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
    taker: int | None = None,
    fold: bool = False,
) -> View:
    """The pool as a view; changes are marked against previous, else as the snapshot says.

    taker is the vCPU about to take pool.next_slot; fold leaves out trailing rows never used, and
    the card.
    """
    pool = _marked(pool, previous)
    chosen = None if selection is None else selection.slot
    said = status(pool, chosen)
    facts = [
        f"{num(pool.nr_slots)} slots of {pool.slot_size} bytes",
        Html("gva ") + el("span", hx(pool.gva), cls="mono"),
        f"{pool.nr_pages} pages",
    ]
    panes = {
        "title": header("ucall pool", facts, pool.step),
        "pool": label("Pool", counts(pool)) + draw_pool(pool, width - FRAME, chosen, taker, fold),
        "card": Html() if chosen is None or fold else _card(pool, chosen),
        "poolkey": _key(pool, chosen),
        "rail": rail(selection),
        "held": Html() if fold else _held_table(pool),
        "status": status_line(said),
    }
    title = f"ucall pool, {pool.nr_slots} slots, step {num(pool.step)}"
    return View(title, said, panes, cat(map(pane, panes)), lambda: _lines(pool))


def _marked(pool: PoolSnapshot, previous: PoolSnapshot | None) -> PoolSnapshot:
    """The pool with the slots marked that changed since previous, where there is such a state."""
    if previous is None or previous.nr_slots != pool.nr_slots:
        return pool
    return pool.since(previous)


def _key(pool: PoolSnapshot, chosen: int | None) -> Html:
    """Only the marks that occur."""
    small = is_big(pool)
    marks: list[tuple[str, str]] = [("k-free", "free")]
    if (pool.in_use & ~pool.leaked & ~pool.done).any():
        marks.append(("k-use", "in use" if small else "in use, digit = vCPU"))
    if pool.done.any():
        marks.append(("k-done", "held by a DONE ucall"))
    if pool.leaked.any():
        marks.append(("k-tri" if small else "k-flt", "leaked: its vCPU is done"))
    if pool.changed.any():
        marks.append(("k-chg", "changed"))
    if pool.next_slot is not None and not small:
        marks.append(("k-next", "taken by the next step"))
    if chosen is not None:
        marks.append(("k-sel", "selected"))
    return key(*marks)


def _card(pool: PoolSnapshot, index: int) -> Html:
    """Everything about one slot; docks under the grid."""
    slot = slot_at(pool, index)
    if slot is None:
        unused = el("span", " free, never used", cls="d")
        return el("div", el("b", f"slot {index}"), unused, cls="card")

    name = f"slot {index}"
    uses = f"used {pool.uses[index]} times"
    what = el("span", f" {_state(slot)} · {uses}", cls="sub")
    sides = (_fields(name, _contents(slot)), _fields(name, _places(slot)))
    return el("div", el("div", name, what, cls="t"), columns("c2e", *sides), cls="card")


def _state(slot: Slot) -> str:
    """The state of a slot, and who took it when."""
    words = STATE[slot.state]
    if slot.state == "free":
        return words
    words += f", {owner(slot)}"
    if slot.since is not None:
        words += f" since step {num(slot.since)}"
    return words


def _contents(slot: Slot) -> list[tuple[str, str]]:
    """What the guest wrote into a slot."""
    rows = [("cmd", plain(slot.cmd, 40)), ("args", ", ".join(map(hx, slot.args)))]
    if slot.text is not None:
        rows.append(("text", f'"{plain(slot.text, 160)}"'))
    return rows


def _places(slot: Slot) -> list[tuple[str, str]]:
    """Where a slot lies, and whether the address stored in it is its own."""
    if slot.hva_ok:
        verdict = el("span", " slot says the same ✓", cls="d")
    else:
        verdict = el("span", " ✗ not this slot's: the guest wrote it", cls="ft")
    return [
        ("gva", f"{hx(slot.gva)} ucalls[{slot.index}]"),
        ("gpa", hx(slot.gpa)),
        ("hva", esc(hx(slot.hva)) + verdict),
    ]


def _fields(name: str, fields: list[tuple[str, str]]) -> Html:
    return table(name, [((("d", field), value), {}) for field, value in fields])


def _held(pool: PoolSnapshot) -> tuple[list[list[str]], str]:
    """The cells of the first held slots, and how many there are."""
    held = taken(pool)
    rows = [_held_row(slot) for slot in held[:HELD]]
    if len(held) > HELD:
        return rows, f"the first {HELD} of {num(len(held))}"
    return rows, str(len(held))


def _held_row(slot: Slot) -> list[str]:
    """A slot in the columns of HEAD."""
    return [
        str(slot.index),
        "?" if slot.vcpu is None else str(slot.vcpu),
        "" if slot.since is None else num(slot.since),
        plain(slot.cmd, 20),
        ", ".join(map(hx, given(slot.args))),
        plain(slot.text or "", 60),
        STATE[slot.state],
    ]


def _held_table(pool: PoolSnapshot) -> Html:
    held, more = _held(pool)
    if not held:
        return Html()
    rows: list[Row] = []
    for *cells, state in held:
        ink = "ft" if state == STATE["leaked"] else "d"
        rows.append(([*cells, (ink, state)], select("slot", cells[0])))
    return label("Held slots", more) + boxed("held slots", rows, HEAD)


def _lines(pool: PoolSnapshot) -> list[str]:
    states = marks(pool)
    nr = min(rows_used(pool, TEXT_COLS) * TEXT_COLS, pool.nr_slots)
    out = []
    for first in range(0, nr, TEXT_COLS):
        out.append(f"{first:>6} {states[first : min(first + TEXT_COLS, nr)]}")
    if nr < pool.nr_slots:
        out.append(f"{'':>6} slots {nr} to {pool.nr_slots - 1}: never used")

    held, more = _held(pool)
    if held:
        out += aligned([HEAD, *held])
        if not more.isdigit():
            out.append(f"({more})")
    return out
