"""Views as pictures in files and in outputs: SVG, PNG, PDF.

resvg makes pixels of an SVG without a browser, and with fonts that come with matplotlib, so that a
picture is the same on every machine and without network. A PDF holds the picture at 288 dots an
inch: its labels are sharp in print, but cannot be searched.
"""

from __future__ import annotations

import io
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labkit.errors import InvalidState, NotAvailable
from labkit.views.drawing.sheet import Sheet

__all__ = ["IN_OUTPUTS", "SUFFIXES", "THEMES", "pdf", "png", "write"]

SUFFIXES = (".svg", ".png", ".pdf")
THEMES = ("light", "dark")
IN_OUTPUTS, SCREEN, PRINT = 1.5, 2, 4  # pixels per CSS pixel
CSS_DPI = 72  # a CSS pixel is a point on paper: 11 pixels are readable there
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"


def png(picture: Sheet, zoom: float = SCREEN) -> bytes:
    """A picture as PNG, with zoom pixels for each of its own."""
    svg_to_bytes = import_module("resvg_py").svg_to_bytes
    made = svg_to_bytes(
        svg_string=picture.svg,
        zoom=zoom,
        skip_system_fonts=True,
        font_files=_fonts(),
        font_family=SANS,
        sans_serif_family=SANS,
        monospace_family=MONO,
    )
    return bytes(made)


def pdf(picture: Sheet) -> bytes:
    """A picture as a PDF of one page of its size."""
    image: Any = import_module("PIL.Image")
    out = io.BytesIO()
    pixels = image.open(io.BytesIO(png(picture, PRINT))).convert("RGB")
    pixels.save(out, "PDF", resolution=PRINT * CSS_DPI)
    return out.getvalue()


@cache
def _fonts() -> list[str]:
    """The files of the two fonts, each plain and bold.

    Found without importing matplotlib, which takes half a second.
    """
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise NotAvailable("pictures need the fonts of matplotlib, which is not installed")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold")
    return [str(folder / f"{name}.ttf") for name in names]


def write(picture: Sheet, path: Path) -> None:
    """Write a picture as what the file's name ends in.

    Raises InvalidState for another ending, NotAvailable for a file that cannot be written.
    """
    makers = {
        ".svg": lambda: picture.svg.encode(),
        ".png": lambda: png(picture),
        ".pdf": lambda: pdf(picture),
    }
    make = makers.get(path.suffix.lower())
    if make is None:
        raise InvalidState(f"{path}: a picture is saved as {', '.join(SUFFIXES)}", path=path)
    data = make()
    try:
        path.write_bytes(data)
    except (OSError, ValueError) as error:
        raise NotAvailable(f"{path}: cannot be written ({error})", path=path) from error
