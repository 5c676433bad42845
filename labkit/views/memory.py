"""Guest-physical memory as a strip: what every page is for."""

from __future__ import annotations

from collections import Counter

from labkit.explore.inspect import MemoryMap, MemoryRange, Selection
from labkit.views.draw import Html, aligned, cat, dashes, grid, hx, key, label, line, num, path, plain, rect, squares, svg, text
from labkit.views.show import View, header, pane, rail, status_line

__all__ = ["render", "status"]

PAGE = 4096
TRACK = 12  # height of a page
MAX_ROWS = 16  # rows with something in them; beyond that a row holds more pages

Strip = tuple[int, int, bool]  # first page, number of pages, all free


def render(memory: MemoryMap, previous: MemoryMap | None = None, *, width: float = 940, selection: Selection | None = None) -> View:
    """The memory map as a view; previous is not used: neither memslots nor their use have change marks."""
    said, slots = status(memory, selection), len(memory.slots)
    secret, chosen = any(part.protected for part in memory.ranges), selection is not None and selection.gpa is not None
    states = [("k-enc", "encrypted (solid)"), ("k-shr", "shared (hollow)")] if secret else [("k-mem", "in use")]
    panes = {
        "title": header("Guest memory", [f"{slots} memslot" + "s" * (slots != 1), f"{num(_total(memory))} pages"], Html("step ") + num(memory.step)),
        "memory": label("Memory", f"{_counts(memory)}; one cell is one page") + _draw(memory, width - 26, selection)
        + key(*states, ("k-dot", "free"), ("k-sel", "selected page") if chosen else None),
        "rail": rail(selection), "status": status_line(said),
    }
    return View(f"guest memory, step {num(memory.step)}", said, panes, cat(map(pane, panes)), lambda: _lines(memory))


def _total(memory: MemoryMap) -> int:
    return sum(size for _, size in memory.slots) // PAGE


def _counts(memory: MemoryMap) -> str:
    return f"{num(sum(part.nr_pages for part in memory.ranges))} of {num(_total(memory))} pages in use"


def status(memory: MemoryMap, selection: Selection | None = None) -> str:
    """The status sentence: the use of the selected page, or of all."""
    if selection is not None and selection.gpa is not None:
        found = next((part for part in memory.ranges if part.gpa <= selection.gpa < part.gpa + part.nr_pages * PAGE), None)
        return f"Page {hx(selection.gpa & -PAGE)}: {_what(found) if found else 'free'}."
    uses: Counter[str] = Counter()
    for part in memory.ranges:
        uses[plain(part.kind, 40)] += part.nr_pages
    return f"{_counts(memory)}: {', '.join(f'{kind} {num(nr)}' for kind, nr in uses.items()) or 'all free'}."


def _what(part: MemoryRange) -> str:
    return plain(part.kind, 40) + (", encrypted" if part.protected else "")


def _span(part: MemoryRange) -> tuple[int, int]:
    return part.gpa // PAGE, part.gpa // PAGE + part.nr_pages


