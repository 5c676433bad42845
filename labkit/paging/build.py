"""Maps pages: writes page tables into guest memory, a table at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.arch.desc import NONE, Level, PagingMode
from labkit.bits import is_aligned
from labkit.errors import InvalidState
from labkit.paging.entries import U64, classify_all
from labkit.paging.walk import Kind, Read, classify

__all__ = ["PageTableBuilder", "Write"]

Write = Callable[[int, bytes], object]  # write(gpa, data)


@dataclass(frozen=True)
class _Run:
    """Neighbouring entries of one table, with what they hold now."""

    level: Level
    entry_gpa: int
    entries: U64


class _Place(NamedTuple):
    """Where following tables ended: an entry, and what it is."""

    level: Level
    entry_gpa: int
    kind: Kind


class PageTableBuilder:
    """Builds one address space; a call does all of its work or, with InvalidState, none of it.

    Upper entries are permissive (all rights), so that leaves alone decide, as in the kernel's
    virt_pg_map() except that they also grant user, for guests at CPL3. The caller flushes TLBs.

    `alloc_table(size)` gives the gpa of a new table of so many bytes. Without root_gpa a root table
    is made; with one (or a raw CR3) its tables are continued.
    """

    def __init__(
        self,
        read: Read,
        write: Write,
        alloc_table: Callable[[int], int],
        mode: PagingMode,
        root_gpa: int | None = None,
    ) -> None:
        self.read = read
        self.write = write
        self.alloc_table = alloc_table
        self.mode = mode
        if root_gpa is None:
            self.root_gpa = self._new_table(mode.levels[0])
        else:
            self.root_gpa = mode.root(root_gpa)

    def map(
        self,
        gva: int,
        gpa: int,
        nr_pages: int = 1,
        page_size: int = 4096,
        *,
        writable: bool = True,
        user: bool = False,
        nx: bool = False,
        **flags: bool,
    ) -> None:
        """Map nr_pages pages of page_size bytes from gva on to gpa on (virt_map, __virt_pg_map).

        Raises InvalidState when an address is not aligned or cannot exist, when any page is mapped
        already, and for a flag or a page size that the format lacks.
        """
        mode = self.mode
        level = self._leaf_level(page_size)
        self._check_range(gva, nr_pages * page_size, page_size)
        if gpa < 0 or not is_aligned(gpa, page_size):
            raise InvalidState(
                f"gpa {gpa:#x} is not aligned to the page size {page_size:#x}", gpa=gpa
            )
        mode.pa.put(gpa + (nr_pages - 1) * page_size)  # raises for a frame that is too high
        bits = mode.new_leaf(level, {"writable": writable, "user": user, "nx": nx, **flags})

        spans = list(self._spans(level, gva, nr_pages))
        free = [self._free_slot(level, start, count) for start, count in spans]
        # All tables first: with no memory left for one, nothing is mapped.
        slots = [
            self._slot(level, start) if slot is None else slot
            for slot, (start, _) in zip(free, spans, strict=True)
        ]
        for (start, count), slot in zip(spans, slots, strict=True):
            offsets = np.arange(count, dtype=np.uint64) * np.uint64(page_size)
            frames = gpa + (start - gva) + offsets
            self._store(slot, _shifted(frames, mode.pa.shift) | np.uint64(bits))

    def unmap(self, gva: int, nr_pages: int = 1) -> None:
        """Clear the leaves of nr_pages smallest pages from gva on.

        Raises InvalidState at a hole or half a huge page.
        """
        for run in self._mapped(gva, nr_pages):
            self._store(run.entry_gpa, np.full_like(run.entries, run.level.empty))

    def protect(self, gva: int, nr_pages: int = 1, **flags: bool) -> None:
        """Set or clear the named flags (writable=False, c=True) on nr_pages smallest pages.

        Other flags stay as they are. Raises InvalidState at a hole or half a huge page, and for a
        flag that the format lacks.
        """
        to_set, to_clear = self.mode.encode(flags)
        for run in self._mapped(gva, nr_pages):
            self._store(run.entry_gpa, (run.entries & ~np.uint64(to_clear)) | np.uint64(to_set))

    def _leaf_level(self, page_size: int) -> Level:
        for level in self.mode.levels:
            if level.leaf is not NONE and level.size == page_size:
                return level
        sizes = " ".join(f"{size:#x}" for size in self.mode.page_sizes)
        raise InvalidState(
            f"{self.mode.name} has no pages of {page_size:#x} bytes, only {sizes}",
            page_size=page_size,
        )

    def _check_range(self, gva: int, size: int, page_size: int) -> None:
        if size <= 0:
            raise InvalidState(f"gva {gva:#x}: wants at least one page", gva=gva)
        if not is_aligned(gva, page_size):
            raise InvalidState(
                f"gva {gva:#x} is not aligned to the page size {page_size:#x}", gva=gva
            )
        mode = self.mode
        last = gva + size - 1
        in_one_half = (gva ^ last) >> (mode.va_bits - 1) == 0
        if mode.canonical(gva) and mode.canonical(last) and in_one_half:
            return
        why = ""
        if not mode.signed and not mode.canonical(gva):
            why = ", whose table maps the lower half of the address space only"
        raise InvalidState(f"gva {gva:#x}..{last:#x} is not canonical in {mode.name}{why}", gva=gva)

    def _spans(self, level: Level, gva: int, nr_pages: int) -> Iterator[tuple[int, int]]:
        """Cut a range into (gva, number of entries), one per table of level."""
        while nr_pages:
            count = min(nr_pages, level.nr_entries - level.index(gva))
            yield gva, count
            gva += count * level.size
            nr_pages -= count

    def _descend(self, level: Level, gva: int) -> _Place:
        """Follow tables towards level, as far as there are any."""
        table = self.root_gpa
        for step in self.mode.levels:
            entry_gpa = table + step.index(gva) * self.mode.entry_size
            entry = self._load(entry_gpa)
            kind = classify(self.mode, step, entry)
            if step is level or kind != "table":
                break
            table = self.mode.next_table(step).get(entry)
        return _Place(step, entry_gpa, kind)

    def _free_slot(self, level: Level, gva: int, count: int) -> int | None:
        """The gpa of the first of count entries of one table; None where there is no table yet.

        Raises InvalidState when any of them maps something.
        """
        place = self._descend(level, gva)
        if place.level is not level:
            if place.kind == "hole":
                return None
            what = "is mapped already" if place.kind == "leaf" else "cannot be mapped"
            raise self._refusal(what, gva, place.level, place.entry_gpa)

        if count == 1 and place.kind == "hole":
            return place.entry_gpa
        entries = self._entries(place.entry_gpa, count)
        taken = np.flatnonzero(classify_all(self.mode, level, entries).present)
        if taken.size:
            first = int(taken[0])
            entry_gpa = place.entry_gpa + first * self.mode.entry_size
            raise self._refusal("is mapped already", gva + first * level.size, level, entry_gpa)
        return place.entry_gpa

    def _slot(self, level: Level, gva: int) -> int:
        """The gpa of the entry of level for gva; makes the tables above it."""
        while True:
            place = self._descend(level, gva)
            if place.level is level:
                return place.entry_gpa
            below = self.mode.levels[self.mode.levels.index(place.level) + 1]
            entry = self.mode.new_table(place.level, self._new_table(below))
            self.write(place.entry_gpa, entry.to_bytes(self.mode.entry_size, self.mode.byteorder))

    def _mapped(self, gva: int, nr_pages: int) -> list[_Run]:
        """The leaves of a range in runs; raises InvalidState before anything is changed."""
        bottom = self.mode.levels[-1]
        self._check_range(gva, nr_pages * bottom.size, bottom.size)
        runs = []
        end = gva + nr_pages * bottom.size
        while gva < end:
            run = self._mapped_run(gva, end)
            runs.append(run)
            gva += len(run.entries) * run.level.size
        return runs

    def _mapped_run(self, gva: int, end: int) -> _Run:
        """The leaves of one table from gva on, up to its end, the range's, or the first hole."""
        level, entry_gpa, kind = self._descend(self.mode.levels[-1], gva)
        if kind != "leaf":
            raise self._refusal("is not mapped", gva, level, entry_gpa)
        if not is_aligned(gva, level.size) or end - gva < level.size:
            raise self._refusal(
                f"is part of a page of {level.size:#x} bytes", gva, level, entry_gpa
            )
        most = min((end - gva) // level.size, level.nr_entries - level.index(gva))
        entries = self._entries(entry_gpa, most)
        leaf = classify_all(self.mode, level, entries).leaf
        count = len(entries) if leaf.all() else int(leaf.argmin())
        return _Run(level, entry_gpa, entries[:count])

    def _refusal(self, what: str, gva: int, level: Level, entry_gpa: int) -> InvalidState:
        """The error that names the entry which is in the way."""
        entry = self._load(entry_gpa)
        where = f"{level}[{level.index(gva):#x}] at gpa {entry_gpa:#x}"
        return InvalidState(
            f"gva {gva:#x} {what}: {where} is {entry:#x}", gva=gva, entry=entry, entry_gpa=entry_gpa
        )

    def _new_table(self, level: Level) -> int:
        """The gpa of a new table of this level that maps nothing."""
        table = self.alloc_table(level.table_size)
        empty = level.empty.to_bytes(self.mode.entry_size, self.mode.byteorder)
        self.write(table, empty * level.nr_entries)
        return table

    def _load(self, entry_gpa: int) -> int:
        return int.from_bytes(self.read(entry_gpa, self.mode.entry_size), self.mode.byteorder)

    def _entries(self, entry_gpa: int, count: int) -> U64:
        data = self.read(entry_gpa, count * self.mode.entry_size)
        return np.frombuffer(data, self.mode.dtype).astype(np.uint64)

    def _store(self, entry_gpa: int, entries: U64) -> None:
        self.write(entry_gpa, entries.astype(self.mode.dtype).tobytes())


def _shifted(frames: U64, shift: int) -> U64:
    """Field.put() for many frames that fit."""
    if shift >= 0:
        return frames << np.uint64(shift)
    return frames >> np.uint64(-shift)
