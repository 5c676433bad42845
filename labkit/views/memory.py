"""Guest-physical memory as a strip: what every page is for."""

from __future__ import annotations

from collections import Counter

from labkit.look.snapshots import MemoryMap, MemoryRange, Selection
from labkit.views.draw import Html, aligned, cat, grid, hx, key, label, num, plain, rect, svg
from labkit.views.show import View, header, pane, rail, status_line
from labkit.views.strip import PAGE, Painter, lay

__all__ = ["render", "status"]

TRACK = 12  # height of a page


def render(
    memory: MemoryMap,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The memory map as a view; previous is not used: neither memslots nor their use have change marks."""
    secret, chosen = (
        any(part.protected for part in memory.ranges),
        selection is not None and selection.gpa is not None,
    )
    states = (
        [("k-enc", "encrypted (solid)"), ("k-shr", "shared (hollow)")]
        if secret
        else [("k-mem", "in use")]
    )
    said, slots = status(memory, selection), len(memory.slots)
    panes = {
        "title": header(
            "Guest memory",
            [f"{slots} memslot" + "s" * (slots != 1), f"{num(_total(memory))} pages"],
            memory.step,
        ),
        "memory": label("Memory", f"{_counts(memory)}; one cell is one page")
        + _draw(memory, width - 26, selection)
        + key(*states, ("k-dot", "free"), ("k-sel", "selected page") if chosen else None),
        "rail": rail(selection),
        "status": status_line(said),
    }
    return View(
        f"guest memory, step {num(memory.step)}",
        said,
        panes,
        cat(map(pane, panes)),
        lambda: aligned(
            [
                ["gpa", "pages", "what"],
                *([hx(part.gpa), num(part.nr_pages), _what(part)] for part in _ordered(memory)),
            ]
        ),
    )


def status(memory: MemoryMap, selection: Selection | None = None) -> str:
    """The status sentence: the use of the selected page, or of all."""
    if selection is not None and selection.gpa is not None:
        found = next(
            (
                part
                for part in memory.ranges
                if 0 <= selection.gpa - part.gpa < part.nr_pages * PAGE
            ),
            None,
        )
        return f"Page {hx(selection.gpa & -PAGE)}: {_what(found) if found else 'free'}."
    uses: Counter[str] = Counter()
    for part in memory.ranges:
        uses[plain(part.kind, 40)] += part.nr_pages
    return f"{_counts(memory)}: {', '.join(f'{kind} {num(nr)}' for kind, nr in uses.items()) or 'all free'}."


def _total(memory: MemoryMap) -> int:
    return sum(size for _, size in memory.slots) // PAGE


def _counts(memory: MemoryMap) -> str:
    return (
        f"{num(sum(part.nr_pages for part in memory.ranges))} of {num(_total(memory))} pages in use"
    )


def _ordered(memory: MemoryMap) -> list[MemoryRange]:
    return sorted(memory.ranges, key=lambda part: part.gpa)


def _what(part: MemoryRange) -> str:
    return plain(part.kind, 40) + (", encrypted" if part.protected else "")


def _page(part: MemoryRange) -> int:
    return part.gpa // PAGE


def _draw(memory: MemoryMap, width: float, selection: Selection | None) -> Html:
    """Solid is encrypted, hollow shared, slate when nothing is encrypted; free pages are dots."""
    ordered = _ordered(memory)
    strip = lay(
        memory.slots, [(_page(part), part.nr_pages, part.kind) for part in ordered], width, TRACK
    )
    painter, secret = Painter(strip), any(part.protected for part in memory.ranges)
    for part in ordered:
        fill = "c-mem" if not secret else "c-enc" if part.protected else "c-shr"
        painter.pages(_page(part), part.nr_pages, 0, TRACK, fill)
    chosen = None if selection is None or selection.gpa is None else selection.gpa // PAGE
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
    if chosen is not None:
        out += cat(
            rect(x - 1.5, y - 1.5, max(strip.pitch, 5) + 2, TRACK + 3, "c-sel")
            for x, y, _, _ in strip.parts(chosen, 1)
        )
    return svg(width, strip.height, out, f"Guest memory: {status(memory)}")
