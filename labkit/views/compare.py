"""One guest on several engines: the verdict, the events on one lane an engine, what differs, and what is let pass and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from labkit.explore.comparison import Comparison, Difference
from labkit.explore.comparison import Row as Event
from labkit.views.draw import (
    Cell,
    Html,
    Row,
    aligned,
    cat,
    cross,
    el,
    key,
    label,
    num,
    path,
    plain,
    squares,
    svg,
    table,
    text,
)
from labkit.views.show import View, header, pane, status_line
from labkit.views.timeline import SHAPES

__all__ = ["render", "sign"]

LEFT, LANE, TOP, MARK = 90, 20, 6, 13  # MARK: pixels that a mark with a letter needs
FOLD, EDGE = 8, 2  # this many equal events in a row are folded, all but some at both ends
MAX_ROWS, MAX_WORDS = 60, 90
SIGNS = {"=": "equal", "≈": "tolerated", "≠": "different"}


def sign(row: Event) -> str:
    """= for what is equal, ≈ for what is let pass, ≠ for a difference."""
    return "≠" if not row.equal else "≈" if row.why else "="


def render(found: Comparison, previous: object = None, *, width: float = 940) -> View:
    """A comparison as a view; previous is not used: it has no step before."""
    facts = [
        f"{plain(name, 40)}: {plain(end, 60)}"
        for name, end in zip(found.backends, found.ends, strict=True)
    ]
    panes = {
        "title": header(f"{plain(found.name, 60)} on {len(found.backends)} engines", facts, None),
        "status": status_line(plain(found.status, 400), "status top"),
        "lanes": label("Events", _counts(found)) + _lanes(found, width - 26) + _key(found),
        "events": _events(found),
        "differences": _differences(found),
        "tolerated": _tolerated(found),
    }
    title = f"{plain(found.name, 60)} on {' and '.join(found.backends)}"
    return View(
        title, plain(found.status, 400), panes, cat(map(pane, panes)), lambda: _lines(found)
    )


def _counts(found: Comparison) -> str:
    signs = [sign(row) for row in found.rows]
    return (
        ", ".join(f"{num(signs.count(one))} {word}" for one, word in SIGNS.items() if one in signs)
        or "none happened"
    )


def _key(found: Comparison) -> Html:
    marks = {sign(row) for row in found.rows}
    gone = any(what is None for row in found.rows if not row.equal for what in row.whats)
    return key(
        ("k-tri", "triangle: the engines disagree") if "≠" in marks else None,
        ("k-flt", "cross: not in its log") if gone else None,
    )


def _lanes(found: Comparison, width: float) -> Html:
    """A lane an engine, a column an event; a cross where one log lacks it, a triangle under what differs."""
    pitch = min((width - LEFT - MARK) / max(len(found.rows), 1), 26)
    bottom, out, wrong = TOP + LANE * len(found.backends), Html(), list[float]()
    for lane, name in enumerate(found.backends):
        y = TOP + LANE * (lane + 0.5)
        out += text(0, y + 4, plain(name, 14), "b" if lane == 0 else None) + path(
            f"M{LEFT} {y}H{width:g}", "c-lane"
        )
        for x, row in _columns(found, pitch):
            out += _mark(row, row.whats[lane], x, y, pitch)
    for x, row in _columns(found, pitch):
        wrong += [x] * (not row.equal)
        out += (
            text(x, bottom + 8, "≈", "s d", "middle")
            if sign(row) == "≈" and pitch >= MARK
            else Html()
        )
    out += path("".join(f"M{x:.1f} {bottom}l4 7h-8z" for x in wrong), "c-flt")
    return svg(
        width, bottom + 10, out, f"Events of {' and '.join(found.backends)}: {_counts(found)}"
    )


def _columns(found: Comparison, pitch: float) -> Iterator[tuple[float, Event]]:
    return ((LEFT + MARK / 2 + (i + 0.5) * pitch, row) for i, row in enumerate(found.rows))


def _mark(row: Event, what: str | None, x: float, y: float, pitch: float) -> Html:
    if what is None and row.equal:
        return text(x, y + 4, "–", "d", "middle")
    if what is None:
        return path(squares([(x - 5, y - 5)], 10, 10), "c-flt") + cross([(x - 3, y - 3)], 6)
    letter = what.removeprefix("ucall ")[:1] if row.kind == "ucall" else ""
    if pitch < MARK:
        return path(f"M{x:.1f} {y - 5:g}v10", "c-exit")
    shape = path(f"M{x:.1f} {y:g}{SHAPES.get(letter, 'm-2 -8h4v16h-4z')}", "c-past")
    return el(
        "g",
        shape,
        text(x, y + 3.5, letter if letter in SHAPES else "", "mk", "middle"),
        data_say=plain(what, 120),
    )


def _folded(found: Comparison) -> Iterator[tuple[int, Event | int]]:
    """(number, row), or (number, how many) for equal rows that are left out."""
    for same, group in groupby(enumerate(found.rows), key=lambda pair: sign(pair[1]) == "="):
        rows = list(group)
        hide = range(EDGE, len(rows) - EDGE) if same and len(rows) >= FOLD else range(0)
        yield from rows[: hide.start] if hide else rows
        if hide:
            yield rows[hide.start][0], len(hide)
            yield from rows[hide.stop :]


def _events(found: Comparison) -> Html:
    rows = list[Row]()
    for n, row in list(_folded(found))[:MAX_ROWS]:
        if isinstance(row, int):
            rows.append((["…", ("r d", num(n)), "", ("d", f"{num(row)} equal events")], {}))
            continue
        cells: list[Cell] = [sign(row), ("r d", num(n)), ("r", str(row.vcpu))]
        cells += [
            ("d" if row.equal else "ft", "not in its log")
            if what is None
            else plain(what, MAX_WORDS)
            for what in _words(row)
        ]
        rows.append(
            ([*cells, ("d", plain(row.why, MAX_WORDS))], {"cls": None if row.equal else "dis"})
        )
    head: list[Cell] = ["", ("r", "event"), ("r", "vCPU"), *found.backends, "tolerated because"]
    return el("div", table("events side by side", rows, head), cls="tbx")


def _words(row: Event) -> list[str | None]:
    """What happened, with the step where engines that count do not agree on it."""
    late = not row.equal and len(set(row.steps)) > 1
    return [
        what and (f"step {num(step or 0)}: {what}" if late else what)
        for step, what in zip(row.steps, row.whats, strict=True)
    ]


def _differences(found: Comparison) -> Html:
    if not found.differences:
        return Html()
    named = len(found.backends) > 2
    rows: list[Row] = [
        (
            [
                difference.kind,
                ("r", "" if difference.vcpu is None else str(difference.vcpu)),
                plain(_where(difference), 120),
                *(
                    plain(f"{name} {value}" if named else value, MAX_WORDS)
                    for name, value in zip(difference.backends, difference.values, strict=True)
                ),
            ],
            {"cls": "dis"},
        )
        for difference in found.differences[:MAX_ROWS]
    ]
    more = f"; the first {MAX_ROWS}" if len(found.differences) > MAX_ROWS else ""
    said = f"{num(len(found.differences))} that nothing excuses{more}"
    head: list[Cell] = ["", ("r", "vCPU"), "where", *(["", ""] if named else found.backends)]
    return label("Differences", said) + el("div", table("differences", rows, head), cls="tbx")


def _where(difference: Difference) -> str:
    return (
        difference.place
        if difference.row is None
        else f"event {difference.row}: {difference.place}"
    )


def _tolerated(found: Comparison) -> Html:
    if not found.causes:
        return Html()
    rows: list[Row] = [([("r", num(count)), cause], {}) for cause, count in found.causes.items()]
    return label(
        "Tolerated", f"{num(len(found.tolerated))} that say nothing about the guest"
    ) + table("tolerated", rows, cls="tb")


def _lines(found: Comparison) -> list[str]:
    rows = [["", "event", "vCPU", *found.backends]]
    for n, row in list(_folded(found))[:MAX_ROWS]:
        rows.append(
            ["…", str(n), "", f"{row} equal events", *[""] * (len(found.backends) - 1)]
            if isinstance(row, int)
            else [
                sign(row),
                str(n),
                str(row.vcpu),
                *("-" if what is None else plain(what, MAX_WORDS) for what in _words(row)),
            ]
        )
    lines = aligned(rows) if found.rows else []
    lines += [f"≠ {plain(difference, 300)}" for difference in found.differences[:MAX_ROWS]]
    return lines + [f"≈ {count} x {cause}" for cause, count in found.causes.items()]