def _strips(memory: MemoryMap, width: float) -> tuple[int, list[Strip]]:
    """Pages per row, and the rows: counted from the start of their memslot, neighbouring free ones as one."""
    per = 64 if width < 700 else 256 if width > 1100 else 128
    while True:
        strips: list[Strip] = []
        for gpa, size in memory.slots:
            start, end = gpa // PAGE, (gpa + size) // PAGE
            used: set[int] = set()
            for low, high in map(_span, memory.ranges):
                used.update(range(max(low - start, 0) // per, (min(high, end) - start - 1) // per + 1) if low < end and high > start else ())
            at = 0
            for row in [*sorted(used), -(-(end - start) // per)]:
                strips += [(start + at * per, min(end - start, row * per) - at * per, True)] if row > at else []
                strips += [(start + row * per, min(per, end - start - row * per), False)] if row in used else []
                at = row + 1
        if sum(not free for _, _, free in strips) <= MAX_ROWS:
            return per, strips
        per *= 2


def _draw(memory: MemoryMap, width: float, selection: Selection | None) -> Html:
    """Solid is encrypted, hollow shared, slate when nothing is encrypted; free pages are dots."""
    per, strips = _strips(memory, width)
    left = 10 + 6.2 * max([7, *(len(hx(page * PAGE)) for page, _, _ in strips)])
    pitch, y, cells, picture = (width - left) / per, 0, [], Html()
    for page, count, free in strips:
        picture += text(left - 8, y + (10 if free else 32), hx(page * PAGE), "m d s", "end")
        if free:
            picture += text(left, y + 10, f"free, {num(count)} pages", "s d")
        else:
            cells.append((y + 22, page, count))
        y += 16 if free else 40
    body = cat(_strip(memory, at, page, count, left, pitch) for at, page, count in cells)
    chosen = None if selection is None or selection.gpa is None else selection.gpa // PAGE
    picture += grid("page", "Guest memory", body, rows=cells, x=left, pitch=pitch, h=TRACK, each="Page {a}: {v}", none="Page {a}: free",
                    values=[(part.gpa // PAGE, part.nr_pages, _what(part)) for part in memory.ranges], size=PAGE, at=chosen)
    for at, page, count in cells:
        if chosen is not None and page <= chosen < page + count:
            picture += rect(left + (chosen - page) * pitch - 1.5, at - 1.5, max(pitch, 5) + 2, TRACK + 3, "c-sel")
    return svg(width, max(y, 1), picture, f"Guest memory: {status(memory)}")


def _strip(memory: MemoryMap, y: float, page: int, count: int, left: float, pitch: float) -> Html:
    out = dashes(left + pitch / 2 - 0.6, [(y + TRACK / 2, count)], max(pitch, 4), 1.2, 1.2, "c-dot")
    secret, ends = any(part.protected for part in memory.ranges), [0.0, 0.0]
    for part in sorted(memory.ranges, key=lambda part: part.gpa):
        low, high = max(_span(part)[0], page), min(_span(part)[1], page + count)
        if low < high:
            x, w = left + (low - page) * pitch, max((high - low) * pitch - 1, 1.5)
            out += rect(x, y - 1, w + 1, TRACK + 2, "c-bg")
            hollow = secret and not part.protected
            out += rect(x + 0.75, y + 0.75, max(w - 1.5, 0.5), TRACK - 1.5, "c-shr") if hollow else rect(x, y, w, TRACK, "c-enc" if secret else "c-mem")
            if pitch > 4:
                out += path(squares(((x + i * pitch - 1, y + 2) for i in range(1, high - low)), 0.7, TRACK - 4), "c-shrt" if hollow else "c-bg")
            out += _name(part, low > _span(part)[0], x, y, w, ends)
    return out


def _name(part: MemoryRange, goes_on: bool, x: float, y: float, w: float, ends: list[float]) -> Html:
    """The bracket over a range with its name, in the first of two rows of names that has room; ends says where they end."""
    out, words = path(f"M{x:.1f} {y - 3:g}h{w:.1f}", "c-brk"), ("… " if goes_on else "") + plain(part.kind, 40)
    row = next((row for row, end in enumerate(ends) if x >= end), None)
    if row is None or (goes_on and w < 80):
        return out
    ends[row] = x + 5.9 * len(words) + 6
    stem = line(x + 0.5, y - 3, x + 0.5, y - 17, "c-brk") if row else Html()
    return out + stem + text(x + 3 * row, y - 6 - 10 * row, words, "s")


def _lines(memory: MemoryMap) -> list[str]:
    return aligned([["gpa", "pages", "what"], *([hx(part.gpa), num(part.nr_pages), _what(part)] for part in sorted(memory.ranges, key=lambda part: part.gpa))])
