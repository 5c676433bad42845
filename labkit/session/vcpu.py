"""One virtual CPU as people hold it: run it, step it, read and set what it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from labkit.arch.translation import PAGING, Translation, as_levels
from labkit.checked import checked, checks_itself, whole
from labkit.engines.base import EngineVcpu, MonitorVcpu
from labkit.engines.disasm import Decoded
from labkit.engines.exits import BudgetExit, Exit, VmgexitExit
from labkit.errors import InvalidState, LabError, NotAvailable
from labkit.machine.registers import Registers
from labkit.session.arrivals import arrived
from labkit.session.backtrace import Backtrace, backtrace
from labkit.session.listing import Listing
from labkit.session.running import collect, stream
from labkit.session.stepping import finish, next_line, run_to, step_line
from labkit.session.turn import act, look
from labkit.sev.vmgexit import complete
from labkit.ucall.calls import Ucall

if TYPE_CHECKING:
    from labkit.guest.lines import Line
    from labkit.paging.scan import PageTable
    from labkit.session.vm import Vm
    from labkit.sev.guest import ProtectedGuest

__all__ = ["Vcpu"]


@checked
class Vcpu:
    """One virtual CPU of a VM.

    Attributes: vm; index; cpu, the engine's side of it; regs, its registers as attributes; state
    ("not started", "running", "done", "aborted", "unhandled", "halted", "shutdown", "stuck",
    "terminated"); breakpoints, a frozenset of gvas.
    """

    def __init__(self, vm: Vm, index: int) -> None:
        self.vm: Vm = vm
        self.turn = vm.turn
        self.index = index
        self.state = "not started"
        self.cpu: EngineVcpu = vm.machine.vcpus[index]
        self.regs = Registers(vm.arch, self.cpu, vm.changed, self._check_registers, vm.turn)
        self.breakpoints: frozenset[int] = frozenset()
        self._passed: frozenset[int] = frozenset()

    def _check_registers(self) -> None:
        """Raise KvmError where the host may not see or set registers."""
        if self.vm.guest is not None:
            self.vm.guest.check_registers(self.index)

    @property
    def sealed(self) -> str:
        """Why the host cannot see or set this vCPU's registers (KvmError EINVAL); "" when it can.

        The lab's own eye still does.
        """
        if self.vm.guest is None:
            return ""
        return self.vm.guest.sealed(self.index)

    @property
    @look
    def step_count(self) -> int:
        """Instructions this vCPU retired; a lower bound where an engine did not count (`exact`)."""
        return self.cpu.insns

    @property
    def exact(self) -> bool:
        """Whether every instruction so far was counted."""
        return self.cpu.exact

    @property
    @look
    def pc(self) -> int:
        """The gva of the instruction that runs next."""
        return self.cpu.read_reg(self.vm.arch.pc)

    @property
    @look
    def insn(self) -> Decoded | None:
        """The instruction that runs next: `.mnemonic`, `.op_str`; None where there is none."""
        insns = self.disassemble(self.pc, 1).insns
        return insns[0] if insns else None

    # --- running

    @checks_itself
    def run(self, max_insns: int | None = None) -> Ucall | Exit:
        """Run this vCPU alone until a ucall or another exit; with max_insns at most that far.

        The budget's end is a BudgetExit. A VMGEXIT that the host has answered is an event, and the
        run goes on. Raises InvalidState for a guest whose launch is not finished.
        """
        if max_insns is not None:
            max_insns = _count(max_insns, "Vcpu.run: max_insns")
            if max_insns < 0:
                raise InvalidState(f"vCPU {self.index}: cannot run {max_insns} instructions")
        self.turn.begin("run", max_insns)
        try:
            if self.vm.shifts.vcpu != self.index:
                self.vm.shifts.change(self.index, self.vm.machine.engine.retired())
            if self.vm.guest is None:
                return arrived(self.vm, self, self.cpu.run(max_insns))
            return self._run_protected(self.vm.guest, max_insns)
        finally:
            self.turn.end()

    def _run_protected(self, guest: ProtectedGuest, max_insns: int | None) -> Ucall | Exit:
        """The same for an encrypted guest, whose VMGEXITs the host answers on the way."""
        guest.check_ready(self.index)
        start = self.cpu.insns
        came = arrived(self.vm, self, self.cpu.run(max_insns))
        while type(came) is VmgexitExit and came.request:
            left = None if max_insns is None else max_insns - (self.cpu.insns - start)
            came = arrived(self.vm, self, self.cpu.run(left))
        return came

    def run_until_done(self, max_insns: int | None = None) -> list[Ucall]:
        """Run this vCPU alone to its DONE and return every ucall on the way.

        Raises GuestAssertFailed on ABORT, BudgetExceeded, and GuestCrashed on anything else that
        ends a guest.
        """
        coming = stream(self.run, lambda: self.state == "done", lambda: self.step_count, max_insns)
        with self.turn.run("run_until_done", max_insns, self.vm.step):
            return collect(coming, self.vm.explain)

    @checks_itself
    def step(self, count: int = 1) -> Ucall | Exit | None:
        """Run count instructions; a ucall or an exit on the way ends it early and is returned."""
        if type(count) is not int:
            count = whole(count, "Vcpu.step: count")
        if count < 1:
            raise InvalidState(f"vCPU {self.index}: cannot step {count} instructions")
        came = self.run(count)
        return None if isinstance(came, BudgetExit) else came

    def step_line(self, max_insns: int = 1_000_000) -> Ucall | Exit | None:
        """Run to the start of another source line, into calls too.

        A ucall or an exit on the way ends it early and is returned. Raises BudgetExceeded when no
        other line comes.
        """
        with self.turn.run("step_line", max_insns):
            return step_line(self, max_insns)

    def next_line(self, max_insns: int = 1_000_000) -> Ucall | Exit | None:
        """Run to the start of another source line, but through calls as if they were one step.

        Otherwise as step_line.
        """
        with self.turn.run("next_line", max_insns):
            return next_line(self, max_insns)

    def finish(self, max_insns: int | None = None) -> Ucall | Exit | None:
        """Run until the function in front has returned to its caller.

        A ucall or an exit on the way ends it early and is returned. Raises InvalidState where no
        caller is known, BudgetExceeded after max_insns instructions.
        """
        with self.turn.run("finish", max_insns):
            return finish(self, max_insns)

    def run_to(self, place: str | int, max_insns: int | None = None) -> Ucall | Exit | None:
        """Run until the instruction at a symbol, a "file.c:12" or a gva is next, or next again.

        A ucall, a breakpoint or another exit on the way ends it early and is returned. Raises as
        `vm.places` and, after max_insns instructions, BudgetExceeded.
        """
        gvas = frozenset(self.vm.places(place))
        with self.turn.run("run_to", max_insns):
            return run_to(self, gvas, max_insns)

    @act
    def complete(self, value: int) -> None:
        """What the IN, MMIO read or hypercall that just exited shall return."""
        answered = self.vm.guest is not None and complete(self.vm.guest, self.index, value)
        if not answered:
            self.cpu.complete(value)
        self.vm.changed()

    @act
    def args_set(self, *values: str | int) -> None:
        """Set the arguments of the entry function, numbers or places by name (vcpu_args_set)."""
        self._check_registers()
        numbers = tuple(self.vm.gva_of(value) for value in values)
        self.vm.machine.set_arguments(self.index, numbers)
        self.vm.changed()

    @act
    def set_entry(self, entry: str | int) -> None:
        """Begin anew at another function, a symbol or a gva (vcpu_arch_set_entry_point).

        The stack is fresh, and the first argument is the vCPU's index.
        """
        self._check_registers()
        self.vm.machine.reset_vcpu(self.index, self.vm.gva_of(entry))
        self.state = "not started"
        self.vm.changed()

    @property
    def monitor_survives(self) -> bool:
        """Whether an exclusive monitor (LDXR, LR) stays set between two runs.

        If it does, code with exclusives can be stepped. Real processors clear it at every exception
        return, and a debugger that steps a load-exclusive/store-exclusive loop never gets out of it
        (kernel commit b3d937722de0); set it to False to see that. Raises NotAvailable where the
        engine has no say.
        """
        return self._monitor().monitor_survives

    @monitor_survives.setter
    def monitor_survives(self, on: bool) -> None:
        self._monitor().monitor_survives = on

    def _monitor(self) -> MonitorVcpu:
        if not isinstance(self.cpu, MonitorVcpu):
            raise NotAvailable(
                "this engine's vCPUs run on a real processor, "
                "which clears exclusive monitors as it likes"
            )
        return self.cpu

    # --- breakpoints

    @act
    def break_at(self, *places: str | int) -> None:
        """Add breakpoints at symbols, "file.c:12" or gvas; raises as `vm.places` does."""
        gvas = set(self.breakpoints)
        for place in places:
            gvas.update(self.vm.places(place))
        self.set_breakpoints(gvas)

    @act
    def set_breakpoints(self, gvas: frozenset[int] | set[int]) -> None:
        """Stop before the instructions at exactly these gvas; raises InvalidState for no gva."""
        for gva in gvas:
            if not 0 <= gva < 1 << 64:
                raise InvalidState(
                    f"vCPU {self.index}: a breakpoint at {gva:#x}, which is no address"
                )
        self.breakpoints = frozenset(gvas)
        self.cpu.set_breakpoints(self.breakpoints)
        self.vm.changed()

    @contextmanager
    def passing(self, gvas: frozenset[int]) -> Iterator[None]:
        """Runs end with a DebugExit at these gvas too, which are breakpoints of nobody."""
        self.cpu.set_breakpoints(self.breakpoints | gvas)
        self._passed = gvas
        try:
            yield
        finally:
            self._passed = frozenset()
            self.cpu.set_breakpoints(self.breakpoints)

    def is_passing(self) -> bool:
        """Whether it stopped where only `passing` wants it: nothing that happened to the guest."""
        return bool(self._passed) and self.pc in self._passed - self.breakpoints

    # --- memory and code

    @look
    def read(self, gva: str | int, size: int) -> bytes:
        """Guest-virtual memory through this vCPU's page tables; raises PageFault with the walk.

        gva: also a place by name, as in `vm.gva_of`. size in bytes.
        """
        return self.vm.machine.space.read(self.vm.gva_of(gva), size, self.translation())

    @look
    def peek(self, gva: str | int, size: int) -> bytes:
        """Guest-virtual memory as the guest itself sees it, encrypted or not; raises PageFault.

        gva: also a place by name, as in `vm.gva_of`. size in bytes.
        """
        return self.vm.machine.space.peek(self.vm.gva_of(gva), size, self.translation())

    @act
    def write(self, gva: str | int, data: bytes) -> None:
        """Write guest-virtual memory as a debugger does, read-only pages too; raises PageFault.

        gva: also a place by name, as in `vm.gva_of`.
        """
        self.vm.machine.space.write(self.vm.gva_of(gva), data, self.translation())
        self.vm.changed()

    @look
    def translation(self) -> Translation:
        """The page tables that this vCPU has loaded: their format, their root, what says so.

        While its paging is off, the VM's own. Raises NotAvailable for a format that labkit does not
        know.
        """
        arch, space = self.vm.arch, self.vm.machine.space
        paging = PAGING[arch.name](self.cpu.read_reg)
        if paging is None:
            return Translation(space.mode, space.root_gpa, f"vCPU {self.index} has no paging on")
        said_by = f"{paging.said_by} of vCPU {self.index}"
        if paging.levels is None:
            raise NotAvailable(f"page tables of a format that is not known here: {said_by}")
        mode = as_levels(space.mode, paging)
        if mode is not space.mode and mode.c_bit is None:
            names = [known.name for known in arch.modes if known.levels == mode.levels]
            mode = replace(mode, name=names[0] if names else mode.name)
        return Translation(mode, mode.root(paging.root), said_by)

    @look
    def page_table(self) -> PageTable:
        """This vCPU's whole address space as it is mapped now, through the guest's own eye."""
        return self.vm.page_table(self)

    @look
    def disassemble(self, gva: int | str | None = None, count: int = 12) -> Listing:
        """Instructions from a gva or a symbol on; without one, those around the program counter."""
        if count < 1:
            raise InvalidState(f"vCPU {self.index}: cannot disassemble {count} instructions")
        arch = self.vm.arch.name
        program = self.vm.program
        pc = self.pc
        if gva is not None:
            return Listing.at(arch, program, self.peek, self.vm.gva_of(gva), count, pc)
        before = count // 3
        return Listing.around(arch, program, self.peek, pc, before, count - before - 1)

    @look
    def source_line(self) -> Line | None:
        """The source line of the program counter; None without debug information."""
        if self.vm.program is None:
            return None
        return self.vm.program.line_at(self.pc)

    @look
    def where(self) -> str:
        """The program counter as symbol+offset, with the source line when there is one."""
        return self.vm.names.place(self.pc)

    @look
    def backtrace(self) -> Backtrace:
        """The functions that have not returned yet, the innermost first, with their source lines.

        They are found by the program's call frame information. Where the trace ends before the
        entry function, it says why. Raises KvmError for a vCPU whose registers are sealed.
        """
        return backtrace(self)

    @look
    def __repr__(self) -> str:
        try:
            at = self.where()
        except LabError as err:
            return f"<Vcpu {self.index} {self.state}: {err}>"
        more = "" if self.exact else "+"
        return f"<Vcpu {self.index} {self.state}, step {self.step_count}{more}, at {at}>"


def _count(value: object, what: str) -> int:
    """A number of instructions; every step of a guest comes through here."""
    return value if type(value) is int else whole(value, what)
