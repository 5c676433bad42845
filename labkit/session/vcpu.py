"""One virtual CPU as people hold it: run, step, look."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from labkit.arch.model import Arch
from labkit.engines.base import BudgetExit, Exit, MonitorVcpu, VmgexitExit
from labkit.engines.disasm import Decoded
from labkit.errors import InvalidState, LabError, NotAvailable
from labkit.guest.program import Program
from labkit.look.vcpu import look_at_vcpu
from labkit.machine.registers import Registers
from labkit.machine.vm import Machine
from labkit.session.arrivals import arrived
from labkit.session.explain import explain, place
from labkit.session.listing import Listing
from labkit.session.running import collect, stream
from labkit.session.stepping import step_line
from labkit.sev.guest import ProtectedGuest
from labkit.sev.vmgexit import complete
from labkit.shown import mimebundle
from labkit.ucall.pool import Ucall

if TYPE_CHECKING:
    from labkit.guest.lines import Line
    from labkit.look.snapshots import VcpuSnapshot

__all__ = ["Host", "Vcpu"]


class Host(Protocol):
    """What a vCPU needs of its VM."""

    machine: Machine
    program: Program | None
    guest: ProtectedGuest | None

    @property
    def arch(self) -> Arch: ...
    def changed(self) -> None: ...
    def gva_of(self, place: str | int) -> int: ...
    def places(self, place: str | int) -> Sequence[int]: ...


class Vcpu:
    """One virtual CPU of a VM."""

    def __init__(self, vm: Host, index: int) -> None:
        self.vm, self.index, self.state = vm, index, "not started"
        self._cpu = vm.machine.vcpus[index]
        self.regs = Registers(vm.arch, self._cpu, vm.changed, self._check_registers)
        self.breakpoints: frozenset[int] = frozenset()
        self.seen: dict[str, int] | None = None  # registers when somebody last looked

    def _check_registers(self) -> None:
        if self.vm.guest is not None:
            self.vm.guest.check_registers(self.index)

    @property
    def sealed(self) -> str:
        """Why the host cannot see or set this vCPU's registers (KvmError EINVAL); "" when it can. The lab's own eye still does."""
        return self.vm.guest.sealed(self.index) if self.vm.guest is not None else ""

    @property
    def step_count(self) -> int:
        """Instructions this vCPU retired; a lower bound where nobody counted (`exact`)."""
        return self._cpu.insns

    @property
    def exact(self) -> bool:
        """Whether every instruction so far was counted."""
        return self._cpu.exact

    @property
    def pc(self) -> int:
        """Address of the instruction that runs next."""
        return self._cpu.read_reg(self.vm.arch.pc)

    @property
    def insn(self) -> Decoded | None:
        """The instruction that runs next: `.mnemonic`, `.op_str`; None where there is none."""
        return next(iter(self.disassemble(self.pc, 1).insns), None)

    def run(self, max_insns: int | None = None) -> Ucall | Exit:
        """Run this vCPU alone until a ucall or another exit; with max_insns at most that far (BudgetExit).

        A VMGEXIT that the host has answered is an event, and the run goes on. Raises InvalidState for a guest whose launch is not finished.
        """
        if max_insns is not None and max_insns < 0:
            raise InvalidState(f"vCPU {self.index}: cannot run {max_insns} instructions")
        if self.vm.guest is None:
            return arrived(self.vm, self, self._cpu.run(max_insns))
        self.vm.guest.check_ready(self.index)
        start = self._cpu.insns
        came = arrived(self.vm, self, self._cpu.run(max_insns))
        while type(came) is VmgexitExit and came.request:
            left = None if max_insns is None else max_insns - (self._cpu.insns - start)
            came = arrived(self.vm, self, self._cpu.run(left))
        return came

    def run_until_done(self, max_insns: int | None = None) -> list[Ucall]:
        """Run this vCPU alone to its DONE and return every ucall on the way.

        Raises GuestAssertFailed on ABORT, BudgetExceeded, and GuestCrashed on anything else that ends a guest.
        """
        return collect(
            stream(self.run, lambda: self.state == "done", lambda: self.step_count, max_insns),
            partial(explain, self.vm),
        )

    def step(self, count: int = 1) -> Ucall | Exit | None:
        """Run count instructions; a ucall or an exit on the way ends it early and is returned."""
        if count < 1:
            raise InvalidState(f"vCPU {self.index}: cannot step {count} instructions")
        came = self.run(count)
        return None if isinstance(came, BudgetExit) else came

    def step_line(self, max_insns: int = 1_000_000) -> Ucall | Exit | None:
        """Run to the start of another source line, into calls too; raises BudgetExceeded when none comes."""
        result: Ucall | Exit | None = step_line(self, max_insns)
        return result

    def complete(self, value: int) -> None:
        """What the IN, MMIO read or hypercall that just exited shall return."""
        if self.vm.guest is None or not complete(self.vm.guest, self.index, value):
            self._cpu.complete(value)
        self.vm.changed()

    @property
    def monitor_survives(self) -> bool:
        """Whether an exclusive monitor (LDXR, LR) stays set between two runs, so that code with exclusives can be stepped.

        Real processors clear it at every exception return, and a debugger that steps a load-exclusive/store-exclusive loop never
        gets out of it (kernel commit b3d937722de0); set it to False to see that. Raises NotAvailable where the engine has no say.
        """
        return self._monitor().monitor_survives

    @monitor_survives.setter
    def monitor_survives(self, on: bool) -> None:
        self._monitor().monitor_survives = on

    def _monitor(self) -> MonitorVcpu:
        if not isinstance(self._cpu, MonitorVcpu):
            raise NotAvailable(
                "this engine's vCPUs run on a real processor, which clears exclusive monitors as it likes"
            )
        return self._cpu

    def args_set(self, *values: int) -> None:
        """Set the arguments of the entry function (vcpu_args_set)."""
        self._check_registers()
        self.vm.machine.set_arguments(self.index, values)
        self.vm.changed()

    def set_entry(self, entry: str | int) -> None:
        """Begin anew at another function, with a fresh stack and the vCPU's index as argument (vcpu_arch_set_entry_point)."""
        self._check_registers()
        self.vm.machine.reset_vcpu(self.index, self.vm.gva_of(entry))
        self.state = "not started"
        self.vm.changed()

    def break_at(self, *places: str | int) -> None:
        """Add breakpoints at symbols, "file.c:12" or gvas."""
        self.set_breakpoints(
            self.breakpoints | {gva for place in places for gva in self.vm.places(place)}
        )

    def set_breakpoints(self, gvas: frozenset[int] | set[int]) -> None:
        """Stop before the instructions at exactly these addresses; raises InvalidState for what is none."""
        for gva in gvas:
            if not 0 <= gva < 1 << 64:
                raise InvalidState(
                    f"vCPU {self.index}: a breakpoint at {gva:#x}, which is no address"
                )
        self.breakpoints = frozenset(gvas)
        self._cpu.set_breakpoints(self.breakpoints)
        self.vm.changed()

    def read(self, gva: int, size: int) -> bytes:
        """Guest-virtual memory through this vCPU's page tables; raises PageFault with the walk."""
        return self.vm.machine.space.read(gva, size, self._root())

    def peek(self, gva: int, size: int) -> bytes:
        """Guest-virtual memory as the guest itself sees it, encrypted or not; raises PageFault with the walk."""
        return self.vm.machine.space.peek(gva, size, self._root())

    def write(self, gva: int, data: bytes) -> None:
        """Write guest-virtual memory as a debugger does, read-only pages included; raises PageFault."""
        self.vm.machine.space.write(gva, data, self._root())
        self.vm.changed()

    def _root(self) -> int:
        return self.vm.arch.root_field.get(self._cpu.read_reg(self.vm.arch.root))

    def disassemble(self, gva: int | str | None = None, count: int = 12) -> Listing:
        """Instructions from gva (or a symbol) on; without one, those around the program counter."""
        if count < 1:
            raise InvalidState(f"vCPU {self.index}: cannot disassemble {count} instructions")
        program, pc = self.vm.program, self.pc
        if gva is None:
            return Listing.around(
                self.vm.arch.name, program, self.peek, pc, count // 3, count - count // 3 - 1
            )
        return Listing.at(self.vm.arch.name, program, self.peek, self.vm.gva_of(gva), count, pc)

    def source_line(self) -> Line | None:
        """The source line of the program counter; None without debug information."""
        return self.vm.program.line_at(self.pc) if self.vm.program else None

    def where(self) -> str:
        """The program counter as symbol+offset, with the source line when there is one."""
        return place(self.vm, self.pc)

    def look(self) -> VcpuSnapshot:
        """Registers, code, stack and what the next instruction touches, as one snapshot that shows itself."""
        return look_at_vcpu(self.vm, self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self.look())

    def __repr__(self) -> str:
        try:
            at = self.where()
        except LabError as err:
            return f"<Vcpu {self.index} {self.state}: {err}>"
        return f"<Vcpu {self.index} {self.state}, step {self.step_count}{'' if self.exact else '+'}, at {at}>"
