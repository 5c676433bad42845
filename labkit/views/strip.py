"""Guest-physical memory as rows of pages: where a page lies in the picture, what ranges are called, and which rows fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from labkit.views.draw import Html, Rows, dashes, hx, num, path, plain, text

__all__ = ["PAGE", "Named", "Painter", "Strip", "box", "lay"]

PAGE = 4096
MAX_ROWS = 16  # rows with something in them; beyond that a row holds more pages
MAX_LANES = 6  # names above a row, one over the other
LANE = 11
Named = tuple[int, int, str]  # first page, number of pages, name
Bracket = tuple[float, float, str]  # x, width, name


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
            low, high = max(page, first), min(page + nr_pages, first + count)
            if low < high:
                yield (
                    self.left + (low - first) * self.pitch,
                    y,
                    max((high - low) * self.pitch - 1, 1.5),
                    high - low,
                )

    def dots(self, down: float) -> Html:
        """Every page as a dot, to be painted over."""
        middles = [(y + down, first, count) for y, first, count in self.rows]
        return (
            dashes(middles, self.left + self.pitch / 2 - 0.6, self.pitch, 1.2, 1.2, "c-dot")
            if self.pitch > 2
            else Html()
        )


def lay(
    slots: Iterable[tuple[int, int]],
    named: Sequence[Named],
    width: float,
    tall: float,
    noted: Iterable[int] = (),
) -> Strip:
    """Rows for memslots of (gpa, bytes); pages in no range fold into a line, rows of noted pages have room for a word below."""
    per, strips = _rows(slots, named, width)
    left = 10 + 6.2 * max([7, *(len(hx(page * PAGE)) for page, _, _ in strips)])
    pitch, y, rows, out, notes = (
        (width - left) / per,
        0.0,
        list[tuple[float, int, int]](),
        Html(),
        set(noted),
    )
    for page, count, free in strips:
        if free:
            out += text(left - 8, y + 10, hx(page * PAGE), "m d s", "end") + text(
                left, y + 10, f"free, {num(count)} pages", "s d"
            )
            y += 16
            continue
        brackets = _brackets(named, page, count, left, pitch)
        lanes = _lanes(brackets, width)
        y += 5 + LANE * max([1, *(lane + 1 for _, lane in lanes.values())])
        out += text(left - 8, y + tall / 2 + 4, hx(page * PAGE), "m d s", "end") + _names(
            brackets, lanes, y
        )
        rows.append((y, page, count))
        y += tall + 8 + 12 * (not notes.isdisjoint(range(page, page + count)))
    return Strip(rows, left, pitch, max(y - 6, 1), out)


def _rows(
    slots: Iterable[tuple[int, int]], named: Sequence[Named], width: float
) -> tuple[int, list[tuple[int, int, bool]]]:
    """Pages per row, and rows of (first page, number, all free) from the start of their memslot on; free neighbours are one."""
    per, slots = 64 if width < 700 else 256 if width > 1100 else 128, list(slots)
    while True:
        out: list[tuple[int, int, bool]] = []
        for gpa, size in slots:
            start, end = gpa // PAGE, (gpa + size) // PAGE
            used: set[int] = set()
            for page, nr, _ in named:
                if page < end and page + nr > start:
                    used.update(
                        range(
                            max(page - start, 0) // per,
                            (min(page + nr, end) - start - 1) // per + 1,
                        )
                    )
            at = 0
            for row in [*sorted(used), -(-(end - start) // per)]:
                out += [(start + at * per, min(end - start, row * per) - at * per, True)] * (
                    row > at
                )
                out += [(start + row * per, min(per, end - start - row * per), False)] * (
                    row in used
                )
                at = row + 1
        if sum(not free for _, _, free in out) <= MAX_ROWS:
            return per, out
        per *= 2


def _brackets(
    named: Sequence[Named], page: int, count: int, left: float, pitch: float
) -> list[Bracket]:
    out, last = list[Bracket](), -1.0
    for first, nr, name in sorted(named):
        low, high = max(first, page), min(first + nr, page + count)
        x = left + (low - page) * pitch
        if (
            low < high and name and x >= last + 1
        ):  # what is narrower than a pixel joins the one before
            last = x
            out.append(
                (
                    x,
                    max((high - low) * pitch - 1, 1.5),
                    ("… " if low > first else "") + plain(name, 40),
                )
            )
    return out


def _lanes(brackets: Sequence[Bracket], right: float) -> dict[int, tuple[float, int]]:
    """Bracket -> (x, lane) of its name. From right to left, so that a leader rises left of all names in the lanes below it."""
    starts, out = [float("inf")] * MAX_LANES, dict[int, tuple[float, int]]()
    for i in range(len(brackets) - 1, -1, -1):
        x, w, words = brackets[i]
        long = 5.7 * len(words) + 4
        at = max(min(x, right - long), 0)
        lane = next((lane for lane, start in enumerate(starts) if at + long <= start), None)
        if (
            lane is not None
            and all(x < start for start in starts[:lane])
            and (not words.startswith("…") or w >= 80)
        ):
            starts[: lane + 1], out[i] = (
                [*(min(start, x) for start in starts[:lane]), at],
                (at, lane),
            )
    return out


def _names(brackets: Sequence[Bracket], lanes: dict[int, tuple[float, int]], y: float) -> Html:
    """Brackets over the ranges with their names; one without room has its bracket, hover and the text form name it."""
    rules = "".join(f"M{x:.1f} {y - 3:g}h{w:.1f}" for x, w, _ in brackets)
    out = Html()
    for i, (at, lane) in lanes.items():
        rules += f"M{brackets[i][0] + 0.5:.1f} {y - 3:g}v{-LANE * lane - 3}" if lane else ""
        out += text(round(at + 3 * bool(lane), 1), y - 6 - LANE * lane, brackets[i][2], "s")
    return path(rules, "c-brk") + out


def box(x: float, y: float, w: float, h: float, inset: float = 0) -> str:
    """Path data of one rectangle, drawn inset for its stroke."""
    return f"M{x + inset:.1f} {y + inset:g}h{max(w - 2 * inset, 0.5):.1f}v{h - 2 * inset:g}h{-max(w - 2 * inset, 0.5):.1f}z"


@dataclass
class Painter:
    """Collects ranges of pages by how they look: few elements, whatever the number of ranges."""

    strip: Strip
    data: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seen: set[tuple[str, int, float]] = field(default_factory=set)

    def pages(self, page: int, nr_pages: int, down: float, tall: float, fill: str) -> None:
        """A range in one of the fills: solid c-enc and c-mem, hollow c-shr."""
        hollow = fill not in ("c-enc", "c-mem", "c-flt")
        for x, y, w, nr in self.strip.parts(page, nr_pages):
            spot = fill, int(x), y + down
            if w < 2 and spot in self.seen:  # narrower than a pixel, and there is one already
                continue
            self.seen.add(spot)
            self.data["c-bg"].append(box(x, y + down - 1, w + 1, tall + 2))
            self.data[fill].append(box(x, y + down, w, tall, 0.75 * hollow))
            if self.strip.pitch > 4 and fill != "c-flt":
                ticks = (x + i * self.strip.pitch - 1 for i in range(1, nr))
                self.data["c-shrt" if hollow else "c-tick"] += (
                    f"M{at:.1f} {y + down + 2:g}h.7v{tall - 4:g}h-.7z" for at in ticks
                )

    def drawn(self) -> Html:
        """All of it; the ground first, the ticks last."""
        order = sorted(self.data, key=lambda cls: (cls != "c-bg", cls in ("c-tick", "c-shrt")))
        return Html("".join(path("".join(self.data[cls]), cls) for cls in order))
