"""Cells in rows, and the grid that lets a person point at one of them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import NamedTuple

from labkit.views.drawing.markup import Html, coordinate, el, hx
from labkit.views.drawing.shapes import Point, path, squares

__all__ = ["Lattice", "Rows", "Values", "dashes", "grid"]

Rows = Sequence[tuple[float, int, int]]  # y, first cell, number of cells
Values = Sequence[tuple[int, int, str]]  # first cell, number of cells, what is said of them


class Lattice(NamedTuple):
    """Cells in reading order: cell i is at (x, y) + pitch, tall times its column and row."""

    x: float
    y: float
    cols: int
    pitch: float
    tall: float

    def at(self, i: int, inset: float = 0) -> Point:
        """The upper left corner of a cell."""
        return (
            self.x + i % self.cols * self.pitch + inset,
            self.y + i // self.cols * self.tall + inset,
        )

    def rows(self, n: int, down: float = 0) -> Rows:
        """The rows that n cells take, each `down` pixels below its upper edge."""
        return [
            (self.at(first)[1] + down, first, min(self.cols, n - first))
            for first in range(0, n, self.cols)
        ]


def dashes(rows: Rows, x: float, pitch: float, on: float, h: float, cls: str) -> Html:
    """Empty cells in rows as thick dashed lines: thousands of cells, one short element.

    The y of a row is its middle; `on` is how wide a cell is drawn, h how high.
    """
    lines = [
        f"M{coordinate(x)} {coordinate(y)}h{coordinate((count - 1) * pitch + on)}"
        for y, _, count in rows
    ]
    pattern = f"{coordinate(on)} {coordinate(pitch - on)}"
    return path("".join(lines), cls, fill="none", stroke_width=h, stroke_dasharray=pattern)


def grid(
    kind: str,
    words: str,
    body: str,
    arg: int | None = None,
    *,
    rows: Rows,
    x: float,
    pitch: float,
    h: float,
    at: int | None,
    each: str,
    none: str,
    values: Values,
    base: int = 0,
    size: int = 0,
) -> Html:
    """A focusable grid of cells.

    The script (js/widget.js) finds a cell from rows, x, pitch and h, and sends kind, cell and arg
    when it is chosen; `at` is the cell that the keys start from.

    Of a cell that one of `values` covers it says `each`, of another `none`, filling in {i} (the
    cell), {h} (in hexadecimal), {v} (the value) and {a} (base + i * size in hexadecimal).
    """
    facts = {
        "rows": rows,
        "x": x,
        "pitch": pitch,
        "h": h,
        "at": at,
        "each": each,
        "none": none,
        "values": values,
        "base": hx(base),
        "size": size,
    }
    told = Html(html.escape(json.dumps(facts, separators=(",", ":"))))
    hit = "".join(squares([(x, y - 1)], count * pitch, h + 2) for y, _, count in rows)
    return el(
        "g",
        path(hit, "c-hit"),
        body,
        role="grid",
        tabindex=0,
        aria_label=words,
        data_kind=kind,
        data_arg=arg,
        data_grid=told,
    )
