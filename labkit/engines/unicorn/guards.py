"""What guards a vCPU's code: hooks at sensitive instructions, found block by block, and at breakpoints."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from unicorn import unicorn_const as uc

from labkit.engines.unicorn.blocks import is_memory_loop
from labkit.engines.unicorn.lib import LIB, STOP, CodeHook, EdgeHook
from labkit.engines.unicorn.stubs import stub

if TYPE_CHECKING:
    from labkit.engines.unicorn.traps import Trap
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["Guards"]


class Guards:
    """The hooks of one vCPU. A block is looked through when Unicorn translates it, before it runs for the first time."""

    def __init__(self, vcpu: UnicornVcpu) -> None:
        self.vcpu, self.handle = vcpu, vcpu.handle
        self.traps: dict[int, Trap] = {}
        self.code_pages: dict[int, bytes] = {}  # gpa -> as it was when a block of it was first translated
        self.stopped = ""  # who ended the native run: "edge", "breakpoint", or nobody here
        self.skip = -1  # the breakpoint that the run begins at
        self.extra = 0  # counted by Unicorn, but no step of the architecture
        self.last = (-1, -1)  # (gva, count) of the last instruction that takes more than one count
        self.locked = (ctypes.c_uint64 * 4)()  # as the "locked" hook of stubs.py wants it
        self.halt = ctypes.c_uint8()  # somebody wants an uncounted run to end
        self.breakpoints: frozenset[int] = frozenset()
        self._hooked_breakpoints: frozenset[int] = frozenset()
        self._hooks: dict[int, int] = {}  # gva -> hook
        self._new: dict[int, Trap] = {}
        self._loops: set[int] = set()  # blocks with a hook that looks at `halt`
        self._new_loop = -1
        self.handle.hook(uc.UC_HOOK_EDGE_GENERATED, EdgeHook(lambda _h, tb, _p, _d: self._edge(tb.contents)))

    def begin(self) -> None:
        """A native run begins."""
        self.stopped, self.extra, self.last = "", 0, (-1, -1)
        self.locked[0] = 0

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        for gva in gvas - self._hooked_breakpoints:
            self.handle.hook(uc.UC_HOOK_CODE, CodeHook(lambda _h, at, _s, _d: self._at_breakpoint(at)), gva, gva)
        self._hooked_breakpoints |= gvas
        self.breakpoints = gvas

    def _at_breakpoint(self, gva: int) -> None:
        if gva in self.breakpoints and gva != self.skip:
            self.stopped = "breakpoint"
            LIB.uc_emu_stop(self.handle.h)
        self.skip = -1

    def _edge(self, tb: Any) -> None:
        """A block was translated and has not run: stop when it holds a sensitive instruction that no hook guards yet."""
        if self._look(tb.pc, tb.size, tb.icount) or self.halt.value:
            self.stopped = "edge"
            LIB.uc_emu_stop(self.handle.h)

    def _look(self, gva: int, size: int, count: int) -> bool:
        """Look through a block of count instructions; 0 means that the block may end before size bytes do."""
        gpa = self.vcpu.translate(gva, uc.UC_PROT_EXEC)
        data = self.vcpu.vmem_read(gva, size)
        if gpa is None or data is None:
            return False
        if count:
            self.vcpu.tally.add(gva, count, data)
        page = gpa & -4096
        if page not in self.code_pages:
            self.code_pages[page] = self.vcpu.vm.read(page, 4096)
        found = self.vcpu.quirks.scan(data, gva, count > 0)
        for at in [at for at in self.traps if gva <= at < gva + size and at not in found]:
            del self.traps[at]  # the guest wrote other code there
        self._new = {at: trap for at, trap in found.items() if at not in self._hooks}
        self.traps.update({at: trap for at, trap in found.items() if at in self._hooks})
        if self.vcpu.mode == "free" and count and gva not in self._loops and is_memory_loop(self.vcpu.vm.arch, gva, data):
            self._loops.add(gva)
            callback = stub("flag") or CodeHook(lambda _h, _a, _s, _d: self._look_at_flag())
            self.handle.hook(uc.UC_HOOK_BLOCK, callback, gva, gva, ctypes.addressof(self.halt))
            self._new_loop = gva
            return True
        return bool(self._new)

    def _look_at_flag(self) -> None:
        if self.halt.value:
            LIB.uc_emu_stop(self.handle.h)

    def scan_ahead(self, pc: int) -> None:
        """Unicorn reports every translated block but the first of an engine's life: look at that one here."""
        if self._look(pc, 4096 - (pc & 4095), 0):
            self.install()

    def install(self) -> None:
        """Put hooks where the last block asked for them, and have it translated again."""
        if self._new_loop >= 0:
            self.handle.forget_code(self._new_loop, 1)
            self._new_loop = -1
        for gva, trap in self._new.items():
            callback: Any = STOP
            data = None
            if trap.kind == "locked":
                callback = stub("locked") or CodeHook(lambda _h, _a, _s, _d: self._at_locked())
                data = ctypes.addressof(self.locked)
            elif not trap.stops:
                callback = CodeHook(lambda _h, at, _s, _d: self._count_extra(at))
            self._hooks[gva] = self.handle.hook(uc.UC_HOOK_CODE, callback, gva, gva, data)
            self.handle.forget_code(gva, 1)
        self.traps.update(self._new)
        self._new = {}

    def _at_locked(self) -> None:
        self.locked[0], self.locked[2] = self.vcpu.counter.value, 0

    def _count_extra(self, gva: int) -> None:
        """At a REP string instruction or a stack-segment load: Unicorn counts one more than the architecture steps."""
        count = self.vcpu.count()
        if self.traps[gva].kind == "shadow" or (self.last == (gva, count - 1) and self.vcpu.quirks.is_drained()):
            self.extra += 1
        self.last = (gva, count)

    def drop_count_hooks(self) -> None:
        """From here on nothing is counted, so the hooks that correct the count on REP can go."""
        for gva in [gva for gva, trap in self.traps.items() if trap.kind == "rep"]:
            self.handle.unhook(self._hooks.pop(gva))
            del self.traps[gva]
