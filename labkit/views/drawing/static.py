"""The form of a view that stands alone: no script, no style sheet, no inline svg.

An untrusted notebook strips style sheets and cuts inline svg down to loose text, so classes become
style attributes and drawings become images with a data URI.
"""

from __future__ import annotations

import base64
import re

from labkit.views.drawing.markup import Html, esc
from labkit.views.drawing.style import inline_styles, svg_css

__all__ = ["FOR_THE_SCRIPT", "SVG", "alone", "document"]

SVG = re.compile(r'<svg class="lk-d".*?</svg>', re.DOTALL)
BUTTONS = re.compile(r'<div class="tp".*?</div></div>|<div class="flts".*?</div>')
TAG = re.compile(r"<(\w+)((?: [^<>]*)?)>")
CLASS = re.compile(r'class="([^"]*)"')
LABEL = re.compile(r'aria-label="([^"]*)"')
EMPTY = re.compile(r"<div[^>]*></div>")
# Of an element of the page; what a click does is no button here
NOT_STATIC = re.compile(r' (?:(?:class|tabindex|data-[\w-]+)="[^"]*"|role="button")')
FOR_THE_SCRIPT = re.compile(r' (?:data-[\w-]+|tabindex)="[^"]*"')  # of an element of a drawing
CELL = re.compile(r"(<td[^>]*>)(.*?)(?=</td>)", re.DOTALL)
INDENT = re.compile(r"(?:(?<=>)|^)(?:[ \t]+(?=<)|[ \t]{2,})")  # in front of text, or alone in a tag
HARD_SPACE = "\N{NO-BREAK SPACE}"
MARGIN = 3  # pixels around a drawing: outlines reach over its edge


def document(drawing: str) -> str:
    """A drawing as an SVG document, with a style sheet and a ground of its own."""
    sizes = re.findall(r' (?:width|height)="([\d.]+)"', drawing)[:2]
    w, h = (float(size) + 2 * MARGIN for size in sizes)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lk-d" width="{w:g}" height="{h:g}" '
        f'viewBox="{-MARGIN} {-MARGIN} {w:g} {h:g}"><style>{svg_css()}</style>'
        f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{w:g}" height="{h:g}" class="c-bg"/>'
    )
    body = drawing[drawing.index(">") + 1 :]
    return opening + FOR_THE_SCRIPT.sub("", body)


def alone(page: str, status: str) -> Html:
    """A view's HTML without what only a live page can use; the first picture is named by status."""
    page = BUTTONS.sub("", page)
    page = _with_images(page, status)
    page = CELL.sub(_with_hard_spaces, page)
    for _ in range(2):  # panes that hold nothing, then columns that hold only such panes
        page = EMPTY.sub("", page)
    return Html(TAG.sub(_styled, page))


def _with_hard_spaces(cell: re.Match[str]) -> str:
    """A table's cell whose indentation survives programs that tidy HTML up.

    nbconvert drops text that is nothing but spaces: the indentation in front of a keyword.
    """
    return cell[1] + INDENT.sub(lambda hit: _hard(hit[0]), cell[2])


def _hard(spaces: str) -> str:
    return spaces.replace("\t", 8 * HARD_SPACE).replace(" ", HARD_SPACE)


def _with_images(page: str, status: str) -> str:
    """Drawings become images: the status is the alt text of the first, its label that of others."""
    first = True

    def image(hit: re.Match[str]) -> str:
        nonlocal first
        if first:
            alt = str(esc(status))
        else:
            named = LABEL.search(hit[0])
            alt = named[1] if named else ""
        first = False
        data = base64.b64encode(document(hit[0]).encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}">'

    return SVG.sub(image, page)


def _styled(tag: re.Match[str]) -> str:
    """An opening tag with the styles of its name and of its classes, instead of the classes."""
    name, attributes = tag[1], tag[2]
    names = [name]
    for classes in CLASS.findall(attributes):
        names += [f".{cls}" for cls in classes.split()]

    styles = inline_styles()
    style = ";".join(styles[name] for name in names if name in styles)
    kept = NOT_STATIC.sub("", attributes)
    if not style:
        return f"<{name}{kept}>"
    return f'<{name}{kept} style="{esc(style)}">'
