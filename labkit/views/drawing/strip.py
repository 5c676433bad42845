"""Guest-physical memory as rows of pages: where a page lies, what ranges are called, what folds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.views.drawing.cells import Rows, dashes
from labkit.views.drawing.markup import Html, cat, hx
from labkit.views.drawing.shapes import NARROW, WIDE, path, rect, text
from labkit.words import num

__all__ = ["Bracket", "Named", "Painter", "Strip", "box", "joined", "lay", "outline"]

MAX_ROWS = 16  # rows with something in them; beyond that a row holds more pages
MAX_LANES = 6  # names above a row, one over the other
LANE = 11  # pixels
LETTER = 5.7  # width of a letter of a name
FREE_ROW = 16  # height of a folded row
SOLID = ("c-enc", "c-mem", "c-flt")  # fills without an edge

Named = tuple[int, int, str]  # first page, number of pages, name


class Bracket(NamedTuple):
    """The rule over a range, and its name."""

    x: float
    width: float
    name: str


class _PageRow(NamedTuple):
    """A row of the picture, or neighbouring free ones folded into one."""

    page: int
    nr_pages: int
    free: bool


@dataclass(frozen=True)
class Strip:
    """The rows of a picture; frame holds their addresses, folded rows and names."""

    rows: Rows
    left: float
    pitch: float
    height: float
    frame: Html

    def parts(self, page: int, nr_pages: int) -> Iterator[tuple[float, float, float, int]]:
        """A range as (x, y, width, number of pages), once per row that it lies in."""
        for y, first, count in self.rows:
            low = max(page, first)
            high = min(page + nr_pages, first + count)
            if low < high:
                x = self.left + (low - first) * self.pitch
                width = max((high - low) * self.pitch - 1, 1.5)
                yield x, y, width, high - low

    def dots(self, down: float) -> Html:
        """Every page as a dot, to be painted over; `down` pixels below the top of its row."""
        if self.pitch <= 2:
            return Html()
        middles = [(y + down, first, count) for y, first, count in self.rows]
        x = self.left + self.pitch / 2 - 0.6
        return dashes(middles, x, self.pitch, 1.2, 1.2, "c-dot")


def joined(ranges: Iterable[Named]) -> list[Named]:
    """Neighbours of one name as one range, so that they share a bracket."""
    out: list[Named] = []
    for page, nr, name in ranges:
        if out:
            first, nr_before, last_name = out[-1]
            if last_name == name and first + nr_before == page:
                out[-1] = (first, nr_before + nr, name)
                continue
        out.append((page, nr, name))
    return out


def lay(
    slots: Iterable[tuple[int, int]],
    named: Sequence[Named],
    width: float,
    tall: float,
    noted: Iterable[int] = (),
) -> Strip:
    """Rows for memslots of (gpa, bytes), each row `tall` pixels high.

    Rows in which no named range lies fold into a line; rows with noted pages have room for a word
    below.
    """
    per_row, page_rows = _page_rows(list(slots), named, width)
    digits = max([7, *(len(hx(row.page * PAGE)) for row in page_rows)])
    left = 10 + 6.2 * digits
    pitch = (width - left) / per_row
    notes = set(noted)

    y = 0.0
    frame = Html()
    rows = list[tuple[float, int, int]]()
    for page, count, free in page_rows:
        address = hx(page * PAGE)
        if free:
            frame += text(left - 8, y + 10, address, "m d s", "end")
            frame += text(left, y + 10, f"free, {num(count)} pages", "s d")
            y += FREE_ROW
            continue

        brackets = _brackets(named, page, count, left, pitch)
        lanes = _lanes(brackets, width)
        y += 5 + LANE * max([1, *(lane + 1 for _, lane in lanes.values())])
        frame += text(left - 8, y + tall / 2 + 4, address, "m d s", "end")
        frame += _names(brackets, lanes, y)
        rows.append((y, page, count))

        y += tall + 8
        if not notes.isdisjoint(range(page, page + count)):
            y += 12
    return Strip(rows, left, pitch, max(y - 6, 1), frame)


def _page_rows(
    slots: Sequence[tuple[int, int]], named: Sequence[Named], width: float
) -> tuple[int, list[_PageRow]]:
    """How many pages a row holds, so that not too many rows are in use; and the rows."""
    if width < NARROW:
        per_row = 64
    elif width > WIDE:
        per_row = 256
    else:
        per_row = 128

    while True:
        rows = list[_PageRow]()
        for gpa, size in slots:
            rows += _rows_of_slot(gpa // PAGE, (gpa + size) // PAGE, named, per_row)
        if sum(not row.free for row in rows) <= MAX_ROWS:
            return per_row, rows
        per_row *= 2


def _rows_of_slot(start: int, end: int, named: Sequence[Named], per_row: int) -> list[_PageRow]:
    """The rows of the memslot with the pages from start to end, counted from its start on."""
    nr_pages = end - start
    used: set[int] = set()
    for page, nr, _ in named:
        if page < end and page + nr > start:
            first = max(page - start, 0) // per_row
            last = (min(page + nr, end) - start - 1) // per_row
            used.update(range(first, last + 1))

    rows = list[_PageRow]()
    done = 0  # how many rows there are already
    nr_rows = -(-nr_pages // per_row)
    for row in [*sorted(used), nr_rows]:
        if row > done:
            nr_free = min(nr_pages, row * per_row) - done * per_row
            rows.append(_PageRow(start + done * per_row, nr_free, free=True))
        if row in used:
            at = row * per_row
            rows.append(_PageRow(start + at, min(per_row, nr_pages - at), free=False))
        done = row + 1
    return rows


def _brackets(
    named: Sequence[Named], page: int, count: int, left: float, pitch: float
) -> list[Bracket]:
    """The named ranges in a row of count pages; one narrower than a pixel joins the one before."""
    out = list[Bracket]()
    last = -1.0
    for first, nr, name in sorted(named):
        low = max(first, page)
        high = min(first + nr, page + count)
        x = left + (low - page) * pitch
        if low >= high or not name or x < last + 1:
            continue
        last = x
        goes_on = "… " if low > first else ""
        out.append(Bracket(x, max((high - low) * pitch - 1, 1.5), goes_on + plain(name, 40)))
    return out


def _lanes(brackets: Sequence[Bracket], right: float) -> dict[int, tuple[float, int]]:
    """Number of a bracket -> (x, lane) of its name; one for which there is no room is missing.

    From right to left, so that a leader rises left of all names in the lanes below it.
    """
    starts = [float("inf")] * MAX_LANES  # of each lane, where its leftmost name or leader begins
    out = dict[int, tuple[float, int]]()
    for i in range(len(brackets) - 1, -1, -1):
        x, width, name = brackets[i]
        if name.startswith("…") and width < 80:
            continue
        long = LETTER * len(name) + 4
        at = max(min(x, right - long), 0)
        lane = next((lane for lane, start in enumerate(starts) if at + long <= start), None)
        if lane is None or any(x >= start for start in starts[:lane]):
            continue

        for below in range(lane):
            starts[below] = min(starts[below], x)
        starts[lane] = at
        out[i] = (at, lane)
    return out


def _names(brackets: Sequence[Bracket], lanes: dict[int, tuple[float, int]], y: float) -> Html:
    """Brackets over the ranges with their names.

    One without room for its name has its bracket all the same; hover and the text form name it.
    """
    rules = "".join(f"M{x:.1f} {y - 3:g}h{w:.1f}" for x, w, _ in brackets)
    words = Html()
    for i, (at, lane) in lanes.items():
        if lane:
            rules += f"M{brackets[i].x + 0.5:.1f} {y - 3:g}v{-LANE * lane - 3}"
            at += 3
        words += text(round(at, 1), y - 6 - LANE * lane, brackets[i].name, "s")
    return path(rules, "c-brk") + words


def box(x: float, y: float, w: float, h: float, inset: float = 0) -> str:
    """Path data of one rectangle, drawn inset for its stroke."""
    wide = max(w - 2 * inset, 0.5)
    return f"M{x + inset:.1f} {y + inset:g}h{wide:.1f}v{h - 2 * inset:g}h{-wide:.1f}z"


def outline(strip: Strip, page: int | None, tall: float) -> Html:
    """The outline of the selected page, of which `tall` pixels are drawn; nothing without one."""
    if page is None:
        return Html()
    width = max(strip.pitch, 5) + 2
    return cat(
        rect(x - 1.5, y - 1.5, width, tall + 3, "c-sel") for x, y, _, _ in strip.parts(page, 1)
    )


@dataclass
class Painter:
    """Collects ranges of pages by how they look: few elements, whatever the number of ranges."""

    strip: Strip
    data: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seen: set[tuple[str, int, float]] = field(default_factory=set)

    def pages(self, page: int, nr_pages: int, down: float, tall: float, fill: str) -> None:
        """A range in one of the fills: solid c-enc, c-mem and c-flt, hollow all others."""
        hollow = fill not in SOLID
        inset = 0.75 if hollow else 0
        for x, y, w, nr in self.strip.parts(page, nr_pages):
            top = y + down
            spot = fill, int(x), top
            if w < 2 and spot in self.seen:  # narrower than a pixel, and there is one already
                continue
            self.seen.add(spot)
            self.data["c-bg"].append(box(x, top - 1, w + 1, tall + 2))
            self.data[fill].append(box(x, top, w, tall, inset))
            if self.strip.pitch > 4 and fill != "c-flt":
                ticks = self.data["c-shrt" if hollow else "c-tick"]
                for i in range(1, nr):
                    at = x + i * self.strip.pitch - 1
                    ticks.append(f"M{at:.1f} {top + 2:g}h.7v{tall - 4:g}h-.7z")

    def drawn(self) -> Html:
        """All of it; the ground first, the ticks last."""
        order = sorted(self.data, key=lambda cls: (cls != "c-bg", cls in ("c-tick", "c-shrt")))
        return cat(path("".join(self.data[cls]), cls) for cls in order)
