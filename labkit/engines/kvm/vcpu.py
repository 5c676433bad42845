"""One vCPU of /dev/kvm: its run page, its run loop, and what each KVM exit means in labkit's words."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from labkit.arch.desc import LAST
from labkit.arch.x86 import X86_PXXV48_4K as MODE
from labkit.engines import need
from labkit.engines.base import (
    BudgetExit,
    DeadlineExit,
    DebugExit,
    Exit,
    InterruptExit,
    Regs,
    Trace,
)
from labkit.engines.kvm.abi import CONSTANTS, EXITS, IOCTLS, STRUCTS, call, enter, struct
from labkit.engines.kvm.exits import HANDLERS, on_io
from labkit.engines.kvm.regs import GPR, Registers
from labkit.engines.kvm.state import restore, save
from labkit.engines.kvm.step import HW_BREAKPOINTS, Stepper, kind_of
from labkit.engines.kvm.ticker import TICKER, send_kick
from labkit.errors import InvalidState, LabError

if TYPE_CHECKING:
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["KvmVcpu"]

RUN = IOCTLS["KVM_RUN"]
IO, DEBUG, INTR = EXITS["KVM_EXIT_IO"], EXITS["KVM_EXIT_DEBUG"], EXITS["KVM_EXIT_INTR"]
_GPRS = STRUCTS["kvm_run"].s.offset
PG = 1 << 31  # of CR0
RIP, RAX, RDI = GPR["rip"], GPR["rax"], GPR["rdi"]
_SERIAL = itertools.count(1)


class KvmVcpu:
    """A vCPU with its file descriptor; it belongs to one thread at a time, which alone touches the descriptor."""

    def __init__(self, vm: KvmVm, index: int, trace: Trace) -> None:
        self.vm, self.index, self.trace = vm, index, trace
        self.insns, self.exact, self.locked_at, self.entered = 0, True, -1, 0
        self.home = self.owner, self.tid = threading.get_ident(), threading.get_native_id()
        self.fd = enter(vm.fd, IOCTLS["KVM_CREATE_VCPU"], index)
        self.page = mmap.mmap(self.fd, vm.run_size)
        self.run_page: Any = STRUCTS["kvm_run"].from_buffer(self.page)
        view = memoryview(self.page)
        self.u8, self.u32, self.u64 = view, view.cast("I"), view.cast("Q")
        self.gprs = self.u64[_GPRS // 8 : _GPRS // 8 + len(GPR)]
        self.regs = Registers(self)
        self.msrs: dict[int, int] = {}  # MSRs that KVM lacks and the VM's table has, as written
        self.pending = (
            ""  # what the next KVM_RUN completes first: "", "pio", "string", "read", "write"
        )
        self.awaits: tuple[int, int] | None = (
            None  # (place in the run page, bytes) that complete() sets
        )
        self.wrote: int | None = (
            None  # gva that an INS was settled to, whose value complete() still may change
        )
        self.took_many = (
            False  # KVM has read ahead elements of a REP INS, of which only one is done
        )
        self.queue: list[Exit] = []  # exits that came in one with another
        self.answers: list[
            tuple[int, int]
        ] = []  # (gpa, value) of the reads that the present instruction has had
        self.replay: list[
            tuple[int, int]
        ] = []  # the same, for an instruction that a restored state begins again
        self.replay_size = 0  # bytes of the last of them
        self.read_at, self.wrote_at = (
            (-1, 0),
            -1,
        )  # RIP at the last access to a hole, for a read with RCX
        self.breakpoints: frozenset[int] = frozenset()
        self._until, self.pausing = float("inf"), False
        self._setup()
        self.stepper = Stepper(self)
        TICKER.vcpus.add(self)

    def _setup(self) -> None:
        call(self.fd, "KVM_SET_CPUID2", self.vm.cpuid(self.index))
        regs = struct("kvm_regs")
        call(self.fd, "KVM_GET_REGS", regs)
        self.gprs[RIP], self.gprs[GPR["rflags"]] = (
            regs.rip,
            regs.rflags,
        )  # the others are 0, RDX too, which says who made the CPU
        self.run_page.kvm_dirty_regs = self.run_page.kvm_valid_regs = CONSTANTS["KVM_SYNC_X86_REGS"]
        self.cpuid_given = dict(self.vm.cpu.cpuid)
        self.started = False

    # --- registers and state

    def mine(self) -> None:
        """Raise InvalidState unless the calling thread is the one that this vCPU belongs to, and it is open."""
        if threading.get_ident() != self.owner:
            self.vm.lanes.pause(self)
        if self.fd < 0:
            raise InvalidState(f"vCPU {self.index}: this VM is closed")

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
        if (
            self.pending == "pio" and name == "rdi"
        ):  # what every ucall asks for; the pending IN does not change it
            self.mine()
            return int(self.gprs[RDI])
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
        if index in self.vm.cpu.msrs:
            self.msrs[index] = value
        return index in self.vm.cpu.msrs

    def hva(self, gva: int) -> int:
        """The host address behind a gva as the CPU itself would find it; 0 where nothing is."""
        return self.vm.hva(gpa) if (gpa := self.gpa(gva)) is not None else 0

    def gpa(self, gva: int) -> int | None:
        """The gpa behind a gva, None where nothing is mapped; not from KVM_TRANSLATE, which leaves accessed bits in the guest's tables."""
        if not self.regs.read("cr0") & PG:
            return gva
        table = MODE.root(self.regs.read("cr3"))
        for level in MODE.levels if MODE.canonical(gva) else ():
            hva = self.vm.hva(table + 8 * level.index(gva))
            entry = ctypes.c_uint64.from_address(hva).value if hva else 0
            if not MODE.present(entry):
                return None
            if level.leaf is LAST or not MODE.table(entry):
                return MODE.frame(level, entry) + (gva & level.size - 1)
            table = MODE.pa.get(entry)
        return None

    def fetch(self, gva: int, size: int) -> bytes:
        """Guest-virtual memory as far as it is mapped."""
        data = b""
        while len(data) < size and (hva := self.hva(gva + len(data))):
            data += ctypes.string_at(hva, min(size - len(data), 4096 - (gva + len(data) & 4095)))
        return data

    def close(self) -> None:
        """Release the descriptor and its page; a second call does nothing."""
        TICKER.vcpus.discard(self)
        if self.fd >= 0:
            del self.run_page, self.stepper
            for view in (self.gprs, self.u32, self.u64, self.u8):
                view.release()
            with suppress(
                BufferError
            ):  # somebody still holds a part of it, such as the frame of an exception; it goes with that
                self.page.close()
            os.close(self.fd)
            self.fd = -1

    # --- running

    def kick(self) -> None:
        """Make the present KVM_RUN return; the only thing that other threads may do here."""
        self.u8[1] = 1  # immediate_exit: a kick that comes before the guest is entered counts too
        send_kick(self.tid)

    def set_breakpoints(self, gvas: frozenset[int]) -> None:
        """Stop with DebugExit before the instructions at these addresses."""
        if gvas:
            need(self.vm, "breakpoints")
            self.need_step(self.read_reg("cs") & 3)
        self.breakpoints = gvas

    def complete(self, value: int) -> None:
        """Give the value that the last IN or MMIO read returns."""
        self.mine()
        if self.replay:
            self.replay[-1] = self.replay[-1][0], value & (1 << 8 * self.replay_size) - 1
            return
        if self.awaits is None:
            raise InvalidState(
                f"vCPU {self.index}: the last exit reads nothing, so there is nothing to complete"
            )
        at, size = self.awaits
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if self.pending:
            self.u8[at : at + size] = data
            if self.pending == "pio" and kind_of(self.fetch(int(self.gprs[RIP]), 15)).string:
                self.settle()  # INS: what was read lies in memory from now on
        elif self.wrote is not None:
            for i, byte in enumerate(data):
                if hva := self.hva(self.wrote + i):
                    ctypes.memset(hva, byte, 1)
        else:
            keep = self.gprs[RAX] & -1 << 8 * size if size < 4 else 0
            self.gprs[RAX] = keep | int.from_bytes(data, "little")
            self.run_page.kvm_dirty_regs |= 1

    def run(self, insns: int | None = None) -> Exit:
        """Run until an exit; with `insns`, until that many instructions retired (BudgetExit)."""
        self.mine()
        shield = self.vm.shield
        shield.enter(self.kick)
        try:
            return self.run_here(insns)
        finally:
            shield.running = False

    def run_here(self, insns: int | None) -> Exit:
        """Run on the calling thread, wherever Ctrl-C goes."""
        if insns is not None and insns <= 0:
            return BudgetExit(insns)
        if not self.started:
            self._first_run()
        self._until, self.locked_at = time.monotonic() + self.vm.deadline, -1
        if self.queue:
            self.vm.lanes.posted.pop(self.index, None)
            return self.queue.pop(0)
        if insns is None and len(self.breakpoints) <= HW_BREAKPOINTS:
            self.exact = False
            if self.breakpoints or self.stepper.control[0]:
                self.settle()
                if (exit := self.stepper.free()) is not None:
                    return exit
            return self.stay_free()
        return self._stepped(insns)

    def _first_run(self) -> None:
        """The VM's CPU table may be edited until now."""
        self.started = True
        if self.vm.cpu.cpuid != self.cpuid_given:
            call(self.fd, "KVM_SET_CPUID2", self.vm.cpuid(self.index))

    def _leave(self) -> None:
        """The guest goes on: what was pending is completed with what the run page holds."""
        if self.pending == "read" and self.awaits is not None:
            at, size = self.awaits
            self.answers.append(
                (self.u64[at // 8 - 1], int.from_bytes(self.u8[at : at + size], "little"))
            )
        self.pending, self.awaits = "", None

    def _enter(self) -> int:
        """One stay in the guest; the exit reason, INTR when somebody asked for a look around."""
        if self.regs.kept:
            self.regs.kept.clear()
        self.entered = next(_SERIAL)
        if TICKER.alive != os.getpid():
            TICKER.start()
        try:
            enter(self.fd, RUN, 0)
            return int(self.u32[2])
        except InterruptedError:
            self.u8[1] = 0
            return INTR
        except OSError as err:
            raise InvalidState(
                f"vCPU {self.index}: KVM cannot run this state: {err.strerror}", pc=self.gprs[RIP]
            ) from err
        finally:
            self.entered = 0

    def stay_free(self) -> Exit:
        """Stay in the guest until an exit, with debug registers as they are."""
        if self.took_many:
            self.settle()
        while True:
            self._leave()
            reason = self._enter()
            if reason == DEBUG:
                return DebugExit(int(self.gprs[RIP]))
            exit = on_io(self) if reason == IO else self._meet(reason)
            if exit is not None:
                return exit

    def _meet(self, reason: int) -> Exit | None:
        handler = HANDLERS.get(reason)
        if handler is None:
            raise LabError(
                f"vCPU {self.index}: KVM came back with exit reason {reason}, which labkit does not know",
                reason=reason,
            )
        return handler(self)

    def stay(self) -> Exit | None:
        """One stay in the guest: an exit, or None when a step was counted or there was only something to see to."""
        self._leave()
        reason = self._enter()
        if reason != DEBUG:
            return self._meet(reason)
        self.insns += 1
        self.answers.clear()
        self.wrote_at = -1
        return None

    def _stepped(self, insns: int | None) -> Exit:
        """Instruction by instruction: exactly as many as asked for, and any number of breakpoints."""
        self.need_step(0)
        self.settle()
        if self.queue:
            return self.queue.pop(0)
        start = self.insns
        with closing(self.stepper.steps()) as steps:
            while insns is None or self.insns - start < insns:
                if (
                    self.insns > start
                    and self.gprs[RIP] in self.breakpoints
                    and not self.stepper.inside
                ):
                    return DebugExit(int(self.gprs[RIP]))
                if (exit := next(steps) or self.asked(insns is None)) is not None:
                    return exit
        return BudgetExit(insns)

    def need_step(self, ring: int) -> None:
        """Raise NotAvailable where KVM's single step is wrong."""
        need(self.vm, "step_user" if ring == 3 else "step")

    def settle(self) -> None:
        """Let KVM finish the instruction of the last exit, so that registers are those behind it; a read from a hole has to wait."""
        self.mine()
        if self.pending == "pio" and self.awaits:
            kind = kind_of(self.fetch(int(self.gprs[RIP]), 15))
            self.wrote = int(self.gprs[RDI]) if kind.string else None
            self.took_many = False
            if kind.rep:
                with self.stepper.once(kind):
                    return self._finish()
        self._finish()

    def _finish(self) -> None:
        while self.pending and self.pending != "read":
            self.pending, self.u8[1] = "", 1
            reason = self._enter()
            self.u8[1] = 0
            if reason not in (INTR, DEBUG) and (exit := self._meet(reason)) is not None:
                self.queue.append(exit)

    def flush(self) -> None:
        """Let go of whatever instruction is under way; what it still reads is 0."""
        self.settle()
        while self.pending:
            self.pending = "flushed"
            self.settle()
        self.awaits = None
        self.vm.lanes.posted.pop(self.index, None)
        for kept in (self.queue, self.answers, self.replay):
            kept.clear()

    def asked(self, in_time: bool) -> Exit | None:
        """What somebody asked of this run meanwhile; counted runs end by themselves and may take their time."""
        if self.pausing or (
            self.vm.shield.interrupted and threading.current_thread() is threading.main_thread()
        ):
            return InterruptExit()
        if in_time and time.monotonic() > self._until:
            return DeadlineExit(self.vm.deadline, int(self.gprs[RIP]))
        return None
