"""Guest-physical memory as a strip: what every page is for."""

from __future__ import annotations

from collections import Counter

from labkit.look.snapshots import MemoryMap, MemoryRange, Selection
from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.views.drawing.cells import grid
from labkit.views.drawing.markup import Html, cat, hx
from labkit.views.drawing.shapes import svg
from labkit.views.drawing.strip import Painter, lay, outline
from labkit.views.drawing.tables import aligned, key, label
from labkit.views.show import FRAME, View, header, pane, rail, selected_gpa, status_line
from labkit.words import num, plural

__all__ = ["render", "status"]

TRACK = 12  # height of a page


def render(
    memory: MemoryMap,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The memory map as a view.

    previous is not used: neither memslots nor their use have change marks.
    """
    said = status(memory, selection)
    nr_slots = len(memory.slots)
    facts = [f"{nr_slots} {plural('memslot', nr_slots)}", f"{num(_total(memory))} pages"]
    panes = {
        "title": header("Guest memory", facts, memory.step),
        "memory": label("Memory", f"{_counts(memory)}; one cell is one page")
        + _draw(memory, width - FRAME, selection)
        + _key(memory, selection),
        "rail": rail(selection),
        "status": status_line(said),
    }
    title = f"guest memory, step {num(memory.step)}"
    return View(title, said, panes, cat(map(pane, panes)), lambda: _lines(memory))


def status(memory: MemoryMap, selection: Selection | None = None) -> str:
    """The status sentence: the use of the selected page, or of all."""
    gpa = selected_gpa(selection)
    if gpa is not None:
        found = next((part for part in memory.ranges if _holds(part, gpa)), None)
        use = "free" if found is None else _what(found)
        return f"Page {hx(gpa & -PAGE)}: {use}."

    uses: Counter[str] = Counter()
    for part in memory.ranges:
        uses[plain(part.kind, 40)] += part.nr_pages
    listed = ", ".join(f"{kind} {num(nr)}" for kind, nr in uses.items())
    return f"{_counts(memory)}: {listed or 'all free'}."


def _holds(part: MemoryRange, gpa: int) -> bool:
    return 0 <= gpa - part.gpa < part.nr_pages * PAGE


def _total(memory: MemoryMap) -> int:
    """How many pages there are."""
    return sum(size for _, size in memory.slots) // PAGE


def _counts(memory: MemoryMap) -> str:
    nr_used = sum(part.nr_pages for part in memory.ranges)
    return f"{num(nr_used)} of {num(_total(memory))} pages in use"


def _ordered(memory: MemoryMap) -> list[MemoryRange]:
    return sorted(memory.ranges, key=lambda part: part.gpa)


def _has_secrets(memory: MemoryMap) -> bool:
    return any(part.protected for part in memory.ranges)


def _what(part: MemoryRange) -> str:
    return plain(part.kind, 40) + (", encrypted" if part.protected else "")


def _page(part: MemoryRange) -> int:
    return part.gpa // PAGE


def _draw(memory: MemoryMap, width: float, selection: Selection | None) -> Html:
    """Solid is encrypted, hollow shared, slate when nothing is encrypted; free pages are dots."""
    ordered = _ordered(memory)
    named = [(_page(part), part.nr_pages, part.kind) for part in ordered]
    strip = lay(memory.slots, named, width, TRACK)
    painter = Painter(strip)
    has_secrets = _has_secrets(memory)
    for part in ordered:
        fill = "c-mem"
        if has_secrets:
            fill = "c-enc" if part.protected else "c-shr"
        painter.pages(_page(part), part.nr_pages, 0, TRACK, fill)

    gpa = selected_gpa(selection)
    chosen = None if gpa is None else gpa // PAGE
    out = strip.frame + grid(
        "page",
        "Guest memory",
        strip.dots(TRACK / 2) + painter.drawn(),
        rows=strip.rows,
        x=strip.left,
        pitch=strip.pitch,
        h=TRACK,
        at=chosen,
        each="Page {a}: {v}",
        none="Page {a}: free",
        size=PAGE,
        values=[(_page(part), part.nr_pages, _what(part)) for part in memory.ranges],
    )
    out += outline(strip, chosen, TRACK)
    return svg(width, strip.height, out, f"Guest memory: {status(memory)}")


def _key(memory: MemoryMap, selection: Selection | None) -> Html:
    states = [("k-mem", "in use")]
    if _has_secrets(memory):
        states = [("k-enc", "encrypted (solid)"), ("k-shr", "shared (hollow)")]
    chosen = None if selected_gpa(selection) is None else ("k-sel", "selected page")
    return key(*states, ("k-dot", "free"), chosen)


def _lines(memory: MemoryMap) -> list[str]:
    rows = [[hx(part.gpa), num(part.nr_pages), _what(part)] for part in _ordered(memory)]
    return aligned([["gpa", "pages", "what"], *rows])
