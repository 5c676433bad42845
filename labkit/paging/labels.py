"""Names for the addresses of a page table: who gives them, and what a range of pages is called.

This room knows no symbols and no stacks; a room above does, and hands in a Labels.
"""

from __future__ import annotations

from typing import Protocol

from labkit.paging.entries import U64

__all__ = ["Labels", "range_label"]


class Labels(Protocol):
    """Who knows what lies where; "" where nobody does."""

    def label(self, gva: int) -> str:
        """What lies at a gva, in a word."""

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        """The same for many gvas at once; gpas are what a page table maps them to."""

    def gva_of(self, place: str | int) -> int:
        """The gva that a name means; raises SymbolNotFound and InvalidState."""


def range_label(first: str, last: str) -> str:
    """What a range is called whose first and last page are called so."""
    return first if first == last else f"{first} .. {last}"
