"""Maps pages: writes page tables into guest memory, a table at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import NONE, Level, PagingMode
from labkit.bits import is_aligned
from labkit.errors import InvalidState
from labkit.paging.entries import classify_all
from labkit.paging.walk import Read, classify

__all__ = ["PageTableBuilder"]

Write = Callable[[int, bytes], object]


@dataclass(frozen=True)
class _Run:
    """Neighbouring entries of one table, with what they hold now."""

    level: Level
    gva: int
    entry_gpa: int
    entries: NDArray[np.uint64]


class PageTableBuilder:
    """Builds one address space; every call either does all of its work or, with InvalidState, none of it.

    Upper entries are permissive (all rights), so that leaves alone decide, as in the kernel's virt_pg_map()
    except that they also grant user, for guests at CPL3. The caller flushes TLBs.
    """

    def __init__(
        self,
        read: Read,
        write: Write,
        alloc_table: Callable[[int], int],
        mode: PagingMode,
        root_gpa: int | None = None,
    ) -> None:
        self.read, self.write, self.alloc_table, self.mode = read, write, alloc_table, mode
        self.root_gpa = self._new_table(mode.levels[0]) if root_gpa is None else mode.root(root_gpa)

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
        """Map nr_pages pages of page_size bytes from gva on to gpa on (kernel: virt_map, __virt_pg_map).

        Raises InvalidState when an address is not aligned or cannot exist, or when any page is mapped already.
        """
        mode = self.mode
        level = self._leaf_level(page_size)
        self._check_range(gva, nr_pages * page_size, page_size)
        if gpa < 0 or not is_aligned(gpa, page_size):
            raise InvalidState(
                f"gpa {gpa:#x} is not aligned to the page size {page_size:#x}", gpa=gpa
            )
        mode.pa.put(gpa + (nr_pages - 1) * page_size)
        bits = mode.new_leaf(level, {"writable": writable, "user": user, "nx": nx, **flags})
        spans = list(self._spans(level, gva, nr_pages))
        for start, count in spans:
            self._check_free(level, start, count)
        slots = [
            self._slot(level, start) for start, _ in spans
        ]  # with no memory left for a table, nothing is mapped
        for (start, count), slot in zip(spans, slots, strict=True):
            frames = gpa + (start - gva) + np.arange(count, dtype=np.uint64) * np.uint64(page_size)
            entries = _shifted(frames, mode.pa.shift) | np.uint64(bits)
            self._store(slot, entries)

    def unmap(self, gva: int, nr_pages: int = 1) -> None:
        """Clear the leaves of nr_pages smallest pages from gva on; raises InvalidState at a hole or half a huge page."""
        for run in self._mapped(gva, nr_pages):
            self._store(run.entry_gpa, np.full_like(run.entries, run.level.empty))

    def protect(self, gva: int, nr_pages: int = 1, **flags: bool) -> None:
        """Set or clear the named flags (writable=False, c=True) on mapped pages and leave the others as they are."""
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
        last = gva + size - 1
        if not (
            self.mode.canonical(gva)
            and self.mode.canonical(last)
            and (gva ^ last) >> (self.mode.va_bits - 1) == 0
        ):
            lower = (
                ""
                if self.mode.signed or self.mode.canonical(gva)
                else ", whose table maps the lower half of the address space only"
            )
            raise InvalidState(
                f"gva {gva:#x}..{last:#x} is not canonical in {self.mode.name}{lower}", gva=gva
            )

    def _spans(self, level: Level, gva: int, nr_pages: int) -> Iterator[tuple[int, int]]:
        """Cut a range into (gva, number of entries), one per table of level."""
        while nr_pages:
            count = min(nr_pages, level.nr_entries - level.index(gva))
            yield gva, count
            gva, nr_pages = gva + count * level.size, nr_pages - count

    def _descend(self, level: Level, gva: int) -> tuple[Level, int, str]:
        """Follow tables towards level: where the walk stops (level, gpa of the entry) and what that entry is."""
        table = self.root_gpa
        for step in self.mode.levels:
            entry_gpa = table + step.index(gva) * self.mode.entry_size
            entry = self._load(entry_gpa)
            kind = classify(self.mode, step, entry)
            if step is level or kind != "table":
                break
            table = self.mode.next_table(step).get(entry)
        return step, entry_gpa, kind

    def _check_free(self, level: Level, gva: int, count: int) -> None:
        step, entry_gpa, kind = self._descend(level, gva)
        if step is not level:
            if kind != "hole":
                raise self._refusal(
                    "is mapped already" if kind == "leaf" else "cannot be mapped",
                    gva,
                    step,
                    entry_gpa,
                )
            return
        entries = self._entries(entry_gpa, count)
        taken = np.flatnonzero(classify_all(self.mode, level, entries).present)
        if taken.size:
            first = int(taken[0])
            raise self._refusal(
                "is mapped already",
                gva + first * level.size,
                level,
                entry_gpa + first * self.mode.entry_size,
            )

    def _slot(self, level: Level, gva: int) -> int:
        """The gpa of the entry of level for gva; makes the tables above it."""
        while True:
            step, entry_gpa, _kind = self._descend(level, gva)
            if step is level:
                return entry_gpa
            below = self.mode.levels[self.mode.levels.index(step) + 1]
            entry = self.mode.new_table(step, self._new_table(below))
            self.write(entry_gpa, entry.to_bytes(self.mode.entry_size, self.mode.byteorder))

    def _mapped(self, gva: int, nr_pages: int) -> list[_Run]:
        """The leaves of a range in runs; raises InvalidState before anything is changed."""
        bottom = self.mode.levels[-1]
        self._check_range(gva, nr_pages * bottom.size, bottom.size)
        runs, end = [], gva + nr_pages * bottom.size
        while gva < end:
            level, entry_gpa, kind = self._descend(bottom, gva)
            if kind != "leaf":
                raise self._refusal("is not mapped", gva, level, entry_gpa)
            if not is_aligned(gva, level.size) or end - gva < level.size:
                raise self._refusal(
                    f"is part of a page of {level.size:#x} bytes", gva, level, entry_gpa
                )
            entries = self._entries(
                entry_gpa, min((end - gva) // level.size, level.nr_entries - level.index(gva))
            )
            leaf = classify_all(self.mode, level, entries).leaf
            count = len(entries) if leaf.all() else int(leaf.argmin())
            runs.append(_Run(level, gva, entry_gpa, entries[:count]))
            gva += count * level.size
        return runs

    def _refusal(self, what: str, gva: int, level: Level, entry_gpa: int) -> InvalidState:
        entry = self._load(entry_gpa)
        where = f"{level}[{level.index(gva):#x}] at gpa {entry_gpa:#x}"
        return InvalidState(
            f"gva {gva:#x} {what}: {where} is {entry:#x}", gva=gva, entry=entry, entry_gpa=entry_gpa
        )

    def _new_table(self, level: Level) -> int:
        table = self.alloc_table(level.table_size)
        self.write(
            table,
            level.empty.to_bytes(self.mode.entry_size, self.mode.byteorder) * level.nr_entries,
        )
        return table

    def _load(self, entry_gpa: int) -> int:
        return int.from_bytes(self.read(entry_gpa, self.mode.entry_size), self.mode.byteorder)

    def _entries(self, entry_gpa: int, count: int) -> NDArray[np.uint64]:
        data = self.read(entry_gpa, count * self.mode.entry_size)
        return np.frombuffer(data, self.mode.dtype).astype(np.uint64)

    def _store(self, entry_gpa: int, entries: NDArray[np.uint64]) -> None:
        self.write(entry_gpa, entries.astype(self.mode.dtype).tobytes())


def _shifted(frames: NDArray[np.uint64], shift: int) -> NDArray[np.uint64]:
    return frames << np.uint64(shift) if shift >= 0 else frames >> np.uint64(-shift)
