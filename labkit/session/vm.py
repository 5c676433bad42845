"""One virtual machine while it runs: what it is made of, who runs in it, what happened in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.arch.x86_cpu import CpuModel
from labkit.checked import checked, checks_itself
from labkit.engines import Capability
from labkit.engines.exits import Exit
from labkit.errors import InvalidState
from labkit.guest.globals import HostGlobals, read_global, write_guest_global
from labkit.guest.loader import DEFAULT_MEMORY, program_string
from labkit.guest.program import Program
from labkit.guest.values import CValue
from labkit.machine.schedule import Schedule
from labkit.machine.vm import Machine
from labkit.outside import plain
from labkit.paging.scan import PageTable
from labkit.session.events import Event, EventLog
from labkit.session.explain import explain
from labkit.session.handlers import install_handler
from labkit.session.make import Plan, as_program, make_barebones, make_twin, make_vm
from labkit.session.names import Names
from labkit.session.progress import watch
from labkit.session.running import collect, run_on, stream_of
from labkit.session.shifts import Shifts
from labkit.session.state import VmState, put_state, take_state
from labkit.session.tables import page_table_of
from labkit.session.turn import Running, Turn, act, look
from labkit.session.vcpu import Vcpu
from labkit.sev.guest import ProtectedGuest
from labkit.ucall.calls import Ucall
from labkit.ucall.designs.stack import StackUcalls
from labkit.ucall.door import UcallDoor
from labkit.ucall.history import history_frame
from labkit.ucall.pool import Pool
from labkit.ucall.snapshot import PoolSnapshot

if TYPE_CHECKING:
    from typing import Self

    import pandas as pd

    from labkit.arch.translation import Translation

__all__ = ["Vm"]


@checked
class Vm:
    """One virtual machine; `Vm.create` makes one with a program, page tables, a pool and vCPUs.

    Attributes: name; backend, the engine's name; program (None: barebones); arch; memory, by gpa;
    machine, which holds the page tables and the engine; cpu, what CPUID and MSRs say; vcpus, by
    index; schedule; protect ("sev", ..., None) and guest, its encryption; ucalls, who reads what
    guests hand over, and door, through which exit they do; names, of its addresses; log, of what
    happened; shifts, which vCPU ran when; closed; observers, who are told of changes.
    """

    vcpus: Sequence[Vcpu]

    def __init__(
        self,
        machine: Machine,
        program: Program | None,
        backend: str,
        name: str,
        schedule: str | None,
        cpu: CpuModel,
        guest: ProtectedGuest | None = None,
    ) -> None:
        self.name = plain(name)
        self.backend = backend
        self.program = program
        self.machine = machine
        self.turn = Turn(name, machine.engine.ask)
        machine.engine.between = self.turn.between
        machine.memory.turn = self.turn
        self.arch = machine.arch
        self.memory = machine.memory
        self.cpu = cpu
        self.vcpus = []
        self.schedule = Schedule.named(schedule or machine.usual_schedule)

        self.guest = guest
        self.protect: str | None = None
        if guest is not None:
            self.protect = guest.kind
            guest.on_command.append(self.changed)

        self.ucalls: Pool | StackUcalls | None = None
        self.door = UcallDoor(machine.arch.ucall)
        self.names = Names(self)
        self.log = EventLog()
        self.shifts = Shifts()
        self.closed = False
        self.observers: list[Callable[[], None]] = []
        self._host_globals = HostGlobals(program) if program is not None else None
        watch(self)

    # --- making VMs

    @classmethod
    def create(
        cls,
        program: Program | str | Path,
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
    ) -> Self:
        """A VM that is ready to run `entry` on every vCPU (vm_create_with_vcpus).

        program: a Program, the path of a C or an ELF file, or C source (for x86-64).
        entry: a function or a gva. memory: bytes of the memslot at gpa 0. paging: a format by name.
        privilege: "kernel" (CPL0) or "user" (CPL3); without it what the engine is made for.
        schedule: see Schedule; "parallel" without it where a guest's ring cannot be counted.
        protect: "sev", "sev-es", "snp" or "tdx" encrypts all pages but those of alloc_shared. The
        guest is launched at once under `policy`, or with launch=False later, step by step, by
        `vm.guest`; the encryption bit is c_bit, else where CPUID says.

        Raises NotAvailable for a backend or a protection that this labkit or machine lacks,
        SymbolNotFound, InvalidState, and for a path or source ElfError and CompileError.
        """
        plan = Plan(
            program=as_program(program),
            entry=entry,
            nr_vcpus=nr_vcpus,
            backend=backend,
            protect=protect,
            ucall=ucall,
            memory=memory,
            schedule=schedule,
            name=name,
            cpu=cpu,
            privilege=privilege,
            policy=policy,
            launch=launch,
            paging=paging,
            c_bit=c_bit,
        )
        return make_vm(cls, plan)

    @classmethod
    def create_barebones(
        cls, arch: str = "x86_64", backend: str = "unicorn", memory: int = DEFAULT_MEMORY
    ) -> Self:
        """A VM with memory (in bytes) and nothing else: no program, no tables, no pool.

        C: vm_create_barebones.
        """
        return make_barebones(cls, arch, backend, memory)

    @act
    def add_vcpu(self, entry: str | int) -> Vcpu:
        """One more vCPU, which begins at a function or a gva (vm_vcpu_add)."""
        index = len(self.vcpus)
        self.machine.create_vcpu(self.gva_of(entry), partial(self.trace, index))
        if self.guest is not None:
            self.guest.add_ghcb(self.machine, index, self.program)
        self.vcpus = [*self.vcpus, self._new_vcpu(index)]
        self.changed()
        return self.vcpus[-1]

    def adopt_vcpu(self) -> None:
        """One more vCPU, whose state will come from a snapshot."""
        index = len(self.vcpus)
        self.machine.adopt_vcpu(partial(self.trace, index))
        self.vcpus = [*self.vcpus, self._new_vcpu(index)]

    def _new_vcpu(self, index: int) -> Vcpu:
        """What people hold of a vCPU; the front door's has looking added."""
        return Vcpu(self, index)

    @property
    def host_pool(self) -> Pool | None:
        """The host's side of the ucall pool; None for a VM without one."""
        return self.ucalls if isinstance(self.ucalls, Pool) else None

    @property
    def privilege(self) -> str:
        """Where guests begin: "kernel" (CPL0) or "user" (CPL3)."""
        return "user" if self.machine.is_user else "kernel"

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What this VM's engine can do, and why not."""
        return self.machine.engine.capabilities

    # --- encryption

    @act
    def launch(self) -> bytes:
        """Encrypt, measure and release a protected guest; returns its measurement.

        For SNP that is its launch digest. C: vm_sev_launch. From then on the host follows no page
        table of it: gva2gpa, read, sync_global_* and alloc are refused.
        """
        measurement = self.need_guest().launch()
        self.changed()
        return measurement

    @act
    def mem_set_private(self, gpa: int, size: int, private: bool = True) -> None:
        """Have the launch encrypt these pages (vm_mem_set_private); size in bytes.

        Raises InvalidState after the launch, and without protection.
        """
        self.need_guest().set_private(gpa, size, private)
        self.changed()

    @act
    def mem_set_shared(self, gpa: int, size: int) -> None:
        """Have the launch leave these pages as they are; page tables are not changed.

        C: vm_mem_set_shared. Raises as mem_set_private does.
        """
        self.mem_set_private(gpa, size, private=False)

    def need_guest(self) -> ProtectedGuest:
        """The encryption of this VM; raises InvalidState when it has none."""
        if self.guest is None:
            raise InvalidState(f"{self.name} is not protected: nothing in it is private")
        return self.guest

    # --- running

    @property
    @look
    def step(self) -> int:
        """The VM's clock: instructions retired by all vCPUs together."""
        return self.machine.engine.retired()

    def run(self, max_insns: int | None = None) -> Ucall | Exit:
        """Run all vCPUs under the schedule until the next ucall or exit of any.

        With max_insns at most that many instructions in all (then BudgetExit).
        """
        with self.turn.run("run", max_insns, self.step):
            try:
                return run_on(self, max_insns)
            finally:
                self.machine.pause()

    def stop(self) -> bool:
        """Have the run that is on end within 100 ms, its state intact (StopExit); from any thread.

        Returns False when no run is on. The VM can go on afterwards as if nothing had been.
        """
        return self.turn.stop()

    @property
    def running(self) -> Running | None:
        """The run that is on: what was called, on which thread, since when; None when none is."""
        return self.turn.running

    def stream(self, max_insns: int | None = None) -> Iterator[Ucall | Exit]:
        """Every ucall and exit until all vCPUs are done, one of them fails, or the budget's end.

        A budget that is used up is a BudgetExit, which comes last.
        """
        return stream_of(self, max_insns)

    def run_until_done(self, max_insns: int | None = None) -> list[Ucall]:
        """Run all vCPUs to their DONE under the schedule; returns every ucall.

        Raises as Vcpu.run_until_done does.
        """
        with self.turn.run("run_until_done", max_insns, self.step):
            return collect(self.stream(max_insns), self.explain)

    @look
    def explain(self, came: Ucall | Exit) -> str:
        """One sentence for what ended a guest: vCPU, instruction, source line, address."""
        return explain(self, came)

    # --- memory

    @look
    def gva2gpa(self, gva: str | int) -> int:
        """Translate a gva or place (`gva_of`) through the VM's page tables (addr_gva2gpa).

        Raises PageFault with who, where and what was found.
        """
        gva = self.gva_of(gva)
        self.machine.space.check_open(f"translate gva {gva:#x}")
        return self.machine.space.walk(gva).require()

    def gpa2hva(self, gpa: int) -> int:
        """The host address of a gpa (addr_gpa2hva); raises MemoryFault for a hole."""
        return self.memory.hva(gpa)

    @act
    def alloc(self, size: int, min_gva: int = 0x2000, kind: str = "alloc") -> int:
        """Zeroed, mapped memory for the guest; size in bytes, returns its gva.

        C: vm_vaddr_alloc, __vm_alloc. `kind` is what memory maps call it. Raises OutOfMemory.
        """
        gva = self.machine.space.alloc(size, kind, min_gva)
        self.changed()
        return gva

    @act
    def alloc_shared(self, size: int, min_gva: int = 0x2000, kind: str = "shared") -> int:
        """The same, but never encrypted where others would be (vm_vaddr_alloc_shared)."""
        gva = self.machine.space.alloc(size, kind, min_gva, protected=False)
        self.changed()
        return gva

    @look
    def read(self, gva: str | int, size: int) -> bytes:
        """Guest-virtual memory from a gva or place (`gva_of`) on, in bytes; raises PageFault."""
        return self.machine.space.read(self.gva_of(gva), size)

    @act
    def write(self, gva: str | int, data: bytes) -> None:
        """Write at a gva or place (`gva_of`) as a debugger does, read-only pages included."""
        self.machine.space.write(self.gva_of(gva), data)
        self.changed()

    def translation(self) -> Translation | None:
        """The page tables that the first vCPU has loaded; None for a VM without vCPU."""
        return self.vcpus[0].translation() if self.vcpus else None

    @look
    def page_table(self, vcpu: Vcpu | None = None, root: int | None = None) -> PageTable:
        """A whole address space as it is mapped now, through the guest's own eye.

        That of a vCPU, as its registers say (the first one's by default), or with root, a gpa, the
        one below that table, in the format that the vCPU uses. It has df, walk(gva), maps(gpa) and
        diff(other); found_by says where root and format come from.
        """
        return page_table_of(self, vcpu, root)

    @property
    @look
    def pool(self) -> PoolSnapshot:
        """The ucall pool now; `.since(other)` marks what changed; raises InvalidState for none."""
        pool = self._need_pool()
        done = frozenset(vcpu.index for vcpu in self.vcpus if vcpu.state == "done")
        return pool.snapshot(self.step, done)

    @property
    @look
    def pool_history(self) -> pd.DataFrame:
        """What happened to the slots of the ucall pool, a row each; the last 65 536 of them.

        step, vcpu (<NA>: the host), slot, event ("taken", "ucall", "given back"), cmd, args, text.
        Raises InvalidState for a VM without a pool.
        """
        return history_frame(self._need_pool().history)

    def _need_pool(self) -> Pool:
        if not isinstance(self.ucalls, Pool):
            raise InvalidState(f"{self.name} was created without a ucall pool")
        return self.ucalls

    # --- names and globals

    @checks_itself
    def gva_of(self, place: str | int) -> int:
        """The gva of a symbol, a "file.c:12", a field, an "f+0x10", or the gva itself.

        Fields are those of globals ("x.field[3]") and of the pool ("ucalls[3].cmd"). Raises
        SymbolNotFound with the names that come near.
        """
        return self.names.gva_of(place)

    @checks_itself
    def places(self, place: str | int) -> Sequence[int]:
        """All gvas of a "file.c:12", else the one that `gva_of` gives; raises as it does."""
        return self.names.places(place)

    @checks_itself
    def string_at(self, gva: int) -> str | None:
        """A string constant of the program, from its file and not from guest memory, or None."""
        return program_string(self.program, gva)

    @act
    def write_guest_global(self, name: str, value: object) -> None:
        """Set this VM's copy of a global, or a part of it, in one store (write_guest_global).

        value: what `read_global` gives, or some fields of a struct. Raises as it does.
        """
        write_guest_global(self.names.program, name, value, self.write, self.read)

    @look
    def read_global(self, name: str) -> CValue:
        """This VM's copy of a global, or of a part of it ("x.field[3]"), by its C type.

        Numbers, pointers and enums are ints, arrays lists, characters bytes; a struct has fields.
        Without debug information all but numbers is bytes. Raises SymbolNotFound, InvalidState.
        """
        return read_global(self.names.program, name, self.read)

    @act
    def sync_global_to_guest(self, name: str) -> None:
        """Copy the host's value of a global into this VM (sync_global_to_guest)."""
        self.host_globals.to_guest(name, self.write)

    @look
    def sync_global_from_guest(self, name: str) -> int | bytes:
        """Copy this VM's value of a global to the host and return it (sync_global_from_guest)."""
        return self.host_globals.from_guest(name, self.read)

    @property
    def host_globals(self) -> HostGlobals:
        """The host's own copy of the program's globals: one on the host, one in each VM.

        `vm.host_globals["x"] = 5`, then sync it to the guest. Raises InvalidState without program.
        """
        if self._host_globals is None:
            raise InvalidState(f"{self.name} has no program, so it has no symbols")
        return self._host_globals

    @act
    def install_exception_handler(self, vector: int, handler: str | int) -> None:
        """Let a guest function handle an exception (vm_install_exception_handler).

        vector: the architecture's number of it; handler: a function or a gva.
        """
        install_handler(self, vector, self.gva_of(handler))

    # --- what happened, and who wants to know

    @property
    @look
    def events(self) -> pd.DataFrame:
        """Everything that happened, a row each: step, vcpu, kind, what, cmd, args, text, slot."""
        return self.log.frame()

    def trace(self, vcpu: int, kind: str, facts: dict[str, object]) -> None:
        """Note something that happened on a vCPU now."""
        self.log.append(Event(self.machine.engine.retired(), vcpu, kind, facts))

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back after every change; returns a function that ends it."""
        self.observers.append(callback)
        return lambda: self.observers.remove(callback)

    def changed(self) -> None:
        """Tell everybody who observes."""
        for tell in list(self.observers):
            tell()

    # --- snapshots

    @look
    def snapshot(self) -> VmState:
        """The whole VM, bit for bit."""
        return take_state(self)

    @act
    def restore(self, state: VmState) -> None:
        """Go back (or on) to a snapshot of this VM.

        Raises InvalidState for one of a VM of another shape.
        """
        put_state(self, state)
        self.changed()

    @look
    def fork(self) -> Self:
        """An independent VM that goes on from here; its pool keeps the addresses handed out."""
        return make_twin(self)

    @act
    def close(self) -> None:
        """Release the engine; the VM cannot run afterwards, and its views keep what they show."""
        self.machine.close()
        self.closed = True
        self.turn.close()
        self.changed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @look
    def __repr__(self) -> str:
        states = ", ".join(f"vCPU {vcpu.index} {vcpu.state}" for vcpu in self.vcpus)
        engine = f"{self.arch.name} on {self.backend}"
        return f"<Vm {self.name}: {engine}, step {self.step}, {states or 'no vCPU'}>"
