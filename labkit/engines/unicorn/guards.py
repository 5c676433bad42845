"""What guards a vCPU's code: hooks at sensitive instructions, found block by block, and at breakpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unicorn import unicorn_const as uc

from labkit.engines.unicorn.native.lib import LIB, STOP, CodeHook, EdgeHook, Page, Tb
from labkit.engines.unicorn.native.stubs import stub
from labkit.engines.unicorn.native.words import AGAIN, COUNT, EXTRA, GVA, LOCKED, LOCKED_GVA, REP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labkit.engines.base import Exit
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["Guards"]


class Guards:
    """The hooks of one vCPU. A block is looked through when Unicorn translates it, before it runs for the first time.

    So code that the guest writes, jumps into the middle of or maps elsewhere is covered too. The translations of one page of gvas
    are always those of one page of gpas: when another lies there, all are dropped.
    """

    def __init__(self, vcpu: UnicornVcpu) -> None:
        self.vcpu, self.handle, self._words = vcpu, vcpu.handle, vcpu.words
        self.traps: dict[int, Trap] = {}
        self.code_pages: dict[
            int, bytes
        ] = {}  # gpa -> as it was when a block of it was last translated
        self.stopped = ""  # who ended the native run: "edge", "breakpoint", "hole", or nobody here
        self.skip = -1  # the breakpoint that the run begins at
        self._restarted = -1  # where an instruction was begun anew
        self._strange = ""  # why the CPU's mode is none that we run
        self.breakpoints: frozenset[int] = frozenset()
        self._hooked_breakpoints: frozenset[int] = frozenset()
        self._hooks: dict[int, tuple[str, int]] = {}  # gva -> (what it does, hook)
        self._mapped: dict[int, int] = {}  # page of gvas -> page of gpas
        self._found: Mapping[int, Trap] = {}  # in the last block, as are the next two
        self._stale: list[int] = []  # where hooks are that do not fit any more
        self._remapped = False
        self._know_a_block()
        self.handle.hook(
            uc.UC_HOOK_EDGE_GENERATED,
            EdgeHook(lambda _h, tb, _before, _d: self._edge(tb.contents)),
        )

    def _know_a_block(self) -> None:
        """Run two blocks of our own: Unicorn reports a new block only when it knows the one before."""
        page, before = Page(self.vcpu.quirks.two_blocks), self.handle.context()
        self.handle.map(0, page.hva, 4096, uc.UC_PROT_ALL)
        self.handle.run(0, self.vcpu.quirks.two_blocks_count)
        self.handle.unmap(0, 4096)
        self.handle.set_context(before)
        self.handle.flush_code()

    def extra(self) -> int:
        """Counted by Unicorn in this run, but no step of the architecture."""
        return self._words.all[EXTRA]

    @property
    def last(self) -> tuple[int, int]:
        """(gva, count) of the last instruction that takes more than one count."""
        return self._words.all[GVA], self._words.all[COUNT]

    @last.setter
    def last(self, value: tuple[int, int]) -> None:
        self._words.all[GVA], self._words.all[COUNT] = value

    def flush(self) -> None:
        """Forget every translation."""
        self.handle.flush_code()
        self.code_pages.clear()
        self._mapped.clear()
        self.vcpu.tally.forget()

    def read(self, gva: int, size: int) -> bytes:
        """Code as the CPU would fetch it, up to the first byte that it could not."""
        data = b""
        while len(data) < size:
            at = gva + len(data)
            gpa = self.vcpu.translate(at, uc.UC_PROT_EXEC)
            part = (
                b""
                if gpa is None
                else self.vcpu.vm.read(gpa, min(size - len(data), 4096 - (at & 4095)))
            )
            if not part:
                break
            data += part
        return data

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        for gva in gvas - self._hooked_breakpoints:
            self.handle.hook(
                uc.UC_HOOK_CODE, CodeHook(lambda _h, at, _s, _d: self._at_breakpoint(at)), gva, gva
            )
        self._hooked_breakpoints |= gvas
        self.breakpoints = gvas

    def _at_breakpoint(self, gva: int) -> None:
        trap, count = self.traps.get(gva), self.vcpu.count()
        if gva not in self.breakpoints or (
            trap is not None and trap.stops
        ):  # the run loop sees to those
            return
        again = self.last == (gva, count - 1) or (
            self.last == (gva, count) and self._words.all[AGAIN]
        )
        if gva != self.skip and not (again and trap is not None and trap.kind == "rep"):
            self.stopped = "breakpoint"
            LIB.uc_emu_stop(self.handle.h)
        self.skip = -1

    def _edge(self, tb: Tb) -> None:
        """A block was translated and has not run: stop when something must be done about it."""
        if tb.icount == 1 and self.vcpu.count() and self._is_restart(tb.pc):
            self._restarted = tb.pc
            self._words.all[EXTRA] += self.vcpu.count() - self.vcpu.before(tb.pc)
            self.vcpu.tally.doubt(tb.pc)
        if self._look(tb.pc, tb.size, tb.icount):
            self.stopped = "edge"
            LIB.uc_emu_stop(self.handle.h)

    def _is_restart(self, gva: int) -> bool:
        """An instruction that writes into its own block is begun anew, in a block of its own: it was counted, and did not run."""
        if self.vcpu.quirks.wants_short_block():
            return False
        tally = self.vcpu.tally
        around = (
            tally.offsets(start)
            for start, (_, data) in tally.blocks.items()
            if start <= gva < start + len(data)
        )
        return any(gva in block and block[gva] + 1 < len(block) for block in around)

    def _look(self, gva: int, size: int, count: int) -> bool:
        self._strange = self.vcpu.quirks.strange_mode()
        data = self.read(gva, size)
        for page in range(gva & -4096, gva + size, 4096):
            self._remapped |= self._note(page)
        self.vcpu.tally.add(gva, count, data)
        self._found = self.vcpu.quirks.scan(data, gva)
        here = [(at, work) for at, (work, _) in self._hooks.items() if gva <= at < gva + size]
        self._stale = [at for at, work in here if work != _work(self._found.get(at))]
        if self._strange or self._stale or self._remapped or self._restarted >= 0:
            return True
        if not self._hooks.keys() >= self._found.keys():
            return True
        self.traps.update(self._found)
        return False

    def _note(self, page: int) -> bool:
        """Remember what a page of gvas is mapped to, and its contents; True when it was mapped to something else."""
        gpa = self.vcpu.translate(page, uc.UC_PROT_EXEC)
        if gpa is None:
            return False
        self.code_pages[gpa] = self.vcpu.vm.read(gpa, 4096)
        return self._mapped.setdefault(page, gpa) != gpa

    def install(self) -> Exit | None:
        """Do what the last block asked for, and have it translated again; an exit when it cannot be run at all."""
        if self._strange:
            self.handle.flush_code()
            return self.vcpu.refuse(self._strange)
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
        if self._restarted >= 0:
            self.handle.forget_code(self._restarted, 1)
            self.vcpu.quirks.shorten_block()  # or it would begin anew for ever
            self._restarted = -1
        return None

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

    def _hook(self, gva: int, trap: Trap) -> None:
        callback: Any = STOP
        data = None
        if trap.kind == "locked":
            callback = stub("locked") or CodeHook(lambda _h, _a, _s, _d: self._at_locked())
            data = self._words.at(LOCKED)
        elif trap.kind == "rep" and (rep := stub("rep")) is not None:
            callback, data = rep, self._words.at(REP)
        elif trap.kind == "iret":
            callback = CodeHook(lambda _h, at, _s, _d: self._at_iret(at))
        elif not trap.stops:
            callback = CodeHook(lambda _h, at, _s, _d: self._count_extra(at))
        self._hooks[gva] = _work(trap), self.handle.hook(uc.UC_HOOK_CODE, callback, gva, gva, data)
        self.handle.forget_code(gva, 1)

    def has_hook(self, gva: int) -> bool:
        """Whether Unicorn leaves its code at this instruction to call one of ours."""
        return gva in self._hooks or gva in self._hooked_breakpoints

    def _unhook(self, gva: int) -> None:
        self.handle.unhook(self._hooks.pop(gva)[1])
        self.handle.forget_code(gva, 1)
        self.traps.pop(gva, None)

    def _at_locked(self) -> None:
        self._words.all[LOCKED], self._words.all[LOCKED_GVA] = self.vcpu.counter.value, 0

    def _at_iret(self, gva: int) -> None:
        self.vcpu.resumed = self.vcpu.insns + self.vcpu.before(gva) + 1 - self.extra()

    def _count_extra(self, gva: int) -> None:
        """At a REP string instruction or a stack-segment load: Unicorn counts one more than the architecture steps."""
        count = self.vcpu.count()
        self._words.all[AGAIN] = self.last == (gva, count - 1)
        if self.is_shadow(gva) or (self._words.all[AGAIN] and self.vcpu.quirks.is_drained()):
            self._words.all[EXTRA] += 1
        self.last = gva, count

    def is_shadow(self, gva: int) -> bool:
        """The instruction there keeps the single-step trap away until the one behind it has run."""
        trap = self.traps.get(gva)
        return trap is not None and trap.kind == "shadow"


def _work(trap: Trap | None) -> str:
    """What the hook of a trap does."""
    return "" if trap is None else "stop" if trap.stops else trap.kind
