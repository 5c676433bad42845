"""A View: one drawing that goes to a live page, a saved notebook, an untrusted one and a terminal."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from labkit.views.draw import Html, cat, el, esc
from labkit.views.style import css, inline_styles, svg_css

__all__ = ["Bundle", "View", "columns", "header", "mimebundle", "pane", "status_line"]

Bundle = tuple[dict[str, Any], dict[str, Any]]
LIVE_ONLY = ("transport",)  # panes that need a kernel


@dataclass(frozen=True)
class View:
    """A drawn snapshot. html is live (themable, needs the style sheet), img_html stands alone, text is for a terminal."""

    title: str
    status: str  # one sentence: the alt text, and what tests read
    panes: dict[str, Html]
    layout: Html  # the panes' places, made with pane() and columns()
    lines: Callable[[], list[str]]  # the text below title and status

    @cached_property
    def html(self) -> Html:
        """The live view: themable HTML with inline drawings, to be used with labkit.views.style.css()."""
        return el("section", self._filled(self.panes), cls="lk", aria_label=self.title)

    @cached_property
    def img_html(self) -> Html:
        """The view without script, style sheet or inline svg: light theme on its own white ground, pictures as data URIs."""
        filled = self._filled({name: body for name, body in self.panes.items() if name not in LIVE_ONLY})
        return _static(el("section", filled, cls="lk", aria_label=self.title), self.status)

    @cached_property
    def svg(self) -> str | None:
        """The first drawing as an SVG document of its own, None for a view that is all tables."""
        found = SVG.search(self.html)
        return _standalone(found[0]) if found else None

    @cached_property
    def text(self) -> str:
        """The view for a terminal: title line, status line, then a table."""
        return "\n".join([self.title, self.status, *self.lines()])

    def page(self, theme: str = "light") -> str:
        """A whole HTML document, to be saved or photographed."""
        light = "true" if theme == "light" else "false"
        ground = "#fff" if theme == "light" else "#111"
        return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{esc(self.title)}</title><style>{css()}</style>'
                f'<body data-jp-theme-light="{light}" style="margin:0;padding:16px 20px;background:{ground}">{self.html}</body></html>')

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return mimebundle(self)[0]

    def _filled(self, panes: dict[str, Html]) -> Html:
        return Html(re.sub(r'data-pane="(\w+)">', lambda hit: hit[0] + panes.get(hit[1], ""), self.layout))


def mimebundle(view: View, widget: Bundle | dict[str, Any] | None = None) -> Bundle:
    """What _repr_mimebundle_ returns: text and HTML that need nothing, and the live widget's entry when there is one.

    There is no image/png: every renderer that shows it also shows the picture in text/html, and making one takes
    either a second drawing of everything or a native rasterizer; a terminal has text/plain.
    """
    data: dict[str, Any] = {"text/plain": view.text, "text/html": str(view.img_html)}
    live = widget if isinstance(widget, tuple) else (widget or {}, {})
    return {**live[0], **data}, dict(live[1])


def pane(name: str, cls: str = "") -> Html:
    """The place of a pane in a layout."""
    return el("div", cls=f"pane {cls}".strip(), data_pane=name)


def columns(cls: str, *parts: Html) -> Html:
    """Panes side by side where there is room."""
    return el("div", *parts, cls=f"cols {cls}")


def header(title: str, facts: Iterable[str], right: str = "") -> Html:
    """Title, what it is a view of, and the figure that changes."""
    parts = list(facts)
    said = cat(part if not i else Html(" · ") + part for i, part in enumerate(parts))
    return el("div", el("h3", title), el("span", said, cls="facts"), el("span", right, cls="right"), cls="hd")


def status_line(words: str, top: bool = False) -> Html:
    """The one sentence that follows hover and step."""
    return el("div", words, cls="status top" if top else "status", role="status", aria_live="polite")


SVG = re.compile(r'<svg class="lk-d".*?</svg>', re.DOTALL)


def _standalone(drawing: str) -> str:
    body = re.sub(r' (?:data-[\w-]+|tabindex)="[^"]*"', "", drawing)
    box = re.search(r'width="([\d.]+)" height="([\d.]+)"', body)
    w, h = (float(box[1]), float(box[2])) if box else (0.0, 0.0)
    opening = (f'<svg xmlns="http://www.w3.org/2000/svg" class="lk-d" width="{w + 6:g}" height="{h + 6:g}" viewBox="-3 -3 {w + 6:g} {h + 6:g}">'
               f'<style>{svg_css()}</style><rect x="-3" y="-3" width="{w + 6:g}" height="{h + 6:g}" class="c-bg"/>')
    return re.sub(r"^<svg[^>]*>", lambda _: opening, body)


def _static(page: str, status: str) -> Html:
    """Inline styles for classes, data URIs for drawings, nothing for attributes that only a script reads."""
    drawings: list[str] = []

    def image(hit: re.Match[str]) -> str:
        name = re.search(r'role="\w+" aria-label="([^"]*)"', hit[0])
        alt = esc(status) if not drawings or not name else name[1]
        drawings.append(alt)
        data = base64.b64encode(_standalone(hit[0]).encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}">'

    styles = inline_styles()

    def tag(hit: re.Match[str]) -> str:
        names = [hit[1], *(f".{name}" for name in re.findall(r'class="([^"]*)"', hit[2]) for name in name.split())]
        style = ";".join(styles[name] for name in names if name in styles)
        kept = re.sub(r' (?:class|tabindex|data-[\w-]+)="[^"]*"', "", hit[2])
        return f"<{hit[1]}{kept}" + (f' style="{esc(style)}">' if style else ">")

    page = SVG.sub(image, page)
    for _ in range(2):  # panes that hold nothing, then columns that hold only such panes
        page = re.sub(r"<div[^>]*></div>", "", page)
    return Html(re.sub(r"<(\w+)((?: [^<>]*)?)>", tag, page))
