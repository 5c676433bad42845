"""A View: one drawing for a live page, a saved notebook, an untrusted one and a terminal."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from labkit.checked import checked
from labkit.errors import InvalidState
from labkit.look.snapshots import Selection
from labkit.outside import plain, printable
from labkit.shown import is_notebook
from labkit.views.drawing.markup import Html, el, esc, hx
from labkit.views.drawing.sheet import Sheet, sheet
from labkit.views.drawing.static import SVG, alone, document
from labkit.views.drawing.style import css
from labkit.views.drawing.tables import swatch
from labkit.views.picture import IN_OUTPUTS, THEMES, png, write
from labkit.words import num

__all__ = [
    "FRAME",
    "Bundle",
    "View",
    "columns",
    "header",
    "mimebundle",
    "pane",
    "rail",
    "selected_gpa",
    "status_line",
]

Bundle = tuple[dict[str, Any], dict[str, Any]]  # MIME type -> data, and metadata
PNG = "image/png"
FRAME = 26  # pixels of a view's width that its border and padding take
PANE = re.compile(r'data-pane="(\w+)">')
ARROW = Html('<span class="d"> → </span>')


@dataclass(frozen=True)
class View:
    """A drawn snapshot.

    html is live (themable, needs the style sheet), img_html stands alone, text is for a terminal.
    """

    title: str
    status: str  # one sentence: the alt text, and what tests read
    panes: dict[str, Html]
    layout: Html  # the panes' places, made with pane() and columns()
    lines: Callable[[], list[str]]  # the text below title and status

    @cached_property
    def html(self) -> Html:
        """The live view: themable HTML with inline drawings, for a page with style.css()."""
        body = PANE.sub(lambda hit: hit[0] + self.panes.get(hit[1], ""), self.layout)
        return el("section", Html(body), cls="lk", aria_label=self.title)

    @cached_property
    def img_html(self) -> Html:
        """The view without script, style sheet, buttons or inline svg: light theme on white.

        Pictures are images with data URIs.
        """
        return alone(self.html, self.status)

    @cached_property
    def svg(self) -> str | None:
        """The first drawing as an SVG document of its own, None for a view that is all tables."""
        found = SVG.search(self.html)
        return document(found[0]) if found else None

    def sheet(self, theme: str = "light") -> Sheet:
        """All drawings as one SVG document for any program; the text of a view that has none.

        Raises InvalidState for a theme that is not "light" or "dark".
        """
        if theme not in THEMES:
            raise InvalidState(f"there is no theme {theme!r}, only {' and '.join(THEMES)}")
        return sheet(self.title, self.status, self.html, self.lines(), theme)

    @checked
    def save(self, path: str | Path, theme: str = "light") -> None:
        """Save it as a file that ends in .svg, .png or .pdf; theme is "light" or "dark".

        Raises InvalidState for another ending or theme, NotAvailable for a file that cannot be
        written.
        """
        write(self.sheet(theme), Path(path))

    @cached_property
    def text(self) -> str:
        """The view for a terminal: title line, status line, then a table."""
        return printable("\n".join([self.title, self.status, *self.lines()]))

    def page(self, theme: str = "light") -> str:
        """A whole HTML document, to be saved or photographed; theme is "light" or "dark"."""
        is_light = theme == "light"
        ground = "#fff" if is_light else "#111"
        style = f"margin:16px 20px;background:{ground}"
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{esc(self.title)}</title><style>{css()}</style>"
            f'<body data-jp-theme-light="{str(is_light).lower()}" style="{style}">'
            f"{self.html}</body></html>"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        return mimebundle(self)


def mimebundle(view: View, widget: Bundle | None = None) -> Bundle:
    """What _repr_mimebundle_ returns: text and HTML that need nothing, and a widget's own entries.

    In a notebook there is image/png too, for what takes no HTML out of it: PDFs, slides, previews.
    It takes about 0.1 s, which nobody shall wait for elsewhere.
    """
    data, metadata = widget or ({}, {})
    data = {**data, "text/plain": view.text, "text/html": str(view.img_html)}
    if not is_notebook():
        return data, metadata
    picture = view.sheet()
    data[PNG] = b64encode(png(picture, IN_OUTPUTS)).decode()
    size = {"width": round(picture.width), "height": round(picture.height)}
    return data, {**metadata, PNG: size}


def pane(name: str) -> Html:
    """The place of a pane in a layout."""
    return el("div", cls="pane", data_pane=name)


def columns(cls: str, *parts: Html) -> Html:
    """Panes side by side where there is room."""
    return el("div", *parts, cls=f"cols {cls}")


def header(title: str, facts: Iterable[str], step: int | None = None, counts: str = "") -> Html:
    """Title, what it is a view of, and at the right counts or the step."""
    said = Html(" · ".join(map(esc, facts)))
    right = counts
    if not right and step is not None:
        right = el("span", "step ", el("b", num(step)))
    return el(
        "div",
        el("h3", title),
        el("span", said, cls="facts"),
        el("span", right, cls="right") if right else "",
        cls="hd",
    )


def status_line(words: str, cls: str = "status") -> Html:
    """The one sentence that follows hover and step."""
    return el("div", words, cls=cls, role="status", aria_live="polite")


def selected_gpa(selection: Selection | None) -> int | None:
    """The guest-physical address of the selection, None where there is none."""
    return None if selection is None else selection.gpa


def rail(chosen: Selection | None, secret: bool | None = None) -> Html:
    """The selection spelled out as a path: what, gva, indices, gpa, hva.

    secret says whether the page is encrypted; with None nothing is said of it.
    """
    if chosen is None:
        return Html()

    head = chosen.kind if chosen.slot is None else f"slot {chosen.slot}"
    parts = [el("span", el("b", head), " " + plain(chosen.label, 80))]
    if chosen.gva is not None:
        parts.append(el("span", f"gva {hx(chosen.gva)}", cls="mono"))
    if chosen.path:
        indices = " ".join(plain(part, 40) for part in chosen.path)
        parts.append(el("span", indices, cls="mono"))
    if chosen.gpa is not None:
        state = "" if secret is None else Html(" ") + swatch(secret)
        parts.append(el("span", f"gpa {hx(chosen.gpa)}", state, cls="mono"))
    if chosen.hva is not None:
        parts.append(el("span", f"hva {hx(chosen.hva)}", cls="mono"))
    return el("div", Html(ARROW.join(parts)), cls="rail", role="group", aria_label="selection")
