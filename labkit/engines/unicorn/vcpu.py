"""One vCPU on Unicorn: its state, and the run loop.

The life of a run. `run` takes a budget, or none. It is made of native runs, calls of
`uc_emu_start`, each of which somebody ends: the guest, a hook, the count, or another thread.
ending.py lists them all and says how they are told apart; `_native` and `_ended` do it. Behind each
the instructions that retired are added to `insns`, which has no other owner, and then there is an
Exit for the caller, or the run goes on with the next native run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.base import Regs, Trace
from labkit.engines.exits import DebugExit, Exit, InternalErrorExit, InterruptExit, StopExit
from labkit.engines.unicorn.counting import Counting
from labkit.engines.unicorn.ending import FETCHES, HOLES, Ending, budget_exit, refusal
from labkit.engines.unicorn.guards import Guards
from labkit.engines.unicorn.late import needs_engine
from labkit.engines.unicorn.memory import GuestMemory
from labkit.engines.unicorn.misses import Misses
from labkit.engines.unicorn.mmio import Mmio
from labkit.engines.unicorn.monitor import clear
from labkit.engines.unicorn.native import contexts
from labkit.engines.unicorn.native.lib import LIB, Handle, IntrHook
from labkit.engines.unicorn.native.tally import MAX_LIMIT
from labkit.engines.unicorn.native.words import COUNT, EXTRA, GVA, LOCKED, NOTHING, STOPPED
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.vm import UnicornVm

__all__ = ["UnicornVcpu"]

# Instructions after which a run looks up for the first time. The slowest code does some 5 M/s, so
# that Ctrl-C is answered within 60 ms
FIRST_LOOK = 1 << 18
# Budgets up to this are counted by Unicorn, one by one: changing over costs a translation
BY_EACH = 4096
RF = 1 << 16  # RFLAGS


class UnicornVcpu:
    """A vCPU whose sensitive instructions are carried out by the host, as under a VMM.

    They stop before they run.

    Which instructions are sensitive is found block by block, when Unicorn translates a block for
    the first time: so code that the guest writes or jumps into the middle of is covered too.
    """

    exact = True  # every instruction is counted

    def __init__(self, vm: UnicornVm, index: int, trace: Trace) -> None:
        self.vm, self.index, self.trace = vm, index, trace
        self.insns = 0
        self.locked_at = -1
        self.monitor_survives = True
        # The count behind what may have set the flag RF; None when nothing did
        self.resumed: int | None = None
        self._stale_tlb = self._stale_code = False
        self.is_made = False  # its engine; see late.py
        self._first: dict[str, int] = {}  # registers

    def make(self) -> None:
        """Make the engine, with the registers that were given before."""
        vm = self.vm
        vm.check_open()
        self.handle = Handle(vm.quirks.uc_arch, vm.quirks.uc_mode, vm.quirks.settings)
        self.is_made = True
        self.memory = GuestMemory(vm, self.handle)
        self.quirks = vm.quirks(self)
        self.memory.quirks = self.quirks

        self._ending = Ending()
        self.counting = Counting(self.handle, vm.arch)
        self._words = self.counting.words.all
        self._begin = self.counting.words.begin
        self.guards = Guards(
            self.handle, self.quirks, self.memory, self.counting, self._ending, self._at_iret
        )
        self._mmio = Mmio(self, self.quirks, self._ending)
        self._misses = Misses(self, self.quirks, self.counting, self._ending)
        self._stop = self.stop  # one object: to bind a method takes time

        self.handle.hook(uc.UC_HOOK_INTR, IntrHook(lambda _h, vector, _d: self._intr(vector)))
        for gpa, hva, size in vm.slots:
            self.map(gpa, hva, size)
        if vm.mmu is not None:
            vm.mmu.attach(self.handle)
        if self._first:
            self.set_regs(self._first)

    def begin_with(self, regs: Mapping[str, int]) -> None:
        """`set_regs` with values that are known to fit, which may wait for the engine."""
        if self.is_made:
            self.set_regs(regs)
        else:
            self._first.update(regs)

    # --- registers and state

    @needs_engine
    def get_regs(self) -> Regs:
        """All registers by their architectural names."""
        return self.quirks.read_all()

    @needs_engine
    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers; raises InvalidState for a name or a value that does not fit."""
        if self.quirks.pc_name in regs:
            self._mmio.forget()
        self.quirks.write_many(regs)
        self.resumed = self.insns

    def read_reg(self, name: str) -> int:
        """One register."""
        if not self.is_made:
            self.make()
        return self.quirks.read(name)

    @needs_engine
    def save(self) -> bytes:
        """The whole CPU state: Unicorn's, and what labkit keeps beside it."""
        facts = {
            "arch": self.vm.arch,
            "insns": self.insns,
            "mmio": self._mmio.state(),
            "extra": self.quirks.extra_state(),
        }
        text = json.dumps(facts).encode()
        return contexts.pack_state(text, self.handle.context())

    @needs_engine
    def restore(self, state: bytes) -> None:
        """Put a saved state back, bit for bit; raises InvalidState for bytes that are none."""
        text, context = contexts.unpack_state(state)
        before = self.save()
        try:
            self._put(text, context)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._put(*contexts.unpack_state(before))
            raise InvalidState(f"not a CPU state of the unicorn engine: {error!r}") from error

    def _put(self, text: bytes, context: bytes) -> None:
        """Put both parts of a saved state back."""
        facts = json.loads(text)
        kind = (self.vm.quirks.uc_arch, self.vm.quirks.uc_mode)
        context = contexts.accepted(self.handle, self.vm.arch, kind, self.quirks, facts, context)
        self.handle.set_context(context)
        self.quirks.leave()
        self.insns = int(facts["insns"])
        self._mmio.set_state(facts["mmio"])
        self.quirks.set_extra_state(facts["extra"])

        self.resumed = self.insns
        self.forget_translations(code=True)
        self.vm.runner = None
        self.vm.monitors.restored(self)

    def close(self) -> None:
        """Release the engine; a second call does nothing."""
        if self.is_made:
            self.handle.close()

    # --- memory

    def map(self, gpa: int, hva: int, size: int) -> None:
        """Let the guest see host memory."""
        self.handle.map(gpa, hva, size, uc.UC_PROT_ALL)

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: translations may be stale, and code if it lay there."""
        self._stale_tlb = True
        if not self._stale_code and self.guards.has_code(gpa, size):
            self._stale_code = True

    def forget_translations(self, code: bool = False) -> None:
        """Do not go on with what is known of page tables, nor (code) of instructions."""
        self._stale_tlb = True
        if code:
            self._stale_code = True

    def sync(self) -> None:
        """Forget what the host, or another vCPU, changed since this vCPU last ran."""
        vm = self.vm
        if vm.runner is not self:
            if self.quirks.monitor_offset():
                vm.monitors.change_over(vm.runner, self)
            vm.runner = self
            if len(vm.vcpus) > 1 and self.guards.code_changed(vm):
                self._stale_code = True

        if self._stale_code:
            self.guards.flush()
        if self._stale_tlb:
            self.handle.flush_tlb()
        self._stale_tlb = self._stale_code = False

    # --- the instruction count

    def retire(self, insns: int = 1) -> None:
        """So many instructions retired."""
        self.insns += insns

    def unretire(self) -> None:
        """The last one did not retire after all."""
        self.insns -= 1

    def recount(self, insns: int) -> None:
        """What just ran was counted wrongly: this is how many there are now."""
        self.insns = insns

    # --- running

    @needs_engine
    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        self.guards.set_breakpoints(gvas)
        self._stale_code = True

    @needs_engine
    def complete(self, value: int) -> None:
        """Give the value that the last IN, MMIO read or hypercall returns."""
        if not self._mmio.complete(value) and not self.quirks.complete(value):
            raise InvalidState(
                f"vCPU {self.index}: the last exit reads nothing, so there is nothing to complete"
            )

    def stop(self) -> None:
        """End the present native run at its next block, from any thread.

        The caller repeats it until the run is over. Where Unicorn counts each instruction nothing
        is done: such a run is over after FIRST_LOOK of them.
        """
        self.counting.stop()

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""
        if not self.is_made:
            self.make()
        shield = self.vm.shield
        shield.enter(self._stop)
        try:
            exit = self._run(insns)
            if self.resumed is not None:
                self.quirks.drop_resume_flag()
            return exit
        finally:
            shield.leave()

    def _run(self, insns: int | None) -> Exit:
        self._prepare()
        mmio = self._mmio
        if (mmio.writes or mmio.waiting) and insns != 0:
            exit = mmio.resume()
            if exit is not None:
                return exit

        end = MAX_LIMIT if insns is None else self._start + insns
        look_after = FIRST_LOOK
        while True:
            left = end - self.insns
            if left <= 0:
                return budget_exit(insns or 0)
            if self.vm.asked and self._is_over():
                return StopExit()
            exit = self._slice(left, look_after)
            if exit is not None:
                return exit
            if self.vm.shield.is_due():
                return InterruptExit()
            if self._words[STOPPED]:
                look_after = MAX_LIMIT

    def _is_over(self) -> bool:
        """Stand still for those who asked; whether the run shall end.

        Who looks at an encrypted guest's memory may have it written back, so translations can be
        stale afterwards.
        """
        self.vm.asked = False
        is_over = self.vm.between()
        if self._stale_tlb or self._stale_code:
            self.sync()
        return is_over

    def _prepare(self) -> None:
        """Begin a run with nothing left of the one before."""
        if self._stale_tlb or self._stale_code or self.vm.runner is not self:
            self.sync()
        self._start = self.insns
        self.quirks.awaits = None
        self.locked_at = -1
        if not self.monitor_survives:
            clear(self)
        self.guards.skip = self.quirks.pc()
        self._words[COUNT] = NOTHING  # what was the last instruction means nothing now

    def _slice(self, left: int, look_after: int) -> Exit | None:
        """One native run towards the budget, or until it is time to look up.

        None when the run goes on behind it.
        """
        if self.quirks.owed:
            return self.quirks.deliver_owed()
        counting = self.counting
        if left <= BY_EACH or counting.by_block == "each":
            return self._native("each", left if left < FIRST_LOOK else FIRST_LOOK)

        exit = self._native("tally", left if left < look_after else look_after)
        if exit is not None or not self._words[STOPPED]:
            return exit
        if counting.tally.knows(self.quirks.pc()):
            return None
        return self._native("each", 1)

    def run_each(self, insns: int) -> Exit | None:
        """One native run of at most so many instructions, counted by Unicorn.

        None when nothing ended it for good.
        """
        return self._native("each", insns)

    def run_one(self) -> Exit | None:
        """Run until one instruction more has retired, or the exit that comes first."""
        before = self.insns
        while True:
            exit = self._native("each", 1)
            if exit is not None or self.insns != before or self._ending.by == "hole":
                return exit

    def run_natively(self, trap: Trap) -> Exit | None:
        """Let Unicorn run a trap after all: it faults, or is not as bad as it may be."""
        with self.guards.passing(trap):
            return self.run_one()

    # --- one native run

    def _native(self, mode: str, limit: int) -> Exit | None:
        """One native run of at most limit instructions, counted as mode says.

        None when the run goes on.
        """
        # Stepping comes here for every instruction: words are read without asking `counting`
        counting, ending, words = self.counting, self._ending, self._words
        if mode != counting.mode:
            counting.change_over(mode, self.quirks)
        ending.by, ending.exception = "", None
        self._begin(limit)
        if mode == "each":
            status = self.handle.run(self.quirks.leave(), limit)
        elif limit <= FIRST_LOOK:
            status = self.handle.run(self.quirks.leave())
        else:  # this may take long, so somebody listens who can call `stop`
            with self.vm.shield.native():
                status = self.handle.run(self.quirks.leave())

        if words[LOCKED]:
            self.locked_at = self.vm.retired() + counting.locked()
        if self.guards.restarted >= 0:
            self.guards.forget_restarted()
        if ending.by or status or ending.exception is not None:
            return self._ended(status, limit)
        if mode == "each" and counting.ran_out():
            return self._between(counting.counter.value - 1)

        pc = self.quirks.arrive()
        guards = self.guards
        trap = guards.traps.get(pc)
        if trap is None or not trap.stops or words[STOPPED]:
            return self._between(counting.begun())

        self.insns += counting.finished(pc) - words[EXTRA]
        if pc in guards.breakpoints and pc != guards.skip:
            return DebugExit(pc)
        guards.skip = -1
        return self.quirks.trap(trap)

    def _between(self, ran: int) -> Exit | None:
        """The run ended between two instructions.

        One that takes one count more than steps is brought to its end.
        """
        words = self._words
        if not ran and not words[STOPPED]:
            return self._misses.unexplained()
        self.insns += ran - words[EXTRA]
        if words[COUNT] != ran:
            return None

        gva = words[GVA]
        is_shadow = self.guards.is_shadow(gva)
        here = self.quirks.pc() == gva
        if not is_shadow and not (here and self.quirks.is_drained()):
            words[COUNT] = 0  # for the next native run, whose counter begins at 0
            if here:
                self.resume_here()
            return None

        after = self.insns + 1 if is_shadow else self.insns
        exit = self.run_one()
        self.insns = after
        return exit

    def _ended(self, status: int, limit: int) -> Exit | None:
        """The run was ended by a hook of ours, by an exception, or by a status of libunicorn."""
        counting, ending, quirks = self.counting, self._ending, self.quirks
        if ending.by == "edge":
            self.insns += counting.begun() - counting.extra
            strange = self.guards.install()
            return self.refuse(strange) if strange else None

        pc = quirks.arrive()
        exception = ending.exception
        failed = status or exception is not None
        if failed and (counting.mode == "each" or self.guards.has_hook(pc)):
            quirks.restore_flags()
            quirks.arrive()
        mmu = self.vm.mmu
        if mmu is not None and status == uc.UC_ERR_EXCEPTION and mmu.facts.why:
            return self._misses.walk(mmu, pc, limit)
        if status in FETCHES or quirks.is_fetch_fault(exception):
            return self._misses.fetch(pc, limit)

        if quirks.came_before(exception):
            self.insns += counting.before(pc) - counting.extra
            return self._failed(status, pc)

        self.insns += counting.finished(pc) - counting.extra
        if counting.last == (pc, counting.begun()) and self.guards.is_shadow(pc):
            self.insns += 1
        if ending.by == "refused":
            return quirks.refused()
        if ending.by:
            return DebugExit(pc) if ending.by == "breakpoint" else None
        return self._failed(status, pc)

    def _failed(self, status: int, pc: int) -> Exit | None:
        """The instruction at pc could not be carried out."""
        if self._ending.exception is not None:
            return self.quirks.exception(self._ending.exception)
        if status in HOLES:
            return self.quirks.hole(pc)
        if status == uc.UC_ERR_INSN_INVALID:
            return self.quirks.invalid()
        return self.refuse(f"unicorn: {LIB.uc_strerror(status).decode()}")

    def _intr(self, vector: int) -> None:
        self._ending.exception = vector
        LIB.uc_emu_stop(self.handle.h)

    def _at_iret(self, gva: int) -> None:
        """An IRET at gva is about to run, and may set RF."""
        self.resumed = self.insns + self.counting.finished(gva) + 1 - self.counting.extra

    # --- what the architecture asks for

    @property
    def ended_by(self) -> str:
        """Who of ours ended the last native run, see ending.py."""
        return self._ending.by

    def end_refused(self) -> None:
        """The present run ends at the instruction under way, which is refused (ending.py)."""
        self._ending.by = "refused"
        LIB.uc_emu_stop(self.handle.h)

    def meet_hole(self) -> Exit | None:
        """Carry out the instruction at the program counter, which touches what no memslot holds."""
        return self._mmio.meet()

    def guard(self, trap: Trap) -> None:
        """One more sensitive instruction, in code that was looked through before."""
        self.guards.add(trap)

    def unguard(self, gva: int) -> None:
        """That instruction may run in Unicorn again."""
        self.guards.remove(gva)

    def passing(self, trap: Trap) -> AbstractContextManager[None]:
        """See `Guards.passing`."""
        return self.guards.passing(trap)

    def resume_here(self) -> None:
        """The run ends between two iterations of a REP: RF is set (SDM vol. 3B 17.3.1.1)."""
        self.set_regs({"rflags": self.read_reg("rflags") | RF})

    def refuse(self, why: str) -> InternalErrorExit:
        """The exit for what this engine will not run, with the bytes at the program counter."""
        pc = self.quirks.pc()
        return refusal(self.vm.arch, why, pc, self.memory.fetch(pc, self.quirks.longest))
