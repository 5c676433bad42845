"""Names for the addresses of one VM: symbols, fields of the pool, stacks, uses of pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from labkit.checked import whole
from labkit.errors import InvalidState
from labkit.guest.program import Program
from labkit.machine.memory import PAGE
from labkit.machine.vm import STACK_PAGES, Machine
from labkit.paging.entries import U64, Indices
from labkit.ucall.abi import (
    BITMAP_BYTES,
    HEADER_SIZE,
    NR_SLOTS,
    OFFSET_ARGS,
    OFFSET_BUFFER,
    OFFSET_HVA,
    UCALL_BUFFER_LEN,
    UCALL_MAX_ARGS,
    UCALL_SIZE,
)

if TYPE_CHECKING:
    from labkit.session.vm import Vm

__all__ = ["Names", "pool_field", "pool_offset"]

_POOL_FIELD = re.compile(
    r"in_use\[(?P<word>\d+)\]"
    r"|ucalls\[(?P<slot>\d+)\](\.(?P<field>cmd|buffer|hva|args)(\[(?P<arg>\d+)\])?)?"
)
_FIELDS = {"cmd": 0, "args": OFFSET_ARGS, "buffer": OFFSET_BUFFER, "hva": OFFSET_HVA}


def pool_field(offset: int) -> str:
    """What lies at a byte of struct ucall_header: "in_use[0]", "ucalls[3].args[1]"."""
    if offset < BITMAP_BYTES:
        return f"in_use[{offset // 8}]"

    index, inside = divmod(offset - BITMAP_BYTES, UCALL_SIZE)
    if inside == 0:
        return f"ucalls[{index}]"
    if inside < OFFSET_ARGS:
        field = "cmd"
    elif inside < OFFSET_BUFFER:
        field = f"args[{(inside - OFFSET_ARGS) // 8}]"
    elif inside < OFFSET_HVA:
        field = "buffer"
    else:
        field = "hva"
    return f"ucalls[{index}].{field}"


def pool_offset(place: str) -> int | None:
    """The byte of struct ucall_header that a name of `pool_field` means, or None for none."""
    found = _POOL_FIELD.fullmatch(place)
    if found is None:
        return None
    if found["word"]:
        offset = 8 * int(found["word"])
        return offset if offset < BITMAP_BYTES else None

    slot, argument = int(found["slot"]), int(found["arg"] or 0)
    is_array = found["field"] in ("args", "buffer")
    width, count = (8, UCALL_MAX_ARGS) if found["field"] == "args" else (1, UCALL_BUFFER_LEN)
    if slot >= NR_SLOTS or argument >= count or (found["arg"] and not is_array):
        return None
    offset = _FIELDS.get(found["field"], 0) + width * argument
    return BITMAP_BYTES + UCALL_SIZE * slot + offset


class Names:
    """What the addresses of a VM are called, and which addresses a name means."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    @property
    def _machine(self) -> Machine:
        return self._vm.machine

    def label(self, gva: int) -> str:
        """What lies at a gva, as briefly as possible; "" where nothing is mapped or nobody knows.

        A symbol, a field of the pool, a stack, or what the page was allocated for.
        """
        gpa = self._machine.space.walk(gva).gpa
        return "" if gpa is None else self._mapped_label(gva, gpa)

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        """`label` of many gvas at once, for a page table that maps them to these gpas.

        Only what may have a name of its own is looked up alone: the uses of pages are found by the
        thousand.
        """
        uses = self._machine.space.uses
        at = _holders(gpas, [(use.gpa, use.gpa + PAGE * use.nr_pages) for use in uses])
        kinds = np.array([*(use.kind for use in uses), ""], object)  # the last for -1: no use
        found: list[str] = kinds[at].tolist()

        has_own_name = _holders(gvas, self._named_gvas()) >= 0
        pool = self._vm.host_pool
        if pool is not None:
            has_own_name |= _holders(gpas, [(pool.gpa, pool.gpa + HEADER_SIZE)]) >= 0
        for index in np.flatnonzero(has_own_name).tolist():
            found[index] = self._mapped_label(int(gvas[index]), int(gpas[index]))
        return found

    def _named_gvas(self) -> list[tuple[int, int]]:
        """(first, end) of what has a name of its own: stacks, and the program with its symbols."""
        ranges = [(base, base + STACK_PAGES * PAGE) for base in self._machine.stacks]
        if self._vm.program is not None:
            ranges += [(segment.gva, segment.end) for segment in self._vm.program.segments]
        return ranges

    def _mapped_label(self, gva: int, gpa: int) -> str:
        """What lies at a gva that is mapped to gpa."""
        pool = self._vm.host_pool
        if pool is not None and 0 <= gpa - pool.gpa < HEADER_SIZE:
            return pool_field(gpa - pool.gpa)
        stack = self._machine.stack_of(gva)
        if stack is not None:
            return f"stack of vCPU {stack}"
        return self._symbol(gva) or self._use(gpa)

    def _symbol(self, gva: int) -> str:
        """The symbol that covers a gva, with the bytes into it: "ucall_alloc+0x2c"."""
        if self._vm.program is None:
            return ""
        found = self._vm.program.symbol_at(gva)
        if found is None:
            return ""
        symbol, offset = found
        return f"{symbol.name}+{offset:#x}" if offset else symbol.name

    def _use(self, gpa: int) -> str:
        """What the page at a gpa was allocated for."""
        for use in self._machine.space.uses:
            if use.gpa <= gpa < use.gpa + PAGE * use.nr_pages:
                return use.kind
        return ""

    def place(self, gva: int) -> str:
        """A gva as symbol+offset with its source line, for a sentence about code."""
        program = self._vm.program
        if program is None:
            return f"{gva:#x}"
        line = program.line_at(gva)
        where = f" ({line.file}:{line.line})" if line is not None else ""
        return program.describe(gva) + where

    def gva_of(self, place: str | int) -> int:
        """The gva of a symbol, a "file.c:12" (its first instruction), a field, or the gva itself.

        Fields are those of globals ("x.field[3]") and of the pool ("ucalls[3].cmd"); "f+0x10" is a
        place too. Raises SymbolNotFound with the names that come near, InvalidState for a line
        without code, and for what is neither a number nor text.
        """
        return self.places(place)[0]

    def places(self, place: str | int) -> Sequence[int]:
        """All gvas of a "file.c:12", else the one that `gva_of` gives; raises as it does."""
        if type(place) is int:
            return (place,)
        if not isinstance(place, str):
            return (whole(place, "a place"),)
        pool = self._vm.host_pool
        is_symbol = self._vm.program is not None and place in self._vm.program.symbols
        if pool is not None and not is_symbol:
            offset = pool_offset(place)
            if offset is not None:
                return (pool.gva + offset,)
        return self.program.places(place)

    @property
    def program(self) -> Program:
        """The program whose symbols they are; raises InvalidState for a VM without one."""
        if self._vm.program is None:
            raise InvalidState(f"{self._vm.name} has no program, so it has no symbols")
        return self._vm.program


def _holders(addresses: U64, ranges: Sequence[tuple[int, int]]) -> Indices:
    """For each address the index of the range (first, end) that it lies in, or -1.

    The ranges do not overlap.
    """
    if not ranges:
        return np.full(len(addresses), -1, np.intp)
    starts = np.array([start for start, _ in ranges], np.uint64)
    last = np.array([end - 1 for _, end in ranges], np.uint64)
    order = np.argsort(starts)
    at = np.searchsorted(starts[order], addresses, "right") - 1
    holder = order[at]
    return np.where((at >= 0) & (addresses <= last[holder]), holder, -1)
