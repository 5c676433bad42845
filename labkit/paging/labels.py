"""Names for the addresses of a page table: who gives them, and what a range of pages is called.

This room knows no symbols and no stacks; a room above does, and hands in a Labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from labkit.paging.entries import U64

__all__ = ["Label", "Labels", "as_labels", "range_label"]

Label = Callable[[int], str]  # what lies at a gva, in a word


@runtime_checkable
class Labels(Protocol):
    """Who knows what lies where; "" where nobody does."""

    def label(self, gva: int) -> str:
        """What lies at a gva, in a word."""

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        """The same for many gvas at once; gpas are what a page table maps them to."""


@dataclass(frozen=True)
class _OneByOne:
    """A plain callable as Labels: each address is looked up alone, which takes its time."""

    label: Label

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        return [self.label(gva) for gva in gvas.tolist()]


def as_labels(label: Label | Labels | None) -> Labels | None:
    """Labels as they are, and a plain callable wrapped."""
    if label is None or isinstance(label, Labels):
        return label
    return _OneByOne(label)


def range_label(first: str, last: str) -> str:
    """What a range is called whose first and last page are called so."""
    return first if first == last else f"{first} .. {last}"
