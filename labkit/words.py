"""Numbers and nouns as they stand in sentences."""

from __future__ import annotations

from labkit.outside import THIN

__all__ = ["num", "plural"]


def num(number: int) -> str:
    """1277 as people read it: thousands apart by a thin space."""
    return f"{number:,}".replace(",", THIN)


def plural(noun: str, number: int) -> str:
    """The noun for so many of it: "slot" or "slots"."""
    return noun if number == 1 else f"{noun}s"
