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
        i, j = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if i < j:
            start, end = min(start, self._starts[i]), max(end, self._ends[j - 1])
        self._starts[i:j], self._ends[i:j] = [start], [end]

    def clear(self, start: int, count: int = 1) -> None:
        """Clear count bits from start on (sparsebit_clear_num)."""
        self._check(start, count)
        end = start + count
        i, j = bisect_right(self._ends, start), bisect_left(self._starts, end)
        keep = (
            [(s, e) for s, e in ((self._starts[i], start), (end, self._ends[j - 1])) if s < e]
            if i < j
            else []
        )
        self._starts[i:j], self._ends[i:j] = [s for s, _ in keep], [e for _, e in keep]

    def is_set(self, start: int, count: int = 1) -> bool:
        """Whether all of count bits from start on are set."""
        self._check(start, count)
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and start + count <= self._ends[i]

    def next_clear(self, start: int, count: int = 1) -> int:
        """The first of count clear bits in a row, not before start (sparsebit_next_clear_num)."""
        self._check(start, count)
        for i in range(bisect_right(self._ends, start), len(self._starts)):
            if start + count <= self._starts[i]:
                return start
            start = max(start, self._ends[i])
        return start

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(first bit, how many) of every run of set bits, in order."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def assign(self, other: Sparsebit) -> None:
        """Become what another one is."""
        self._starts, self._ends = list(other._starts), list(other._ends)

    def copy(self) -> Sparsebit:
        """An independent set of the same bits."""
        return Sparsebit(self.ranges())

    def __len__(self) -> int:
        return sum(count for _, count in self.ranges())

    def __contains__(self, bit: int) -> bool:
        return self.is_set(bit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sparsebit) and (self._starts, self._ends) == (
            other._starts,
            other._ends,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Sparsebit {len(self)} set: {', '.join(f'{s:#x}+{n:#x}' for s, n in self.ranges()) or 'none'}>"

    @staticmethod
    def _check(start: int, count: int) -> None:
        if start < 0 or count < 1 or start + count > 1 << 64:
            raise InvalidState(
                f"bits {start:#x} to {start + count:#x} are not a range of a sparsebit",
                start=start,
                count=count,
            )
