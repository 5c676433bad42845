"""Page tables against memory: what the guest's tables say of each page's encryption, what memory really is, where the two differ.

In the model every protection but SNP garbles where the two differ; a real TDX module refuses the access instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.errors import InvalidState
from labkit.look.snapshots import MemoryMap
from labkit.paging.entries import U64, Bools, runs
from labkit.paging.scan import PageTable
from labkit.shown import mimebundle

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EncryptionMap", "EncryptionRange", "PageState", "PageStates", "encryption_map"]

PAGE, WORD = 4096, (1 << 64) - 1
NOBODY = np.uint64(
    1
)  # for "mapped nowhere" in arrays of gva - gpa: never the difference of two pages


class PageState(IntEnum):
    """What memory really is, page by page."""

    SHARED = 0  # plaintext: what the host sees is what the guest wrote
    PRIVATE = 1  # encrypted with the guest's key (SNP: and validated)
    UNLAUNCHED = 2  # the guest's, but no launch command encrypted it
    UNVALIDATED = 3  # SNP: assigned to the guest, which has not validated it
    FOREIGN = 4  # SNP: assigned to somebody else


@dataclass(frozen=True, eq=False)
class PageStates:
    """One memslot's pages from gpa on; states has shape (nr_pages,), uint8, of PageState. Raises InvalidState for anything else."""

    gpa: int
    states: NDArray[np.uint8]

    def __post_init__(self) -> None:
        wrong = (
            self.states.ndim != 1
            or self.states.dtype != np.uint8
            or int(self.states.max(initial=0)) >= len(PageState)
        )
        if wrong or self.gpa % PAGE or not 0 <= self.gpa < 1 << 52:
            raise InvalidState(
                f"page states at gpa {self.gpa:#x}: not a row of PageState at a page's address below 2^52, but "
                f"{self.states.dtype} of shape {self.states.shape}",
                gpa=self.gpa,
            )

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

        private: DRAM holds ciphertext of the guest's key. protected: the host meant it to (protected_phy_pages). owner: the
        ASID that the RMP gives the page to, 0 for none; validated: the RMP's bit; asid: the guest's.
        """
        try:
            on, meant, who, valid = np.broadcast_arrays(
                np.atleast_1d(private), protected, owner, validated
            )
        except ValueError as err:
            raise InvalidState(f"page states at gpa {gpa:#x}: {err}", gpa=gpa) from err
        state = np.select(
            [(who != 0) & (who != asid), on & ~valid.astype(bool), on, meant],
            [PageState.FOREIGN, PageState.UNVALIDATED, PageState.PRIVATE, PageState.UNLAUNCHED],
            PageState.SHARED,
        )
        return cls(gpa, state.astype(np.uint8))


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
    def is_free(self) -> bool:
        """Whether nothing maps the range, nobody uses it, and nothing is encrypted in it."""
        return self.tables == "not mapped" and self.memory is PageState.SHARED and not self.what

    @property
    def place(self) -> str:
        """ "Page 0xd4000", "Pages 0xd0000 to 0xd3000"."""
        return (
            f"Page {self.gpa:#x}"
            if self.nr_pages == 1
            else f"Pages {self.gpa:#x} to {self.gpa + (self.nr_pages - 1) * PAGE:#x}"
        )


@dataclass(frozen=True, repr=False)
class EncryptionMap:
    """Every range of guest-physical pages, by gpa: what the page tables say, what memory is, and where they disagree."""

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
        """One row per range: gpa, gpa_end, nr_pages, tables, memory, gva (None: not mapped), nr_mappings, what, problem, why."""
        import pandas as pd

        names = (
            "gpa",
            "gpa_end",
            "nr_pages",
            "tables",
            "memory",
            "gva",
            "nr_mappings",
            "what",
            "problem",
            "why",
        )
        rows = [
            (
                part.gpa,
                part.gpa + part.nr_pages * PAGE - 1,
                part.nr_pages,
                part.tables,
                part.memory.name.lower(),
                min(part.gvas, default=None),
                part.nr_mappings,
                part.what,
                part.problem,
                part.why,
            )
            for part in self.ranges
        ]
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        return pd.DataFrame(
            {
                name: pd.Series(column, dtype=object if name == "gva" else None)
                for name, column in zip(names, columns, strict=True)
            }
        )

    def at(self, gpa: int) -> EncryptionRange | None:
        """The range that holds gpa; None outside of memory."""
        return next(
            (part for part in self.ranges if 0 <= gpa - part.gpa < part.nr_pages * PAGE), None
        )

    def nr_pages(self, *states: PageState) -> int:
        """How many pages in use are in one of these states."""
        return sum(
            part.nr_pages for part in self.ranges if part.memory in states and not part.is_free
        )

    @property
    def status(self) -> str:
        """The map in one sentence, or the first disagreement in two."""
        bad = self.disagreements
        if not bad:
            return (
                f"{self.nr_pages(PageState.PRIVATE)} pages encrypted, {self.nr_pages(PageState.SHARED)} shared; "
                "page tables and memory agree everywhere."
            )
        more = (
            f" {len(bad) - 1} more range{'s' * (len(bad) > 2)} disagree{'s' * (len(bad) == 2)}."
            if len(bad) > 1
            else ""
        )
        return f"{bad[0].place}: {bad[0].problem}. {bad[0].why}{more}"

    def __repr__(self) -> str:
        return f"<EncryptionMap {self.protection}: {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


# What tables and memory make of each other: (few words, the sentence). {yes} and {no} are the two values of the bit.
_PLAIN = "{yes}, memory still plaintext"
_NEVER = "{yes}, never launched"
_CIPHER = "{no}, memory still ciphertext"
_WALKED = "page table in plaintext"
_BOTH = (
    "{yes} and {no} at once",
    "What the guest writes through the one mapping it reads back as noise through the other.",
)
_OTHER = "The RMP gives the page to somebody else: an access with {yes} exits to the host (#NPF)."
_GARBLES = {
    ("encrypted", PageState.SHARED): (
        _PLAIN,
        "The guest decrypts what nobody encrypted: it will read noise.",
    ),
    ("encrypted", PageState.UNLAUNCHED): (
        _NEVER,
        "No launch command encrypted it: the guest will read noise until it has written whole blocks.",
    ),
    ("shared", PageState.PRIVATE): (
        _CIPHER,
        "The guest reads it undecrypted: it will read noise, and what it writes garbles a block.",
    ),
    ("walked", PageState.SHARED): (
        _WALKED,
        "The CPU walks page tables as encrypted memory, whatever a bit says: it will find noise.",
    ),
    ("walked", PageState.UNLAUNCHED): (
        _WALKED,
        "No launch command encrypted it, and the CPU walks page tables as encrypted memory.",
    ),
}
_REFUSES = {  # SNP, APM vol. 2 (24593) 15.36.10
    ("encrypted", PageState.SHARED): (
        _PLAIN,
        "The RMP assigns it to no guest: an access with {yes} exits to the host (#NPF).",
    ),
    ("encrypted", PageState.UNLAUNCHED): (
        _NEVER,
        "The RMP assigns it to no guest: an access with {yes} exits to the host (#NPF).",
    ),
    ("encrypted", PageState.UNVALIDATED): (
        "{yes}, not validated",
        "The first access raises #VC until the guest runs PVALIDATE.",
    ),
    ("encrypted", PageState.FOREIGN): ("{yes}, another's page", _OTHER),
    ("shared", PageState.PRIVATE): (
        _CIPHER,
        "A read gives ciphertext; a write meets the RMP and exits to the host (#NPF).",
    ),
    ("shared", PageState.UNVALIDATED): (
        "{no}, assigned",
        "The page is still the guest's own: a write exits to the host (#NPF).",
    ),
    ("shared", PageState.FOREIGN): (
        "{no}, another's page",
        "The RMP gives the page to somebody else: a write exits to the host (#NPF).",
    ),
    ("walked", PageState.SHARED): (
        _WALKED,
        "The CPU walks page tables as private memory: the walk exits to the host (#NPF).",
    ),
    ("walked", PageState.UNLAUNCHED): (
        _WALKED,
        "The CPU walks page tables as private memory: the walk exits to the host (#NPF).",
    ),
    ("walked", PageState.UNVALIDATED): (
        "page table not validated",
        "The walk raises #VC until the guest runs PVALIDATE.",
    ),
    ("walked", PageState.FOREIGN): (
        "another's page table",
        "The RMP gives the page to somebody else: the walk exits (#NPF).",
    ),
}


def encryption_map(
    table: PageTable,
    truth: Iterable[PageStates],
    memory: MemoryMap | None = None,
    *,
    protection: str = "sev",
    facts: tuple[str, ...] = (),
) -> EncryptionMap:
    """Compare page tables (mode with a C-bit or shared bit, else InvalidState) with the state of every page of memory.

    memory says what pages are for; without it the labels of the page table do. What the tables map outside of memory
    is not memory and not in the map.
    """
    mode, slots = table.mode, sorted(truth, key=lambda slot: slot.gpa)
    if mode.c_bit is None:
        raise InvalidState(
            f"{mode.name} has no C-bit: nothing of this guest is encrypted", mode=mode.name
        )
    for low, high in pairwise(slots):
        if low.gpa + len(low.states) * PAGE > high.gpa:
            raise InvalidState(
                f"page states at gpa {high.gpa:#x} begin inside those at gpa {low.gpa:#x}",
                gpa=high.gpa,
            )
    words = mode.c_word(True), mode.c_word(False)
    ranges = _Segments(table, slots, memory).ranges(
        _REFUSES if protection == "snp" else _GARBLES, words
    )
    said = protection.upper(), *facts, f"{mode.c_name}-bit {mode.c_bit}"
    return EncryptionMap(
        table.step or 0,
        said[0],
        words,
        said[1:],
        tuple((s.gpa, len(s.states) * PAGE) for s in slots),
        ranges,
    )


class _Mapped(NamedTuple):
    """Segments seen from the page tables: how often each is mapped one way, and the lowest gva minus its gpa."""

    nr: NDArray[np.int64]
    shift: U64


class _Segments:
    """Memory cut wherever anything changes; every array has one element per segment."""

    def __init__(self, table: PageTable, slots: list[PageStates], memory: MemoryMap | None) -> None:
        first, last = runs(table.gva, table.size, (table.gpa,), (table.flag("c"),))
        self.table, self.maps = (
            table,
            (
                table.gpa[first],
                table.gpa[last] + table.size[last],
                table.gva[first],
                table.flag("c")[first],
            ),
        )
        walked = np.array(sorted(gpa for gpa, data in table.tables.items() if data), np.uint64)
        self.uses = memory.ranges if memory is not None else ()
        uses = np.array(
            [(use.gpa, use.gpa + use.nr_pages * PAGE) for use in self.uses], np.uint64
        ).reshape(-1, 2)
        inside = [
            np.concatenate([[0], np.flatnonzero(np.diff(s.states)) + 1, [len(s.states)]]) * PAGE
            + s.gpa
            for s in slots
        ]
        self.cuts: U64 = np.unique(
            np.concatenate(
                [
                    np.array(at, np.uint64)
                    for at in (
                        *self.maps[:2],
                        walked,
                        walked + np.uint64(PAGE),
                        uses.ravel(),
                        *inside,
                    )
                ]
            )
        )
        start = self.cuts[:-1]
        self.slot, self.state = np.full(len(start), -1), np.zeros(len(start), np.uint8)
        for i, s in enumerate(slots):
            here = slice(
                *np.searchsorted(
                    self.cuts, np.array([s.gpa, s.gpa + len(s.states) * PAGE], np.uint64)
                )
            )
            self.slot[here], self.state[here] = (
                i,
                s.states[(start[here] - np.uint64(s.gpa)) // np.uint64(PAGE)],
            )
        self.use = np.full(len(start), -1)
        for i, (low, high) in enumerate(np.searchsorted(self.cuts, uses)):
            self.use[low:high] = i
        self.walked: Bools = np.isin(start, walked)
        self.secret, self.shared = self._mapped(True), self._mapped(False)

    def _mapped(self, secret: bool) -> _Mapped:
        start, end, gva, c = self.maps
        low, high, gva = (
            np.searchsorted(self.cuts, start)[c == secret],
            np.searchsorted(self.cuts, end)[c == secret],
            gva[c == secret],
        )
        change = np.zeros(len(self.cuts), np.int64)
        np.add.at(change, low, 1)
        np.add.at(change, high, -1)
        shift = np.full(len(self.slot), NOBODY)
        _, once = np.unique(
            np.stack([low, high]), axis=1, return_index=True
        )  # gvas ascend: the first of equal spans is the lowest
        for i in sorted(once.tolist(), reverse=True):
            shift[low[i] : high[i]] = (int(gva[i]) - int(self.cuts[low[i]])) & WORD
        return _Mapped(np.cumsum(change)[:-1], shift)

    def ranges(
        self, rules: dict[tuple[str, PageState], tuple[str, str]], words: tuple[str, str]
    ) -> tuple[EncryptionRange, ...]:
        """Segments of one slot with equal facts, joined."""
        facts = (self.slot, self.state, self.use, self.walked, *self.secret, *self.shared)
        cut = np.ones(len(self.slot), bool)
        cut[1:] = np.any([fact[1:] != fact[:-1] for fact in facts], axis=0)
        first = np.flatnonzero(cut)
        last = np.append(first[1:], len(self.slot))
        kept = self.slot[first] >= 0
        return tuple(
            self._range(low, high, rules, words)
            for low, high in zip(first[kept].tolist(), last[kept].tolist(), strict=True)
        )

    def _range(
        self,
        low: int,
        high: int,
        rules: dict[tuple[str, PageState], tuple[str, str]],
        words: tuple[str, str],
    ) -> EncryptionRange:
        gpa, nr = int(self.cuts[low]), (int(self.cuts[high]) - int(self.cuts[low])) // PAGE
        gvas = tuple(
            (int(side.shift[low]) + gpa) & WORD
            for side in (self.secret, self.shared)
            if side.shift[low] != NOBODY
        )
        secret, shared, state = (
            int(self.secret.nr[low]),
            int(self.shared.nr[low]),
            PageState(int(self.state[low])),
        )
        tables = (
            "both" if secret and shared else "encrypted" if secret else "shared" if shared else ""
        )
        found = _BOTH if tables == "both" else rules.get((tables, state)) if tables else None
        if self.walked[low]:
            tables = tables or "walked"
            found = rules.get(("walked", state)) or found
        what = (
            self.uses[self.use[low]].kind
            if self.use[low] >= 0
            else self.table.labels(gvas[0])
            if gvas and self.table.labels
            else ""
        )
        problem, why = (text.format(yes=words[0], no=words[1]) for text in found or ("", ""))
        if tables == "both":
            why = (
                f"gva {gvas[0]:#x} maps it with {words[0]}, gva {gvas[1]:#x} with {words[1]}. {why}"
            )
        return EncryptionRange(
            gpa, nr, tables or "not mapped", state, gvas, secret + shared, what, problem, why
        )
