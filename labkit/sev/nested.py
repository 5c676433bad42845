"""The nested page table: which page of DRAM stands behind a guest-physical one."""

from __future__ import annotations

from collections.abc import Mapping

from labkit.machine.memory import PAGE

__all__ = ["NestedTable"]


class NestedTable:
    """Which page of DRAM stands behind a gpa: its own, but for pairs that a host has exchanged.

    `pages` has those only: gpa of a page -> spa of the page behind it.
    """

    def __init__(self, pages: Mapping[int, int] | None = None) -> None:
        self.pages = dict(pages or {})

    def __copy__(self) -> NestedTable:
        return NestedTable(self.pages)

    def spa(self, gpa: int) -> int:
        """Where a gpa is in DRAM."""
        page = gpa & -PAGE
        return self.pages.get(page, page) + gpa % PAGE

    def gpa(self, spa: int) -> int:
        """The gpa that a page of DRAM stands behind; spa is the page's."""
        for gpa, page in self.pages.items():
            if page == spa:
                return gpa
        return spa

    def exchange(self, gpa: int, other: int) -> None:
        """Exchange the pages behind two gpas."""
        first, second = gpa & -PAGE, other & -PAGE
        behind_first, behind_second = self.spa(first), self.spa(second)
        self.pages[first] = behind_second
        self.pages[second] = behind_first
