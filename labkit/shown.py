"""How a snapshot shows itself in a notebook without knowing who draws it.

The front door says who draws, the rooms ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.checked import checked
from labkit.errors import NotAvailable

__all__ = ["Bundle", "draw_with", "is_notebook", "mimebundle", "save"]

# What IPython's _repr_mimebundle_ returns: data by MIME type, and metadata.
Bundle = tuple[dict[str, Any], dict[str, Any]]

_drawer: list[Callable[[object], Bundle]] = []  # one at most
_saver: list[Callable[[object, Path, str], None]] = []  # one at most


def draw_with(draw: Callable[[object], Bundle], write: Callable[[object, Path, str], None]) -> None:
    """Let draw(snapshot) make the MIME bundles of all snapshots from now on.

    And write(snapshot, path, theme) their pictures.
    """
    _drawer[:] = [draw]
    _saver[:] = [write]


def is_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    if "IPython" not in sys.modules:
        return False
    return hasattr(sys.modules["IPython"].get_ipython(), "kernel")


@checked
def save(snapshot: object, path: str | Path, theme: str = "light") -> None:
    """Save the picture of a snapshot as a file that ends in .svg, .png or .pdf.

    theme: "light" or "dark". Raises InvalidState for another ending or theme, NotAvailable for a
    file that cannot be written.
    """
    if not _saver:
        raise NotAvailable("nobody here draws pictures: import labkit")
    _saver[0](snapshot, Path(path), theme)


def mimebundle(snapshot: object) -> Bundle:
    """The MIME bundle of a snapshot: text alone when nobody draws."""
    if not _drawer:
        return {"text/plain": repr(snapshot)}, {}
    return _drawer[0](snapshot)
