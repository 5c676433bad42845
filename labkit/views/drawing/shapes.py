"""Pieces of a picture: one kind of mark is one element, however many there are of it."""

from __future__ import annotations

from collections.abc import Iterable

from labkit.views.drawing.markup import Attribute, Html, coordinate, el

__all__ = [
    "NARROW",
    "WIDE",
    "Point",
    "bar",
    "cross",
    "path",
    "rect",
    "squares",
    "svg",
    "text",
]

NARROW = 700  # pixels: below it there is room for the shortest words only
WIDE = 1100  # above it there is room for more than usual

Point = tuple[float, float]  # x, y in pixels


def svg(w: float, h: float, body: str, words: str) -> Html:
    """A picture with its name for those who cannot see it."""
    return el(
        "svg",
        body,
        cls="lk-d",
        width=w,
        height=h,
        viewBox=f"0 0 {coordinate(w)} {coordinate(h)}",
        role="group",
        aria_label=words,
    )


def rect(x: float, y: float, w: float, h: float, cls: str) -> Html:
    """A rectangle."""
    return el("rect", x=x, y=y, width=w, height=h, cls=cls)


def path(d: str, cls: str, **attributes: Attribute) -> Html:
    """A path, or nothing for an empty one."""
    if not d:
        return Html()
    # The data is our own text: as Html it is never cut, whatever its length.
    return el("path", d=Html(d), cls=cls, **attributes)


def text(
    x: float | str, y: float, words: str, cls: str | None = None, anchor: str | None = None
) -> Html:
    """A line of text, or nothing; x may be a list of places, one per character."""
    if not words:
        return Html()
    return el("text", words, x=x, y=y, cls=cls, text_anchor=anchor)


def squares(places: Iterable[Point], w: float, h: float) -> str:
    """Path data of equal rectangles: many cells, one element."""
    tail = f"h{coordinate(w)}v{coordinate(h)}h{coordinate(-w)}z"
    return "".join(f"M{coordinate(x)} {coordinate(y)}{tail}" for x, y in places)


def cross(places: Iterable[Point], size: float) -> Html:
    """The crosses of cells that are wrong; places are their upper left ends."""
    s = coordinate(size)
    strokes = f"l{s} {s}m0 -{s}l-{s} {s}"
    return path("".join(f"M{coordinate(x)} {coordinate(y)}{strokes}" for x, y in places), "c-x")


def bar(places: Iterable[Point], w: float, h: float) -> Html:
    """Change marks in the foot of cells that end at (x, bottom).

    Each is a bar below a gap, so that it reads without colour.
    """
    feet = [(x, bottom - h) for x, bottom in places]
    gaps = squares(((x, y - 1.5) for x, y in feet), w, 1.5)
    return path(gaps, "c-bg") + path(squares(feet, w, h), "c-chg")
