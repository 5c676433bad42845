"""What the guest's page tables say of each page's encryption, beside what memory really is: facts.

How they are found is in encryption_map.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.checked import checked
from labkit.errors import InvalidState
from labkit.machine.memory import PAGE
from labkit.shown import mimebundle, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EncryptionMap", "EncryptionRange", "PageState", "PageStates"]

MAX_GPA = 1 << 52  # no physical address reaches further (APM vol. 2, 5.1)


class PageState(IntEnum):
    """What memory really is, page by page."""

    SHARED = 0  # plaintext: what the host sees is what the guest wrote
    PRIVATE = 1  # encrypted with the guest's key (SNP: and validated)
    UNLAUNCHED = 2  # the guest's, but no launch command encrypted it
    UNVALIDATED = 3  # SNP: assigned to the guest, which has not validated it
    FOREIGN = 4  # SNP: assigned to somebody else


@dataclass(frozen=True, eq=False)
class PageStates:
    """One memslot's pages from gpa on.

    states: shape (nr_pages,), uint8, of PageState. Raises InvalidState for anything else.
    """

    gpa: int
    states: NDArray[np.uint8]

    def __post_init__(self) -> None:
        is_row = self.states.ndim == 1 and self.states.dtype == np.uint8
        is_known = int(self.states.max(initial=0)) < len(PageState)
        is_place = self.gpa % PAGE == 0 and 0 <= self.gpa < MAX_GPA
        if not (is_row and is_known and is_place):
            raise InvalidState(
                f"page states at gpa {self.gpa:#x}: not a row of PageState at a page's address "
                f"below 2^52, but {self.states.dtype} of shape {self.states.shape}",
                gpa=self.gpa,
            )

    @property
    def end(self) -> int:
        """The gpa behind it."""
        return self.gpa + PAGE * len(self.states)

    @classmethod
    def of(
        cls,
        gpa: int,
        private: ArrayLike,
        protected: ArrayLike = False,
        owner: ArrayLike = 0,
        validated: ArrayLike = True,
        asid: int = 0,
    ) -> PageStates:
        """From one array a fact, of one length or a single value for all pages.

        private: DRAM holds ciphertext of the guest's key.
        protected: the host meant it to (protected_phy_pages).
        owner: the ASID that the RMP gives the page to, 0 for none; asid: the guest's.
        validated: the RMP's bit.

        Raises InvalidState for arrays of different lengths, and as PageStates does.
        """
        try:
            facts = np.broadcast_arrays(np.atleast_1d(private), protected, owner, validated)
        except ValueError as err:
            raise InvalidState(f"page states at gpa {gpa:#x}: {err}", gpa=gpa) from err

        is_private, is_meant, owners, is_valid = facts
        is_foreign = (owners != 0) & (owners != asid)
        is_unvalidated = is_private & ~is_valid.astype(bool)
        states = np.select(
            [is_foreign, is_unvalidated, is_private, is_meant],
            [PageState.FOREIGN, PageState.UNVALIDATED, PageState.PRIVATE, PageState.UNLAUNCHED],
            PageState.SHARED,
        )
        return cls(gpa, states.astype(np.uint8))


@dataclass(frozen=True)
class EncryptionRange:
    """Neighbouring pages of which everything here is true."""

    gpa: int
    nr_pages: int
    tables: str  # "encrypted", "shared", "both", "walked" (a page table itself), "not mapped"
    memory: PageState
    gvas: tuple[int, ...]  # lowest gva that maps the first page as encrypted, and as shared
    nr_mappings: int
    what: str  # its use, "" when it is free
    problem: str = ""  # where tables and memory disagree, in a few words
    why: str = ""  # and why that matters, as a sentence

    @property
    def end(self) -> int:
        """The gpa behind it."""
        return self.gpa + PAGE * self.nr_pages

    @property
    def is_free(self) -> bool:
        """Whether nothing maps the range, nobody uses it, and nothing is encrypted in it."""
        return self.tables == "not mapped" and self.memory is PageState.SHARED and not self.what

    @property
    def place(self) -> str:
        """ "Page 0xd4000", "Pages 0xd0000 to 0xd3000"."""
        if self.nr_pages == 1:
            return f"Page {self.gpa:#x}"
        return f"Pages {self.gpa:#x} to {self.end - PAGE:#x}"


@checked
@dataclass(frozen=True, repr=False)
class EncryptionMap:
    """Every range of guest-physical pages, by gpa: what page tables say, what memory is.

    Where the two differ is in `disagreements`.
    """

    step: int
    protection: str
    words: tuple[str, str]  # how a leaf says encrypted and shared: "C=1", "C=0"
    facts: tuple[str, ...]  # for the title: "policy 0x20", "C-bit 51"
    slots: tuple[tuple[int, int], ...]  # (gpa, bytes)
    ranges: tuple[EncryptionRange, ...]

    @cached_property
    def disagreements(self) -> tuple[EncryptionRange, ...]:
        """The ranges where page tables and memory say different things."""
        return tuple(part for part in self.ranges if part.problem)

    @cached_property
    def df(self) -> pd.DataFrame:
        """One row per range; gva is None where nothing is mapped.

        Columns: gpa, gpa_end, nr_pages, tables, memory, gva, nr_mappings, what, problem, why.
        """
        from labkit.hexed import HexFrame

        gvas = [min(part.gvas, default=None) for part in self.ranges]  # objects: None is no number
        columns = {
            "gpa": [part.gpa for part in self.ranges],
            "gpa_end": [part.end - 1 for part in self.ranges],
            "nr_pages": [part.nr_pages for part in self.ranges],
            "tables": [part.tables for part in self.ranges],
            "memory": [part.memory.name.lower() for part in self.ranges],
            "gva": np.array(gvas, dtype=object),
            "nr_mappings": [part.nr_mappings for part in self.ranges],
            "what": [part.what for part in self.ranges],
            "problem": [part.problem for part in self.ranges],
            "why": [part.why for part in self.ranges],
        }
        if not self.ranges:
            return HexFrame(columns, dtype=object)  # no value says which type
        return HexFrame(columns)

    def at(self, gpa: int) -> EncryptionRange | None:
        """The range that holds gpa; None outside of memory."""
        for part in self.ranges:
            if part.gpa <= gpa < part.end:
                return part
        return None

    def nr_pages(self, *states: PageState) -> int:
        """How many pages in use are in one of these states."""
        in_use = [part for part in self.ranges if not part.is_free]
        return sum(part.nr_pages for part in in_use if part.memory in states)

    @property
    def status(self) -> str:
        """The map in one sentence, or the first disagreement in two."""
        bad = self.disagreements
        if not bad:
            encrypted = self.nr_pages(PageState.PRIVATE)
            shared = self.nr_pages(PageState.SHARED)
            return (
                f"{encrypted} pages encrypted, {shared} shared; "
                "page tables and memory agree everywhere."
            )
        said = f"{bad[0].place}: {bad[0].problem}. {bad[0].why}"
        if len(bad) == 1:
            return said
        if len(bad) == 2:
            return f"{said} 1 more range disagrees."
        return f"{said} {len(bad) - 1} more ranges disagree."

    def __repr__(self) -> str:
        return f"<EncryptionMap {self.protection}: {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)
