"""The drawing vocabulary: pictures and tables are strings, and text from a guest cannot become markup."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "DIGITS",
    "Attribute",
    "Cell",
    "Html",
    "Lattice",
    "Point",
    "Row",
    "Rows",
    "aligned",
    "bar",
    "cat",
    "cross",
    "dashes",
    "el",
    "esc",
    "grid",
    "hx",
    "key",
    "label",
    "num",
    "path",
    "plain",
    "rect",
    "select",
    "squares",
    "svg",
    "swatch",
    "table",
    "text",
]

THIN = "\N{THIN SPACE}"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a vCPU as one character
SPECIAL = re.compile("[&<>\"']")


class Html(str):
    """Text that is markup already; every other str is escaped when it is put into an element."""

    __slots__ = ()

    def __add__(self, other: str) -> Html:
        return Html(str.__add__(self, esc(other)))


Attribute = str | float | None
Cell = str | tuple[str, str]  # content, or (class, content)
Row = tuple[Sequence[Cell], dict[str, Attribute]]  # cells, and attributes of the row
Rows = Sequence[tuple[float, int, int]]  # y, first cell, number of cells
Point = tuple[float, float]


def plain(what: object, limit: int = 200) -> str:
    """Text from anywhere as one safe line: controls, direction marks and half surrogates spelled out, cut at limit."""
    string = str(what)
    if len(string) > limit:
        string = string[: limit - 1] + "…"
    return (
        string
        if string.isprintable()
        else "".join(c if c.isprintable() or c == THIN else _spell(ord(c)) for c in string)
    )


def _spell(code: int) -> str:
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )


def esc(what: object, limit: int = 4000) -> Html:
    """Text as markup; Html stays what it is."""
    if isinstance(what, Html):
        return what
    string = plain(what, limit)
    return Html(html.escape(string) if SPECIAL.search(string) else string)


def cat(parts: Iterable[str]) -> Html:
    """Pieces of markup (or text, which is escaped) in a row."""
    return Html("".join(map(esc, parts)))


def num(number: int) -> str:
    """1277 as people read it: thousands apart by a thin space."""
    return f"{number:,}".replace(",", THIN)


def hx(number: int, digits: int = 0) -> str:
    """A number in hexadecimal with 0x."""
    return f"0x{number:0{digits}x}"


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.2f}".rstrip("0").rstrip(".")


def el(tag: str, *children: str, **attributes: Attribute) -> Html:
    """One element; cls is class, underscores are dashes, None leaves an attribute out."""
    head = tag
    for name, value in attributes.items():
        if value is not None:
            name = "class" if name == "cls" else name.replace("_", "-")
            head += f' {name}="{esc(value) if isinstance(value, str) else _short(value)}"'
    return Html(f"<{head}>{''.join(map(esc, children))}</{tag}>")


def rect(x: float, y: float, w: float, h: float, cls: str) -> Html:
    """A rectangle."""
    return el("rect", x=x, y=y, width=w, height=h, cls=cls)


def path(d: str, cls: str, **attributes: Attribute) -> Html:
    """A path, or nothing for an empty one."""
    return (
        el("path", d=Html(d), cls=cls, **attributes) if d else Html()
    )  # our own text: never cut, whatever its length


def text(
    x: float | str, y: float, words: str, cls: str | None = None, anchor: str | None = None
) -> Html:
    """A line of text, or nothing; x may be a list of places, one per character."""
    return el("text", words, x=x, y=y, cls=cls, text_anchor=anchor) if words else Html()


def squares(places: Iterable[Point], w: float, h: float) -> str:
    """Path data of equal rectangles: many cells, one element."""
    tail = f"h{_short(w)}v{_short(h)}h{_short(-w)}z"
    return "".join(f"M{_short(x)} {_short(y)}{tail}" for x, y in places)


def cross(places: Iterable[Point], size: float) -> Html:
    """The crosses of cells that are wrong; places are their upper left ends."""
    s = _short(size)
    return path(
        "".join(f"M{_short(x)} {_short(y)}l{s} {s}m0 -{s}l-{s} {s}" for x, y in places), "c-x"
    )


def dashes(rows: Rows, x: float, pitch: float, on: float, h: float, cls: str) -> Html:
    """Empty cells in rows as thick dashed lines (y is their middle): thousands of cells, one short element."""
    d = "".join(
        f"M{_short(x)} {_short(y)}h{_short((count - 1) * pitch + on)}" for y, _, count in rows
    )
    return path(
        d, cls, fill="none", stroke_width=h, stroke_dasharray=f"{_short(on)} {_short(pitch - on)}"
    )


def bar(places: Iterable[Point], w: float, h: float) -> Html:
    """Change marks in the foot of cells that end at (x, bottom): a bar below a gap, so that it reads without colour."""
    feet = [(x, bottom - h) for x, bottom in places]
    return path(squares(((x, y - 1.5) for x, y in feet), w, 1.5), "c-bg") + path(
        squares(feet, w, h), "c-chg"
    )


def svg(w: float, h: float, body: str, words: str) -> Html:
    """A picture with its name for those who cannot see it."""
    return el(
        "svg",
        body,
        cls="lk-d",
        width=w,
        height=h,
        viewBox=f"0 0 {_short(w)} {_short(h)}",
        role="group",
        aria_label=words,
    )


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
        """The rows that n cells take."""
        return [
            (self.at(first)[1] + down, first, min(self.cols, n - first))
            for first in range(0, n, self.cols)
        ]


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
    values: Sequence[tuple[int, int, str]],
    base: int = 0,
    size: int = 0,
) -> Html:
    """A focusable grid of cells.

    The script finds a cell from rows, x, pitch and h, and sends kind, cell and arg when it is chosen. Of a cell that a
    (first, number, value) covers it says each, of another none, filling in {i}, {h} (hexadecimal), {v} (the value) and
    {a} (base + i * size in hexadecimal).
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
    hit = path(
        "".join(squares([(x, y - 1)], count * pitch, h + 2) for y, _, count in rows), "c-hit"
    )
    told = Html(html.escape(json.dumps(facts, separators=(",", ":"))))
    return el(
        "g",
        hit,
        body,
        role="grid",
        tabindex=0,
        aria_label=words,
        data_kind=kind,
        data_arg=arg,
        data_grid=told,
    )


