"""Makes VMs: with a program and vCPUs, barebones, or as a twin of another."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from labkit.arch import find_arch
from labkit.arch.x86_cpu import CpuModel
from labkit.bits import align_up
from labkit.engines import open_engine
from labkit.engines.interrupt import shield
from labkit.errors import InvalidState, NotAvailable
from labkit.guest.loader import kernel_globals, load_program, memory_for
from labkit.guest.program import Program
from labkit.machine.memory import PAGE, Memory
from labkit.machine.vm import MAX_VCPUS, Machine
from labkit.session.state import put_state, take_state
from labkit.sev import protection
from labkit.ucall.abi import HEADER_SIZE
from labkit.ucall.designs import DESIGNS, make_ucalls

if TYPE_CHECKING:
    from labkit.session.vm import Vm
    from labkit.sev import MakeGuest
    from labkit.sev.guest import ProtectedGuest

    AnyVm = TypeVar("AnyVm", bound=Vm)

__all__ = ["Plan", "as_program", "make_barebones", "make_twin", "make_vm"]


@dataclass(frozen=True)
class Plan:
    """What a VM shall be, before there is one; the fields are the arguments of `Vm.create`."""

    program: Program
    entry: str | int
    nr_vcpus: int
    backend: str
    protect: str | None
    ucall: str | None
    memory: int | None
    schedule: str | None
    name: str | None
    cpu: CpuModel | None
    privilege: str | None
    policy: int | None
    launch: bool
    paging: str
    c_bit: int | None

    def check(self) -> None:
        """Raise NotAvailable or InvalidState for what no VM can be."""
        if self.ucall is not None and self.ucall not in DESIGNS:
            designs = ", ".join(DESIGNS)
            raise NotAvailable(
                f"ucall={self.ucall!r}: there are {designs}, or None for a VM without ucalls",
                ucall=self.ucall,
            )
        if not 1 <= self.nr_vcpus <= MAX_VCPUS:
            raise InvalidState(
                f"a VM needs at least one vCPU and has at most {MAX_VCPUS}, not {self.nr_vcpus}"
            )


def as_program(guest: Program | str | Path, arch: str = "x86_64") -> Program:
    """What a user has in hand as a Program: one already, a path to C or ELF, or C source.

    Text with more than one line, or with a brace, is C source. `arch` is what C is compiled for.
    Raises ElfError, CompileError, and InvalidState for what is none of these.
    """
    if isinstance(guest, Program):
        return guest
    if not isinstance(guest, str | Path):
        raise InvalidState(f"a guest is a Program, a path or C source, not {guest!r}")
    if isinstance(guest, str) and ("\n" in guest or "{" in guest):
        return Program.compile(guest, arch=arch)
    if Path(guest).suffix == ".c":
        return Program.compile(Path(guest), arch=arch)
    return Program.load(guest)


def make_vm(kind: type[AnyVm], plan: Plan) -> AnyVm:
    """A VM of this class with program, page tables, ucalls and vCPUs; launched if protected."""
    plan.check()
    with shield().held():
        return _make_vm(kind, plan)


def _make_vm(kind: type[AnyVm], plan: Plan) -> AnyVm:
    program = plan.program
    start = plan.entry if isinstance(plan.entry, int) else program.places(plan.entry)[0]
    size = plan.memory
    if size is None:
        size = memory_for(program, plan.nr_vcpus, HEADER_SIZE)
    cpu = plan.cpu.copy() if plan.cpu is not None else CpuModel()
    machine, guest = _open_machine(
        arch=program.arch,
        paging=plan.paging,
        backend=plan.backend,
        slots=[(0, size)],
        cpu=cpu,
        privilege=plan.privilege,
        protect=protection(plan.protect, plan.policy, plan.c_bit, plan.launch),
    )
    name = plan.name or program.name
    vm = kind(machine, program, plan.backend, name, plan.schedule, cpu, guest)

    load_program(program, machine.space)
    machine.boot()
    kernel_globals(program, machine, cpu)
    if plan.ucall is not None:
        vm.ucalls = make_ucalls(plan.ucall, program, machine.space)
        if vm.host_pool is not None and "ucall_pool" in program.symbols:
            vm.write_guest_global("ucall_pool", vm.host_pool.gva)
    vm.door.open(program, machine.space)
    for _ in range(plan.nr_vcpus):
        vm.add_vcpu(start)
    if vm.guest is not None and plan.launch:
        vm.launch()
    return vm


def make_barebones(kind: type[AnyVm], arch: str, backend: str, memory: int) -> AnyVm:
    """A VM of this class with memory and nothing else: no program, no tables, no pool."""
    cpu = CpuModel()
    with shield().held():
        machine, _ = _open_machine(arch, "", backend, [(0, memory)], cpu, "kernel", None)
        return kind(machine, None, backend, "barebones", None, cpu, None)


def make_twin(vm: AnyVm) -> AnyVm:
    """An independent VM that goes on from where vm is; its pool keeps the addresses handed out."""
    cpu = vm.cpu.copy()
    machine, guest = _open_machine(
        arch=vm.arch.name,
        paging=vm.arch.mode.name,
        backend=vm.backend,
        slots=[(slot.gpa, slot.size) for slot in vm.memory.slots],
        cpu=cpu,
        privilege=vm.privilege,
        protect=protection(vm.protect, None, None if vm.guest is None else vm.guest.c_bit),
    )
    name = f"{vm.name} (fork)"
    twin = type(vm)(machine, vm.program, vm.backend, name, vm.schedule.name, cpu, guest)

    state = take_state(vm)
    twin.door = copy(vm.door)
    if vm.ucalls is not None:
        twin.ucalls = vm.ucalls.twin(machine.space)
    for _ in vm.vcpus:
        twin.adopt_vcpu()
    put_state(twin, state)
    return twin


def _open_machine(
    arch: str,
    paging: str,
    backend: str,
    slots: list[tuple[int, int]],
    cpu: CpuModel,
    privilege: str | None,
    protect: MakeGuest | None,
) -> tuple[Machine, ProtectedGuest | None]:
    """A machine with memslots of (gpa, bytes), and what protects it if anything does."""
    memory = Memory()
    for gpa, size in slots:
        memory.add(gpa, align_up(size, PAGE))
    guest = protect(memory, cpu) if protect is not None else None
    engine = open_engine(backend, arch, cpu)
    return Machine(find_arch(arch, paging), engine, memory, privilege, guest), guest
