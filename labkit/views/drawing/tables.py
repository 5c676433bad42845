"""What stands in words around a picture: section labels, keys, tables, and rows for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from labkit.outside import plain
from labkit.views.drawing.markup import Attribute, Html, cat, el

__all__ = [
    "Cell",
    "Row",
    "aligned",
    "boxed",
    "classes",
    "key",
    "label",
    "select",
    "swatch",
    "table",
]

Cell = str | tuple[str, str]  # content, or (class, content)
Row = tuple[Sequence[Cell], dict[str, Attribute]]  # cells, and attributes of the row


def label(words: str, more: str = "") -> Html:
    """A section label with one dim half sentence."""
    return el("div", words, el("span", more, cls="sub"), cls="lab")


def key(*marks: tuple[str, str] | None) -> Html:
    """The key under a picture: (class of the mark, words), only those that occur."""
    shown = [el("span", el("i", cls=mark[0]), mark[1]) for mark in marks if mark is not None]
    return el("div", *shown, cls="key", aria_label="key")


def swatch(secret: bool, said: str = "", clear: str = "shared") -> Html:
    """Encrypted or not, as a cell and a word.

    said is what a leaf's bit says ("C=1"), clear the word for what is not encrypted.
    """
    if secret:
        mark, ink, word = "sw e", "et", "encrypted"
    else:
        mark, ink, word = "sw s", "st", clear
    return el("span", cls=mark) + el("span", f"{said} {word}".strip(), cls=ink)


def table(name: str, rows: Iterable[Row], head: Sequence[Cell] = (), cls: str = "tb") -> Html:
    """A table with its name for screen readers."""
    top = el("thead", el("tr", _cells("th", head))) if head else ""
    lines = [el("tr", _cells("td", row), **attributes) for row, attributes in rows]
    return el("table", top, el("tbody", *lines), cls=cls, aria_label=name)


def _cells(tag: str, row: Sequence[Cell]) -> Html:
    made = []
    for cell in row:
        if isinstance(cell, str):
            made.append(el(tag, cell))
        else:
            cls, content = cell
            made.append(el(tag, content, cls=cls or None))
    return cat(made)


def boxed(name: str, rows: Iterable[Row], head: Sequence[Cell] = (), cls: str = "tb") -> Html:
    """A table that scrolls by itself where it is wider than the page."""
    return el("div", table(name, rows, head, cls), cls="tbx")


def select(kind: str, value: object, cls: str | None = None) -> dict[str, Attribute]:
    """The attributes of a row that selects something when it is clicked."""
    return {"data_act": "select", "data_kind": kind, "data_value": plain(value), "cls": cls}


def classes(**on: bool) -> str | None:
    """The names of what holds, as a class attribute; None when nothing does."""
    return " ".join(name for name, holds in on.items() if holds) or None


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines
