"""How a snapshot shows itself in a notebook without knowing who draws it: the drawing rooms register, the lower ones ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["mimebundle", "register"]

_DRAWN_BY: dict[type, Callable[[Any], Any]] = {}


def register(kind: type, draw: Callable[[Any], Any]) -> None:
    """Let draw(snapshot) make the MIME bundle of every snapshot of this class."""
    _DRAWN_BY[kind] = draw


def mimebundle(snapshot: Any) -> Any:
    """The MIME bundle of a snapshot: text alone when nobody registered."""
    draw = _DRAWN_BY.get(type(snapshot))
    return {"text/plain": repr(snapshot)} if draw is None else draw(snapshot)
