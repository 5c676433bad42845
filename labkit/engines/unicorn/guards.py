"""What guards a vCPU's code.

Hooks at sensitive instructions, found block by block, and at breakpoints.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from unicorn import unicorn_const as uc

from labkit.engines.disasm import branch_target, disassemble
from labkit.engines.unicorn.native.lib import (
    LIB,
    READ_REG,
    STOP,
    CodeHook,
    EdgeHook,
    Handle,
    Page,
    Tb,
)
from labkit.engines.unicorn.native.stubs import stub
from labkit.engines.unicorn.native.words import AGAIN, EXTRA, LOCKED, LOCKED_GVA, RCX, REP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from labkit.engines.unicorn.counting import Counting
    from labkit.engines.unicorn.ending import Ending
    from labkit.engines.unicorn.isa.check import Check
    from labkit.engines.unicorn.isa.core import Machine
    from labkit.engines.unicorn.isa.quirks import Quirks
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.memory import GuestMemory

__all__ = ["Guards"]


class Guards:
    """The hooks of one vCPU.

    A block is looked through when Unicorn translates it, before it runs for the first time. So code
    that the guest writes, jumps into the middle of or maps elsewhere is covered too. The
    translations of one page of gvas are always those of one page of gpas: when another lies there,
    all are dropped. `at_iret(gva)` is called before an IRET.
    """

    def __init__(
        self,
        handle: Handle,
        quirks: Quirks,
        memory: GuestMemory,
        counting: Counting,
        ending: Ending,
        at_iret: Callable[[int], None],
    ) -> None:
        self.handle, self.quirks, self.memory = handle, quirks, memory
        self.counting, self.ending, self.at_iret = counting, ending, at_iret
        self._words = counting.words
        self.traps: dict[int, Trap] = {}
        self.skip = -1  # the breakpoint that the run begins at
        self._passes = -1  # the sensitive instruction that is Unicorn's for once
        self.breakpoints: frozenset[int] = frozenset()

        self._hooked_breakpoints: frozenset[int] = frozenset()
        self._checks: list[object] = []
        self._hooks: dict[int, tuple[str, int]] = {}  # gva -> (what it does, hook)
        self._mapped: dict[int, int] = {}  # page of gvas -> page of gpas
        # gpa -> the page as it was when a block of it was last translated
        self._code_pages: dict[int, bytes] = {}

        # What the last block asks for
        self._found: Mapping[int, Trap] = {}
        self._stale: list[int] = []  # where hooks are that do not fit any more
        self._remapped = False
        # The last block that was translated, and the count when it has run
        self._newest = (-1, -1)
        self.restarted = -1  # where an instruction was begun anew in this native run
        self._strange = ""  # why the CPU's mode is none that we run

        self._know_a_block()
        edge = EdgeHook(lambda _h, tb, _before, _d: self._edge(tb.contents))
        self.handle.hook(uc.UC_HOOK_EDGE_GENERATED, edge)

    def _know_a_block(self) -> None:
        """Run two blocks of our own.

        Unicorn reports a new block only when it knows the one before.
        """
        page = Page(self.quirks.two_blocks)
        before = self.handle.context()
        self.handle.map(0, page.hva, 4096, uc.UC_PROT_ALL)
        self.handle.run(0, self.quirks.two_blocks_count)
        self.handle.unmap(0, 4096)
        self.handle.set_context(before)
        self.handle.flush_code()

    # --- what was translated

    def flush(self) -> None:
        """Forget every translation."""
        self.handle.flush_code()
        self._code_pages.clear()
        self._mapped.clear()
        self.counting.tally.forget()

    def has_code(self, gpa: int, size: int) -> bool:
        """Whether a block of these pages was translated."""
        first, last = gpa & -4096, gpa + size - 1
        return any(first <= page <= last for page in self._code_pages)

    def code_changed(self, vm: Machine) -> bool:
        """Whether a page with translated code is not what it was."""
        return any(vm.read(gpa, 4096) != seen for gpa, seen in self._code_pages.items())

    # --- a new block

    def _edge(self, tb: Tb) -> None:
        """A block was translated and has not run: stop when something must be done about it."""
        counting = self.counting
        if tb.icount == 1 and counting.begun() and self._is_restart(tb.pc):
            counting.begin_anew(tb.pc)
            self.restarted = tb.pc
        if self._look(tb.pc, tb.size, tb.icount):
            self.ending.by = "edge"
            LIB.uc_emu_stop(self.handle.h)

    def _is_restart(self, gva: int) -> bool:
        """An instruction that writes into its own block is begun anew, in a block of its own.

        It was counted, and did not run.
        """
        if self._was_begun_here(gva):
            return True
        if self.quirks.wants_short_block():
            return False
        tally = self.counting.tally
        for start, (_, data) in tally.blocks.items():
            if start <= gva < start + len(data):
                block = tally.offsets(start)
                if gva in block and block[gva] + 1 < len(block):
                    return True
        return False

    def _was_begun_here(self, gva: int) -> bool:
        """Whether the last instruction that was counted is the one at gva, which is about to run.

        So it is no other place from which the CPU came here. That can be said of a REP, whose hook
        saw RCX, of the first instruction of a run, and of the last one of a block that is new.
        """
        counting, words = self.counting, self._words.all
        begun = counting.begun()
        if counting.last == (gva, begun):
            return words[RCX] == self.quirks.read("rcx")
        is_first = begun == 1 and gva == self.handle.started_at
        if not is_first and not self._ends_newest(gva, begun):
            return False

        trap = self.traps.get(gva)
        if trap is not None and trap.kind == "rep":
            return False
        arch = self.memory.vm.arch
        insn = next(disassemble(arch, self.memory.fetch(gva, self.quirks.longest), gva), None)
        return insn is not None and branch_target(arch, insn) != gva

    def _ends_newest(self, gva: int, begun: int) -> bool:
        """Whether the newest block has just run, and ends with the instruction at gva."""
        block, end = self._newest
        return end == begun and gva == max(self.counting.tally.offsets(block), default=-1)

    def _look(self, gva: int, size: int, count: int) -> bool:
        """Look through a block of so many bytes and instructions.

        True when something must be done before it runs.
        """
        self._strange = self.quirks.strange_mode()
        data = self.memory.fetch(gva, size)
        for page in range(gva & -4096, gva + size, 4096):
            self._remapped |= self._note(page)
        self.counting.tally.add(gva, count, data)
        self._newest = gva, self.counting.begun() + count

        found = self.quirks.scan(data, gva)
        if self._passes in found:
            found = {at: trap for at, trap in found.items() if at != self._passes}
        self._found = found
        here = [(at, work) for at, (work, _) in self._hooks.items() if gva <= at < gva + size]
        self._stale = [at for at, work in here if work != _work(self._found.get(at))]
        if self._strange or self._stale or self._remapped:
            return True
        if not self._hooks.keys() >= self._found.keys():
            return True
        self.traps.update(self._found)
        return False

    def _note(self, page: int) -> bool:
        """Remember what a page of gvas is mapped to, and its contents.

        True when it was mapped to something else.
        """
        gpa = self.memory.translate(page, uc.UC_PROT_EXEC)
        if gpa is None:
            return False
        self._code_pages[gpa] = self.memory.vm.read(gpa, 4096)
        return self._mapped.setdefault(page, gpa) != gpa

    def install(self) -> str:
        """Do what the last block asked for, and have it translated again.

        Returns why it cannot be run at all, or "".
        """
        if self._strange:
            self.handle.flush_code()
            return self._strange

        if self._remapped:
            self._stale, self._remapped = list(self._hooks), False
            self.flush()
        for gva in self._stale:
            self._unhook(gva)
        self._stale = []

        for gva, trap in self._found.items():
            if gva not in self._hooks:
                self._hook(gva, trap)
        self.traps.update(self._found)
        return ""

    def forget_restarted(self) -> None:
        """Drop the block that Unicorn made for an instruction that it began anew.

        It would take that block another time without a word, and the count would be wrong.
        """
        self.handle.forget_code(self.restarted, 1)
        self.restarted = -1

    # --- hooks at sensitive instructions

    def add(self, trap: Trap) -> None:
        """One more sensitive instruction, in code that was looked through before."""
        if trap.gva in self._hooks:
            self.remove(trap.gva)
        self._hook(trap.gva, trap)
        self.traps[trap.gva] = trap

    def remove(self, gva: int) -> None:
        """That instruction may run in Unicorn again."""
        self._unhook(gva)
        self.handle.flush_code()

    @contextmanager
    def passing(self, trap: Trap) -> Iterator[None]:
        """In this block the instruction is Unicorn's, in code that is new meanwhile too."""
        self._passes = trap.gva
        self.remove(trap.gva)
        try:
            yield
        finally:
            self._passes = -1
            self.add(trap)

    def has_hook(self, gva: int) -> bool:
        """Whether Unicorn leaves its code at this instruction to call one of ours."""
        return gva in self._hooks or gva in self._hooked_breakpoints

    def is_shadow(self, gva: int) -> bool:
        """The instruction there keeps the single-step trap away until the one behind it has run."""
        trap = self.traps.get(gva)
        return trap is not None and trap.kind == "shadow"

    def _hook(self, gva: int, trap: Trap) -> None:
        callback, data = self._callback(trap)
        hook = self.handle.hook(uc.UC_HOOK_CODE, callback, gva, gva, data)
        self._hooks[gva] = _work(trap), hook
        self.handle.forget_code(gva, 1)

    def _callback(self, trap: Trap) -> tuple[Any, int | None]:
        """The hook of a sensitive instruction.

        A ctypes callback or the address of a C function, and its data.
        """
        if trap.check is not None:
            return self._checked(trap.check)
        if trap.kind == "locked":
            locked = stub("locked") or CodeHook(lambda _h, _a, _s, _d: self._at_locked())
            return locked, self._words.at(LOCKED)
        if trap.kind == "rep":
            rep = stub("rep")
            if rep is not None:
                return rep, self._words.at(REP)
        if trap.kind == "iret":
            return CodeHook(lambda _h, at, _s, _d: self.at_iret(at)), None
        if not trap.stops:
            return CodeHook(lambda _h, at, _s, _d: self._count_extra(at)), None
        return STOP, None

    def _checked(self, check: Check) -> tuple[Any, int | None]:
        """The hook of an instruction that is a trap only at times (`check` of stubs.c)."""
        code = stub("check")
        if code is None:
            return CodeHook(lambda h, _a, _s, _d: self._look_at(check) and LIB.uc_emu_stop(h)), None
        words = (ctypes.c_uint64 * 8)(  # struct check of stubs.c
            READ_REG,
            STOP,
            check.base,
            check.index,
            check.scale,
            check.segment,
            check.displacement,
            check.mask,
        )
        self._checks.append(words)  # for as long as translated code may call the hook
        return code, ctypes.addressof(words)

    def _look_at(self, check: Check) -> bool:
        """What `check` of stubs.c does."""
        read = self.handle.read
        total = check.displacement
        for register, scale in ((check.base, 1), (check.index, check.scale), (check.segment, 1)):
            if register:
                total += scale * read(register)
        return bool(total & check.mask)

    def _unhook(self, gva: int) -> None:
        self.handle.unhook(self._hooks.pop(gva)[1])
        self.handle.forget_code(gva, 1)
        self.traps.pop(gva, None)

    def _at_locked(self) -> None:
        """What `locked` of stubs.c does, where Unicorn counts."""
        self._words.all[LOCKED] = self.counting.begun()
        self._words.all[LOCKED_GVA] = 0

    def _count_extra(self, gva: int) -> None:
        """Correct the count at a REP string instruction or a stack-segment load.

        Unicorn counts one more there than the architecture steps.
        """
        count = self.counting.begun()
        again = self.counting.last == (gva, count - 1)
        self._words.all[AGAIN] = again
        if self.is_shadow(gva):
            if self.quirks.refuses(self.traps[gva]):
                self.ending.by = "refused"
                LIB.uc_emu_stop(self.handle.h)
                return
            self._words.all[EXTRA] += 1
        else:
            self._words.all[RCX] = self.quirks.read("rcx")
            if again and self.quirks.is_drained():
                self._words.all[EXTRA] += 1
        self.counting.last = gva, count

    # --- breakpoints

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        for gva in gvas - self._hooked_breakpoints:
            callback = CodeHook(lambda _h, at, _s, _d: self._at_breakpoint(at))
            self.handle.hook(uc.UC_HOOK_CODE, callback, gva, gva)
        self._hooked_breakpoints |= gvas
        self.breakpoints = gvas

    def _at_breakpoint(self, gva: int) -> None:
        trap = self.traps.get(gva)
        # The run loop sees to those that are traps too
        is_trap = trap is not None and trap.stops and trap.check is None
        if gva not in self.breakpoints or is_trap:
            return

        # A REP comes to its own breakpoint once, not at every iteration
        is_rep = trap is not None and trap.kind == "rep"
        if gva != self.skip and not (is_rep and self._came_round(gva)):
            self.ending.by = "breakpoint"
            LIB.uc_emu_stop(self.handle.h)
        self.skip = -1

    def _came_round(self, gva: int) -> bool:
        """Whether the REP there has just done an iteration.

        Its own hook may have run before this one, or not.
        """
        count = self.counting.begun()
        if self.counting.last == (gva, count):
            return self._words.all[AGAIN] != 0
        return self.counting.last == (gva, count - 1)


def _work(trap: Trap | None) -> str:
    """What the hook of a trap does."""
    if trap is None:
        return ""
    if trap.check is not None:
        return repr(trap.check)
    return "stop" if trap.stops else trap.kind
