"""A page as a map of its cipher blocks, once for either eye."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from labkit.look.eyes import BLOCK, Eye, PageEyes
from labkit.outside import plain
from labkit.views.drawing.cells import Lattice, grid
from labkit.views.drawing.markup import Html
from labkit.views.drawing.shapes import bar, path, rect, squares, svg, text
from labkit.views.drawing.tables import key
from labkit.words import num

__all__ = ["about", "draw_maps", "map_key"]

COLS = 16  # blocks a row
TOP = 16  # room for the name of the eye
APART = 18  # pixels between the two maps
EYES = ("host", "guest")


def draw_maps(page: PageEyes, rows: list[int], chosen: int | None, pitch: float) -> Html:
    """All blocks for either eye, pitch pixels each.

    Filled where anything is not zero, a bar where something changed, an outline around the rows
    that the dump shows.
    """
    nr = len(page.host) // BLOCK
    apart = COLS * pitch + APART
    out = Html()
    for column, (name, eye) in enumerate(zip(EYES, page.eyes, strict=True)):
        lattice = Lattice(column * apart, TOP, COLS, pitch, pitch)
        out += text(lattice.x, 9, name, "s d")
        out += grid(
            "block",
            f"Blocks for the {name}",
            _blocks(eye, page.private, lattice) + _shown(rows, chosen, lattice),
            column,
            rows=lattice.rows(nr),
            x=lattice.x,
            pitch=pitch,
            h=pitch - 1,
            at=chosen,
            each="Block {i}",
            none="Block {i} at {a}",
            values=[],
            base=page.gpa,
            size=BLOCK,
        )
    words = "The page as cipher blocks: " + "; ".join(about(eye) for eye in page.eyes)
    return svg(2 * apart - APART, TOP + -(-nr // COLS) * pitch + 2, out, words)


def _blocks(eye: Eye, private: bool, lattice: Lattice) -> Html:
    """The blocks as cells, with bars on those that changed."""
    pitch = lattice.pitch
    zero = np.flatnonzero(~eye.blocks.any(axis=1)).tolist()
    full = np.flatnonzero(eye.blocks.any(axis=1)).tolist()
    changed = np.flatnonzero(eye.changed.any(axis=1)).tolist()

    out = path(squares(map(lattice.at, zero), pitch - 1, pitch - 1), "c-pale")
    if private:
        out += path(squares(map(lattice.at, full), pitch - 1, pitch - 1), "c-enc")
    else:
        corners = (lattice.at(i, 0.6) for i in full)
        out += path(squares(corners, pitch - 2.2, pitch - 2.2), "c-shr thin")
    feet = [(x, y + pitch - 1) for x, y in map(lattice.at, changed)]
    return out + bar(feet, pitch - 1, 2)


def _shown(rows: list[int], chosen: int | None, lattice: Lattice) -> Html:
    """Outlines around the blocks in the dump, and around the chosen one."""
    outlines = [_outline(lattice, first, count) for first, count in _spans(rows)]
    out = path("".join(outlines), "c-sel")
    if chosen is not None:
        x, y = lattice.at(chosen, -1.5)
        out += rect(x, y, lattice.pitch + 2, lattice.pitch + 2, "c-sel")
    return out


def _spans(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours, as (first, how many)."""
    start = rows[0]
    for at, after in zip(rows, [*rows[1:], -1], strict=True):
        if after != at + 1:
            yield start, at - start + 1
            start = after


def _outline(lattice: Lattice, first: int, count: int) -> str:
    """Boxes around a run of cells, one per row of the map."""
    pitch = lattice.pitch
    out = ""
    end = first + count
    while first < end:
        x, y = lattice.at(first, -1)
        here = min(end - first, COLS - first % COLS)
        out += f"M{x:g} {y:g}h{here * pitch + 1:g}v{pitch + 1:g}h{-here * pitch - 1:g}z"
        first += here
    return out


def about(eye: Eye) -> str:
    """An eye's hint of noise or sense."""
    different = f"{num(eye.nr_different)} different blocks of {num(len(eye.blocks))}"
    return f"{plain(eye.name, 40)}: {eye.entropy:.2f} bits a byte, {different}"


def map_key(page: PageEyes) -> Html:
    """The key of the maps."""
    changed = any(eye.changed.any() for eye in page.eyes)
    return key(
        ("k-enc" if page.private else "k-shr", "not zero"),
        ("k-tint", "all zero"),
        ("k-chg", "changed") if changed else None,
        ("k-sel", "shown"),
    )
