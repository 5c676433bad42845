"""A set of page numbers kept as ranges (kernel: tools/testing/selftests/kvm/lib/sparsebit.c)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from labkit.errors import InvalidState

__all__ = ["Sparsebit"]


class Sparsebit:
    """Bits 0 .. 2^64-1, most of them in few long runs; `ranges()` gives the runs that are set."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # exclusive
        for start, count in ranges:
            self.set(start, count)

    def set(self, start: int, count: int = 1) -> None:
        """Set count bits from start on (sparsebit_set_num)."""
        self._check(start, count)
        end = start + count
        # The runs first..last-1 overlap the new one or touch it, and become one with it.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def clear(self, start: int, count: int = 1) -> None:
        """Clear count bits from start on (sparsebit_clear_num)."""
        self._check(start, count)
        end = start + count
        # The runs first..last-1 overlap; of the outermost ones something may be left.
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        starts = []
        ends = []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if end < self._ends[last - 1]:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def is_set(self, start: int, count: int = 1) -> bool:
        """Whether all of count bits from start on are set."""
        self._check(start, count)
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and start + count <= self._ends[index]

    def next_clear(self, start: int, count: int = 1) -> int:
        """The first of count clear bits in a row, not before start (sparsebit_next_clear_num)."""
        self._check(start, count)
        for index in range(bisect_right(self._ends, start), len(self._starts)):
            if start + count <= self._starts[index]:
                return start
            start = max(start, self._ends[index])
        return start

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(first bit, how many) of every run of set bits, in order."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def assign(self, other: Sparsebit) -> None:
        """Become what another one is."""
        self._starts = list(other._starts)
        self._ends = list(other._ends)

    def copy(self) -> Sparsebit:
        """An independent set of the same bits."""
        return Sparsebit(self.ranges())

    def __len__(self) -> int:
        return sum(count for _, count in self.ranges())

    def __contains__(self, bit: int) -> bool:
        return self.is_set(bit)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sparsebit):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{start:#x}+{count:#x}" for start, count in self.ranges())
        return f"<Sparsebit {len(self)} set: {shown or 'none'}>"

    @staticmethod
    def _check(start: int, count: int) -> None:
        if start < 0 or count < 1 or start + count > 1 << 64:
            raise InvalidState(
                f"bits {start:#x} to {start + count:#x} are not a range of a sparsebit",
                start=start,
                count=count,
            )
