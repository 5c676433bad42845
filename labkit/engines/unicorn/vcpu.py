"""One vCPU on Unicorn: the run loop, the instruction count, and the traps that make runs exact."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from unicorn import unicorn_const as uc

from labkit.engines.base import BudgetExit, DebugExit, Exit, InternalErrorExit, InterruptExit, MmioExit, Regs, Trace
from labkit.engines.disasm import disassemble
from labkit.engines.unicorn.blocks import is_memory_loop, settle
from labkit.engines.unicorn.calibrate import calibrate
from labkit.engines.unicorn.lib import LIB, STOP, CodeHook, EdgeHook, Handle, IntrHook, MemHook
from labkit.engines.unicorn.stubs import stub
from labkit.engines.unicorn.tally import MAX_BLOCK, Tally
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.unicorn.traps import Trap
    from labkit.engines.unicorn.vm import UnicornVm

__all__ = ["COUNT_FOR", "Quirks", "UnicornVcpu", "budget_exit"]

SLICE = {"each": 1 << 20, "tally": 1 << 24}  # instructions after which a counted run looks up, some 15 ms: Ctrl-C, budget
COUNT_FOR = 1 << 22  # an unbounded run is counted exactly that far, then runs uncounted
BY_EACH = 4096  # budgets up to this are counted by Unicorn, an instruction at a time: changing over costs a translation
_FETCH = (uc.UC_MEM_FETCH_UNMAPPED, uc.UC_MEM_FETCH_PROT)
_WRITE = (uc.UC_MEM_WRITE_UNMAPPED, uc.UC_MEM_WRITE_PROT)
_UNMAPPED = (uc.UC_ERR_READ_UNMAPPED, uc.UC_ERR_WRITE_UNMAPPED, uc.UC_ERR_FETCH_UNMAPPED, uc.UC_ERR_READ_PROT, uc.UC_ERR_WRITE_PROT,
             uc.UC_ERR_FETCH_PROT)
_HEADER = struct.Struct("<4sI")


@cache
def budget_exit(insns: int) -> BudgetExit:
    """The one exit object for a budget: stepping makes one a step."""
    return BudgetExit(insns)


class Quirks(Protocol):
    """What one architecture adds to the run loop."""

    uc_arch: int
    uc_mode: int
    awaits: list[int] | None

    def pc(self) -> int: ...
    def leave(self) -> int: ...  # the program counter to run from; what was known of registers is void
    def arrive(self) -> int: ...  # the program counter after a run, and other registers that a trap will ask for
    def set_pc(self, gva: int) -> None: ...
    def scan(self, data: bytes, gva: int, whole: bool) -> dict[int, Trap]: ...
    def trap(self, trap: Trap) -> Exit | None: ...
    def exception(self, vector: int) -> Exit | None: ...
    def invalid(self) -> Exit | None: ...
    def complete(self, value: int) -> bool: ...
    def is_drained(self) -> bool: ...
    def is_fetch_fault(self, vector: int | None) -> bool: ...
    def read_all(self) -> Regs: ...
    def read(self, name: str) -> int: ...
    def write_many(self, regs: Mapping[str, int]) -> None: ...
    def extra_state(self) -> dict[str, object]: ...
    def set_extra_state(self, state: dict[str, object]) -> None: ...


class UnicornVcpu:
    """A vCPU whose sensitive instructions stop before they run and are carried out by the host, as under a VMM.

    Which instructions are sensitive is found block by block, when Unicorn translates a block for the first time: so code that
    the guest writes or jumps into the middle of is covered too. A hook at such an address is C's own `uc_emu_stop`.
    """

    def __init__(self, vm: UnicornVm, index: int, trace: Trace) -> None:
        self.vm, self.index, self.trace = vm, index, trace
        self.insns, self.exact = 0, True
        self.handle = Handle(vm.quirks.uc_arch, vm.quirks.uc_mode)
        self.counter = ctypes.c_uint64.from_address(self.handle.h + calibrate().counter)
        self.traps: dict[int, Trap] = {}
        self.code_pages: dict[int, bytes] = {}  # gpa -> as it was when last translated or checked
        self.stale_tlb = self.stale_code = False
        self._hooks: dict[int, int] = {}  # gva -> hook
        self._new: dict[int, Trap] = {}
        self._exception: int | None = None
        self._stopped = ""
        self._breakpoints: frozenset[int] = frozenset()
        self._guarded: frozenset[int] = frozenset()  # where a hook is, breakpoint or not
        self._skip = -1
        self._extra = 0  # counted by Unicorn, but no step of the architecture
        self._last = (-1, -1)  # (gva, count) of the last instruction that takes more than one count
        self._mmio: MmioExit | None = None
        self.tally = Tally(vm.arch)
        self._mode, self._tally_hook = "", 0
        self._locked = (ctypes.c_uint64 * 4)()  # as the "locked" hook wants it
        self.locked_at = -1
        self._new_loop = -1
        self._loops: set[int] = set()  # blocks with a hook that looks at `_halt`
        self._halt = ctypes.c_uint8()
        self._fresh, self._forced = True, False
        self.quirks = vm.quirks(self)
        self._hook_all()
        for gpa, hva, size in vm.slots:
            self.map(gpa, hva, size)

    # --- registers and state

    def get_regs(self) -> Regs:
        """All registers by their architectural names."""
        return self.quirks.read_all()

    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers; raises InvalidState for a name or a value that does not fit."""
        self._mmio = None if "rip" in regs else self._mmio
        self.quirks.write_many(regs)

    def read_reg(self, name: str) -> int:
        """One register."""
        return self.quirks.read(name)

    def save(self) -> bytes:
        """The whole CPU state: Unicorn's, and what labkit keeps beside it."""
        mmio = None if self._mmio is None else [self._mmio.gpa, self._mmio.size, self._mmio.data]
        facts = {"insns": self.insns, "exact": self.exact, "mmio": mmio, "extra": self.quirks.extra_state()}
        text = json.dumps(facts).encode()
        return _HEADER.pack(b"LKU1", len(text)) + text + self.handle.context()

    def restore(self, state: bytes) -> None:
        """Put a saved state back, bit for bit; raises InvalidState for bytes that are none."""
        if len(state) < _HEADER.size or state[:4] != b"LKU1":
            raise InvalidState("not a CPU state of the unicorn engine")
        size = _HEADER.unpack_from(state)[1]
        facts = json.loads(state[_HEADER.size:_HEADER.size + size])
        self.handle.set_context(state[_HEADER.size + size:])
        self.quirks.leave()
        self.insns, self.exact = facts["insns"], facts["exact"]
        self._mmio = None if facts["mmio"] is None else MmioExit(facts["mmio"][0], facts["mmio"][1], False, facts["mmio"][2])
        self.quirks.set_extra_state(facts["extra"])
        self.stale_tlb = self.stale_code = True

    def close(self) -> None:
        """Release the engine; a second call does nothing."""
        self.handle.close()

    # --- memory

    def map(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory."""
        self.handle.map(gpa, hva, size, uc.UC_PROT_ALL)

    def vmem_read(self, gva: int, size: int) -> bytes | None:
        """Guest-virtual memory as the CPU itself would translate it; None when it would fault."""
        buffer = ctypes.create_string_buffer(size)
        bad = LIB.uc_vmem_read(ctypes.c_void_p(self.handle.h), ctypes.c_uint64(gva), uc.UC_PROT_READ, buffer, ctypes.c_size_t(size))
        return None if bad else buffer.raw

    def vmem_write(self, gva: int, data: bytes) -> bool:
        """Write as the CPU itself would, permissions and dirty bits included; False when it would fault."""
        return not LIB.uc_vmem_write(ctypes.c_void_p(self.handle.h), ctypes.c_uint64(gva), uc.UC_PROT_WRITE, data,
                                     ctypes.c_size_t(len(data)))

    def translate(self, gva: int, access: int = uc.UC_PROT_READ) -> int | None:
        """The gpa behind a gva, None when the access would fault."""
        gpa = ctypes.c_uint64()
        bad = LIB.uc_vmem_translate(ctypes.c_void_p(self.handle.h), ctypes.c_uint64(gva), access, ctypes.byref(gpa))
        return None if bad else gpa.value

    def _sync(self) -> None:
        """Forget what the host, or another vCPU, changed since this vCPU last ran."""
        if self.vm.runner is not self:
            self.vm.runner = self
            if len(self.vm.vcpus) > 1 and any(self.vm.read(gpa, 4096) != seen for gpa, seen in self.code_pages.items()):
                self.stale_code = True
        if self.stale_code:
            self.handle.flush_code()
            self.code_pages.clear()
            self.tally.close()
            self._fresh = True
        if self.stale_tlb:
            self.handle.flush_tlb()
        self.stale_tlb = self.stale_code = False

    # --- running

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        for gva in gvas - self._guarded:
            self.handle.hook(uc.UC_HOOK_CODE, CodeHook(lambda _h, at, _s, _d: self._at_breakpoint(at)), gva, gva)
        self._guarded |= gvas
        self._breakpoints = gvas
        self.stale_code = True

    def complete(self, value: int) -> None:
        """Give the value that the last IN, MMIO read or hypercall returns."""
        if self._mmio is not None:
            self._mmio = MmioExit(self._mmio.gpa, self._mmio.size, False, value)
        elif not self.quirks.complete(value):
            raise InvalidState(f"vCPU {self.index}: the last exit reads nothing, so there is nothing to complete")

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""
        shield = self.vm.shield
        shield.enter(self.stop)
        try:
            return self._run(insns)
        finally:
            shield.running = False

    def stop(self) -> None:
        """Make an uncounted run return, from another thread; the caller repeats it until the run is over (see blocks.py)."""
        if self._halt.value:
            self._forced = True  # only a block that loops on itself without memory can still be running
            LIB.uc_emu_stop(self.handle.h)
            return
        self._halt.value = 1
        for gva in {gva & -4096 for gva in list(self.tally.blocks)}:
            self.handle.forget_code(gva, 4096)

    def _run(self, insns: int | None) -> Exit:
        if self.stale_tlb or self.stale_code or self.vm.runner is not self:
            self._sync()
        start, self.quirks.awaits, self._skip, self.locked_at = self.insns, None, self.quirks.pc(), -1
        if self._fresh:
            self._scan_ahead()
        if self._mmio is not None and (exit := self._finish_mmio()) is not None:
            return exit
        while True:
            left = None if insns is None else insns - (self.insns - start)
            if left is not None and left <= 0:
                return budget_exit(insns or 0)
            if (exit := self._slice(left, self.insns - start)) is not None:
                return exit
            if self.vm.shield.interrupted:
                return InterruptExit()

    def _slice(self, left: int | None, done: int) -> Exit | None:
        """One native run; None when the run goes on behind it. The mode says who counts: "each", "tally" or nobody ("free")."""
        if left is None and (not self.exact or done >= self.vm.count_for - MAX_BLOCK):
            return self._native("free", 0)
        mode = "each" if (left is not None and left <= BY_EACH) or stub("tally") is None else "tally"
        return self._native(mode, min(SLICE[mode], self.vm.count_for - done if left is None else left))

    def _native(self, mode: str, limit: int) -> Exit | None:
        if mode != self._mode:
            self._change_over(mode)
        self._stopped, self._extra, self._exception, self._last = "", 0, None, (-1, -1)
        self._locked[0] = 0
        self.tally.begin(limit)
        if mode == "free":
            status = self._run_uncounted()
        else:
            status = LIB.uc_emu_start(self.handle.h, self.quirks.leave(), 0, 0, limit if mode == "each" else 0)
        self._skip = -1
        if self._locked[0]:
            self.locked_at = self.vm.retired() + self._when_locked() - self._extra
        if self._stopped == "edge":
            self.insns += self._count() - self._extra
            self._install()
            return None
        if self._stopped or status or self._exception is not None:
            pc = self.quirks.arrive()
            fetch = self.quirks.is_fetch_fault(self._exception) or status in (uc.UC_ERR_FETCH_UNMAPPED, uc.UC_ERR_FETCH_PROT)
            self.insns += (self._count() if fetch else self._before(pc)) - self._extra
            return self._stop_reason(status)
        if mode == "each" and self.counter.value > limit:
            return self._budget(limit)
        pc = self.quirks.arrive()
        trap = self.traps.get(pc)
        if trap is not None and trap.stops and not self.tally.stopped:
            self.insns += self._before(pc) - self._extra
            return self.quirks.trap(trap)
        return self._between_blocks(pc, limit)

    def _between_blocks(self, pc: int, limit: int) -> Exit | None:
        """The run ended where a block begins: at the limit, at a block without entry, or because somebody asked."""
        ran = self._count()
        self.insns += ran - self._extra
        if not self.tally.stopped:
            return None
        if not self.tally.knows(pc):
            return self._native("each", 1)
        count = self.tally.blocks[pc][0]
        return self._native("each", limit - ran) if ran < limit < ran + count else None

    def _count(self) -> int:
        """Instructions that the last native run began."""
        return {"each": self.counter.value, "tally": self.tally.total, "free": 0}[self._mode]

    def _before(self, pc: int) -> int:
        """Instructions that it finished, when it ended before or in the one at pc."""
        if self._mode == "tally":
            return self.tally.before(pc)
        return max(self._count() - 1, 0)

    def _when_locked(self) -> int:
        total, _, gva, block = self._locked
        return self.tally.before(gva, total, block) + 1 if self._mode == "tally" else total

    def _change_over(self, mode: str) -> None:
        """Blocks carry the hooks that were there when they were translated, so they must go."""
        if self._mode == "tally":
            self.handle.unhook(self._tally_hook)
        if mode == "tally":
            code = stub("tally")
            assert code is not None
            self._tally_hook = self.handle.hook(uc.UC_HOOK_BLOCK, code, data=self.tally.address)
        self._locked[1] = self.tally.address if mode == "tally" else ctypes.addressof(self.counter)
        self._mode = mode
        if mode == "free":
            self._drop_count_hooks()
        self.handle.flush_code()

    def _run_uncounted(self) -> int:
        self._halt.value = self._forced = False
        with self.vm.shield.native():
            status: int = LIB.uc_emu_start(self.handle.h, self.quirks.leave(), 0, 0, 0)
        stopped = self._forced and not self._stopped and not status and self._exception is None
        if stopped and self.quirks.pc() not in self.traps:
            blocks = {gva: data for gva, (_count, data) in self.tally.blocks.items()}
            self.quirks.set_pc(settle(self.vm.arch, self.quirks.pc(), blocks))
        self._halt.value = 0
        return status

    def _drop_count_hooks(self) -> None:
        """From here on nothing is counted, so the hooks that correct the count on REP can go."""
        self.exact = False
        for gva in [gva for gva, trap in self.traps.items() if trap.kind == "rep"]:
            self.handle.unhook(self._hooks.pop(gva))
            del self.traps[gva]

    def _budget(self, limit: int) -> Exit | None:
        """The count is used up; an instruction that takes one count more than steps is brought to its end."""
        self.insns += limit - self._extra
        gva, at = self._last
        if at != limit:
            return None
        trap = self.traps.get(gva)
        if trap is None or not self._unfinished(trap, gva):
            return None
        before = self.insns + (trap.kind == "shadow")
        exit = self._native("each", 1)
        self.insns = before
        return exit

    def _unfinished(self, trap: Trap, gva: int) -> bool:
        """The instruction that just ran needs one more of Unicorn's counts: its step is not over."""
        return trap.kind == "shadow" or (self.quirks.pc() == gva and self.quirks.is_drained())

    def _stop_reason(self, status: int) -> Exit | None:
        pc = self.quirks.pc()
        if self._stopped == "breakpoint":
            return DebugExit(pc)
        if self._exception is not None:
            return self.quirks.exception(self._exception)
        if status in _UNMAPPED:
            return self._memory_fault(pc)
        if status == uc.UC_ERR_INSN_INVALID:
            return self.quirks.invalid()
        return self.refuse(f"unicorn: {LIB.uc_strerror(status).decode()}")

    def _memory_fault(self, pc: int) -> Exit | None:
        """A hole in guest memory. Which one is found by running the instruction again with hooks: any hook on memory makes all
        memory accesses six times slower, so none is there before it is needed."""
        faults: list[tuple[int, int, int, int]] = []

        def unmapped(_h: int, kind: int, gpa: int, size: int, value: int, _d: int) -> bool:
            faults.append((kind, gpa, size, value))
            return False

        hook = self.handle.hook(uc.UC_HOOK_MEM_UNMAPPED | uc.UC_HOOK_MEM_PROT, MemHook(unmapped))
        self.handle.flush_code()
        LIB.uc_emu_start(self.handle.h, pc, 0, 0, 1)
        self.handle.unhook(hook)
        self.handle.flush_code()
        if not faults:
            return self.refuse("Unicorn met a hole in guest memory and did not find it again")
        kind, gpa, size, value = faults[0]
        if kind in _FETCH:
            return InternalErrorExit(f"instruction fetch from gpa {gpa:#x}, where no memslot is", pc)
        if kind in _WRITE:
            return self._mmio_write(gpa, size, value & (1 << 8 * size) - 1)
        self._mmio = MmioExit(gpa, size, False, 0)
        return self._mmio

    # --- MMIO: the instruction runs once with a page of its own in the hole

    def _finish_mmio(self) -> Exit | None:
        """Carry out the load that left with an MMIO read; a read-modify-write leaves again with its write."""
        assert self._mmio is not None
        mmio, self._mmio = self._mmio, None
        data = (mmio.data & (1 << 8 * mmio.size) - 1).to_bytes(mmio.size, "little")
        return self._with_page(mmio.gpa, data)

    def _mmio_write(self, gpa: int, size: int, value: int) -> Exit | None:
        return self._with_page(gpa, bytes(size)) or MmioExit(gpa, size, True, value)

    def _with_page(self, gpa: int, data: bytes) -> Exit | None:
        page, offset = gpa & -4096, gpa & 4095
        span = 4096 if offset + len(data) <= 4096 else 8192
        buffer = ctypes.create_string_buffer(span + 4096)
        hva = -(-ctypes.addressof(buffer) // 4096) * 4096
        ctypes.memmove(hva + offset, data, len(data))
        if self.vm.overlaps(page, span):
            return self.refuse(f"an access of {len(data)} bytes at gpa {gpa:#x} runs across the end of a memslot")
        writes: list[MmioExit] = []

        def written(_h: int, _kind: int, at: int, count: int, value: int, _d: int) -> bool:
            writes.append(MmioExit(at, count, True, value & (1 << 8 * count) - 1))
            return True

        self.handle.map(page, hva, span, uc.UC_PROT_ALL)
        self.handle.flush_tlb()
        hook = self.handle.hook(uc.UC_HOOK_MEM_WRITE, MemHook(written), page, page + span - 1)
        self.handle.flush_code()
        try:
            exit = self._native("each", 1)
        finally:
            self.handle.unhook(hook)
            self.handle.unmap(page, span)
            self.handle.flush_tlb()
        return exit or next(iter(writes), None)

    # --- hooks

    def _hook_all(self) -> None:
        self.handle.hook(uc.UC_HOOK_INTR, IntrHook(lambda _h, vector, _d: self._intr(vector)))
        self.handle.hook(uc.UC_HOOK_EDGE_GENERATED, EdgeHook(lambda _h, tb, _p, _d: self._edge(tb.contents)))


    def _intr(self, vector: int) -> None:
        self._exception = vector
        LIB.uc_emu_stop(self.handle.h)

    def _at_breakpoint(self, gva: int) -> None:
        if gva in self._breakpoints and gva != self._skip:
            self._stopped = "breakpoint"
            LIB.uc_emu_stop(self.handle.h)
        self._skip = -1

    def _edge(self, tb: Any) -> None:
        """A block was translated and has not run: stop when it holds a sensitive instruction that no hook guards yet."""
        if self._look(tb.pc, tb.size, tb.icount) or self._halt.value:
            self._stopped = "edge"
            LIB.uc_emu_stop(self.handle.h)

    def _look(self, gva: int, size: int, count: int) -> bool:
        """Look through a block of count instructions; 0 means that the block may end before size bytes do."""
        gpa = self.translate(gva, uc.UC_PROT_EXEC)
        data = self.vmem_read(gva, size)
        if gpa is None or data is None:
            return False
        if count:
            self.tally.add(gva, count, data)
        page = gpa & -4096
        if page not in self.code_pages:
            self.code_pages[page] = self.vm.read(page, 4096)
        found = self.quirks.scan(data, gva, count > 0)
        for at in [at for at in self.traps if gva <= at < gva + size and at not in found]:
            del self.traps[at]  # the guest wrote other code there
        self._new = {at: trap for at, trap in found.items() if at not in self._hooks}
        self.traps.update({at: trap for at, trap in found.items() if at in self._hooks})
        if self._mode == "free" and count and gva not in self._loops and is_memory_loop(self.vm.arch, gva, data):
            self._loops.add(gva)
            callback = stub("flag") or CodeHook(lambda _h, _a, _s, _d: self._look_at_flag())
            self.handle.hook(uc.UC_HOOK_BLOCK, callback, gva, gva, ctypes.addressof(self._halt))
            self._new_loop = gva
            return True
        return bool(self._new)

    def _look_at_flag(self) -> None:
        if self._halt.value:
            LIB.uc_emu_stop(self.handle.h)

    def _scan_ahead(self) -> None:
        """Unicorn reports every translated block but the first of an engine's life: look at that one here."""
        pc, self._fresh = self.quirks.pc(), False
        if self._look(pc, 4096 - (pc & 4095), 0):
            self._install()

    def _install(self) -> None:
        if self._new_loop >= 0:
            self.handle.forget_code(self._new_loop, 1)
            self._new_loop = -1
        for gva, trap in self._new.items():
            callback: Any = STOP
            data = None
            if trap.kind == "locked":
                callback = stub("locked") or CodeHook(lambda _h, _a, _s, _d: self._at_locked())
                data = ctypes.addressof(self._locked)
            elif not trap.stops:
                callback = CodeHook(lambda _h, at, _s, _d: self._count_extra(at))
            self._hooks[gva] = self.handle.hook(uc.UC_HOOK_CODE, callback, gva, gva, data)
            self.handle.forget_code(gva, 1)
        self.traps.update(self._new)
        self._new = {}

    def _at_locked(self) -> None:
        self._locked[0], self._locked[2] = self.counter.value, 0

    def _count_extra(self, gva: int) -> None:
        """At a REP string instruction or a stack-segment load: Unicorn counts one more than the architecture steps."""
        count = self._count()
        if self.traps[gva].kind == "shadow" or (self._last == (gva, count - 1) and self.quirks.is_drained()):
            self._extra += 1
        self._last = (gva, count)

    def refuse(self, why: str) -> InternalErrorExit:
        """The exit for what this engine will not run, with the bytes at the program counter."""
        pc = self.quirks.pc()
        data = self.vmem_read(pc, 15) or b""
        insn = next(disassemble(self.vm.arch, data, pc), None)
        return InternalErrorExit(why, pc, data[: insn.size] if insn else data, insn.text if insn else "")
