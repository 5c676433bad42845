"""What the guest said: the last ucall or exit on a card, all of them in a log, who called whom."""

from __future__ import annotations

from itertools import islice

from labkit.look.snapshots import EventMark, FrameRow, Said, VcpuSnapshot, VmSnapshot
from labkit.outside import plain
from labkit.views.drawing.markup import Attribute, Html, el, hx
from labkit.views.drawing.tables import Row, classes, label, select, table
from labkit.words import num

__all__ = ["card", "card_text", "frames", "log", "log_text"]

NR_ROWS = 200  # of the log, the newest ones
SEARCHED = 5000  # events among which those of one vCPU are looked for
NR_IN_TEXT = 8  # of them in a terminal
MAX_TEXT = 300  # characters of what a guest said


def card(vm: VmSnapshot) -> Html:
    """The last ucall or exit in full; nothing before the first."""
    said = vm.said
    if said is None:
        return Html()
    when = "just now" if said.is_now else f"at step {num(said.step)}"
    head = el("b", plain(said.kind, 40), cls="ft" if said.is_end else None)
    who = el("span", f"vCPU {said.vcpu}, {when}", cls="d")
    parts = [el("span", head, " ", who)]
    if said.text is not None:
        parts.append(el("span", plain(repr(said.text), MAX_TEXT), cls="mono txt"))
    if said.args:
        parts.append(el("span", "args ", _args(said), cls="mono"))
    if said.slot is not None:
        attributes = select("slot", said.slot, "lnk")
        parts.append(el("span", f"slot {said.slot}", role="button", tabindex=0, **attributes))
    if said.words and not said.is_end:
        parts.append(el("span", plain(said.words, MAX_TEXT)))
    cls = "said end" if said.is_end else "said"
    return el("div", *parts, cls=cls, role="group", aria_label="last ucall or exit")


def _args(said: Said) -> Html:
    """Small numbers as people count, others in hexadecimal."""
    return Html(", ".join(str(arg) if arg < 10 else hx(arg) for arg in said.args))


def card_text(vm: VmSnapshot) -> list[str]:
    """The card for a terminal."""
    said = vm.said
    if said is None:
        return []
    when = "just now" if said.is_now else f"at step {num(said.step)}"
    text = "" if said.text is None else f" {plain(repr(said.text), MAX_TEXT)}"
    args = f" args {', '.join(map(hx, said.args))}" if said.args else ""
    slot = "" if said.slot is None else f" slot {said.slot}"
    words = f": {plain(said.words, MAX_TEXT)}" if said.words else ""
    return [f"last: vCPU {said.vcpu} {plain(said.kind, 40)}{text}{args}{slot} ({when}){words}"]


# --- the log


def _logged(vm: VmSnapshot) -> list[EventMark]:
    """The newest events of the vCPUs that the log shows, newest first.

    Of one vCPU among many those of the last SEARCHED events, so that a long past costs no more.
    """
    if vm.log_of is None:
        return list(reversed(vm.events[-NR_ROWS:]))
    newest = reversed(vm.events[-SEARCHED:])
    return list(islice((event for event in newest if event.vcpu == vm.log_of), NR_ROWS))


def log(vm: VmSnapshot) -> Html:
    """All ucalls and exits, the newest first; a click selects the slot, or what stopped."""
    shown = _logged(vm)
    chosen = vm.selection
    rows: list[Row] = []
    for event in shown:
        is_chosen = False
        attributes: dict[str, Attribute] = {}
        if event.slot is not None:
            is_chosen = chosen is not None and chosen.slot == event.slot
            attributes = select("slot", event.slot, classes(sel=is_chosen))
        elif event.gva is not None:
            is_chosen = chosen is not None and chosen.gva == event.gva
            attributes = select("byte", hx(event.gva), classes(sel=is_chosen))
        cells = (("r nm", num(event.step)), ("d", f"vCPU {event.vcpu}"), ("cm", _what(event)))
        rows.append((cells, attributes))

    head = label("Ucalls and exits", _how_many(vm, len(rows)))
    if len(vm.vcpus) > 1 and vm.events:
        head += _filters(vm)
    if not rows:
        return head
    return head + el("div", table("log", rows, cls="regs log"), cls="scr", tabindex=0)


def _how_many(vm: VmSnapshot, nr_rows: int) -> str:
    if not vm.events:
        return "nothing happened yet"
    if vm.log_of is not None:
        return f"the newest {nr_rows} of vCPU {vm.log_of}, {num(len(vm.events))} of all"
    if nr_rows < len(vm.events):
        return f"the newest {nr_rows} of {num(len(vm.events))}"
    return f"{nr_rows}, the newest first"


def _what(event: EventMark) -> Html:
    kind = el("b", f"{event.letter} ", cls="mono") if event.kind == "ucall" else Html()
    return kind + plain(event.text, MAX_TEXT)


def _filters(vm: VmSnapshot) -> Html:
    """A button for all vCPUs, and one for each."""
    words: list[tuple[str, int | str]] = [("all", "all")]
    words += [(f"vCPU {vcpu.index}", vcpu.index) for vcpu in vm.vcpus]
    made = []
    for word, value in words:
        is_on = value == ("all" if vm.log_of is None else vm.log_of)
        made.append(
            el(
                "button",
                word,
                type="button",
                cls="flt on" if is_on else "flt",
                aria_pressed="true" if is_on else "false",
                aria_label=f"log of {word}",
                data_act="log_of",
                data_value=value,
            )
        )
    return el("div", *made, cls="flts")


def log_text(vm: VmSnapshot) -> list[str]:
    """The newest rows of the log for a terminal, the oldest first."""
    shown, nr_events = _logged(vm), len(vm.events)
    lines = [
        f"  {num(event.step):>9} vCPU {event.vcpu} {plain(event.text, 120)}"
        for event in reversed(shown[:NR_IN_TEXT])
    ]
    if nr_events > len(lines):
        lines.insert(0, f"  ... {num(nr_events - len(lines))} before")
    return lines


# --- who called whom


def frames(vcpu: VcpuSnapshot) -> Html:
    """The functions that have not returned yet; a click shows the source of the call."""
    if len(vcpu.frames) < 2 and not vcpu.frames_end:
        return Html()
    rows: list[Row] = []
    for number, frame in enumerate(vcpu.frames):
        cells = (("nm", f"#{number}"), ("v", plain(frame.where, 60)), ("cm", _line(frame)))
        attributes: dict[str, Attribute] = {
            "data_act": "frame",
            "data_value": str(number),
            "cls": classes(cur=number == vcpu.frame),
            "role": "button",
            "tabindex": 0,
        }
        rows.append((cells, attributes))
    said = "the innermost function first"
    if vcpu.frames_end:
        said = f"ends early: {plain(vcpu.frames_end, 80)}"
    return label("Backtrace", said) + table("backtrace", rows, cls="regs")


def _line(frame: FrameRow) -> str:
    return "" if frame.file is None else plain(f"{frame.file}:{frame.line}", 80)
