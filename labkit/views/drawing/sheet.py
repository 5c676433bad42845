"""A view as one SVG document: title, status, and its drawings below each other, or else its text.

What reads it need not know CSS variables, nor have fonts of a certain kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labkit.outside import plain
from labkit.views.drawing.markup import esc
from labkit.views.drawing.static import FOR_THE_SCRIPT, SVG
from labkit.views.drawing.style import sheet_css

__all__ = ["Sheet", "sheet"]

EDGE = 16  # pixels around everything
GAP = 14  # between status and what follows
TITLE_LINE, LINE = 22, 16  # heights
CAPTION_ABOVE, CAPTION_BELOW = 28, 10  # from a drawing to the next one's name, and to itself
MONO_WIDTH, SANS_WIDTH = 7.3, 6.6  # pixels that a letter takes at most, at 12 and at 11 pixels
MIN_WIDTH, MAX_COLUMNS, MAX_LINES = 480, 160, 400
MAX_WORDS = 400  # letters of one line
TAB = 8

SIZES = re.compile(r' (?:width|height)="([\d.]+)"')
LABEL = re.compile(r'aria-label="([^"]*)"')


@dataclass(frozen=True)
class Sheet:
    """An SVG document and its size in pixels."""

    svg: str
    width: float
    height: float


class _Page:
    """Parts below each other, as long as it gets."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.bottom = float(EDGE)
        self.right = 0.0

    def text(self, words: str, height: int, classes: str, letter: float) -> None:
        """One line of text."""
        self.bottom += height
        said = esc(plain(words, MAX_WORDS))
        place = f'x="{EDGE}" y="{self.bottom - 4:g}"'
        self.parts.append(f'<text {place} class="{classes}">{said}</text>')
        self.right = max(self.right, EDGE + letter * len(words))

    def drawing(self, drawing: str, said: str) -> None:
        """One drawing, under its name if that says more than the status above."""
        named = LABEL.search(drawing)
        if named is None or named[1].endswith(said):
            self.bottom += GAP
        else:
            self.bottom += CAPTION_ABOVE
            caption = f'<text x="{EDGE}" y="{self.bottom:g}" class="d">{named[1]}</text>'
            self.parts.append(caption)
            self.bottom += CAPTION_BELOW
        width, height = (float(size) for size in SIZES.findall(drawing)[:2])
        body = FOR_THE_SCRIPT.sub("", drawing[drawing.index(">") + 1 : drawing.rindex("</svg>")])
        self.parts.append(f'<g transform="translate({EDGE} {self.bottom:g})">{body}</g>')
        self.bottom += height
        self.right = max(self.right, EDGE + width)


def sheet(title: str, status: str, html: str, lines: Sequence[str], theme: str = "light") -> Sheet:
    """The drawings in a view's html on one page; its lines of text where it has none.

    theme is "light" or "dark".
    """
    page = _Page()
    drawings = SVG.findall(html)
    page.text(title, TITLE_LINE, "b", SANS_WIDTH)
    for words in _wrapped(status, 140):
        page.text(words, LINE, "", SANS_WIDTH)
    for drawing in drawings:
        page.drawing(drawing, str(esc(status)))
    if not drawings:
        page.bottom += GAP / 2
        for line in _cut(lines):
            page.text(line, LINE, "m t", MONO_WIDTH)

    width = max(page.right + EDGE, MIN_WIDTH)
    height = page.bottom + EDGE
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lk-d" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" xml:space="preserve">'
        f"<style>{sheet_css(theme)}</style>"
        f'<rect width="{width:g}" height="{height:g}" class="c-bg"/>'
    )
    return Sheet(opening + "".join(page.parts) + "</svg>", width, height)


def _cut(lines: Sequence[str]) -> Iterator[str]:
    """Lines no longer and no more than a page holds; what is left out is said."""
    for line in lines[:MAX_LINES]:
        flat = line.expandtabs(TAB)
        yield flat if len(flat) <= MAX_COLUMNS else flat[: MAX_COLUMNS - 1] + "…"
    if len(lines) > MAX_LINES:
        yield f"… {len(lines) - MAX_LINES} more lines"


def _wrapped(text: str, columns: int) -> list[str]:
    """A sentence in lines of at most so many letters, cut between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
