"""The picture of a walk laid out: a column for each level of the format, and one for the page."""

from __future__ import annotations

from typing import NamedTuple

from labkit.arch.desc import Level
from labkit.views.drawing.cells import Lattice
from labkit.views.drawing.shapes import NARROW, WIDE

__all__ = ["COLS", "TOP", "Plan", "ramp", "size_name"]

TOP = 88  # where the tables begin, under the address
COLS = 16  # a row of entries is one hex digit
PITCHES = (10, 8, 7, 5.5, 4.5, 3.5)  # of an entry, in pixels; the largest is for wide pictures
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Plan(NamedTuple):
    """Where the columns are."""

    width: float
    pitch: float
    left: float
    page: float  # width of the page column
    gap: float  # between two columns

    @classmethod
    def of(cls, width: float, nr_levels: int) -> Plan:
        """The columns as large as the width allows, with room for the curves between them."""
        narrow, wide = width < NARROW, width > WIDE
        if narrow:
            left, page, least_gap = 10, 60, 18
        else:
            left, page, least_gap = 34, 190 if wide else 110, 30

        for pitch in PITCHES:  # where none fits, the last stays
            gap = (width - left - nr_levels * COLS * pitch - page) / nr_levels
            if gap >= least_gap and (wide or pitch < PITCHES[0]):
                break
        return cls(width, pitch, left, page, max(gap, 8))

    def x(self, column: int) -> float:
        """The left edge of a column."""
        return self.left + column * (self.table + self.gap)

    @property
    def table(self) -> float:
        """The width of a table."""
        return COLS * self.pitch

    @property
    def tall(self) -> float:
        """The height of a table, and of the page."""
        return 32 * self.pitch

    @property
    def narrow(self) -> bool:
        """Whether there is room for the shortest words only."""
        return self.width < NARROW

    def lattice(self, column: int, level: Level) -> Lattice:
        """The entries of the table in a column."""
        return Lattice(self.x(column), TOP, COLS, self.pitch, self.tall / level.nr_entries * COLS)


def ramp(level: Level) -> int:
    """The number of a level's grey, 1 to 5: the same for every format by what an entry covers."""
    return min(level.shift // 9, 5)


def size_name(size: int) -> str:
    """4096 as "4 KiB"."""
    unit = min((size.bit_length() - 1) // 10, 5)
    return f"{size >> 10 * unit} {UNITS[unit]}"
