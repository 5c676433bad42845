"""The events of several engines, side by side: a lane an engine, a column an event."""

from __future__ import annotations

from labkit.explore.comparison import Comparison, Row
from labkit.outside import plain
from labkit.views.drawing.markup import Html
from labkit.views.drawing.shapes import cross, path, squares, svg, text
from labkit.views.drawing.tables import key
from labkit.views.pictures.timeline import exit_mark
from labkit.words import num

__all__ = ["counts", "draw_lanes", "lanes_key", "sign"]

LEFT = 90  # room for the names of the engines
LANE = 20  # height of one
TOP = 6
MARK = 13  # pixels that a mark with a letter needs
SIGNS = {"=": "equal", "≈": "tolerated", "≠": "different"}


def sign(row: Row) -> str:
    """= for what is equal, ≈ for what is let pass, ≠ for a difference."""
    if not row.equal:
        return "≠"
    return "≈" if row.why else "="


def counts(found: Comparison) -> str:
    """How many events are equal, tolerated and different, in words."""
    signs = [sign(row) for row in found.rows]
    counts = [f"{num(signs.count(one))} {word}" for one, word in SIGNS.items() if one in signs]
    return ", ".join(counts) or "none happened"


def lanes_key(found: Comparison) -> Html:
    """Only the marks that occur."""
    different = [row for row in found.rows if not row.equal]
    marks = []
    if different:
        marks.append(("k-tri", "triangle: the engines disagree"))
    if any(what is None for row in different for what in row.whats):
        marks.append(("k-flt", "cross: not in its log"))
    return key(*marks)


def draw_lanes(found: Comparison, width: float) -> Html:
    """A lane an engine, a column an event; under the lanes what is tolerated and what differs."""
    pitch = min((width - LEFT - MARK) / max(len(found.rows), 1), 26)
    columns = [(LEFT + MARK / 2 + (i + 0.5) * pitch, row) for i, row in enumerate(found.rows)]
    bottom = TOP + LANE * len(found.backends)

    out = Html()
    for lane, name in enumerate(found.backends):
        y = TOP + LANE * (lane + 0.5)
        out += text(0, y + 4, plain(name, 14), "b" if lane == 0 else None)
        out += path(f"M{LEFT} {y}H{width:g}", "c-lane")
        for x, row in columns:
            out += _mark(row, row.whats[lane], x, y, pitch)

    triangles = ""
    for x, row in columns:
        if sign(row) == "≈" and pitch >= MARK:
            out += text(x, bottom + 8, "≈", "s d", "middle")
        if not row.equal:
            triangles += f"M{x:.1f} {bottom}l4 7h-8z"
    out += path(triangles, "c-flt")
    words = f"Events of {' and '.join(found.backends)}: {counts(found)}"
    return svg(width, bottom + 10, out, words)


def _mark(row: Row, what: str | None, x: float, y: float, pitch: float) -> Html:
    """One event on one engine: a cross where its log lacks it, a dash where that is tolerated."""
    if what is None and row.equal:
        return text(x, y + 4, "–", "d", "middle")
    if what is None:
        return path(squares([(x - 5, y - 5)], 10, 10), "c-flt") + cross([(x - 3, y - 3)], 6)
    if pitch < MARK:
        return path(f"M{x:.1f} {y - 5:g}v10", "c-exit")
    letter = what.removeprefix("ucall ")[:1] if row.kind == "ucall" else ""
    return exit_mark(letter, x, y, plain(what, 120))
