"""Counts instructions block by block, exactly, at nearly full speed.

Unicorn's own counting calls a hook at every instruction (50 M/s against 1400 M/s uncounted). A
block's instructions are known when it is translated, so a hook at its start adds them all; where a
run ends inside a block, the rest is taken off.
"""

from __future__ import annotations

import ctypes
import mmap

from labkit.engines.disasm import disassemble
from labkit.engines.unicorn.native.words import Words

__all__ = ["MAX_LIMIT", "Tally"]

SLOTS = 1 << 16  # where the hash of a gva leads
SPARE = 1 << 12  # slots behind them, for what comes after the last
FULL = SLOTS * 3 // 4  # blocks; then the table is begun anew
MAX_LIMIT = (1 << 63) - 1  # instructions in one native run
NEVER = 1 << 63  # a count that is over any limit


class Tally:
    """The counter of one vCPU, as the hook `tally` of stubs.c reads and writes it."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        # Slots of (gva + 1, count), of which the kernel backs those that are used
        self._memory = mmap.mmap(-1, 16 * (SLOTS + SPARE))
        self._table = memoryview(self._memory).cast("Q")
        self._used = 0
        self.words = Words(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        # gva -> (instructions, bytes), as last translated
        self.blocks: dict[int, tuple[int, bytes]] = {}
        self._offsets: dict[int, dict[int, int]] = {}
        # (block, gva in it) -> what `back` found
        self._back: dict[tuple[int, int], int] = {}
        # Where blocks of two lengths begin; they are left to Unicorn's own counting
        self._unsure: set[int] = set()

    def add(self, gva: int, count: int, data: bytes) -> None:
        """A block was translated.

        A shorter one too where the CPU wants to look up, as behind STI and MOV SS.
        """
        known, before = self.blocks.get(gva, (count, b""))
        self.blocks[gva] = (count, data)
        self._offsets.pop(gva, None)
        self._back.clear()
        if known != count and (before.startswith(data) or data.startswith(before)):
            self.doubt(gva)
        elif gva not in self._unsure:
            self._enter(gva, count)

    def doubt(self, gva: int) -> None:
        """Do not count the block at gva: one entry cannot be right for all of them."""
        self._unsure.add(gva)
        self._enter(gva, NEVER)

    def _enter(self, gva: int, count: int) -> None:
        at = self._slot(gva)
        if not self._table[at]:
            if self._used == FULL:
                self._memory[:] = bytes(len(self._memory))
                self._used = 0
                at = self._slot(gva)
            self._used += 1

        self._table[at], self._table[at + 1] = gva + 1, count

    def _slot(self, gva: int) -> int:
        """Which word of the table begins the slot of a block, or the empty one where it may go."""
        table, key = self._table, gva + 1
        at = 2 * ((gva ^ gva >> 16) % SLOTS)
        while table[at] not in (0, key):
            at += 2
        return at

    def knows(self, gva: int) -> bool:
        """See to it that the block at gva is in the table, which may have been begun anew.

        False when it cannot.
        """
        if gva not in self.blocks or gva in self._unsure:
            return False
        self._enter(gva, self.blocks[gva][0])
        return True

    def back(self, block: int, gva: int) -> int:
        """What to add (0 or less) to the total of a block just entered.

        The sum is the instructions run when the one at gva is about to. A gva behind the
        block means that its last one is the one that left.
        """
        found = self._back.get((block, gva))
        if found is None:
            count = self.blocks.get(block, (0, b""))[0]
            found = self._back[block, gva] = self.offsets(block).get(gva, count - 1) - count
        return found

    def offsets(self, gva: int) -> dict[int, int]:
        """The instructions of the block at gva: their own gvas, and how many are before them."""
        if gva not in self._offsets:
            data = self.blocks.get(gva, (0, b""))[1]
            insns = list(disassemble(self.arch, data, gva))
            self._offsets[gva] = {insn.gva: i for i, insn in enumerate(insns)}
            end = insns[-1].gva + insns[-1].size if insns else gva
            if end < gva + len(data):  # Unicorn sees an instruction where capstone sees none
                self._offsets[gva][end] = len(insns)
        return self._offsets[gva]

    def holds(self, gva: int) -> bool:
        """Whether an instruction of a block that was translated is at gva."""
        return any(
            start <= gva < start + len(data) and gva in self.offsets(start)
            for start, (_, data) in self.blocks.items()
        )

    def forget(self) -> None:
        """Every block was dropped.

        What the table says of one is true until it is translated anew.
        """
        self.blocks.clear()
        self._offsets.clear()
        self._back.clear()
        self._unsure.clear()
