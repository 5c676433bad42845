"""One vCPU on Unicorn: the run loop, the instruction count, and the traps that make runs exact."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.base import (
    BudgetExit,
    DebugExit,
    Exit,
    InternalErrorExit,
    InterruptExit,
    Regs,
    Trace,
)
from labkit.engines.disasm import disassemble
from labkit.engines.unicorn.guards import Guards
from labkit.engines.unicorn.misses import fetch_fault, mmu_miss
from labkit.engines.unicorn.mmio import FETCHES, HOLES, Mmio
from labkit.engines.unicorn.monitor import clear
from labkit.engines.unicorn.native.calibrate import calibrate
from labkit.engines.unicorn.native.lib import LIB, QUICK, Handle, IntrHook
from labkit.engines.unicorn.native.stubs import stub
from labkit.engines.unicorn.native.tally import MAX_LIMIT, Tally
from labkit.engines.unicorn.native.words import (
    BLOCK,
    COUNT,
    EXTRA,
    LIMIT,
    LOCKED,
    LOCKED_BLOCK,
    LOCKED_GVA,
    NOTHING,
    STOPPED,
    TALLY,
    TOTAL,
)
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.unicorn.vm import UnicornVm

__all__ = ["UnicornVcpu", "budget_exit"]

# Instructions after which a run looks up for the first time. The slowest code does some 5 M/s, so that Ctrl-C is answered
# within 60 ms; who goes on from there has time for a thread that hears it at once.
FIRST_LOOK = 1 << 18
BY_EACH = 4096  # budgets up to this are counted by Unicorn, an instruction at a time: changing over costs a translation
RF = 1 << 16
_HEADER = struct.Struct("<4sI")


@cache
def budget_exit(insns: int) -> BudgetExit:
    """The one exit object for a budget: stepping makes one a step."""
    return BudgetExit(insns)


class UnicornVcpu:
    """A vCPU whose sensitive instructions stop before they run and are carried out by the host, as under a VMM.

    Which instructions are sensitive is found block by block, when Unicorn translates a block for the first time: so code that
    the guest writes or jumps into the middle of is covered too. A hook at such an address is C's own `uc_emu_stop`.
    """

    def __init__(self, vm: UnicornVm, index: int, trace: Trace) -> None:
        self.vm, self.index, self.trace = vm, index, trace
        self.insns, self.exact = 0, True
        self.handle = Handle(vm.quirks.uc_arch, vm.quirks.uc_mode, vm.quirks.settings)
        self.counter = ctypes.c_uint64.from_address(self.handle.h + calibrate().counter)
        self.stale_tlb = self.stale_code = False
        self.tally = Tally(vm.arch)
        self.words = self.tally.words
        self.mode, self._tally_hook, self._by_block = "", 0, "tally" if stub("tally") else "each"
        self.locked_at, self._stop = -1, self.stop
        self.monitor_survives = True
        self.exception: int | None = None
        self._gpa = ctypes.c_uint64()
        self._gpa_at = ctypes.byref(self._gpa)
        self.shortened = (-1, -1)
        # The count behind what may have set the flag RF; None when nothing did
        self.resumed: int | None = None
        self.quirks = vm.quirks(self)
        self.guards, self.mmio = Guards(self), Mmio(self)
        self.handle.hook(uc.UC_HOOK_INTR, IntrHook(lambda _h, vector, _d: self._intr(vector)))
        for gpa, hva, size in vm.slots:
            self.map(gpa, hva, size)
        if vm.mmu is not None:
            vm.mmu.attach(self.handle)

    # --- registers and state

    def get_regs(self) -> Regs:
        """All registers by their architectural names."""
        return self.quirks.read_all()

    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers; raises InvalidState for a name or a value that does not fit."""
        if self.quirks.pc_name in regs:
            self.mmio.forget()
        self.quirks.write_many(regs)
        self.resumed = self.insns

    def read_reg(self, name: str) -> int:
        """One register."""
        return self.quirks.read(name)

    def save(self) -> bytes:
        """The whole CPU state: Unicorn's, and what labkit keeps beside it."""
        facts = {
            "insns": self.insns,
            "mmio": self.mmio.state(),
            "extra": self.quirks.extra_state(),
        }
        text = json.dumps(facts).encode()
        return _HEADER.pack(b"LKU1", len(text)) + text + self.handle.context()

    def restore(self, state: bytes) -> None:
        """Put a saved state back, bit for bit; raises InvalidState for bytes that are none."""
        if len(state) < _HEADER.size or state[:4] != b"LKU1":
            raise InvalidState("not a CPU state of the unicorn engine")
        size = _HEADER.unpack_from(state)[1]
        facts = json.loads(state[_HEADER.size : _HEADER.size + size])
        self.handle.set_context(state[_HEADER.size + size :])
        self.quirks.leave()
        self.insns = facts["insns"]
        self.mmio.set_state(facts["mmio"])
        self.quirks.set_extra_state(facts["extra"])
        self.resumed = self.insns
        self.stale_tlb = self.stale_code = True
        self.vm.runner = None
        self.vm.monitors.restored(self)

    def close(self) -> None:
        """Release the engine; a second call does nothing."""
        self.handle.close()

    # --- memory

    def map(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory."""
        self.handle.map(gpa, hva, size, uc.UC_PROT_ALL)

    def vmem_read(self, gva: int, size: int) -> bytes | None:
        """Guest-virtual memory as the CPU itself would read it; None when it would fault."""
        if self.vm.mmu is not None:
            return self.vm.mmu.access(self.handle, gva, size, self.quirks.ring())
        buffer = ctypes.create_string_buffer(size)
        read = self._quietly(LIB.uc_vmem_read, gva, uc.UC_PROT_READ, buffer, size)
        return buffer.raw if read else None

    def vmem_write(self, gva: int, data: bytes) -> bool:
        """Write as the CPU itself would, permissions and dirty bits included; False when it would fault."""
        if self.vm.mmu is not None:
            return (
                self.vm.mmu.access(self.handle, gva, len(data), self.quirks.ring(), data)
                is not None
            )
        return self._quietly(LIB.uc_vmem_write, gva, uc.UC_PROT_WRITE, data, len(data))

    def translate(self, gva: int, access: int = uc.UC_PROT_READ) -> int | None:
        """The gpa behind a gva, None when the access would fault."""
        if self.vm.mmu is not None:
            return self.vm.mmu.translate(self.handle, gva, access, self.quirks.ring())
        return (
            self._gpa.value
            if self._quietly(QUICK.uc_vmem_translate, gva, access, self._gpa_at)
            else None
        )

    def _quietly(self, function: Callable[..., int], gva: int, *args: object) -> bool:
        """Whether that worked; a failed look of ours must not stay behind where the guest looks for its faults."""
        trace = self.quirks.fault_trace
        before = trace[0]() if trace else 0
        if not function(self.handle.h, gva, *args):
            return True
        if trace:
            trace[1](before)
        return False

    def sync(self) -> None:
        """Forget what the host, or another vCPU, changed since this vCPU last ran."""
        if self.vm.runner is not self:
            if self.quirks.monitor_offset():
                self.vm.monitors.change_over(self.vm.runner, self)
            self.vm.runner = self
            if len(self.vm.vcpus) > 1 and any(
                self.vm.read(gpa, 4096) != seen for gpa, seen in self.guards.code_pages.items()
            ):
                self.stale_code = True
        if self.stale_code:
            self.guards.flush()
        if self.stale_tlb:
            self.handle.flush_tlb()
        self.stale_tlb = self.stale_code = False

    # --- running

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        self.guards.set_breakpoints(gvas)
        self.stale_code = True

    def complete(self, value: int) -> None:
        """Give the value that the last IN, MMIO read or hypercall returns."""
        if not self.mmio.complete(value) and not self.quirks.complete(value):
            raise InvalidState(
                f"vCPU {self.index}: the last exit reads nothing, so there is nothing to complete"
            )

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""
        shield = self.vm.shield
        shield.enter(self._stop)
        try:
            exit = self._run(insns)
            if self.resumed is not None:
                self.quirks.drop_resume_flag()
            return exit
        finally:
            shield.running = False

    def stop(self) -> None:
        """End a counted run at the next block, from any thread; the caller repeats it until the run is over."""
        self.words.all[LIMIT] = 0

    def _run(self, insns: int | None) -> Exit:
        if self.stale_tlb or self.stale_code or self.vm.runner is not self:
            self.sync()
        start, self.quirks.awaits, self.locked_at = self.insns, None, -1
        if not self.monitor_survives:
            clear(self)
        self.guards.skip = self.quirks.pc()
        self.words.all[COUNT] = NOTHING  # what was the last instruction means nothing now
        mmio = self.mmio
        if (
            (mmio.writes or mmio.waiting)
            and (insns is None or insns > 0)
            and (exit := mmio.resume()) is not None
        ):
            return exit
        look_after = FIRST_LOOK
        while True:
            left = MAX_LIMIT if insns is None else insns - (self.insns - start)
            if left <= 0:
                return budget_exit(insns or 0)
            exit = self._slice(left, look_after)
            if exit is not None:
                return exit
            if self.vm.shield.interrupted:
                return InterruptExit()
            if self.mode == "tally" and self.words.all[STOPPED]:
                look_after = MAX_LIMIT

    def _slice(self, left: int, look_after: int) -> Exit | None:
        """One native run towards the budget, or until it is time to look up; None when the run goes on behind it."""
        if left <= BY_EACH or self._by_block == "each":
            return self.native("each", min(left, FIRST_LOOK))
        exit = self.native("tally", min(left, look_after), long=look_after == MAX_LIMIT)
        if exit is not None or self.mode != "tally" or not self.words.all[STOPPED]:
            return exit
        if self.tally.knows(self.quirks.pc()):
            return None
        return self.native("each", 1)

    def native(self, mode: str, limit: int, long: bool = False) -> Exit | None:
        """One native run of at most limit instructions, counted as mode says."""
        if mode != self.mode:
            self._change_over(mode)
        guards, words, self.exception = self.guards, self.words.all, None
        guards.stopped = ""
        self.words.begin(limit)
        if long:
            with self.vm.shield.native():
                status = self.handle.run(self.quirks.leave())
        else:
            status = self.handle.run(self.quirks.leave(), limit if mode == "each" else 0)
        if words[LOCKED]:
            self.locked_at = self.vm.retired() + self._when_locked() - words[EXTRA]
        if guards.stopped == "edge":
            self.insns += self.count() - words[EXTRA]
            return guards.install()
        if guards.stopped or status or self.exception is not None:
            return self._stop_reason(status, limit)
        if mode == "each" and self.counter.value > limit:
            return self._budget(limit)
        pc = self.quirks.arrive()
        trap = guards.traps.get(pc)
        if trap is None or not trap.stops or words[STOPPED]:
            return self._budget(self.count())
        self.insns += self.before(pc) - words[EXTRA]
        if pc in guards.breakpoints and pc != guards.skip:
            return DebugExit(pc)
        guards.skip = -1
        return self.quirks.trap(trap)

    def count(self) -> int:
        """Instructions that the last native run began."""
        if self.mode == "tally":
            return self.words.all[TOTAL]
        return self.counter.value

    def before(self, pc: int) -> int:
        """Instructions that it finished, when it ended before or in the one at pc."""
        if self.mode == "tally":
            words = self.words.all
            return words[TOTAL] + self.tally.back(words[BLOCK], pc)
        return max(self.count() - 1, 0)

    def _when_locked(self) -> int:
        words = self.words.all
        return words[LOCKED] + (
            self.tally.back(words[LOCKED_BLOCK], words[LOCKED_GVA]) + 1
            if self.mode == "tally"
            else 0
        )

    def _change_over(self, mode: str) -> None:
        """Blocks carry the hooks that were there when they were translated, so they must go."""
        if self.mode == "tally":
            self.handle.unhook(self._tally_hook)
        if mode == "tally":
            code = stub("tally")
            assert code is not None
            self._tally_hook = self.handle.hook(uc.UC_HOOK_BLOCK, code, data=self.words.at(TALLY))
        self.words.count_at(
            self.words.at(TOTAL) if mode == "tally" else ctypes.addressof(self.counter)
        )
        self.mode = mode
        self.handle.flush_code()
        if mode == "tally":
            self._drop_counting()

    def _drop_counting(self) -> None:
        """Unicorn removes its counting hook when a run begins, and takes faults where counted code is no longer mapped."""
        trace = self.quirks.fault_trace
        fault, before = trace[0]() if trace else 0, self.handle.context()
        self.words.begin(0)  # the first block does not run
        self.handle.run(self.quirks.pc())
        self.handle.flush_code()
        self.handle.set_context(before)
        if trace:
            trace[1](fault)

    def _budget(self, ran: int) -> Exit | None:
        """Between two instructions; one that takes one count more than steps is brought to its end."""
        self.insns += ran - self.guards.extra()
        gva, at = self.guards.last
        if at != ran:
            return None
        shadow = self.guards.is_shadow(gva)
        if not shadow and not (self.quirks.pc() == gva and self.quirks.is_drained()):
            self.guards.last = (gva, 0)  # for the next native run, whose counter begins at 0
            if self.quirks.pc() == gva:
                self.resume_here()
            return None
        after = self.insns + shadow
        exit = self.run_one()
        self.insns = after
        return exit

    def resume_here(self) -> None:
        """The run ends between two iterations of a REP: RF is set (SDM vol. 3B 17.3.1.1)."""
        self.set_regs({"rflags": self.read_reg("rflags") | RF})

    def run_one(self) -> Exit | None:
        """Run until one instruction more has retired, or the exit that comes first."""
        before = self.insns
        while (
            (exit := self.native("each", 1)) is None
            and self.insns == before
            and self.guards.stopped != "hole"
        ):
            pass
        return exit

    def _stop_reason(self, status: int, limit: int) -> Exit | None:
        pc, guards = self.quirks.arrive(), self.guards
        if (status or self.exception is not None) and (self.mode == "each" or guards.has_hook(pc)):
            self.quirks.restore_flags()
            self.quirks.arrive()
        if self.vm.mmu is not None and status == uc.UC_ERR_EXCEPTION and self.vm.mmu.facts.why:
            return mmu_miss(self, self.vm.mmu, pc, limit)
        if status in FETCHES or self.quirks.is_fetch_fault(self.exception):
            ran = self.count()  # the instruction there was never begun
            self.insns += ran - guards.extra()
            return fetch_fault(self, pc, bool(limit) and ran >= limit)
        self.insns += (
            self.before(pc)
            - guards.extra()
            + (guards.last == (pc, self.count()) and guards.is_shadow(pc))
        )
        if guards.stopped:
            return DebugExit(pc) if guards.stopped == "breakpoint" else None
        if self.exception is not None:
            return self.quirks.exception(self.exception)
        if status in HOLES:
            return self.quirks.hole(pc)
        if status == uc.UC_ERR_INSN_INVALID:
            return self.quirks.invalid()
        return self.refuse(f"unicorn: {LIB.uc_strerror(status).decode()}")

    def _intr(self, vector: int) -> None:
        self.exception = vector
        LIB.uc_emu_stop(self.handle.h)

    def refuse(self, why: str) -> InternalErrorExit:
        """The exit for what this engine will not run, with the bytes at the program counter."""
        pc = self.quirks.pc()
        data = self.guards.read(pc, self.quirks.longest)
        insn = next(disassemble(self.vm.arch, data, pc), None)
        return InternalErrorExit(
            why, pc, data[: insn.size] if insn else data, insn.text if insn else ""
        )
