"""One vCPU of /dev/kvm: its registers and state, its run loop, and how what waits is settled."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from labkit.engines import need
from labkit.engines.base import Regs
from labkit.engines.exits import (
    BudgetExit,
    DeadlineExit,
    DebugExit,
    Exit,
    InterruptExit,
    StopExit,
)
from labkit.engines.kvm.abi import CONSTANTS, EXITS, IOCTLS, call, enter, struct
from labkit.engines.kvm.exits import HANDLERS, on_io
from labkit.engines.kvm.kinds import Kind, kind_of
from labkit.engines.kvm.memory import GuestMemory
from labkit.engines.kvm.page import EXIT_REASON, RunPage
from labkit.engines.kvm.places import GPR
from labkit.engines.kvm.regs import Registers
from labkit.engines.kvm.repeat import one_iteration
from labkit.engines.kvm.state import restore, save
from labkit.engines.kvm.step import HW_BREAKPOINTS, Stepper
from labkit.engines.kvm.ticker import TICKER, handle_kicks, send_kick
from labkit.engines.kvm.waiting import AT_PORT, In, Load, Taken, Waiting
from labkit.errors import InvalidState, LabError

if TYPE_CHECKING:
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["KvmVcpu"]

RUN = IOCTLS["KVM_RUN"]
IO, DEBUG, INTR = EXITS["KVM_EXIT_IO"], EXITS["KVM_EXIT_DEBUG"], EXITS["KVM_EXIT_INTR"]
RIP, RAX, RDI, FLAGS = GPR["rip"], GPR["rax"], GPR["rdi"], GPR["rflags"]
LONGEST = 15  # bytes of an instruction (SDM vol. 2A 2.3.11)
_SERIAL = itertools.count(1)


class KvmVcpu:
    """A vCPU with its file descriptor; it belongs to the thread that touched it last.

    Another thread may take it whenever it does not run (`mine`), and kick it when it does.
    """

    def __init__(self, vm: KvmVm, index: int) -> None:
        self.vm = vm
        self.index = index
        self.insns = 0
        self.exact = True
        self.locked_at = -1
        self.entered = 0  # the number of the present stay in the guest, 0 outside
        self.home = threading.get_ident(), threading.get_native_id()
        self.owner, self.tid = self.home
        self.is_running = False  # on its owner's thread, in no lane, and not standing still
        self.fd = enter(vm.fd, IOCTLS["KVM_CREATE_VCPU"], index)
        self.page = RunPage(self.fd, vm.run_size)
        self.gprs = self.page.gprs
        self.waiting = Waiting(self.page)
        self.regs = Registers(self)
        self.memory = GuestMemory(vm, self.regs)
        self.msrs: dict[int, int] = {}  # MSRs that KVM lacks and the VM's table has, as written
        self.breakpoints: frozenset[int] = frozenset()
        self.pausing = False  # somebody wants it out of the guest, without an exit
        self._until = float("inf")  # the present run's deadline
        self._setup()
        self.stepper = Stepper(self)
        handle_kicks()
        TICKER.vcpus.add(self)

    def _setup(self) -> None:
        call(self.fd, "KVM_SET_CPUID2", self.vm.cpuid(self.index))
        regs = struct("kvm_regs")
        call(self.fd, "KVM_GET_REGS", regs)
        # The others are 0, RDX too, which says who made the CPU.
        self.gprs[RIP] = regs.rip
        self.gprs[FLAGS] = regs.rflags
        self.page.fields.kvm_valid_regs = CONSTANTS["KVM_SYNC_X86_REGS"]
        self.page.registers_changed()
        self.cpuid_given = dict(self.vm.cpu.cpuid)
        self.started = False

    # --- registers and state

    def mine(self) -> None:
        """Make the calling thread the one that may touch this vCPU.

        One that runs in parallel is paused first. Raises InvalidState for one that another thread
        runs now, and for one that is closed.
        """
        if threading.get_ident() != self.owner:
            if not self.vm.lanes.pause(self) and self.is_running:
                raise InvalidState(f"vCPU {self.index} runs on another thread ({self.owner:#x})")
            self._adopt()
        if self.fd < 0:
            raise InvalidState(f"vCPU {self.index}: this VM is closed")

    def _adopt(self) -> None:
        self.home = threading.get_ident(), threading.get_native_id()
        self.owner, self.tid = self.home

    def get_regs(self) -> Regs:
        """All registers by their architectural names."""
        self.settle()
        return self.regs.read_all()

    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers; raises InvalidState for a name or a value that does not fit."""
        self.settle()
        if "rip" in regs:
            self.flush()
        self.regs.write_many(regs)

    def read_reg(self, name: str) -> int:
        """One register."""
        if name == "rdi" and isinstance(self.waiting.stage, AT_PORT):
            # What every ucall asks for; the IN that is under way does not change it.
            self.mine()
            return self.gprs[RDI]
        self.settle()
        return self.regs.read(name)

    def save(self) -> bytes:
        """The whole CPU state, to be given to `restore` of any vCPU of this engine."""
        self.settle()
        return save(self)

    def restore(self, state: bytes) -> None:
        """Put a saved state back; raises InvalidState for bytes that are none."""
        self.mine()
        self.flush()
        restore(self, state)

    def host_msr(self, index: int) -> int | None:
        """An MSR that KVM lacks and the VM's own table has."""
        return self.msrs.get(index, self.vm.cpu.msrs.get(index))

    def set_host_msr(self, index: int, value: int) -> bool:
        """Set one of those; False when the table does not have it."""
        if index not in self.vm.cpu.msrs:
            return False
        self.msrs[index] = value
        return True

    def close(self) -> None:
        """Release the descriptor and its page; a second call does nothing."""
        TICKER.vcpus.discard(self)
        if self.fd >= 0:
            del self.stepper  # which holds a part of the page
            self.page.close()
            os.close(self.fd)
            self.fd = -1

    # --- what waits in the run page

    def settle(self) -> None:
        """Let KVM finish the instruction of the last exit, so that registers are those behind it.

        A read from a hole has to wait for its value.
        """
        self.mine()
        stage = self.waiting.stage
        if isinstance(stage, In):
            self._settle_in(stage)
        else:
            self._finish()

    def _settle_in(self, stage: In) -> None:
        """Of a REP INS, one iteration; a store of INS to a hole is no further instruction."""
        kind = self._kind()
        gva = self.gprs[RDI] if kind.string else None
        counted = self.insns
        if kind.rep:
            with one_iteration(self, kind):
                self._finish()
        else:
            self._finish()
        self.insns = counted
        self.waiting.settled_in(stage.size, gva)

    def _kind(self) -> Kind:
        """What instruction the guest stands at."""
        return kind_of(self.memory.fetch(self.gprs[RIP], LONGEST))

    def _finish(self) -> None:
        while self.waiting.can_settle():
            self._complete_only()

    def _complete_only(self) -> None:
        """Enter the guest so that KVM completes what is under way, and no more.

        An exit that this brings waits, before others that came with it.
        """
        self.waiting.go_on()
        self.page.leave_at_once(True)
        reason = self._enter()
        self.page.leave_at_once(False)
        if reason in (INTR, DEBUG):
            return
        behind = len(self.waiting.exits)
        exit = self._meet(reason)
        if exit is not None:
            self.waiting.exits.insert(behind, exit)

    def flush(self) -> None:
        """Let go of whatever instruction is under way; what it still reads is 0."""
        self.settle()
        while isinstance(self.waiting.stage, Load):
            self._complete_only()
            self._finish()
        self.waiting.forget()

    def complete(self, value: int) -> None:
        """Give the value that the last IN or MMIO read returns.

        Raises InvalidState when the last exit reads nothing.
        """
        self.mine()
        stage = self.waiting.stage
        if isinstance(stage, Taken):
            self._change_taken(stage, value)
        elif not self.waiting.complete(value):
            raise InvalidState(
                f"vCPU {self.index}: the last exit reads nothing, so there is nothing to complete"
            )
        elif isinstance(stage, In) and self._kind().string:
            self.settle()  # INS: what was read lies in memory from now on

    def _change_taken(self, taken: Taken, value: int) -> None:
        """Change the value of an IN that is over already."""
        value &= (1 << 8 * taken.size) - 1
        if taken.gva is not None:
            for i, byte in enumerate(value.to_bytes(taken.size, "little")):
                hva = self.memory.hva(taken.gva + i)
                if hva:
                    ctypes.memset(hva, byte, 1)
            return

        # 4 bytes clear the upper half, fewer keep what is above them (SDM vol. 1 3.4.1.1).
        above = -1 << 8 * taken.size
        kept = self.gprs[RAX] & above if taken.size < 4 else 0
        self.gprs[RAX] = kept | value
        self.page.registers_changed()

    # --- what is asked of a run

    def kick(self) -> None:
        """Make the present KVM_RUN return; the only thing that other threads may do here."""
        self.page.leave_at_once(True)  # a kick that comes before the guest is entered counts too
        send_kick(self.tid)

    def asked(self, in_time: bool) -> Exit | None:
        """What somebody asked of this run meanwhile; None when nobody did.

        Only where `in_time` is the deadline one of the askers: counted runs end by themselves.
        """
        if self.pausing or self.vm.shield.is_due():
            return InterruptExit()
        if self.vm.asked and self.is_running and self._is_over():
            return StopExit()
        if in_time and time.monotonic() > self._until:
            return DeadlineExit(self.vm.deadline, self.gprs[RIP])
        return None

    def _is_over(self) -> bool:
        """Stand still for those who asked; whether the run shall end."""
        self.vm.asked = False
        self.is_running = False
        try:
            return self.vm.between()
        finally:
            self._adopt()
            self.is_running = True

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        if gvas:
            need(self.vm, "breakpoints")
            self.need_step(self.read_reg("cs") & 3)
        self.breakpoints = gvas

    def need_step(self, ring: int) -> None:
        """Raise NotAvailable where KVM's single step is wrong."""
        need(self.vm, "step_user" if ring == 3 else "step")

    # --- running

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""
        self.mine()
        self._adopt()  # a new thread may have the identifier of one that ended, and is another
        self.is_running = True
        shield = self.vm.shield
        shield.enter(self.kick)
        try:
            if shield.is_due():
                return InterruptExit()
            return self.run_here(insns)
        finally:
            shield.leave()
            self.is_running = False

    def run_here(self, insns: int | None) -> Exit:
        """Run on the calling thread, wherever Ctrl-C goes."""
        if insns is not None and insns <= 0:
            return BudgetExit(insns)
        if not self.started:
            self._first_run()
        self._until = time.monotonic() + self.vm.deadline
        self.locked_at = -1
        if self.waiting.exits:
            return self.waiting.take()
        if insns is None and len(self.breakpoints) <= HW_BREAKPOINTS:
            self.exact = False
            return self._free()
        return self._stepped(insns)

    def _first_run(self) -> None:
        """The VM's CPU table may be edited until now."""
        self.started = True
        if self.vm.cpu.cpuid != self.cpuid_given:
            call(self.fd, "KVM_SET_CPUID2", self.vm.cpuid(self.index))

    def _free(self) -> Exit:
        """As fast as the CPU goes, up to an exit or a breakpoint of a debug register."""
        debugs = self.breakpoints or self.stepper.control[0]
        if debugs or self.waiting.has_read_ahead():
            self.settle()
            if self.waiting.exits:
                return self.waiting.take()
        if debugs:
            exit = self.stepper.free()
            if exit is not None:
                return exit
        return self.stay_free()

    def stay_free(self) -> Exit:
        """Stay in the guest until an exit, with debug registers as they are."""
        while True:
            self.waiting.go_on()
            reason = self._enter()
            if reason == DEBUG:
                return DebugExit(self.gprs[RIP])
            exit = on_io(self) if reason == IO else self._meet(reason)
            if exit is not None:
                return exit

    def _stepped(self, insns: int | None) -> Exit:
        """Instruction by instruction: exactly as many as asked for, any number of breakpoints."""
        self.need_step(0)
        self.settle()
        if self.waiting.exits:
            return self.waiting.take()

        start = self.insns
        with closing(self.stepper.steps()) as steps:
            while insns is None or self.insns - start < insns:
                if self.insns > start and self._at_breakpoint():
                    return DebugExit(self.gprs[RIP])
                exit = next(steps) or self.asked(in_time=insns is None)
                if exit is not None:
                    return exit
        return BudgetExit(insns)

    def _at_breakpoint(self) -> bool:
        return self.gprs[RIP] in self.breakpoints and not self.waiting.inside_rep

    def stay(self) -> Exit | None:
        """One stay in the guest: an exit, or None when a step was counted or nobody need know."""
        self.waiting.go_on()
        reason = self._enter()
        if reason != DEBUG:
            return self._meet(reason)
        self.insns += 1
        self.waiting.insn_over()
        return None

    def _enter(self) -> int:
        """One stay in the guest; the exit reason, INTR when somebody asked for a look around."""
        if self.regs.kept:
            self.regs.kept.clear()
        self.entered = next(_SERIAL)
        if TICKER.alive != os.getpid():
            TICKER.start()
        try:
            enter(self.fd, RUN, 0)
            return self.page.u32[EXIT_REASON]
        except InterruptedError:
            self.page.leave_at_once(False)
            return INTR
        except OSError as err:
            raise InvalidState(
                f"vCPU {self.index}: KVM cannot run this state: {err.strerror}", pc=self.gprs[RIP]
            ) from err
        finally:
            self.entered = 0

    def _meet(self, reason: int) -> Exit | None:
        handler = HANDLERS.get(reason)
        if handler is None:
            raise LabError(
                f"vCPU {self.index}: KVM came back with exit reason {reason}, "
                "which labkit does not know",
                reason=reason,
            )
        return handler(self)
