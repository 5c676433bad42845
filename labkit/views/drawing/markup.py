"""Markup as strings: text from a guest cannot become an element, whatever it holds."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from labkit.outside import plain

__all__ = ["Attribute", "Html", "cat", "coordinate", "el", "esc", "hx"]

SPECIAL = re.compile("[&<>\"']")

Attribute = str | float | None


class Html(str):
    """Text that is markup already; every other str is escaped when it is put into an element."""

    __slots__ = ()

    def __add__(self, other: str) -> Html:
        return Html(str.__add__(self, esc(other)))


def esc(what: object, limit: int = 4000) -> Html:
    """Text as markup; Html stays what it is."""
    if isinstance(what, Html):
        return what
    string = plain(what, limit)
    return Html(html.escape(string) if SPECIAL.search(string) else string)


def cat(parts: Iterable[str]) -> Html:
    """Pieces of markup (or text, which is escaped) in a row."""
    return Html("".join(map(esc, parts)))


def hx(number: int, digits: int = 0) -> str:
    """A number in hexadecimal with 0x."""
    return f"0x{number:0{digits}x}"


def coordinate(number: float) -> str:
    """A number for a drawing, to a hundredth of a pixel and no longer than needed."""
    if isinstance(number, int):
        return str(number)
    return f"{number:.2f}".rstrip("0").rstrip(".")


def el(tag: str, *children: str, **attributes: Attribute) -> Html:
    """One element; cls is class, underscores are dashes, None leaves an attribute out."""
    head = tag
    for name, value in attributes.items():
        if value is None:
            continue
        name = "class" if name == "cls" else name.replace("_", "-")
        written = esc(value) if isinstance(value, str) else coordinate(value)
        head += f' {name}="{written}"'
    return Html(f"<{head}>{''.join(map(esc, children))}</{tag}>")
