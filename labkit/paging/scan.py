"""The whole address space at once: page tables read level by level into numpy arrays."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import PagingMode
from labkit.errors import MemoryFault
from labkit.paging.entries import U64, Bools, classify_all, frames, grants, runs
from labkit.paging.walk import Read, Walk, walk
from labkit.shown import mimebundle

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MAX_LEAVES", "Label", "PageTable", "scan"]

MAX_LEAVES = 1 << 18  # 1 GiB of 4K pages; a table that points to itself makes up to 2**36
MAX_PROBLEMS = 100  # bad entries remembered one by one
CHUNK = 1024  # tables decoded at once, which bounds the memory that hostile tables can cost

Label = Callable[[int], str]  # what lives at a gva, in a word


@dataclass(frozen=True, repr=False, eq=False)
class PageTable:
    """One address space at one step: every leaf, ordered by gva, and the tables as they were read.

    The arrays have one element per leaf. gva, gpa, size (bytes) and entry are uint64, level indexes mode.levels,
    rights is the entry with the flags that all levels together give. truncated means that leaves may be missing.
    """

    mode: PagingMode
    root: int
    step: int | None
    tables: dict[int, bytes]  # gpa -> content, for every table read
    gva: U64
    gpa: U64
    size: U64
    entry: U64
    level: NDArray[np.uint8]
    rights: U64
    bad: U64  # first gva below each entry that is reserved or points outside memory; at most MAX_PROBLEMS
    nr_bad: int
    outside: frozenset[int]  # gpas of tables that no memslot holds
    truncated: bool
    labels: Label | None = None

    def __len__(self) -> int:
        return len(self.gva)

    def walk(self, gva: int) -> Walk:
        """Translate gva in this snapshot, from the saved tables alone; never raises."""
        found = walk(self._read, self.mode, self.root, gva)
        last = found.steps[-1] if found.steps else None
        if last is None or last.kind != "outside" or last.next_gpa in self.outside:
            return replace(found, page_table=self)
        missing = f"gva {gva:#x}: {last} points to gpa {last.next_gpa:#x}, a table that this capped scan did not read"
        return replace(found, problem=missing, page_table=self)

    def maps(self, gpa: int) -> list[int]:
        """Every gva that maps gpa, lowest first."""
        if not 0 <= gpa < 1 << 64:
            return []
        offset = np.uint64(gpa) - self.gpa  # wraps below the page, to more than any size
        hit = offset < self.size
        return [int(gva) for gva in self.gva[hit] + offset[hit]]

    def diff(self, other: PageTable) -> pd.DataFrame:
        """What changed from other (earlier) to this snapshot: sign (+ - ~), gva, gva_end, nr_pages, page_size, before, after."""
        from labkit.paging.diff import diff

        return diff(other, self)

    def flag(self, name: str) -> Bools:
        """One effective flag of every leaf."""
        on: Bools = (
            (self.rights ^ np.uint64(self.mode.inverted)) & np.uint64(self.mode.flags[name])
        ) != 0
        return on

    @cached_property
    def df(self) -> pd.DataFrame:
        """Ranges of neighbouring pages with equal flags: gva, gva_end, nr_pages, page_size, gpa, a bool column per flag, what."""
        import pandas as pd

        first, last = self.ranges()
        columns: dict[str, object] = {
            "gva": self.gva[first],
            "gva_end": self.gva[last] + (self.size[last] - np.uint64(1)),
            "nr_pages": last - first + 1,
            "page_size": self.size[first],
            "gpa": self.gpa[first],
        }
        columns |= {name: self.flag(name)[first] for name in self.mode.flags}
        columns["what"] = [
            self._what(int(low), int(high))
            for low, high in zip(self.gva[first], self.gva[last], strict=True)
        ]
        return pd.DataFrame(columns)

    @cached_property
    def leaves(self) -> pd.DataFrame:
        """One row per leaf: gva, gpa, page_size, level, entry and a bool column per flag."""
        import pandas as pd

        names = np.array([level.name for level in self.mode.levels])
        columns = {
            "gva": self.gva,
            "gpa": self.gpa,
            "page_size": self.size,
            "level": names[self.level],
            "entry": self.entry,
        }
        return pd.DataFrame(columns | {name: self.flag(name) for name in self.mode.flags})

    def ranges(self, ignore: tuple[str, ...] = ()) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First and last leaf of each range: gva and gpa run on, page size and flags (but those to ignore) are equal."""
        mask = self.mode.flag_mask & ~sum(self.mode.flags[name] for name in ignore)
        return runs(self.gva, self.size, (self.gpa,), (self.rights & np.uint64(mask),))

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each entry that is reserved or points outside memory, for at most MAX_PROBLEMS of them."""
        return tuple(str(self.walk(int(gva)).problem) for gva in self.bad)

    @property
    def text(self) -> str:
        """The ranges for a terminal: title, status, one line per range (40 at most); accessed and dirty split none."""
        traces = tuple(name for name in ("accessed", "dirty") if name in self.mode.flags)
        unseen = sum(self.mode.flags[name] for name in traces)
        first, last = self.ranges(ignore=traces)
        lines = [f"{self.mode.name}, root {self.root:#x}", self.status]
        for low, high in list(zip(first, last, strict=True))[:40]:
            start, last_page, size = int(self.gva[low]), int(self.gva[high]), int(self.size[low])
            count = f"{high - low + 1} x {_bytes(size)}"
            flags = self.mode.letters(int(self.rights[low]) & ~unseen | self.mode.inverted & unseen)
            words = " ".join(filter(None, ["P", flags, self._what(start, last_page)]))
            lines.append(
                f"{start:#018x}..{last_page + size - 1:#018x} {count:>10} -> {int(self.gpa[low]):#x} {words}"
            )
        return "\n".join(
            lines
            + ([f"... {len(first) - 40} more ranges"] if len(first) > 40 else [])
            + list(self.problems[:5])
        )

    @property
    def status(self) -> str:
        """What the snapshot holds, in one sentence."""
        step = "" if self.step is None else f" at step {self.step}"
        bad = f", {self.nr_bad} bad entries" if self.nr_bad else ""
        capped = ", more not read (truncated)" if self.truncated else ""
        return f"{len(self)} leaves ({_bytes(int(self.size.sum()))}) in {len(self.tables)} tables{step}{bad}{capped}."

    def __repr__(self) -> str:
        return f"<PageTable {self.mode.name} root {self.root:#x}: {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)

    def _what(self, low: int, high: int) -> str:
        if self.labels is None:
            return ""
        first, last = self.labels(low), self.labels(high)
        return first if first == last else f"{first} .. {last}"

    def _read(self, gpa: int, size: int) -> bytes:
        at = bisect_right(self._starts, gpa) - 1
        table = self._starts[at] if at >= 0 else 0
        if at < 0 or gpa + size > table + len(self.tables[table]):
            raise MemoryFault(f"gpa {gpa:#x} is in no table of this snapshot", gpa=gpa, size=size)
        return self.tables[table][gpa - table : gpa - table + size]

    @cached_property
    def _starts(self) -> list[int]:
        return sorted(self.tables)


def scan(
    read: Read,
    mode: PagingMode,
    root_gpa: int,
    step: int | None = None,
    label: Label | None = None,
    max_leaves: int = MAX_LEAVES,
) -> PageTable:
    """Read every table below root_gpa (or raw CR3) and give a snapshot of all leaves; never raises.

    Without .truncated it holds exactly the translations that walk() finds; tables that loop or are very many
    are cut off after max_leaves leaves, and what is there is still true.
    """
    return _Scan(read, mode, max_leaves).run(mode.root(root_gpa), step, label)


class _Scan:
    """The state of one scan: tables read so far, leaves found so far."""

    def __init__(self, read: Read, mode: PagingMode, max_leaves: int) -> None:
        self.read, self.mode, self.left = read, mode, max_leaves
        self.max_visits = max(512, max_leaves >> 6)
        self.tables: dict[int, bytes] = {}
        self.outside: set[int] = set()
        self.leaves: list[tuple[U64, U64, U64, U64, U64, NDArray[np.uint8]]] = []
        self.bad: list[U64] = []
        self.truncated = False

    def run(self, root: int, step: int | None, label: Label | None) -> PageTable:
        """Go down level by level; a visit is a table as seen from one gva, with the rights granted so far."""
        mode = self.mode
        visits = (
            np.zeros(1, np.uint64),
            np.array([root], np.uint64),
            np.array([mode.inherit], np.uint64),
        )
        for depth in range(len(mode.levels)):
            visits = self._level(depth, *visits)
        parts = [np.concatenate(column) for column in zip(*self.leaves, strict=True)] or [
            np.empty(0, np.uint64)
        ] * 6
        if len(self.leaves) > 1:
            order = np.argsort(parts[0], kind="stable")
            parts = [part[order] for part in parts]
        gva, gpa, size, entry, rights, level = parts
        bad = np.concatenate([np.empty(0, np.uint64), *self.bad])
        return PageTable(
            mode,
            root,
            step,
            self.tables,
            gva,
            gpa,
            size,
            entry,
            level.astype(np.uint8),
            rights,
            np.sort(bad)[:MAX_PROBLEMS],
            len(bad),
            frozenset(self.outside),
            self.truncated,
            label,
        )

    def _level(self, depth: int, base: U64, table: U64, rights: U64) -> tuple[U64, U64, U64]:
        below, nr_below = [(base[:0], table[:0], rights[:0])], 0
        for at in range(0, len(base), CHUNK):
            if nr_below > self.max_visits or not self.left:
                self.truncated = True
                break
            part = slice(at, at + CHUNK)
            below.append(self._chunk(depth, base[part], table[part], rights[part]))
            nr_below += len(below[-1][0])
        self.truncated |= nr_below > self.max_visits
        gva, gpa, acc = (
            np.concatenate(column)[: self.max_visits] for column in zip(*below, strict=True)
        )
        return gva, gpa, acc

    def _chunk(self, depth: int, base: U64, table: U64, rights: U64) -> tuple[U64, U64, U64]:
        """Decode some tables of one level: keeps their leaves, gives the visits below them."""
        mode, level = self.mode, self.mode.levels[depth]
        tables = self.tables
        size = level.table_size
        data = [
            raw if len(raw := tables.get(gpa, b"")) == size else self._table(gpa, size)
            for gpa in table.tolist()
        ]
        if not all(data):
            there = np.array([bool(raw) for raw in data])
            self.bad.append(base[~there])
            base, rights = base[there], rights[there]
        entries = np.frombuffer(b"".join(data), mode.dtype).astype(np.uint64, copy=False)
        present = mode.present_at(level)
        at = np.flatnonzero((entries & np.uint64(present.mask)) == np.uint64(present.value))
        entries = entries[at]
        index = (at & (level.nr_entries - 1)).astype(np.uint64)
        owner = at >> level.bits
        gva = base[owner] + (index << np.uint64(level.shift))
        if depth == 0:
            top = 1 << (mode.va_bits - 1)
            gva[(gva & np.uint64(top)) != 0] |= np.uint64(mode.extend(top))
        kinds = classify_all(mode, level, entries)
        acc = rights[owner] & grants(mode, entries, kinds.table)
        leaf, below = np.flatnonzero(kinds.leaf), np.flatnonzero(kinds.table)
        if len(leaf) + len(below) < len(at):
            self.bad.append(gva[~(kinds.table | kinds.leaf)])
        self._keep(depth, gva[leaf], entries[leaf], acc[leaf])
        return gva[below], frames(mode.next_table(level), entries[below]), acc[below]

    def _keep(self, depth: int, gva: U64, entry: U64, acc: U64) -> None:
        if len(gva) > self.left:
            self.truncated = True
            gva, entry, acc = gva[: self.left], entry[: self.left], acc[: self.left]
        self.left -= len(gva)
        if not len(gva):
            return
        mode, size = self.mode, self.mode.levels[depth].size
        gpa = frames(mode.pa, entry) & np.uint64(-size & (1 << 64) - 1)
        rights = (entry & np.uint64(~mode.inherit & (1 << 64) - 1)) | (
            acc ^ np.uint64(mode.flip & mode.inherit)
        )
        self.leaves.append(
            (
                gva,
                gpa,
                np.full(len(gva), size, np.uint64),
                entry,
                rights,
                np.full(len(gva), depth, np.uint8),
            )
        )

    def _table(self, gpa: int, size: int) -> bytes:
        """Read a table, b"" outside the memslots; each is read once, so loops see one state."""
        known = self.tables.get(gpa, b"")
        if len(known) > size:  # as a larger table of another level
            return known[:size]
        try:
            self.tables[gpa] = data = known + self.read(gpa + len(known), size - len(known))
        except MemoryFault:
            self.outside.add(gpa)
            return b""
        return data


def _bytes(size: int) -> str:
    for unit, name in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size / unit:.4g}{name}"
    return f"{size}"
