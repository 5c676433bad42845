"""Memory cut wherever anything changes that an encryption map tells: all with arrays, for speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.look.encryption import PageState, PageStates
from labkit.look.snapshots import MemoryRange
from labkit.machine.memory import PAGE
from labkit.paging.entries import U64, Bools, runs
from labkit.paging.scan import PageTable

__all__ = ["Segment", "cut_memory"]

MASK64 = (1 << 64) - 1
# "Mapped nowhere" in arrays of gva - gpa: never the difference of two pages.
NOWHERE = 1
Ints = NDArray[np.int64]


class Segment(NamedTuple):
    """Neighbouring pages of one memslot of which everything here is true."""

    gpa: int
    nr_pages: int
    memory: PageState
    use: int  # index of the use of memory, -1: free
    is_walked: bool  # it is a page table
    nr_encrypted: int  # how often it is mapped as encrypted
    nr_shared: int
    gva_encrypted: int | None  # the lowest gva that maps its first page as encrypted
    gva_shared: int | None


def cut_memory(
    table: PageTable, slots: Sequence[PageStates], uses: Sequence[MemoryRange]
) -> Iterator[Segment]:
    """The memslots as segments, by gpa, each as long as it can be.

    slots: by gpa, none inside another. uses: what memory is for; where two overlap the later one
    counts.
    """
    spans = _spans(table)
    walked = np.array(sorted(gpa for gpa, data in table.tables.items() if data), np.uint64)
    edges = _edges(spans, walked, slots, uses)
    columns = _Columns(
        slot=_slot_indices(edges, slots),
        memory=_memory_states(edges, slots),
        use=_use_indices(edges, uses),
        is_walked=np.isin(edges[:-1], walked),
        encrypted=_mapped(edges, spans, True),
        shared=_mapped(edges, spans, False),
    )
    return columns.segments(edges)


# --- where to cut


class _Spans(NamedTuple):
    """Runs of leaves whose gva and gpa run on together, by gva; an element each."""

    start: U64  # gpa
    end: U64  # gpa behind it
    gva: U64  # of the start
    secret: Bools  # whether the leaves say encrypted


def _spans(table: PageTable) -> _Spans:
    secret = table.flag("c")
    first, last = runs(table.gva, table.size, (table.gpa,), (secret,))
    return _Spans(
        start=table.gpa[first],
        end=table.gpa[last] + table.size[last],
        gva=table.gva[first],
        secret=secret[first],
    )


def _edges(
    spans: _Spans, walked: U64, slots: Sequence[PageStates], uses: Sequence[MemoryRange]
) -> U64:
    """Every gpa at which anything begins or ends, ascending: a segment lies between two."""
    edges = [spans.start, spans.end, walked, walked + np.uint64(PAGE)]
    for slot in slots:
        changes = np.flatnonzero(np.diff(slot.states)) + 1
        pages = np.concatenate([[0], changes, [len(slot.states)]])
        edges.append((pages * PAGE + slot.gpa).astype(np.uint64))
    edges.append(np.array([use.gpa for use in uses], np.uint64))
    edges.append(np.array([use.end for use in uses], np.uint64))
    return np.unique(np.concatenate(edges))


# --- what is true between two edges


def _slot_indices(edges: U64, slots: Sequence[PageStates]) -> Ints:
    """The index of the memslot that each segment lies in, -1 for none."""
    indices = np.full(_nr_segments(edges), -1)
    for index, slot in enumerate(slots):
        low, high = np.searchsorted(edges, np.array([slot.gpa, slot.end], np.uint64))
        indices[low:high] = index
    return indices


def _memory_states(edges: U64, slots: Sequence[PageStates]) -> NDArray[np.uint8]:
    """The PageState of each segment, 0 outside the memslots."""
    states = np.zeros(_nr_segments(edges), np.uint8)
    for slot in slots:
        low, high = np.searchsorted(edges, np.array([slot.gpa, slot.end], np.uint64))
        pages = (edges[low:high] - np.uint64(slot.gpa)) // np.uint64(PAGE)
        states[low:high] = slot.states[pages]
    return states


def _use_indices(edges: U64, uses: Sequence[MemoryRange]) -> Ints:
    """The index of the use that each segment has, -1 for none."""
    indices = np.full(_nr_segments(edges), -1)
    lows = np.searchsorted(edges, np.array([use.gpa for use in uses], np.uint64))
    highs = np.searchsorted(edges, np.array([use.end for use in uses], np.uint64))
    for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
        indices[low:high] = index
    return indices


def _nr_segments(edges: U64) -> int:
    return max(len(edges) - 1, 0)


class _Mapped(NamedTuple):
    """Segments as the page tables map them one way, as encrypted or as shared."""

    nr: Ints  # how often
    shift: U64  # the lowest gva minus its gpa, modulo 2^64; NOWHERE


def _mapped(edges: U64, spans: _Spans, secret: bool) -> _Mapped:
    mine = spans.secret == secret
    low = np.searchsorted(edges, spans.start[mine])
    high = np.searchsorted(edges, spans.end[mine])
    shifts = spans.gva[mine] - spans.start[mine]

    # A span counts from where it begins to where it ends: sum up the steps.
    steps = np.zeros(len(edges), np.int64)
    np.add.at(steps, low, 1)
    np.add.at(steps, high, -1)

    # gvas ascend: of equal spans the first is the lowest, and where spans overlap it comes last,
    # over those that are higher. Tables that point to themselves have 100 000 equal spans.
    shift = np.full(_nr_segments(edges), NOWHERE, np.uint64)
    _, firsts = np.unique(np.stack([low, high]), axis=1, return_index=True)
    for span in sorted(firsts.tolist(), reverse=True):
        shift[low[span] : high[span]] = shifts[span]
    return _Mapped(np.cumsum(steps)[:-1], shift)


# --- neighbours of which all is equal


@dataclass(frozen=True)
class _Columns:
    """What is true of each segment, an element each."""

    slot: Ints
    memory: NDArray[np.uint8]
    use: Ints
    is_walked: Bools
    encrypted: _Mapped
    shared: _Mapped

    def segments(self, edges: U64) -> Iterator[Segment]:
        """Those of a memslot, with equal neighbours joined."""
        first = np.flatnonzero(self._differs())
        starts = edges[first]
        ends = edges[np.append(first[1:], len(self.slot))]
        kept = self.slot[first] >= 0
        first, starts, ends = first[kept], starts[kept], ends[kept]
        rows = zip(
            starts.tolist(),
            ((ends - starts) // np.uint64(PAGE)).tolist(),
            self.memory[first].tolist(),
            self.use[first].tolist(),
            self.is_walked[first].tolist(),
            self.encrypted.nr[first].tolist(),
            self.shared.nr[first].tolist(),
            self.encrypted.shift[first].tolist(),
            self.shared.shift[first].tolist(),
            strict=True,
        )
        for gpa, nr_pages, memory, use, is_walked, nr_encrypted, nr_shared, secret, shared in rows:
            yield Segment(
                gpa=gpa,
                nr_pages=nr_pages,
                memory=PageState(memory),
                use=use,
                is_walked=is_walked,
                nr_encrypted=nr_encrypted,
                nr_shared=nr_shared,
                gva_encrypted=_gva(gpa, secret),
                gva_shared=_gva(gpa, shared),
            )

    def _differs(self) -> Bools:
        """Where a segment is not like the one before it; the first never is."""
        differs = np.ones(len(self.slot), bool)
        columns: tuple[NDArray[np.generic], ...] = (
            self.slot,
            self.memory,
            self.use,
            self.is_walked,
            *self.encrypted,
            *self.shared,
        )
        differs[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        return differs


def _gva(gpa: int, shift: int) -> int | None:
    if shift == NOWHERE:
        return None
    return (gpa + shift) & MASK64
