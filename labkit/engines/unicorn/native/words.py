"""The words that hooks in machine code (stubs.c) and the run loop of one vCPU share.

They are one block, made new by one copy.
"""

from __future__ import annotations

import ctypes
from array import array

from unicorn.x86_const import UC_X86_REG_RCX

from labkit.engines.unicorn.native.lib import READ_REG, STOP

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
    "RCX",
    "REP",
    "STOPPED",
    "TALLY",
    "TOTAL",
    "Words",
]

# Where the words of each hook begin, each a struct of stubs.c
REP, LOCKED, TALLY, _END = 0, 8, 12, 18

# GVA and COUNT are those of the last instruction that takes more than one count
_COUNTER, GVA, COUNT, EXTRA, RCX, AGAIN, _READ_REG, _RCX_NUMBER = range(REP, LOCKED)

# LOCKED itself is the count at the last locked instruction
_, _LOCKED_COUNTER, LOCKED_GVA, LOCKED_BLOCK = range(LOCKED, TALLY)

TOTAL, BLOCK, _TABLE, LIMIT, STOPPED, _STOP = range(TALLY, _END)

NOTHING = (1 << 64) - 1  # no instruction, at no count


class Words:
    """`words.all[TOTAL]` is one of them."""

    def __init__(self, table: int) -> None:
        raw = (ctypes.c_uint64 * _END)()
        self.address = ctypes.addressof(raw)
        self.all = memoryview(raw).cast("B").cast("Q")

        self._fresh = memoryview(array("Q", bytes(8 * _END)))
        self._fresh[GVA] = self._fresh[COUNT] = NOTHING
        self._fresh[_READ_REG], self._fresh[_RCX_NUMBER] = READ_REG, UC_X86_REG_RCX
        self._fresh[_TABLE], self._fresh[_STOP] = table, STOP
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
