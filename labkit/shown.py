"""How a snapshot shows itself in a notebook without knowing who draws it.

The front door says who draws, the rooms ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Bundle", "draw_with", "mimebundle"]

# What IPython's _repr_mimebundle_ returns: data by MIME type, and metadata.
Bundle = tuple[dict[str, Any], dict[str, Any]]

_drawer: list[Callable[[object], Bundle]] = []  # one at most


def draw_with(draw: Callable[[object], Bundle]) -> None:
    """Let draw(snapshot) make the MIME bundles of all snapshots from now on."""
    _drawer[:] = [draw]


def mimebundle(snapshot: object) -> Bundle:
    """The MIME bundle of a snapshot: text alone when nobody draws."""
    if not _drawer:
        return {"text/plain": repr(snapshot)}, {}
    return _drawer[0](snapshot)
