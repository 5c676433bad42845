"""The slots of the pool over time, one row each, under the lanes of a timeline."""

from __future__ import annotations

from labkit.look.snapshots import Hold, VmSnapshot
from labkit.views.drawing.markup import Attribute, Html, el
from labkit.views.drawing.shapes import path, text
from labkit.words import num

__all__ = ["LEFT", "draw_slot", "slot_rows"]

LEFT = 66  # room for the names of lanes and rows
MAX_ROWS = 6  # the slots that were held last
HIGH = 8  # pixels of a bar
DIGIT = 12  # pixels of a bar that has room for the digit of its vCPU


def slot_rows(vm: VmSnapshot) -> list[int]:
    """The slots that have a row, lowest first: those that were held last, MAX_ROWS at most."""
    rows: list[int] = []
    for hold in reversed(vm.holds):
        if hold.slot not in rows:
            rows.append(hold.slot)
        if len(rows) == MAX_ROWS:
            break
    return sorted(rows)


def draw_slot(vm: VmSnapshot, slot: int, y: float, scale: float, width: float) -> Html:
    """When a slot was held, and by whom; a click selects it."""
    out = text(0, y + 3.5, f"slot {slot}", "s d")
    bars = ""
    for hold in vm.holds:
        if hold.slot != slot:
            continue
        start = LEFT + hold.start * scale
        end = LEFT + (vm.step if hold.end is None else hold.end) * scale
        long = max(end - start, 1.0)
        bars += f"M{start:.1f} {y - HIGH / 2:g}h{long:.1f}v{HIGH}h-{long:.1f}z"
        if long >= DIGIT and 0 <= hold.vcpu < 10:
            out += text(start + long / 2, y + 3.5, str(hold.vcpu), "own", "middle")
    out = path(bars, "c-use") + out
    return el("g", out, _hit(vm, slot, y, width))


def _hit(vm: VmSnapshot, slot: int, y: float, width: float) -> Html:
    """The row takes clicks over its whole height, and says what it shows."""
    mine = [hold for hold in vm.holds if hold.slot == slot]
    facts: dict[str, Attribute] = {
        "data_act": "select",
        "data_kind": "slot",
        "data_value": slot,
        "data_say": f"Slot {slot}: held {len(mine)} times, last {_last(mine[-1])}",
    }
    return el("rect", x=0, y=y - 6, width=width, height=12, cls="c-hit", **facts)


def _last(hold: Hold) -> str:
    who = "by nobody knows whom" if hold.vcpu < 0 else f"by vCPU {hold.vcpu}"
    until = "until now" if hold.end is None else f"to step {num(hold.end)}"
    return f"{who}, from step {num(hold.start)} {until}"
