"""Who counts the instructions of one native run, and what the count says of where it ended.

Two ways, of which one is on: "each" is Unicorn's own counter, a hook at every instruction; "tally"
adds whole blocks (native/tally.py). Blocks carry the hooks that were there when they were
translated, so a change from one to the other drops them all.

How far a native run may go is decided by the run loop (`_slice` of vcpu.py). Up to BY_EACH
instructions Unicorn counts each of them. Beyond, whole blocks are counted, and the run stops before
the block in which the budget ends: what is left then is less than BY_EACH. The first native run
looks up after FIRST_LOOK instructions, so that a short run pays nothing for Ctrl-C; whoever goes on
from there runs to the end of its budget, while a thread waits for SIGINT (interrupt.py) and calls
`stop`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.unicorn.native.calibrate import calibrate
from labkit.engines.unicorn.native.stubs import stub
from labkit.engines.unicorn.native.tally import Tally
from labkit.engines.unicorn.native.words import (
    BLOCK,
    COUNT,
    EXTRA,
    GVA,
    LIMIT,
    LOCKED,
    LOCKED_BLOCK,
    LOCKED_GVA,
    TALLY,
    TOTAL,
)

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.quirks import Quirks
    from labkit.engines.unicorn.native.lib import Handle

__all__ = ["Counting"]


class Counting:
    """The count of one vCPU's present native run. `words` are shared with hooks in machine code."""

    def __init__(self, handle: Handle, arch: str) -> None:
        self.handle = handle
        self.tally = Tally(arch)
        self.words = self.tally.words
        counter = handle.h + calibrate().counter
        self.counter = ctypes.c_uint64.from_address(counter)
        self._limit = ctypes.c_uint64.from_address(counter + 8)  # its neighbour in `uc_engine`
        self.mode = ""
        # Where the host's processor is another, Unicorn counts everything
        self._usual = "tally" if stub("tally") else "each"
        self.by_block = self._usual
        self._hook = 0

    def count_each(self, on: bool) -> None:
        """Let Unicorn count each instruction, however many there are."""
        self.by_block = "each" if on else self._usual

    def end_behind_this(self) -> None:
        """Let the present run end behind the instruction that is under way (of "each")."""
        self._limit.value = min(self._limit.value, self.counter.value)

    def stop(self) -> None:
        """End a run that is counted by blocks at the next one, from any thread."""
        self.words.all[LIMIT] = 0

    def change_over(self, mode: str, quirks: Quirks) -> None:
        """Count in this way from now on."""
        if self.mode == "tally":
            self.handle.unhook(self._hook)

        if mode == "tally":
            code = stub("tally")
            assert code is not None, "by_block says so"
            self._hook = self.handle.hook(uc.UC_HOOK_BLOCK, code, data=self.words.at(TALLY))
            self.words.count_at(self.words.at(TOTAL))
        else:
            self.words.count_at(ctypes.addressof(self.counter))

        self.mode = mode
        self.handle.flush_code()
        self.tally.forget()
        if mode == "tally":
            self._drop_counter(quirks)

    def _drop_counter(self, quirks: Quirks) -> None:
        """Get rid of Unicorn's counting hook, which it removes only when a run begins.

        With the hook it takes faults where counted code is no longer mapped.
        """
        trace = quirks.fault_trace
        fault = trace[0]() if trace else 0
        before = self.handle.context()

        self.words.begin(0)  # up to the first block, which does not run
        self.handle.run(quirks.pc())

        self.handle.flush_code()
        self.handle.set_context(before)
        if trace:
            trace[1](fault)

    # --- what it came to

    def begun(self) -> int:
        """Instructions that the run began."""
        if self.mode == "tally":
            return self.words.all[TOTAL]
        return self.counter.value

    def finished(self, pc: int) -> int:
        """Instructions that it finished, when it ended before or in the one at pc."""
        if self.mode == "tally":
            words = self.words.all
            return words[TOTAL] + self.tally.back(words[BLOCK], pc)
        return max(self.counter.value - 1, 0)

    def before(self, pc: int) -> int:
        """Instructions that it ran, when an exception came before the one at pc had begun."""
        if self.mode == "tally":
            words = self.words.all
            if pc in self.tally.offsets(words[BLOCK]):
                return self.finished(pc)
        return self.begun()

    def begin_anew(self, pc: int) -> None:
        """The instruction at pc was counted last and did not run: it will now, alone in a block.

        The present run ends behind it, or before it where whole blocks are counted.
        """
        if self.mode == "tally":
            self.words.all[TOTAL] = self.finished(pc)
            self.tally.doubt(pc)
        else:
            self.counter.value -= 1
            self._limit.value = min(self._limit.value, self.counter.value + 1)

    def ran_out(self) -> bool:
        """Whether Unicorn's own counter ended the run, before the instruction that it counted."""
        return self.mode == "each" and self.counter.value > self._limit.value

    @property
    def extra(self) -> int:
        """Counted by Unicorn in this run, but no step of the architecture."""
        return self.words.all[EXTRA]

    def locked(self) -> int:
        """The step, from the start of the run, of its last locked instruction, when it had one."""
        words = self.words.all
        count = words[LOCKED]
        if self.mode == "tally":
            count += self.tally.back(words[LOCKED_BLOCK], words[LOCKED_GVA]) + 1
        return count - words[EXTRA]

    @property
    def last(self) -> tuple[int, int]:
        """(gva, count) of the last instruction that takes more than one count."""
        return self.words.all[GVA], self.words.all[COUNT]

    @last.setter
    def last(self, value: tuple[int, int]) -> None:
        self.words.all[GVA], self.words.all[COUNT] = value
