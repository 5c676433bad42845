"""The words that hooks in machine code (stubs.py) and the run loop of one vCPU share: one block, made new by one copy."""

from __future__ import annotations

import ctypes
from array import array

__all__ = [
    "AGAIN",
    "BLOCK",
    "COUNT",
    "EXTRA",
    "GVA",
    "LIMIT",
    "LOCKED",
    "LOCKED_BLOCK",
    "LOCKED_GVA",
    "NOTHING",
    "REP",
    "STOPPED",
    "TALLY",
    "TOTAL",
    "Words",
]

REP, LOCKED, TALLY, _END = 0, 6, 10, 15  # where the words of each hook begin
_COUNTER, GVA, COUNT, EXTRA, _RCX, AGAIN = range(REP, LOCKED)
_, _LOCKED_COUNTER, LOCKED_GVA, LOCKED_BLOCK = range(
    LOCKED, TALLY
)  # LOCKED itself: the count at the last locked instruction
TOTAL, BLOCK, TABLE, LIMIT, STOPPED = range(TALLY, _END)
NOTHING = (1 << 64) - 1  # no instruction, at no count


class Words:
    """`words.all[TOTAL]` is one of them. GVA and COUNT are those of the last instruction that takes more than one count."""

    def __init__(self, table: int) -> None:
        raw = (ctypes.c_uint64 * _END)()
        self.address = ctypes.addressof(raw)
        self.all = memoryview(raw).cast("B").cast("Q")
        self._fresh = memoryview(array("Q", bytes(8 * _END)))
        self._fresh[GVA] = self._fresh[COUNT] = NOTHING
        self._fresh[TABLE] = table
        self.all[:] = self._fresh

    def at(self, word: int) -> int:
        """The host address of a word."""
        return self.address + 8 * word

    def count_at(self, counter: int) -> None:
        """Where in host memory the count of instructions is from now on."""
        for words in (self.all, self._fresh):
            words[_COUNTER] = words[_LOCKED_COUNTER] = counter

    def begin(self, limit: int) -> None:
        """A native run begins; the tally stops before a block that would go beyond limit."""
        words = self.all
        if words[COUNT]:
            words[:] = self._fresh
        else:  # the run before ended in the midst of an instruction
            words[EXTRA] = words[LOCKED] = words[TOTAL] = words[STOPPED] = 0
        words[LIMIT] = limit
