"""The front door: Vm and Vcpu, composed of the rooms below. The only file that knows them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from labkit.arch import find_arch
from labkit.arch.x86_cpu import CpuModel
from labkit.bits import align_up
from labkit.engines import Capability, open_engine
from labkit.engines.base import Exit
from labkit.errors import InvalidState, NotAvailable
from labkit.guest.globals import GlobalVar, HostGlobals, write_guest_global
from labkit.guest.loader import (
    DEFAULT_MEMORY,
    kernel_globals,
    load_program,
    memory_for,
    program_string,
)
from labkit.hosts.buttons import VmController
from labkit.look.encryption import EncryptionMap
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress
from labkit.look.snapshots import MemoryMap, VmSnapshot
from labkit.look.vcpu import label_gva, look_at_memory
from labkit.look.vm import gpa_of, look_at_encryption, look_at_launch, look_at_vm, look_through_both
from labkit.machine.memory import PAGE, Memory
from labkit.machine.schedule import Schedule
from labkit.machine.vm import MAX_VCPUS, Machine
from labkit.paging.scan import PageTable, scan
from labkit.session.events import Event, events_frame
from labkit.session.explain import explain
from labkit.session.running import collect, run_on, stream
from labkit.session.state import VmState, fork, put_state, take_state
from labkit.session.vcpu import Vcpu
from labkit.sev import protection
from labkit.sev.guest import ProtectedGuest
from labkit.shown import draw_with
from labkit.ucall.abi import HEADER_SIZE
from labkit.ucall.designs import DESIGNS, make_ucalls
from labkit.ucall.designs.stack import StackUcalls
from labkit.ucall.door import UcallDoor
from labkit.ucall.pool import Pool, PoolSnapshot, Ucall

if TYPE_CHECKING:
    import pandas as pd

    from labkit.guest.program import Program
    from labkit.sev import MakeGuest
    from labkit.views.live import Hub

__all__ = ["Vcpu", "Vm", "VmState"]


class Vm:
    """One virtual machine; `Vm.create` makes one with a program, page tables, a ucall pool and vCPUs."""

    def __init__(
        self,
        machine: Machine,
        program: Program | None,
        backend: str,
        name: str,
        schedule: str | None,
        cpu: CpuModel,
    ) -> None:
        self.machine, self.program, self.backend, self.name = machine, program, backend, name
        self.arch, self.memory, self.cpu, self.door = (
            machine.arch,
            machine.memory,
            cpu,
            UcallDoor(machine.arch.ucall),
        )
        self.schedule = Schedule.named(schedule or machine.usual_schedule)
        self.vcpus: list[Vcpu] = []
        self.protect: str | None = None
        self.guest: ProtectedGuest | None = None  # its encryption
        self._ucalls: Pool | StackUcalls | None = None  # who reads what guests hand over
        self._events, self._observers = list[Event | Ucall](), list[Callable[[], None]]()
        self._host, self._string = (
            HostGlobals(program) if program else None,
            partial(program_string, program),
        )
        self._seen_pool: PoolSnapshot | None = None
        self._seen_eyes: dict[int, PageEyes] = {}
        self._hub: Hub | None = None

    # --- making VMs

    @classmethod
    def create(
        cls,
        program: Program,
        entry: str | int = "guest_code",
        nr_vcpus: int = 1,
        backend: str = "unicorn",
        protect: str | None = None,
        ucall: str | None = "pool",
        memory: int | None = None,
        schedule: str | None = None,
        name: str | None = None,
        cpu: CpuModel | None = None,
        privilege: str | None = None,
        policy: int | None = None,
        launch: bool = True,
        paging: str = "",
        c_bit: int | None = None,
    ) -> Vm:
        """A VM that is ready to run `entry`, a function or a gva, on every vCPU (vm_create_with_vcpus); memory in bytes, paging by name.

        privilege: "kernel" (CPL0) or "user" (CPL3); without it, as the engine's capability "user_by_default" says.
        schedule: see Schedule; without it "round_robin", and "parallel" for guests that run in a ring in which nobody can count.
        protect: "sev", "sev-es", "snp" or "tdx" encrypts the guest: every page but those of alloc_shared, launched at once under
        `policy` (or with launch=False later, step by step, by `vm.guest`), with the encryption bit at c_bit (else CPUID says where).

        Raises NotAvailable for a backend or a protection this labkit or machine lacks, SymbolNotFound, InvalidState.
        """
        if ucall not in (*DESIGNS, None):
            raise NotAvailable(
                f"ucall={ucall!r}: there are {', '.join(DESIGNS)}, or None for a VM without ucalls",
                ucall=ucall,
            )
        if not 1 <= nr_vcpus <= MAX_VCPUS:
            raise InvalidState(
                f"a VM needs at least one vCPU and has at most {MAX_VCPUS}, not {nr_vcpus}"
            )
        start = entry if isinstance(entry, int) else program.symbol(entry).gva
        size = memory_for(program, nr_vcpus, HEADER_SIZE) if memory is None else memory
        guest = protection(protect, policy, c_bit, launch)
        vm = cls._bare(
            program.arch,
            backend,
            [(0, size)],
            program,
            name or program.name,
            schedule,
            cpu,
            privilege,
            guest,
            paging,
        )
        load_program(program, vm.machine.space)
        vm.machine.boot()
        kernel_globals(program, vm.machine, vm.cpu)
        if ucall is not None:
            vm._take_ucalls(ucall)
        vm.door.open(program, vm.machine.space)
        for _ in range(nr_vcpus):
            vm._add_vcpu(start)
        if vm.guest is not None and launch:
            vm.launch()
        return vm

    @classmethod
    def create_barebones(
        cls, arch: str = "x86_64", backend: str = "unicorn", memory: int = DEFAULT_MEMORY
    ) -> Vm:
        """A VM with memory and nothing else (vm_create_barebones): no program, no tables, no pool."""
        return cls._bare(arch, backend, [(0, memory)], None, "barebones", None, None, "kernel")

    @classmethod
    def _bare(
        cls,
        arch: str,
        backend: str,
        slots: list[tuple[int, int]],
        program: Program | None,
        name: str,
        schedule: str | None,
        cpu: CpuModel | None,
        privilege: str | None,
        protect: MakeGuest | None = None,
        paging: str = "",
    ) -> Vm:
        cpu, memory = cpu.copy() if cpu else CpuModel(), Memory()
        for gpa, size in slots:
            memory.add(gpa, align_up(size, PAGE))
        guest = protect(memory, cpu) if protect is not None else None
        engine = open_engine(backend, arch, cpu)
        vm = cls(
            Machine(find_arch(arch, paging), engine, memory, privilege, guest),
            program,
            backend,
            name,
            schedule,
            cpu,
        )
        if guest is not None:
            vm.guest, vm.protect = guest, guest.kind
            guest.on_command.append(vm.changed)
        return vm

    def launch(self) -> bytes:
        """Encrypt, measure and release a protected guest (vm_sev_launch); returns its measurement (SNP: its launch digest).

        From then on the host follows no page table of it: gva2gpa, read, sync_global_* and alloc are refused.
        """
        guest = self._need_guest()
        measurement = guest.launch()
        self.changed()
        return measurement

    def _take_ucalls(self, design: str) -> None:
        program = self._need_program()
        self._ucalls = make_ucalls(design, program, self.machine.space)
        if self._pool is not None and "ucall_pool" in program.symbols:
            self.write_guest_global("ucall_pool", self._pool.gva)

    @property
    def _pool(self) -> Pool | None:
        return self._ucalls if isinstance(self._ucalls, Pool) else None

    def _add_vcpu(self, entry: int) -> None:
        index = len(self.vcpus)
        self.machine.create_vcpu(entry, partial(self._trace, index))
        if self.guest is not None:
            self.guest.add_ghcb(self.machine, index, self.program)
        self.vcpus.append(Vcpu(self, index))

    def add_vcpu(self, entry: str | int) -> Vcpu:
        """One more vCPU (vm_vcpu_add)."""
        self._add_vcpu(self.gva_of(entry))
        self.changed()
        return self.vcpus[-1]

    # --- running

    @property
    def step(self) -> int:
        """The VM's clock: instructions retired by all vCPUs together."""
        return self.machine.engine.retired()

    def run(self, max_insns: int | None = None) -> Ucall | Exit:
        """Run all vCPUs under the schedule until the next ucall or exit of any; at most max_insns in all (BudgetExit)."""
        try:
            return run_on(self, max_insns)
        finally:
            self.machine.pause()

    def stream(self, max_insns: int | None = None) -> Iterator[Ucall | Exit]:
        """Every ucall and exit until all vCPUs are done, one of them fails, or the budget is used up (then BudgetExit last)."""
        try:
            yield from stream(partial(run_on, self), self._all_done, lambda: self.step, max_insns)
        finally:
            self.machine.pause()

    def _all_done(self) -> bool:
        return all(vcpu.state == "done" for vcpu in self.vcpus)

    def run_until_done(self, max_insns: int | None = None) -> list[Ucall]:
        """Run all vCPUs to their DONE under the schedule; returns every ucall, raises as Vcpu.run_until_done does."""
        return collect(self.stream(max_insns), self.explain)

    def explain(self, came: Ucall | Exit) -> str:
        """One sentence for what ended a guest: vCPU, instruction, source line, address."""
        return explain(self, came)

    # --- memory

    def gva2gpa(self, gva: int) -> int:
        """Translate through the VM's page tables (addr_gva2gpa); raises PageFault with who, where and what was found."""
        self.machine.space.check_open(f"translate gva {gva:#x}")
        return self.machine.space.walk(gva).require()

    def gpa2hva(self, gpa: int) -> int:
        """The host address of a gpa (addr_gpa2hva); raises MemoryFault for a hole."""
        return self.memory.hva(gpa)

    def alloc(self, size: int, min_gva: int = 0x2000, kind: str = "alloc") -> int:
        """Zeroed, mapped memory for the guest, in bytes (vm_vaddr_alloc, __vm_alloc); returns its gva."""
        return self._alloc(size, kind, min_gva, True)

    def _alloc(self, size: int, kind: str, min_gva: int, protected: bool) -> int:
        gva = self.machine.space.alloc(size, kind, min_gva, protected=protected)
        self.changed()
        return gva

    def mem_set_private(self, gpa: int, size: int, private: bool = True) -> None:
        """Have the launch encrypt these pages (vm_mem_set_private); raises InvalidState after it, and without protection."""
        self._need_guest().set_private(gpa, size, private)
        self.changed()

    def mem_set_shared(self, gpa: int, size: int) -> None:
        """Have the launch leave these pages as they are (vm_mem_set_shared); page tables are not changed."""
        self.mem_set_private(gpa, size, False)

    def _need_guest(self) -> ProtectedGuest:
        if self.guest is None:
            raise InvalidState(f"{self.name} is not protected: nothing in it is private")
        return self.guest

    def alloc_shared(self, size: int, min_gva: int = 0x2000, kind: str = "shared") -> int:
        """The same, but never encrypted (vm_vaddr_alloc_shared); without protection there is no difference."""
        return self._alloc(size, kind, min_gva, False)

    def read(self, gva: int, size: int) -> bytes:
        """Guest-virtual memory through the VM's own page tables."""
        return self.machine.space.read(gva, size)

    def write(self, gva: int, data: bytes) -> None:
        """Write guest-virtual memory, read-only pages included, as a debugger does."""
        self.machine.space.write(gva, data)
        self.changed()

    # --- globals: one copy per VM

    def write_guest_global(self, name: str, value: int | bytes) -> None:
        """Set this VM's copy of a global in one store (write_guest_global)."""
        write_guest_global(self._need_program(), name, value, self.write)

    def sync_global_to_guest(self, name: str) -> None:
        """Copy the host's value of a global into this VM (sync_global_to_guest)."""
        self.host_globals.to_guest(name, self.write)

    def sync_global_from_guest(self, name: str) -> int | bytes:
        """Copy this VM's value of a global to the host and return it (sync_global_from_guest)."""
        return self.host_globals.from_guest(name, self.read)

    @property
    def host_globals(self) -> HostGlobals:
        """The host's own copy of the program's globals: `vm.host_globals["x"] = 5`, then sync it to the guest."""
        self._need_program()
        assert self._host is not None
        return self._host

    def install_exception_handler(self, vector: int, handler: str | int) -> None:
        """Let a guest function handle an exception (vm_install_exception_handler)."""
        if not 0 <= vector < self.arch.nr_vectors:
            raise InvalidState(
                f"{self.arch.name} has no exception {vector}, only 0 to {self.arch.nr_vectors - 1}"
            )
        pointer = GlobalVar(
            "a handler's address",
            self.machine.handlers_gva + 8 * vector,
            8,
            True,
            False,
            self.arch.mode.byteorder,
        )
        self.write(pointer.gva, pointer.encode(self.gva_of(handler)))

    def _need_program(self) -> Program:
        if self.program is None:
            raise InvalidState(f"{self.name} has no program, so it has no symbols")
        return self.program

    def gva_of(self, place: str | int) -> int:
        """A symbol's address, or the address itself."""
        return place if isinstance(place, int) else self._need_program().symbol(place).gva

    def places(self, place: str | int) -> Sequence[int]:
        """The addresses of a symbol, a "file.c:12" or a gva."""
        return (place,) if isinstance(place, int) else self._need_program().places(place)

    # --- looking

    @property
    def pool(self) -> PoolSnapshot:
        """The ucall pool now; changes are marked against the last time this was asked."""
        if self._pool is None:
            raise InvalidState(f"{self.name} was created without a ucall pool")
        done = frozenset(v.index for v in self.vcpus if v.state == "done")
        self._seen_pool = self._pool.snapshot(self.step, done, self._seen_pool)
        return self._seen_pool

    def page_table(self) -> PageTable:
        """The whole address space as it is mapped now, through the guest's eye: df, walk(gva), maps(gpa), diff(other)."""
        space = self.machine.space
        return scan(space.eye, space.mode, space.root_gpa, self.step, partial(label_gva, self))

    def encryption_map(self) -> EncryptionMap:
        """Every range of guest memory: what the page tables say of its encryption, what it really is, where the two disagree."""
        return look_at_encryption(self)

    def launch_progress(self) -> LaunchProgress:
        """The launch so far: each command and what came of it, the growing digest, the guest's state."""
        self._need_guest()
        return look_at_launch(self)

    def eyes(self, gpa: int | None = None, gva: int | None = None) -> PageEyes:
        """One page, by gpa or gva, through two eyes: the host's and the guest's; changes are marked against the last look at it.

        Raises InvalidState without exactly one address, PageFault and MemoryFault for one where nothing is.
        """
        page = gpa_of(self, gpa, gva) & -PAGE
        self._seen_eyes[page] = look_through_both(self, page, self._seen_eyes.get(page))
        return self._seen_eyes[page]

    def memory_map(self) -> MemoryMap:
        """What lies where in guest-physical memory."""
        return look_at_memory(self)

    def look(self, vcpu: int = 0) -> VmSnapshot:
        """All of the VM as one snapshot that shows itself; `vcpu` is the one in front."""
        return look_at_vm(self, vcpu)

    def show(self, kind: str = "vm") -> Any:
        """A live view that follows the VM: all of it, or one part alone; a saved notebook keeps its picture, a terminal its text.

        kind: "stepper", "pool", "pages", "memory", for a protected VM also "encryption", "eyes" (the selected page) and "launch";
        raises InvalidState for any other.
        """
        from labkit.views.dashboard import SECRETS
        from labkit.views.live import Hub
        from labkit.views.widget import LabWidget

        if kind in SECRETS:
            self._need_guest()
        self._hub = self._hub or Hub(VmController(self))
        return LabWidget(self._hub, kind)

    @property
    def events(self) -> pd.DataFrame:
        """Everything that happened: seq, step, vcpu, kind, what, and the facts of each kind."""
        return events_frame(self._events)

    def _trace(self, vcpu: int, kind: str, facts: dict[str, object]) -> None:
        self._events.append(Event(self.step, vcpu, kind, facts))

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back after every change; returns a function that ends it."""
        self._observers.append(callback)
        return lambda: self._observers.remove(callback)

    def changed(self) -> None:
        """Tell everybody who observes."""
        for tell in list(self._observers):
            tell()

    @property
    def privilege(self) -> str:
        """Where guests begin: "kernel" (CPL0) or "user" (CPL3)."""
        return "user" if self.machine.is_user else "kernel"

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this VM's engine can do, and why not."""
        return self.machine.engine.capabilities

    # --- snapshots

    def snapshot(self) -> VmState:
        """The whole VM, bit for bit."""
        return take_state(self)

    def restore(self, state: VmState) -> None:
        """Go back (or on) to a snapshot of this VM; raises InvalidState for one of a VM of another shape."""
        put_state(self, state)
        self.changed()

    def fork(self) -> Vm:
        """An independent VM that goes on from here; its pool keeps the addresses that this one handed out."""
        slots = [(slot.gpa, slot.size) for slot in self.memory.slots]
        guest = protection(self.protect, None, self.guest.c_bit if self.guest else None)
        twin = self._bare(
            self.arch.name,
            self.backend,
            slots,
            self.program,
            f"{self.name} (fork)",
            self.schedule.name,
            self.cpu,
            self.privilege,
            guest,
            self.arch.mode.name,
        )
        fork(self, twin)
        return twin

    def close(self) -> None:
        """Release the engine; the VM cannot run afterwards."""
        self.machine.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        states = ", ".join(f"vCPU {v.index} {v.state}" for v in self.vcpus) or "no vCPU"
        return f"<Vm {self.name}: {self.arch.name} on {self.backend}, step {self.step}, {states}>"


draw_with(
    lambda snapshot: import_module("labkit.views.dashboard").bundle(snapshot)
)  # which loads when first needed
