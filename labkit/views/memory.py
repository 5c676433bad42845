"""Guest-physical memory as a strip: what every page is for."""

from __future__ import annotations

from collections import Counter

from labkit.explore.inspect import MemoryMap, MemoryRange, Selection
from labkit.views.draw import Html, Rows, aligned, cat, dashes, grid, hx, key, label, num, path, plain, rect, squares, svg, text
from labkit.views.show import View, header, pane, rail, status_line

__all__ = ["render", "status"]

PAGE = 4096
TRACK = 12  # height of a page
MAX_ROWS = 16  # rows with something in them; beyond that a row holds more pages


def render(memory: MemoryMap, previous: object = None, *, width: float = 940, selection: Selection | None = None) -> View:
    """The memory map as a view; previous is not used: neither memslots nor their use have change marks."""
    secret, chosen = any(part.protected for part in memory.ranges), selection is not None and selection.gpa is not None
    states = [("k-enc", "encrypted (solid)"), ("k-shr", "shared (hollow)")] if secret else [("k-mem", "in use")]
    said, slots = status(memory, selection), len(memory.slots)
    panes = {
        "title": header("Guest memory", [f"{slots} memslot" + "s" * (slots != 1), f"{num(_total(memory))} pages"], memory.step),
        "memory": label("Memory", f"{_counts(memory)}; one cell is one page") + _draw(memory, width - 26, selection)
        + key(*states, ("k-dot", "free"), ("k-sel", "selected page") if chosen else None),
        "rail": rail(selection), "status": status_line(said),
    }
    return View(f"guest memory, step {num(memory.step)}", said, panes, cat(map(pane, panes)), lambda: aligned(
        [["gpa", "pages", "what"], *([hx(part.gpa), num(part.nr_pages), _what(part)] for part in _ordered(memory))]))


def status(memory: MemoryMap, selection: Selection | None = None) -> str:
    """The status sentence: the use of the selected page, or of all."""
    if selection is not None and selection.gpa is not None:
        found = next((part for part in memory.ranges if 0 <= selection.gpa - part.gpa < part.nr_pages * PAGE), None)
        return f"Page {hx(selection.gpa & -PAGE)}: {_what(found) if found else 'free'}."
    uses: Counter[str] = Counter()
    for part in memory.ranges:
        uses[plain(part.kind, 40)] += part.nr_pages
    return f"{_counts(memory)}: {', '.join(f'{kind} {num(nr)}' for kind, nr in uses.items()) or 'all free'}."


def _total(memory: MemoryMap) -> int:
    return sum(size for _, size in memory.slots) // PAGE


def _counts(memory: MemoryMap) -> str:
    return f"{num(sum(part.nr_pages for part in memory.ranges))} of {num(_total(memory))} pages in use"


def _ordered(memory: MemoryMap) -> list[MemoryRange]:
    return sorted(memory.ranges, key=lambda part: part.gpa)


def _what(part: MemoryRange) -> str:
    return plain(part.kind, 40) + (", encrypted" if part.protected else "")


def _span(part: MemoryRange) -> tuple[int, int]:
    return part.gpa // PAGE, part.gpa // PAGE + part.nr_pages


def _strips(memory: MemoryMap, width: float) -> tuple[int, list[tuple[int, int, bool]]]:
    """Pages per row, and rows of (first page, number, all free) from the start of their memslot on; free neighbours are one."""
    per = 64 if width < 700 else 256 if width > 1100 else 128
    while True:
        out: list[tuple[int, int, bool]] = []
        for gpa, size in memory.slots:
            start, end = gpa // PAGE, (gpa + size) // PAGE
            used: set[int] = set()
            for low, high in map(_span, memory.ranges):
                if low < end and high > start:
                    used.update(range(max(low - start, 0) // per, (min(high, end) - start - 1) // per + 1))
            at = 0
            for row in [*sorted(used), -(-(end - start) // per)]:
                out += [(start + at * per, min(end - start, row * per) - at * per, True)] * (row > at)
                out += [(start + row * per, min(per, end - start - row * per), False)] * (row in used)
                at = row + 1
        if sum(not free for _, _, free in out) <= MAX_ROWS:
            return per, out
        per *= 2


def _draw(memory: MemoryMap, width: float, selection: Selection | None) -> Html:
    """Solid is encrypted, hollow shared, slate when nothing is encrypted; free pages are dots."""
    per, strips = _strips(memory, width)
    left = 10 + 6.2 * max([7, *(len(hx(page * PAGE)) for page, _, _ in strips)])
    pitch, y, out = (width - left) / per, 0, Html()
    cells: list[tuple[float, int, int]] = []
    for page, count, free in strips:
        out += text(left - 8, y + (10 if free else 32), hx(page * PAGE), "m d s", "end")
        if free:
            out += text(left, y + 10, f"free, {num(count)} pages", "s d")
        else:
            cells.append((y + 22, page, count))
        y += 16 if free else 40
    chosen = None if selection is None or selection.gpa is None else selection.gpa // PAGE
    out += grid("page", "Guest memory", _ranges(memory, cells, left, pitch), rows=cells, x=left, pitch=pitch, h=TRACK, at=chosen,
                each="Page {a}: {v}", none="Page {a}: free", size=PAGE,
                values=[(_span(part)[0], part.nr_pages, _what(part)) for part in memory.ranges])
    for at, page, count in cells:
        if chosen is not None and page <= chosen < page + count:
            out += rect(left + (chosen - page) * pitch - 1.5, at - 1.5, max(pitch, 5) + 2, TRACK + 3, "c-sel")
    return svg(width, max(y, 1), out, f"Guest memory: {status(memory)}")


def _ranges(memory: MemoryMap, rows: Rows, left: float, pitch: float) -> Html:
    middles = [(y + TRACK / 2, page, count) for y, page, count in rows]
    out = dashes(middles, left + pitch / 2 - 0.6, pitch, 1.2, 1.2, "c-dot") if pitch > 2 else Html()
    secret, ordered = any(part.protected for part in memory.ranges), _ordered(memory)
    for y, page, count in rows:
        ends = [0.0, 0.0]  # where the names end, in two rows of them
        for part in ordered:
            low, high = max(_span(part)[0], page), min(_span(part)[1], page + count)
            if low < high:
                x, w, hollow = left + (low - page) * pitch, max((high - low) * pitch - 1, 1.5), secret and not part.protected
                fill = "c-shr" if hollow else "c-enc" if secret else "c-mem"
                ticks = squares(((x + i * pitch - 1, y + 2) for i in range(1, high - low)), 0.7, TRACK - 4) if pitch > 4 else ""
                inset = 0.75 if hollow else 0
                out += rect(x, y - 1, w + 1, TRACK + 2, "c-bg")
                out += rect(x + inset, y + inset, max(w - 2 * inset, 0.5), TRACK - 2 * inset, fill)
                out += path(ticks, "c-shrt" if hollow else "c-bg")
                out += _name(("… " if low > _span(part)[0] else "") + plain(part.kind, 40), x, y, w, ends)
    return out


def _name(words: str, x: float, y: float, w: float, ends: list[float]) -> Html:
    """The bracket over a range with its name, in the first row of names that has room."""
    out, row = path(f"M{x:.1f} {y - 3:g}h{w:.1f}", "c-brk"), next((row for row, end in enumerate(ends) if x >= end), None)
    if row is None or (words.startswith("…") and w < 80):
        return out
    ends[row] = x + 5.9 * len(words) + 6
    return out + path(f"M{x + .5:.1f} {y - 3:g}v-14" if row else "", "c-brk") + text(x + 3 * row, y - 6 - 10 * row, words, "s")
