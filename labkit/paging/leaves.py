"""Reads all page tables of an address space, level by level, into numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import Level, PagingMode
from labkit.errors import MemoryFault
from labkit.paging.entries import (
    MASK64,
    U64,
    Bools,
    Indices,
    classify_all,
    frames,
    grants,
    match_all,
)
from labkit.paging.walk import Read

__all__ = ["Leaves", "Tables", "read_tables"]

CHUNK = 1024  # tables decoded at once, which bounds the memory that hostile tables can cost
MIN_VISITS = 512  # of tables on one level, however few leaves are wanted


class Leaves(NamedTuple):
    """Leaf entries and what they map; arrays with one element per leaf."""

    gva: U64
    gpa: U64
    size: U64  # bytes
    entry: U64
    rights: U64  # the entry with the flags that all levels together give
    level: NDArray[np.uint8]  # index into mode.levels


@dataclass(frozen=True)
class Tables:
    """What was found below one root."""

    leaves: Leaves  # by gva
    tables: dict[int, bytes]  # gpa -> content, for every table read
    outside: frozenset[int]  # gpas of tables that no memslot holds
    bad: U64  # first gva below each entry that is reserved or points outside memory, sorted
    truncated: bool  # leaves may be missing


class _Visits(NamedTuple):
    """Tables as each is seen from one gva; arrays with one element per visit."""

    base: U64  # first gva that it translates
    table: U64  # its gpa
    rights: U64  # granted so far, as PagingMode.grants() has them

    def at(self, which: slice | Bools) -> _Visits:
        """Some of them."""
        return _Visits(self.base[which], self.table[which], self.rights[which])


def read_tables(read: Read, mode: PagingMode, root: int, max_leaves: int) -> Tables:
    """Read every table below the root table at gpa root; never raises.

    Tables that loop or are very many are cut off after max_leaves leaves.
    """
    return _Reader(read, mode, max_leaves).run(root)


class _Reader:
    """The state of one reading: tables read so far, leaves found so far."""

    def __init__(self, read: Read, mode: PagingMode, max_leaves: int) -> None:
        self.read = read
        self.mode = mode
        self.room = max_leaves  # for more leaves
        self.max_visits = max(MIN_VISITS, max_leaves >> 6)
        self.tables: dict[int, bytes] = {}
        self.outside: set[int] = set()
        self.leaves: list[Leaves] = []
        self.bad: list[U64] = []
        self.truncated = False

    def run(self, root: int) -> Tables:
        """Go down level by level, from one visit of the root table."""
        visits = _Visits(
            base=np.zeros(1, np.uint64),
            table=np.array([root], np.uint64),
            rights=np.array([self.mode.inherit], np.uint64),
        )
        for depth in range(len(self.mode.levels)):
            visits = self._read_level(depth, visits)

        bad = np.concatenate([np.empty(0, np.uint64), *self.bad])
        return Tables(
            leaves=self._sorted_leaves(),
            tables=self.tables,
            outside=frozenset(self.outside),
            bad=np.sort(bad),
            truncated=self.truncated,
        )

    def _sorted_leaves(self) -> Leaves:
        """All leaves by gva; each part that was kept is in order already."""
        if not self.leaves:
            none = np.empty(0, np.uint64)
            return Leaves(none, none, none, none, none, np.empty(0, np.uint8))
        if len(self.leaves) == 1:
            return self.leaves[0]
        columns = [np.concatenate(column) for column in zip(*self.leaves, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return Leaves(*(column[order] for column in columns))

    def _read_level(self, depth: int, visits: _Visits) -> _Visits:
        """Read the tables of one level; gives the visits of the next, as many as are allowed."""
        parts = [visits.at(slice(0))]
        nr_below = 0
        for start in range(0, len(visits.base), CHUNK):
            if nr_below > self.max_visits or not self.room:
                self.truncated = True
                break
            below = self._read_chunk(depth, visits.at(slice(start, start + CHUNK)))
            parts.append(below)
            nr_below += len(below.base)

        if nr_below > self.max_visits:
            self.truncated = True
        together = _Visits(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return together.at(slice(self.max_visits))

    def _read_chunk(self, depth: int, visits: _Visits) -> _Visits:
        """Decode some tables of one level: keeps their leaves, gives the visits below them."""
        mode = self.mode
        level = mode.levels[depth]
        visits, data = self._contents(level, visits)
        at, entries = _present(mode, level, data)
        owner = at >> level.bits  # the visit that an entry belongs to
        gva = self._gvas(depth, visits.base[owner], at)

        kinds = classify_all(mode, level, entries)
        rights = grants(mode, entries, kinds.table)
        rights &= visits.rights[owner]
        leaf = np.flatnonzero(kinds.leaf)
        below = np.flatnonzero(kinds.table)
        if len(leaf) + len(below) < len(at):
            self.bad.append(gva[~(kinds.table | kinds.leaf)])
        self._keep(depth, gva[leaf], entries[leaf], rights[leaf])
        return _Visits(gva[below], frames(mode.next_table(level), entries[below]), rights[below])

    def _contents(self, level: Level, visits: _Visits) -> tuple[_Visits, bytes]:
        """The visits of tables that are in memory, and what these hold, one behind the other."""
        size = level.table_size
        contents = []
        for gpa in visits.table.tolist():
            known = self.tables.get(gpa, b"")
            contents.append(known if len(known) == size else self._table(gpa, known, size))
        if not all(contents):
            there = np.array([bool(content) for content in contents])
            self.bad.append(visits.base[~there])
            visits = visits.at(there)
        return visits, b"".join(contents)

    def _table(self, gpa: int, known: bytes, size: int) -> bytes:
        """Read a table, as far as it is not known, b"" outside the memslots.

        Each is read once, so loops see one state.
        """
        if len(known) > size:  # as a larger table of another level
            return known[:size]
        try:
            content = known + self.read(gpa + len(known), size - len(known))
        except MemoryFault:
            self.outside.add(gpa)
            return b""
        self.tables[gpa] = content
        return content

    def _gvas(self, depth: int, base: U64, at: Indices) -> U64:
        """The first gva that each entry translates, given its table's, and where it stands."""
        level = self.mode.levels[depth]
        # In place: these arrays are large, and new ones cost more than the arithmetic.
        gva = (at & (level.nr_entries - 1)).astype(np.uint64)
        gva <<= np.uint64(level.shift)
        gva += base
        if depth == 0:  # the root's entries say which half of the address space this is
            top = 1 << (self.mode.va_bits - 1)
            gva[(gva & np.uint64(top)) != 0] |= np.uint64(self.mode.extend(top))
        return gva

    def _keep(self, depth: int, gva: U64, entry: U64, granted: U64) -> None:
        """Keep leaves of one level, so many as there is room for."""
        if len(gva) > self.room:
            self.truncated = True
            gva = gva[: self.room]
            entry = entry[: self.room]
            granted = granted[: self.room]
        self.room -= len(gva)
        if not len(gva):
            return

        mode = self.mode
        size = mode.levels[depth].size
        rights = entry & np.uint64(~mode.inherit & MASK64)
        rights |= granted ^ np.uint64(mode.flip & mode.inherit)
        gpa = frames(mode.pa, entry)
        gpa &= np.uint64(-size & MASK64)
        self.leaves.append(
            Leaves(
                gva=gva,
                gpa=gpa,
                size=np.full(len(gva), size, np.uint64),
                entry=entry,
                rights=rights,
                level=np.full(len(gva), depth, np.uint8),
            )
        )


def _present(mode: PagingMode, level: Level, data: bytes) -> tuple[Indices, U64]:
    """Where in these tables the present entries stand, and the entries."""
    entries = np.frombuffer(data, mode.dtype).astype(np.uint64, copy=False)
    at = np.flatnonzero(match_all(mode.present_at(level), entries))
    return at, entries[at]
