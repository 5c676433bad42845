"""Guest-physical memory as a strip: what every page is for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from labkit.explore.inspect import MemoryMap, MemoryRange, Selection
from labkit.views.draw import Html, Says, aligned, cat, dashes, grid, hx, key, label, line, num, path, plain, rect, squares, svg, text
from labkit.views.show import View, header, pane, status_line

__all__ = ["counts", "draw", "memory_key", "render", "status"]

PAGE = 4096
TRACK = 12  # height of a page
MAX_ROWS = 16  # rows with something in them; beyond that a row holds more pages


def render(memory: MemoryMap, previous: MemoryMap | None = None, *, width: int = 940, selection: Selection | None = None) -> View:
    """The memory map as a view; previous is not needed, because neither memslots nor their use have change marks."""
    said = status(memory, selection)
    slots = f"{len(memory.slots)} memslot" + "s" * (len(memory.slots) != 1)
    panes = {
        "title": header("Guest memory", [slots, f"{num(_total(memory))} pages"], Html("step ") + num(memory.step)),
        "memory": label("Pages", counts(memory)) + draw(memory, width - 26, selection),
        "memorykey": memory_key(memory, selection),
        "status": status_line(said),
    }
    return View(f"guest memory, step {num(memory.step)}", said, panes, cat(pane(name) for name in panes), lambda: _lines(memory))


def _total(memory: MemoryMap) -> int:
    return sum(size for _, size in memory.slots) // PAGE


def counts(memory: MemoryMap) -> str:
    """The figures in words: "231 of 2 048 in use"."""
    return f"{num(sum(part.nr_pages for part in memory.ranges))} of {num(_total(memory))} in use"


def status(memory: MemoryMap, selection: Selection | None = None) -> str:
    """The status sentence: the use of the selected page, or of all."""
    if selection is not None and selection.gpa is not None:
        found = _range_at(memory, selection.gpa)
        return f"Page {hx(selection.gpa & -PAGE)}: {_what(found) if found else 'free'}."
    uses: Counter[str] = Counter()
    for part in memory.ranges:
        uses[plain(part.kind, 40)] += part.nr_pages
    return f"{counts(memory)}: {', '.join(f'{kind} {num(nr)}' for kind, nr in uses.items()) or 'all free'}."


def _range_at(memory: MemoryMap, gpa: int) -> MemoryRange | None:
    return next((part for part in memory.ranges if part.gpa <= gpa < part.gpa + part.nr_pages * PAGE), None)


def _what(part: MemoryRange) -> str:
    return plain(part.kind, 40) + (", encrypted" if part.protected else "")


@dataclass(frozen=True)
class _Row:
    """A row of pages, or (first None) a line that stands for a run of free ones."""

    page: int
    count: int
    free: bool
    slot: int


def _rows(memory: MemoryMap, per: int) -> list[_Row]:
    """Rows start where their memslot starts; neighbouring free rows are one line."""
    rows: list[_Row] = []
    parts = [(part.gpa // PAGE, part.gpa // PAGE + part.nr_pages) for part in sorted(memory.ranges, key=lambda part: part.gpa)]
    for slot, (gpa, size) in enumerate(memory.slots):
        first, end = gpa // PAGE, (gpa + size) // PAGE
        used = sorted({(page - first) // per for low, high in parts if low < end and high > first
                       for page in range(max(low, first) - (max(low, first) - first) % per, min(high, end), per)})
        at = 0
        for row in [*used, -(-(end - first) // per)]:
            if row > at:
                rows.append(_Row(first + at * per, min(end, first + row * per) - first - at * per, True, slot))
            if row in used:
                rows.append(_Row(first + row * per, min(per, end - first - row * per), False, slot))
            at = row + 1
    return rows


def _layout(memory: MemoryMap, width: float) -> tuple[int, list[_Row]]:
    per = 64 if width < 700 else 256 if width > 1100 else 128
    rows = _rows(memory, per)
    while sum(not row.free for row in rows) > MAX_ROWS:
        per *= 2
        rows = _rows(memory, per)
    return per, rows


def draw(memory: MemoryMap, width: float, selection: Selection | None = None) -> Html:
    """The strip: solid is encrypted, hollow shared, slate when nothing is encrypted; free pages are dots."""
    per, rows = _layout(memory, width)
    left = 10 + 6.2 * max([7, *(len(hx(row.page * PAGE)) for row in rows)])
    pitch = (width - left) / per
    picture, cells, y = Html(), [], 0.0
    for row in rows:
        name = text(left - 8, y + (10 if row.free else 32), hx(row.page * PAGE), "m d s", "end")
        picture += name + (text(left, y + 10, f"free, {num(row.count)} pages", "s d") if row.free else Html())
        if not row.free:
            cells.append((y + 22, row.page, row.count))
        y += 16 if row.free else 40
    strips = cat(_strip(memory, at, page, count, left, pitch) for at, page, count in cells)
    says = Says("Page {a}: {v}", "Page {a}: free", [(part.gpa // PAGE, part.nr_pages, _what(part)) for part in memory.ranges], 0, PAGE)
    chosen = None if selection is None or selection.gpa is None else selection.gpa // PAGE
    picture += grid("page", "Guest memory", strips, says, rows=cells, x=left, pitch=pitch, h=TRACK, at=chosen)
    for at, page, count in cells:
        if chosen is not None and page <= chosen < page + count:
            picture += rect(left + (chosen - page) * pitch - 1.5, at - 1.5, max(pitch, 5) + 2, TRACK + 3, "c-sel")
    return svg(width, max(y, 1), picture, f"Guest memory: {status(memory)}", "group")


def _strip(memory: MemoryMap, y: float, page: int, count: int, left: float, pitch: float) -> Html:
    out = dashes(left + pitch / 2 - 0.6, [(y + TRACK / 2, 0, count)], max(pitch, 4), 1.2, 1.2, "c-dot")
    secret = any(part.protected for part in memory.ranges)
    ends = [0.0, 0.0]  # where the last label ends, in either row of labels
    for part in sorted(memory.ranges, key=lambda part: part.gpa):
        low, high = max(part.gpa // PAGE, page), min(part.gpa // PAGE + part.nr_pages, page + count)
        if low >= high:
            continue
        x, w = left + (low - page) * pitch, max((high - low) * pitch - 1, 1.5)
        out += rect(x, y - 1, w + 1, TRACK + 2, "c-bg")
        out += rect(x + 0.75, y + 0.75, max(w - 1.5, 0.5), TRACK - 1.5, "c-shr") if secret and not part.protected else (
            rect(x, y, w, TRACK, "c-enc" if part.protected else "c-mem"))
        if pitch > 4:
            ticks = squares(((x + i * pitch - 1, y + 2) for i in range(1, high - low)), 0.7, TRACK - 4)
            out += path(ticks, "c-tick" if part.protected or not secret else "c-shrt")
        out += _name(plain(part.kind, 40), part.gpa // PAGE < page, x, y, w, ends)
    return out


def _name(kind: str, goes_on: bool, x: float, y: float, w: float, ends: list[float]) -> Html:
    """The bracket over a range with its name, in the first of two rows of labels that has room."""
    out = path(f"M{x:.1f} {y - 3:g}h{w:.1f}", "c-brk")
    words = ("… " if goes_on else "") + kind
    if goes_on and w < 80:
        return out
    for row, end in enumerate(ends):
        if x >= end:
            ends[row] = x + 5.9 * len(words) + 6
            stem = line(x + 0.5, y - 3, x + 0.5, y - 8 - 9 * row, "c-brk") if row else Html()
            return out + stem + text(x + 3 * row, y - 6 - 10 * row, words, "s")
    return out


def memory_key(memory: MemoryMap, selection: Selection | None = None) -> Html:
    """The key: only marks that occur."""
    secret = any(part.protected for part in memory.ranges)
    states = [("k-enc", "encrypted (solid)"), ("k-shr", "shared (hollow)")] if secret else [("k-mem", "in use")]
    chosen = selection is not None and selection.gpa is not None
    return key(*states, ("k-dot", "free"), ("k-sel", "selected page") if chosen else None)


def _lines(memory: MemoryMap) -> list[str]:
    rows = [[hx(part.gpa), num(part.nr_pages), _what(part)] for part in sorted(memory.ranges, key=lambda part: part.gpa)]
    return aligned([["gpa", "pages", "what"], *rows])
