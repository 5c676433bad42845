"""One guest on several engines: the verdict, the events, what differs, what is let pass and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from labkit.explore.comparison import Comparison, Difference
from labkit.explore.comparison import Row as Event
from labkit.outside import plain
from labkit.views.drawing.markup import Html, cat
from labkit.views.drawing.tables import Cell, Row, aligned, boxed, label, table
from labkit.views.pictures.lanes import counts, draw_lanes, lanes_key, sign
from labkit.views.show import FRAME, View, header, pane, status_line
from labkit.words import num

__all__ = ["render"]

FOLD = 8  # this many equal events in a row are folded
EDGE = 2  # but these at either end
MAX_ROWS = 60
MAX_WORDS = 90


class _Line(NamedTuple):
    """A line of the table: an event, or how many equal ones are left out from there on."""

    number: int
    event: Event | None
    nr_folded: int = 0


def render(found: Comparison, previous: object = None, *, width: float = 940) -> View:
    """A comparison as a view; previous is not used: it has no step before."""
    name = plain(found.name, 60)
    said = plain(found.status, 400)
    ends = zip(found.backends, found.ends, strict=True)
    facts = [f"{plain(backend, 40)}: {plain(end, 60)}" for backend, end in ends]
    panes = {
        "title": header(f"{name} on {len(found.backends)} engines", facts),
        "status": status_line(said, "status top"),
        "lanes": label("Events", counts(found))
        + draw_lanes(found, width - FRAME)
        + lanes_key(found),
        "events": _events(found),
        "differences": _differences(found),
        "tolerated": _tolerated(found),
    }
    title = f"{name} on {' and '.join(found.backends)}"
    return View(title, said, panes, cat(map(pane, panes)), lambda: _lines(found))


def _folded(found: Comparison) -> list[_Line]:
    """The first lines of the table; long runs of equal events are left out but for their ends."""
    lines = list[_Line]()
    numbered = enumerate(found.rows)
    for is_equal, group in groupby(numbered, key=lambda pair: sign(pair[1]) == "="):
        run = [_Line(number, event) for number, event in group]
        if is_equal and len(run) >= FOLD:
            hidden = run[EDGE:-EDGE]
            run[EDGE:-EDGE] = [_Line(hidden[0].number, None, len(hidden))]
        lines += run
    return lines[:MAX_ROWS]


def _events(found: Comparison) -> Html:
    rows = [_event_row(line) for line in _folded(found)]
    head: list[Cell] = ["", ("r", "event"), ("r", "vCPU"), *found.backends, "tolerated because"]
    return boxed("events side by side", rows, head)


def _event_row(line: _Line) -> Row:
    event = line.event
    number = ("r d", num(line.number))
    if event is None:
        return ["…", number, "", ("d", f"{num(line.nr_folded)} equal events")], {}

    cells: list[Cell] = [sign(event), number, ("r", str(event.vcpu))]
    for what in _words(event):
        if what is None:
            cells.append(("d" if event.equal else "ft", "not in its log"))
        else:
            cells.append(plain(what, MAX_WORDS))
    cells.append(("d", plain(event.why, MAX_WORDS)))
    return cells, {"cls": None if event.equal else "dis"}


def _words(row: Event) -> Iterator[str | None]:
    """What happened on each engine, with the step where engines that count disagree on it."""
    late = not row.equal and len(set(row.steps)) > 1
    for step, what in zip(row.steps, row.whats, strict=True):
        if what and late:
            yield f"step {num(step or 0)}: {what}"
        else:
            yield what


def _differences(found: Comparison) -> Html:
    if not found.differences:
        return Html()
    named = len(found.backends) > 2  # then a difference says which two it is of
    rows = [_difference_row(difference, named) for difference in found.differences[:MAX_ROWS]]
    said = f"{num(len(found.differences))} that nothing excuses"
    if len(found.differences) > MAX_ROWS:
        said += f"; the first {MAX_ROWS}"
    engines = ("", "") if named else found.backends
    head: list[Cell] = ["", ("r", "vCPU"), "where", *engines]
    return label("Differences", said) + boxed("differences", rows, head)


def _difference_row(difference: Difference, named: bool) -> Row:
    place = difference.place
    if difference.row is not None:
        place = f"event {difference.row}: {place}"
    vcpu = "" if difference.vcpu is None else str(difference.vcpu)
    cells: list[Cell] = [difference.kind, ("r", vcpu), plain(place, 120)]
    for name, value in zip(difference.backends, difference.values, strict=True):
        cells.append(plain(f"{name} {value}" if named else value, MAX_WORDS))
    return cells, {"cls": "dis"}


def _tolerated(found: Comparison) -> Html:
    if not found.causes:
        return Html()
    rows: list[Row] = [([("r", num(count)), cause], {}) for cause, count in found.causes.items()]
    said = f"{num(len(found.tolerated))} that say nothing about the guest"
    return label("Tolerated", said) + table("tolerated", rows)


def _lines(found: Comparison) -> list[str]:
    lines = []
    if found.rows:
        head = ["", "event", "vCPU", *found.backends]
        lines = aligned([head, *(_event_line(line, len(head)) for line in _folded(found))])
    for difference in found.differences[:MAX_ROWS]:
        lines.append(f"≠ {plain(difference, 300)}")
    for cause, count in found.causes.items():
        lines.append(f"≈ {count} x {cause}")
    return lines


def _event_line(line: _Line, nr_columns: int) -> list[str]:
    if line.event is None:
        cells = ["…", str(line.number), "", f"{line.nr_folded} equal events"]
        return cells + [""] * (nr_columns - len(cells))

    cells = [sign(line.event), str(line.number), str(line.event.vcpu)]
    for what in _words(line.event):
        cells.append("-" if what is None else plain(what, MAX_WORDS))
    return cells
