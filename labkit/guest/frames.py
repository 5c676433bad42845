"""Where a function keeps its caller's registers: the call frame information of a program.

Read from .debug_frame, and from .eh_frame where there is none (DWARF 4 section 6.4; a kernel
selftest has the latter). What is broken in it is left out: the file is not trusted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from elftools.dwarf.callframe import FDE

from labkit.guest.sections import debug_info

__all__ = ["FrameRule", "FrameTable"]

MAX_FUNCTIONS = 100_000


@dataclass(frozen=True)
class FrameRule:
    """How to find the caller's frame from an instruction: DWARF register numbers and bytes.

    The canonical frame address (CFA) is a register plus an offset; `saved` says at which offset
    from it a register of the caller lies. The return address is in the register `returns`.
    """

    cfa_register: int
    cfa_offset: int
    saved: Mapping[int, int]
    returns: int


class FrameTable:
    """The rules of all functions of a program, by gva."""

    def __init__(self, image: bytes) -> None:
        functions: dict[int, FDE] = {}
        with suppress(Exception):  # pyelftools on hostile bytes: then there is no call frame info
            for fde in islice(_functions(image), MAX_FUNCTIONS):
                functions[int(fde.header["initial_location"])] = fde
        self._starts = sorted(functions)
        self._functions = functions

    def rule(self, gva: int) -> FrameRule | None:
        """The rule at an instruction; None where no call frame information covers it."""
        at = bisect_right(self._starts, gva) - 1
        if at < 0:
            return None
        start = self._starts[at]
        fde = self._functions[start]
        with suppress(Exception):  # as above
            if gva < start + int(fde.header["address_range"]):
                return _rule(fde, gva)
        return None


def _functions(image: bytes) -> list[FDE]:
    dwarf = debug_info(image)
    if dwarf is None:
        return []
    entries: list[Any] = []
    if dwarf.has_CFI():
        entries = dwarf.CFI_entries()
    elif dwarf.has_EH_CFI():
        entries = dwarf.EH_CFI_entries()
    return [entry for entry in entries if isinstance(entry, FDE)]


def _rule(fde: FDE, gva: int) -> FrameRule | None:
    """The last row of a function's table that begins at or before gva."""
    found = None
    for row in fde.get_decoded().table:
        if row["pc"] > gva:
            break
        found = row
    if found is None or found["cfa"].reg is None:  # a CFA by expression: of PLTs, not of guests
        return None
    saved = {
        number: int(rule.arg)
        for number, rule in found.items()
        if isinstance(number, int) and rule.type == "OFFSET"
    }
    cfa = found["cfa"]
    if fde.cie is None:
        return None
    returns = int(fde.cie["return_address_register"])
    return FrameRule(int(cfa.reg), int(cfa.offset), saved, returns)
