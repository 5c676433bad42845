"""What an instruction will read, write and decide, as facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from labkit.errors import LabError

__all__ = ["MASK64", "Access", "Operands", "Read", "Regs", "TestedBit", "number_at"]

MASK64 = (1 << 64) - 1
Read = Callable[[int, int], bytes]  # read(gva, size); raises a LabError where nothing is mapped
Regs = Mapping[str, int]  # by name, each whole


@dataclass(frozen=True)
class Access:
    """One memory operand."""

    gva: int
    size: int  # bytes
    reads: bool
    writes: bool
    before: int | None  # None when the page tables do not map it
    after: int | None  # None when it is not written, or not known


class TestedBit(NamedTuple):
    """The bit of memory that an instruction of the BT family tests."""

    gva: int  # of the word that holds it
    bit: int  # in that word, from its lowest
    is_set: bool


@dataclass(frozen=True)
class Operands:
    """The instruction at the program counter, understood as far as a reader needs it."""

    accesses: tuple[Access, ...] = ()
    target: int | None = None  # of a direct jump or call
    taken: bool | None = None  # of a conditional jump
    bit: TestedBit | None = None  # of an instruction that tests one


def number_at(
    read: Read, gva: int, size: int, byteorder: Literal["little", "big"] = "little"
) -> int | None:
    """The number of `size` bytes at gva; None when nothing is mapped there."""
    try:
        return int.from_bytes(read(gva, size), byteorder)
    except LabError:
        return None
