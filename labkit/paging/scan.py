"""The whole address space at once: a snapshot of every page that is mapped, and of the tables."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import PagingMode
from labkit.checked import checked
from labkit.errors import InvalidState, MemoryFault
from labkit.paging.entries import U64, Bools, Indices, runs
from labkit.paging.labels import Labels, range_label
from labkit.paging.leaves import read_tables
from labkit.paging.walk import Read, Walk, walk
from labkit.shown import Bundle, mimebundle, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MAX_LEAVES", "PageTable", "scan"]

MAX_LEAVES = 1 << 18  # 1 GiB of 4K pages; a table that points to itself makes up to 2**36
MAX_PROBLEMS = 100  # bad entries remembered one by one
SHOWN_RANGES = 40  # lines of ranges in a terminal
SHOWN_PROBLEMS = 5


@checked
@dataclass(frozen=True, repr=False, eq=False)
class PageTable:
    """One address space at one step: every leaf, ordered by gva, and the tables as they were read.

    The arrays gva, gpa, size, entry, level and rights have one element per leaf; size is in bytes,
    level indexes mode.levels, rights is the entry with the flags that all levels together give.
    truncated means that leaves may be missing.
    """

    mode: PagingMode
    root: int  # gpa of the root table
    step: int | None  # the VM's clock when it was taken
    tables: dict[int, bytes]  # gpa -> content, for every table read
    gva: U64
    gpa: U64
    size: U64
    entry: U64
    level: NDArray[np.uint8]
    rights: U64
    # First gva below each entry that is reserved or points outside memory; at most MAX_PROBLEMS.
    bad: U64
    nr_bad: int
    outside: frozenset[int]  # gpas of tables that no memslot holds
    truncated: bool
    names: Labels | None = None  # who says what lies where
    found_by: str = ""  # the registers that say which root and format these are

    def __len__(self) -> int:
        return len(self.gva)

    # --- one address

    def walk(self, gva: str | int) -> Walk:
        """Translate a gva, or a place by name, in this snapshot, from the saved tables alone.

        Never raises for a gva: a hole is a value. Raises SymbolNotFound for a name that there is
        not.
        """
        gva = self._gva_of(gva)
        found = replace(walk(self._read, self.mode, self.root, gva), page_table=self)
        last = found.steps[-1] if found.steps else None
        if last is None or last.kind != "outside" or last.next_gpa in self.outside:
            return found
        where = f"gpa {last.next_gpa:#x}, a table that this capped scan did not read"
        return replace(found, problem=f"gva {gva:#x}: {last} points to {where}")

    def _gva_of(self, place: str | int) -> int:
        if isinstance(place, int):
            return place
        if self.names is None:
            raise InvalidState(f"these page tables have no names for their addresses: no {place!r}")
        return self.names.gva_of(place)

    def _read(self, gpa: int, size: int) -> bytes:
        """Memory, as far as it was read for this snapshot."""
        index = bisect_right(self._table_gpas, gpa) - 1
        if index >= 0:
            start = self._table_gpas[index]
            content = self.tables[start]
            if gpa + size <= start + len(content):
                return content[gpa - start : gpa - start + size]
        raise MemoryFault(f"gpa {gpa:#x} is in no table of this snapshot", gpa=gpa, size=size)

    @cached_property
    def _table_gpas(self) -> list[int]:
        return sorted(self.tables)

    def maps(self, gpa: int) -> list[int]:
        """Every gva that maps gpa, lowest first."""
        if not 0 <= gpa < 1 << 64:
            return []
        offset = np.uint64(gpa) - self.gpa  # wraps below the page, to more than any size
        hit = offset < self.size
        return [int(gva) for gva in self.gva[hit] + offset[hit]]

    def label(self, gva: str | int) -> str:
        """What lies at a gva, in a word; "" when nobody knows."""
        return "" if self.names is None else self.names.label(self._gva_of(gva))

    # --- rights

    def flag(self, name: str) -> Bools:
        """One effective flag of every leaf; raises InvalidState for one that the format lacks."""
        if name not in self.mode.flags:
            flags = ", ".join(self.mode.flags)
            raise InvalidState(f"{self.mode.name} has no flag {name!r}, only {flags}")
        says_yes = self.rights ^ np.uint64(self.mode.inverted)
        on: Bools = (says_yes & np.uint64(self.mode.flags[name])) != 0
        return on

    @property
    def executable(self) -> Bools:
        """Whether each leaf's own bits let code run there: nx is clear, or the format lacks it."""
        if "nx" not in self.mode.flags:
            return np.ones(len(self), np.bool_)
        return ~self.flag("nx")

    def _flag_columns(self, at: Indices | slice) -> dict[str, Bools]:
        """A column for each flag of some leaves, and whether they are executable."""
        columns = {name: self.flag(name)[at] for name in self.mode.flags}
        columns["executable"] = self.executable[at]
        return columns

    # --- tables to compute with

    def ranges(self, ignore: tuple[str, ...] = ()) -> tuple[Indices, Indices]:
        """First and last leaf of each range.

        Within a range gva and gpa run on, page size and flags (but those to ignore) are equal.
        """
        mask = self.mode.flag_mask & ~sum(self.mode.flags[name] for name in ignore)
        return runs(self.gva, self.size, (self.gpa,), (self.rights & np.uint64(mask),))

    @cached_property
    def df(self) -> pd.DataFrame:
        """Ranges of neighbouring pages with equal flags.

        gva, gva_end, nr_pages, page_size (bytes), gpa, a bool column per flag, executable, and
        what lies there.
        """
        from labkit.hexed import HexFrame

        first, last = self.ranges()
        columns: dict[str, object] = {
            "gva": self.gva[first],
            "gva_end": self.gva[last] + (self.size[last] - np.uint64(1)),
            "nr_pages": last - first + 1,
            "page_size": self.size[first],
            "gpa": self.gpa[first],
        }
        columns |= self._flag_columns(first)
        columns["what"] = self._range_labels(first, last)
        return HexFrame(columns)

    @cached_property
    def leaves(self) -> pd.DataFrame:
        """One row per leaf: gva, gpa, page_size (bytes), level, entry, flags, executable."""
        from labkit.hexed import HexFrame

        level_names = np.array([level.name for level in self.mode.levels])
        columns: dict[str, object] = {
            "gva": self.gva,
            "gpa": self.gpa,
            "page_size": self.size,
            "level": level_names[self.level],
            "entry": self.entry,
        }
        return HexFrame(columns | self._flag_columns(slice(None)))

    def _range_labels(self, first: Indices, last: Indices) -> list[str]:
        """What each range is called, given its first and last leaf."""
        if self.names is None:
            return [""] * len(first)
        found = list(self.names.labels(self.gva[first], self.gpa[first]))
        longer = np.flatnonzero(first != last)
        ends = self.names.labels(self.gva[last[longer]], self.gpa[last[longer]])
        for index, end in zip(longer.tolist(), ends, strict=True):
            found[index] = range_label(found[index], end)
        return found

    def diff(self, other: PageTable) -> pd.DataFrame:
        """What changed from other (earlier) to this snapshot.

        sign (+ - ~), gva, gva_end, nr_pages, page_size, before, after: see labkit.paging.diff.
        """
        from labkit.paging.diff import diff

        return diff(other, self)

    # --- words

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each entry that is reserved or points outside memory.

        For at most MAX_PROBLEMS of them.
        """
        return tuple(str(self.walk(int(gva)).problem) for gva in self.bad)

    @property
    def text(self) -> str:
        """The ranges for a terminal: title, status, one line per range, problems.

        At most SHOWN_RANGES lines of ranges; accessed and dirty split none.
        """
        traces = tuple(name for name in ("accessed", "dirty") if name in self.mode.flags)
        first, last = self.ranges(ignore=traces)
        lines = [f"{self.mode.name}, root {self.root:#x}", self.status]
        if self.found_by:
            lines.insert(1, f"as {self.found_by} says")
        for low, high in zip(first[:SHOWN_RANGES], last[:SHOWN_RANGES], strict=True):
            lines.append(self._range_line(int(low), int(high), traces))
        if len(first) > SHOWN_RANGES:
            lines.append(f"... {len(first) - SHOWN_RANGES} more ranges")
        lines.extend(self.problems[:SHOWN_PROBLEMS])
        return "\n".join(lines)

    def _range_line(self, low: int, high: int, ignore: tuple[str, ...]) -> str:
        """One range, from leaf low to leaf high, without the flags to ignore."""
        mode = self.mode
        size = int(self.size[low])
        start = int(self.gva[low])
        last_page = int(self.gva[high])
        where = f"{start:#018x}..{last_page + size - 1:#018x}"
        count = f"{high - low + 1} x {_bytes(size)}"
        ignored = sum(mode.flags[name] for name in ignore)
        # An inverted flag says no when it is set.
        flags = mode.letters(int(self.rights[low]) & ~ignored | mode.inverted & ignored)
        what = range_label(self.label(start), self.label(last_page))
        words = " ".join(word for word in ("P", flags, what) if word)
        return f"{where} {count:>10} -> {int(self.gpa[low]):#x} {words}"

    @property
    def status(self) -> str:
        """What the snapshot holds, in one sentence."""
        found = f"{len(self)} leaves ({_bytes(int(self.size.sum()))}) in {len(self.tables)} tables"
        if self.step is not None:
            found += f" at step {self.step}"
        if self.nr_bad:
            found += f", {self.nr_bad} bad entries"
        if self.truncated:
            found += ", more not read (truncated)"
        return f"{found}."

    def __repr__(self) -> str:
        return f"<PageTable {self.mode.name} root {self.root:#x}: {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        return mimebundle(self)


def scan(
    read: Read,
    mode: PagingMode,
    root_gpa: int,
    step: int | None = None,
    names: Labels | None = None,
    max_leaves: int = MAX_LEAVES,
) -> PageTable:
    """Read every table below root_gpa (or raw CR3) and give a snapshot of all leaves; never raises.

    Without .truncated it holds exactly the translations that walk() finds; tables that loop or are
    very many are cut off after max_leaves leaves, and what is there is still true. `names` say what
    lies where.
    """
    root = mode.root(root_gpa)
    found = read_tables(read, mode, root, max_leaves)
    return PageTable(
        mode=mode,
        root=root,
        step=step,
        tables=found.tables,
        gva=found.leaves.gva,
        gpa=found.leaves.gpa,
        size=found.leaves.size,
        entry=found.leaves.entry,
        level=found.leaves.level,
        rights=found.leaves.rights,
        bad=found.bad[:MAX_PROBLEMS],
        nr_bad=len(found.bad),
        outside=found.outside,
        truncated=found.truncated,
        names=names,
    )


def _bytes(size: int) -> str:
    """A size with its unit: "4K", "2.027M"."""
    for unit, name in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size / unit:.4g}{name}"
    return f"{size}"
