"""A View: one drawing that goes to a live page, a saved notebook, an untrusted one and a terminal."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from labkit.look.snapshots import Selection
from labkit.views.draw import Html, cat, el, esc, hx, num, plain, swatch
from labkit.views.style import css, inline_styles, svg_css

__all__ = ["Bundle", "View", "columns", "header", "mimebundle", "pane", "rail", "status_line"]

Bundle = tuple[dict[str, Any], dict[str, Any]]
SVG = re.compile(r'<svg class="lk-d".*?</svg>', re.DOTALL)


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
        body = re.sub(
            r'data-pane="(\w+)">', lambda hit: hit[0] + self.panes.get(hit[1], ""), self.layout
        )
        return el("section", Html(body), cls="lk", aria_label=self.title)

    @cached_property
    def img_html(self) -> Html:
        """The view without script, style sheet, buttons or inline svg: light theme on white ground, pictures as data URIs."""
        return _static(re.sub(r'<div class="tp".*?</div></div>', "", self.html), self.status)

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
        light, ground = ("true", "#fff") if theme == "light" else ("false", "#111")
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{esc(self.title)}</title><style>{css()}</style>'
            f'<body data-jp-theme-light="{light}" style="margin:16px 20px;background:{ground}">{self.html}</body></html>'
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        return mimebundle(self)


def mimebundle(view: View, widget: Bundle | None = None) -> Bundle:
    """What _repr_mimebundle_ returns: text and HTML that need nothing, and the live widget's entry when there is one.

    There is no image/png: what shows it also shows the picture in text/html, and making one takes a second drawing of
    everything or a native rasterizer.
    """
    data, metadata = widget or ({}, {})
    return {**data, "text/plain": view.text, "text/html": str(view.img_html)}, metadata


def pane(name: str) -> Html:
    """The place of a pane in a layout."""
    return el("div", cls="pane", data_pane=name)


def columns(cls: str, *parts: Html) -> Html:
    """Panes side by side where there is room."""
    return el("div", *parts, cls=f"cols {cls}")


def header(title: str, facts: Iterable[str], step: int | None = None, counts: str = "") -> Html:
    """Title, what it is a view of, and at the right counts or the step."""
    said = cat(Html(" · " if i else "") + fact for i, fact in enumerate(facts))
    right = counts or (el("span", "step ", el("b", num(step))) if step is not None else "")
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


def rail(chosen: Selection | None, secret: bool | None = None) -> Html:
    """The selection spelled out as a path: what, gva, indices, gpa (encrypted or shared, when secret says), hva."""
    if chosen is None:
        return Html()
    head = chosen.kind if chosen.slot is None else f"slot {chosen.slot}"
    parts = [el("span", el("b", head), " " + plain(chosen.label, 80))]
    if chosen.gva is not None:
        parts.append(el("span", f"gva {hx(chosen.gva)}", cls="mono"))
    parts += [el("span", " ".join(plain(part, 40) for part in chosen.path), cls="mono")] * bool(
        chosen.path
    )
    if chosen.gpa is not None:
        parts.append(
            el(
                "span",
                f"gpa {hx(chosen.gpa)}",
                "" if secret is None else Html(" ") + swatch(secret),
                cls="mono",
            )
        )
    if chosen.hva is not None:
        parts.append(el("span", f"hva {hx(chosen.hva)}", cls="mono"))
    return el(
        "div",
        Html('<span class="d"> → </span>'.join(parts)),
        cls="rail",
        role="group",
        aria_label="selection",
    )


def _standalone(drawing: str) -> str:
    """A drawing as a document: its own style sheet and ground, no attributes that only a script reads."""
    w, h = (float(size) + 6 for size in re.findall(r' (?:width|height)="([\d.]+)"', drawing)[:2])
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lk-d" width="{w:g}" height="{h:g}" viewBox="-3 -3 {w:g} {h:g}">'
        f'<style>{svg_css()}</style><rect x="-3" y="-3" width="{w:g}" height="{h:g}" class="c-bg"/>'
    )
    return opening + re.sub(
        r' (?:data-[\w-]+|tabindex)="[^"]*"', "", drawing[drawing.index(">") + 1 :]
    )


def _static(page: str, status: str) -> Html:
    """Inline styles for classes, data URIs for drawings; the first picture has the status as its alt text."""
    alts, styles = [str(esc(status))], inline_styles()

    def image(hit: re.Match[str]) -> str:
        name = re.search(r'aria-label="([^"]*)"', hit[0])
        alt = alts.pop() if alts else name[1] if name else ""
        return f'<img src="data:image/svg+xml;base64,{base64.b64encode(_standalone(hit[0]).encode()).decode()}" alt="{alt}">'

    def tag(hit: re.Match[str]) -> str:
        names = [
            hit[1],
            *(
                f".{name}"
                for names in re.findall(r'class="([^"]*)"', hit[2])
                for name in names.split()
            ),
        ]
        style = ";".join(styles[name] for name in names if name in styles)
        kept = re.sub(r' (?:class|tabindex|data-[\w-]+)="[^"]*"', "", hit[2])
        return f"<{hit[1]}{kept}" + (f' style="{esc(style)}">' if style else ">")

    page = SVG.sub(image, page)
    for _ in range(2):  # panes that hold nothing, then columns that hold only such panes
        page = re.sub(r"<div[^>]*></div>", "", page)
    return Html(re.sub(r"<(\w+)((?: [^<>]*)?)>", tag, page))
