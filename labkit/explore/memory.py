"""Where two runs left other bytes in memory: words of 8 bytes, told apart by what they are.

A word of a page table is an entry; all others are told page by page.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.explore.comparison import Difference
from labkit.explore.sides import NO_GPA, Pair, Side
from labkit.explore.tolerance import AHEAD, HOST, TIME, is_read_ahead
from labkit.machine.memory import PAGE

__all__ = ["Words", "of_memory", "unlike_words"]

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]

PAGE_MASK = ~np.uint64(PAGE - 1)


class Words(NamedTuple):
    """Words that differ between two sides: arrays with an element per word.

    gpas says where; one and other are the two values; is_host whether both are host addresses that
    mean the same gpa.
    """

    gpas: U64
    one: U64
    other: U64
    is_host: Bools

    def where(self, chosen: Bools) -> Words:
        """Those of them that are chosen."""
        return Words(self.gpas[chosen], self.one[chosen], self.other[chosen], self.is_host[chosen])


def unlike_words(pair: Pair) -> Iterator[Words]:
    """The words that differ, memslot by memslot; none for memslots of another place or size."""
    one, other = pair.one, pair.other
    word = one.page_table.mode.dtype  # 8 bytes in the guests' byte order
    for slot, other_slot in zip(one.slots, other.slots, strict=False):
        if (slot.gpa, len(slot.data)) != (other_slot.gpa, len(other_slot.data)):
            continue
        stored = np.frombuffer(slot.data, word)
        other_stored = np.frombuffer(other_slot.data, word)
        at = np.flatnonzero(stored != other_stored)
        words = stored[at].astype(np.uint64)
        other_words = other_stored[at].astype(np.uint64)

        meant = one.gpas(words)
        is_host = (meant == other.gpas(other_words)) & (meant != NO_GPA)
        gpas = at.astype(np.uint64) * np.uint64(8) + np.uint64(slot.gpa)
        yield Words(gpas, words, other_words, is_host)


def of_memory(pair: Pair, timed: Collection[int]) -> Iterator[Difference]:
    """What two runs left otherwise in memory, with the cause for what is tolerated.

    timed has the gpas of words that are known to follow the clock.
    """
    shapes = _shape(pair.one), _shape(pair.other)
    if shapes[0] != shapes[1]:
        yield Difference("memory", "memslots", None, pair.names, shapes)

    timed_gpas = np.array(sorted(timed), np.uint64)
    for words in unlike_words(pair):
        follows = np.where(np.isin(words.gpas, timed_gpas), TIME, "")
        causes = np.where(words.is_host, HOST, follows)

        is_mine = pair.one.tables_of(words.gpas) != NO_GPA
        is_its = pair.other.tables_of(words.gpas) != NO_GPA
        is_entry = is_mine | is_its
        yield from _of_entries(pair, words.where(is_entry), causes[is_entry].tolist())
        for cause in sorted(set(causes[~is_entry].tolist())):
            yield from _of_pages(pair, words.where(~is_entry & (causes == cause)), cause)


def _shape(side: Side) -> str:
    """The memslots of a side, in words."""
    return ", ".join(f"{slot.gpa:#x}+{len(slot.data):#x}" for slot in side.slots)


def _of_entries(pair: Pair, words: Words, causes: list[str]) -> Iterator[Difference]:
    """A difference per page-table entry, with the cause for each that has one."""
    one, other = pair.one, pair.other
    is_mine = (one.tables_of(words.gpas) != NO_GPA).tolist()
    for at, gpa in enumerate(words.gpas.tolist()):
        entry, other_entry = int(words.one[at]), int(words.other[at])
        cause = causes[at]
        if not cause and is_read_ahead(pair, entry, other_entry):
            cause = AHEAD
        place = one.entry(gpa) if is_mine[at] else other.entry(gpa)
        values = _entry(one, entry), _entry(one, other_entry)
        yield Difference("page table", place, None, pair.names, values, cause)


def _entry(side: Side, entry: int) -> str:
    """A page-table entry in words."""
    mode = side.page_table.mode
    if not mode.present(entry):
        return f"not present ({entry:#x})"
    return f"gpa {mode.pa.get(entry):#x} P {mode.letters(entry)} ({entry:#x})"


def _of_pages(pair: Pair, words: Words, cause: str) -> Iterator[Difference]:
    """A difference per page: the bytes from the first that differs, with gpa, gva and symbol."""
    byteorder = pair.one.page_table.mode.byteorder
    _, firsts, counts = np.unique(words.gpas & PAGE_MASK, return_index=True, return_counts=True)
    for at, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        data = int(words.one[at]).to_bytes(8, byteorder)
        other_data = int(words.other[at]).to_bytes(8, byteorder)
        skip = next(i for i in range(8) if data[i] != other_data[i])

        place = pair.one.place(int(words.gpas[at]) + skip)
        if count > 1:
            place += f" and {count - 1} more words of its page"
        values = data[skip:].hex(" "), other_data[skip:].hex(" ")
        yield Difference("memory", place, None, pair.names, values, cause)