def label(words: str, more: str = "") -> Html:
    """A section label with one dim half sentence."""
    return el("div", words, el("span", more, cls="sub"), cls="lab")


def key(*marks: tuple[str, str] | None) -> Html:
    """The key under a picture: (class of the mark, words), only those that occur."""
    return el(
        "div",
        *(el("span", el("i", cls=mark[0]), mark[1]) for mark in marks if mark),
        cls="key",
        aria_label="key",
    )


def swatch(secret: bool, said: str = "", clear: str = "shared") -> Html:
    """Encrypted or not, as a cell and a word; said is what a leaf's bit says ("C=1"), clear the word for what is not."""
    mark, ink, word = ("sw e", "et", "encrypted") if secret else ("sw s", "st", clear)
    return el("span", cls=mark) + el("span", f"{said} {word}".strip(), cls=ink)


def table(name: str, rows: Iterable[Row], head: Sequence[Cell] = (), cls: str = "tb") -> Html:
    """A table with its name for screen readers."""

    def cells(tag: str, row: Sequence[Cell]) -> Html:
        return cat(
            el(tag, cell) if isinstance(cell, str) else el(tag, cell[1], cls=cell[0] or None)
            for cell in row
        )

    body = el("tbody", *(el("tr", cells("td", row), **attributes) for row, attributes in rows))
    return el(
        "table",
        el("thead", el("tr", cells("th", head))) if head else "",
        body,
        cls=cls,
        aria_label=name,
    )


def select(kind: str, value: object, cls: str | None = None) -> dict[str, Attribute]:
    """The attributes of a row that selects something when it is clicked."""
    return {"data_act": "select", "data_kind": kind, "data_value": plain(value), "cls": cls}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
