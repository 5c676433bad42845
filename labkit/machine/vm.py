"""One machine: memory, address space and vCPUs on an engine, booted as selftests' guests expect.

It knows no ucall, no way of encryption and no view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from labkit.arch.model import Arch, BootTables
from labkit.bits import align_up
from labkit.engines import Capability, need
from labkit.engines.base import (
    EngineVcpu,
    EngineVm,
    LoggingVm,
    ParallelVm,
    PatientVcpu,
    ProtectingVm,
    Trace,
)
from labkit.engines.exits import Exit
from labkit.errors import InvalidState, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.machine.protection import Protection
from labkit.machine.space import AddressSpace
from labkit.machine.state import MachineState, MachineTables, SlotImage, WriteLog
from labkit.paging.entries import Bools

__all__ = ["MAX_VCPUS", "STACK_PAGES", "Machine", "MachineState", "Protection"]

STACK_PAGES = 5  # DEFAULT_STACK_PGS
STACK_SIZE = STACK_PAGES * PAGE
MAX_VCPUS = 512  # KVM_MAX_VCPUS of the selftests: one pool slot each
MASK64 = (1 << 64) - 1


class Machine:
    """A machine without ucalls: what the selftests call a barebones VM.

    Attributes: arch, engine, memory, space (the address space), is_user (guests begin in the least
    privileged ring), vcpus. By vCPU: entries (gva where it began), stacks (gva of its lowest byte),
    tasks (gva of its own descriptor page, where guests run as users), areas (gpa of its own memory,
    where the architecture wants it). preset are registers that every vCPU begins with.

    Raises InvalidState for a privilege that is none, NotAvailable for one that the architecture,
    and for a protection that the engine lacks.
    """

    def __init__(
        self,
        arch: Arch,
        engine: EngineVm,
        memory: Memory,
        privilege: str | None = "kernel",
        protection: Protection | None = None,
    ) -> None:
        self.arch = arch
        self.engine = engine
        self.memory = memory
        self.is_user = _is_user(privilege, arch, engine)
        for slot in memory.slots:
            engine.add_memslot(slot.gpa, slot.hva, slot.size)

        self._log = WriteLog(engine if isinstance(engine, LoggingVm) else None)
        memory.on_write += [engine.memory_written, self._log.note]
        self._parallel = engine if isinstance(engine, ParallelVm) else None

        self._protection = protection
        self._protecting: ProtectingVm | None = None
        if protection is None:
            self.space = AddressSpace(memory, arch.mode, self.is_user)
        else:
            self._protecting = self._protecting_engine(protection)
            self.space = self._protect(protection, self._protecting)
        self.space.check_size = self._check_size

        self.vcpus: list[EngineVcpu] = []
        self.entries: list[int] = []
        self._accepted: set[int] = set()  # entries with which some vCPU has begun
        self.stacks: list[int] = []
        self.tasks: list[int] = []
        self.areas: list[int] = []
        self.preset: dict[str, int] = {}
        self.tables_gva = 0
        self.idt_gva = 0
        self.handlers_gva = 0
        self.vectors_gva = 0

    def close(self) -> None:
        """Release the engine; memory goes with the last reference."""
        self.engine.close()

    # --- encryption

    def _protecting_engine(self, protection: Protection) -> ProtectingVm:
        if not isinstance(self.engine, ProtectingVm):
            raise NotAvailable(
                f'the {self.engine.name} engine cannot encrypt guests: use backend="unicorn"'
            )
        if self.is_user and protection.level > 1:
            raise NotAvailable(
                'privilege "user": only CPL0 can write the GHCB\'s MSR, '
                "and without it a guest reaches no host"
            )
        return self.engine

    def _protect(self, protection: Protection, engine: ProtectingVm) -> AddressSpace:
        """Put engine, host and page tables under a key."""
        mode = protection.mode(self.arch.mode)
        engine.protect(mode, protection, protection.inverted, protection.level)
        protection.connect(engine)
        self.memory.on_look += [protection.look, engine.memory_needed]
        protection.on_encrypted.append(self.seal)
        return AddressSpace(self.memory, mode, self.is_user, protection.protected)

    def seal(self, why: str) -> None:
        """The guest was launched: from here on the host can follow no page table.

        Only the guest's eye sees private pages. Without a reason, it was not yet launched.
        """
        self.space.sealed = why
        self.space.eye = self.plain if why else self.memory.read

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the guest's key shows it: as the guest's own page walker reads it."""
        if self._protecting is None:
            return self.memory.read(gpa, size)
        return self._protecting.plain(gpa, size)

    def written(self) -> list[tuple[int, Bools, Bools]]:
        """How the guest wrote its pages last, one item a memslot.

        (gpa of the memslot, through its key, without it): arrays of one bool a page. Empty without
        protection.
        """
        if self._protecting is None:
            return []
        return self._protecting.written()

    def poke(self, gpa: int, data: bytes) -> None:
        """Write memory as the guest's own kernel would, through its key where it is private."""
        if self._protecting is None:
            self.memory.write(gpa, data)
        else:
            self._protecting.write_plain(gpa, data)

    def swap_pages(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table.

        Raises NotAvailable without protection.
        """
        if self._protecting is None:
            raise NotAvailable("only an encrypted machine has a nested page table to play with")
        self._protecting.swap(gpa, other)

    # --- booting

    def _check_size(self, page_size: int) -> None:
        if page_size > 2 << 20:
            need(self.engine, "huge_pages")

    def boot(self) -> None:
        """Allocate the machine's own tables and the table of guest exception handlers.

        On x86 its own are GDT, TSS and IDT.
        """
        arch = self.arch
        if arch.tables is not None:
            self.tables_gva = self.space.alloc(PAGE, "tables")
            self.space.write(self.tables_gva, arch.tables(self.tables_gva, 0))
        if arch.idt is not None:
            self.idt_gva = self.space.alloc(PAGE, "tables")
        self.handlers_gva = self.space.alloc(8 * arch.nr_vectors, "tables")

    def install_handlers(self, handlers: Sequence[int]) -> None:
        """Point the exception table at the guest's own entry stubs, given by their gvas."""
        assert self.arch.idt is not None
        self.space.write(self.idt_gva, self.arch.idt(handlers))

    def create_vcpu(self, entry: int, trace: Trace) -> EngineVcpu:
        """Add a vCPU with a stack of its own, which begins at `entry` (a gva).

        Its index is the first argument. Raises InvalidState when there are MAX_VCPUS already.
        """
        index = len(self.vcpus)
        if index >= MAX_VCPUS:
            raise InvalidState(
                f"a VM has at most {MAX_VCPUS} vCPUs, as the selftests' KVM_MAX_VCPUS"
            )
        self.space.guard()  # a stack that overflows faults there, instead of eating what lies below
        self.stacks.append(self.space.alloc(STACK_SIZE, "stacks"))
        if self.is_user:
            self.tasks.append(self._make_task())
        if self.arch.area:
            self.areas.append(self._make_area(self.arch.area))
        vcpu = self.engine.create_vcpu(index, trace)
        self._attach(vcpu)
        self.entries.append(entry)
        self.reset_vcpu(index, entry)
        return vcpu

    def _make_task(self) -> int:
        """A descriptor page whose exceptions go to a stack of its own: vCPUs must not share one."""
        top = self.space.alloc(STACK_SIZE, "stacks") + STACK_SIZE
        gva = self.space.alloc(PAGE, "tables")
        assert self.arch.tables is not None
        self.space.write(gva, self.arch.tables(gva, top))
        return gva

    def _make_area(self, size: int) -> int:
        """Physical memory for one vCPU; its size is its alignment too."""
        gpa = self.space.alloc_pages(2 * size // PAGE - 1, "tables")
        return align_up(gpa, size)

    def adopt_vcpu(self, trace: Trace) -> None:
        """Add a vCPU whose state will come from a snapshot."""
        self._attach(self.engine.create_vcpu(len(self.vcpus), trace))

    def _attach(self, vcpu: EngineVcpu) -> None:
        self.vcpus.append(vcpu)
        if self._protection is not None:
            self._protection.adopt_vcpu(vcpu.get_regs)

    def reset_vcpu(self, index: int, entry: int) -> None:
        """Bring a vCPU back to its reset state at `entry`.

        vcpu_arch_set_entry_point() and more.
        """
        arch = self.arch
        self.entries[index] = entry
        tables = self._boot_tables(index)
        for offset, data in arch.area_image(tables).items():
            self.memory.write(tables.area + offset, data)

        registers = arch.reset(tables) | self.preset
        if arch.cpu_id:
            registers[arch.cpu_id] = index
        registers[arch.pc] = entry
        registers[arch.sp] = self.stacks[index] + STACK_SIZE - arch.stack_bias
        registers[arch.arguments[0]] = index
        vcpu = self.vcpus[index]
        # The first one shows whether the engine takes an entry; then the others need not.
        if entry in self._accepted and isinstance(vcpu, PatientVcpu):
            vcpu.begin_with(registers)
        else:
            vcpu.set_regs(registers)
            self._accepted.add(entry)

    def _boot_tables(self, index: int) -> BootTables:
        """Where one vCPU finds the tables that it begins with."""
        arch = self.arch
        root_gpa = self.space.root_gpa
        gdt = self.tasks[index] if self.is_user else self.tables_gva
        return BootTables(
            root_gpa=root_gpa,
            gdt=gdt,
            idt=self.idt_gva,
            tss=gdt + arch.tss_offset,
            user=self.is_user,
            root=arch.root_field.put(root_gpa) | arch.mode.selector,
            vectors=self.vectors_gva,
            area=self.areas[index] if self.areas else 0,
        )

    def set_arguments(self, index: int, values: Sequence[int]) -> None:
        """Set the integer arguments of the entry function (vcpu_args_set).

        Raises InvalidState for more than there are registers, and for one that does not fit.
        """
        names = self.arch.arguments
        if not 1 <= len(values) <= len(names):
            raise InvalidState(
                f"args_set takes 1 to {len(names)} values on {self.arch.name}, not {len(values)}"
            )
        for value in values:
            if not -1 << 63 <= value < 1 << 64:
                raise InvalidState(
                    f"args_set: {value:#x} does not fit into the 64 bits of an argument"
                )
        self.vcpus[index].set_regs(
            {name: value & MASK64 for name, value in zip(names, values, strict=False)}
        )

    def stack_of(self, gva: int) -> int | None:
        """The vCPU whose stack a gva lies in."""
        for index, base in enumerate(self.stacks):
            if base <= gva < base + STACK_SIZE:
                return index
        return None

    # --- running

    @property
    def usual_schedule(self) -> str:
        """The deterministic one, unless it would count instructions where the engine cannot.

        That is in a ring where it has no way to.
        """
        if self.is_user:
            step_user = _capability(self.engine.capabilities, "step_user")
            if step_user is not None and not step_user.have:
                return "parallel"
        return "round_robin"

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Run these vCPUs at once, on real threads, until one exits: (its index, the exit).

        Raises NotAvailable for an engine that cannot.
        """
        if self._parallel is None:
            can = _capability(self.engine.capabilities, "parallel_vcpus")
            why = "it does not say why" if can is None else can.why
            raise NotAvailable(
                f'schedule "parallel": the {self.engine.name} engine runs vCPUs '
                f"one after the other: {why}"
            )
        return self._parallel.run_parallel(indices)

    def pause(self) -> None:
        """Stop vCPUs that run at once, if there are any."""
        if self._parallel is not None:
            self._parallel.pause()

    # --- snapshots

    def state(self) -> MachineState:
        """All memory, CPU and allocator state."""
        tables = MachineTables(
            tables_gva=self.tables_gva,
            idt_gva=self.idt_gva,
            handlers_gva=self.handlers_gva,
            vectors_gva=self.vectors_gva,
            preset=dict(self.preset),
        )
        state = MachineState(
            cpus=tuple(vcpu.save() for vcpu in self.vcpus),
            slots=tuple(
                SlotImage(slot.gpa, self.memory.read(slot.gpa, slot.size))
                for slot in self.memory.slots
            ),
            views=[] if self._protecting is None else self._protecting.views_state(),
            space=self.space.state(),
            tables=tables,
            entries=tuple(self.entries),
            stacks=tuple(self.stacks),
            areas=tuple(self.areas),
            tasks=tuple(self.tasks),
        )
        self._log.restart(state)
        return state

    def set_state(self, state: MachineState) -> None:
        """Put a state back.

        Raises InvalidState when it is of a machine with other memslots or vCPUs.
        """
        self._check_shape(state)
        # Before memory, which an instruction that was under way may still change.
        for vcpu, saved in zip(self.vcpus, state.cpus, strict=True):
            vcpu.restore(saved)
        for gpa, data in state.pieces(self._log.restart(state)):
            self.memory.put(gpa, data)

        if self._protecting is not None:
            self._protecting.set_views_state(list(state.views))
        self.space.set_state(state.space)
        self.tables_gva = state.tables.tables_gva
        self.idt_gva = state.tables.idt_gva
        self.handlers_gva = state.tables.handlers_gva
        self.vectors_gva = state.tables.vectors_gva
        self.preset = dict(state.tables.preset)
        self.entries = list(state.entries)
        self.stacks = list(state.stacks)
        self.areas = list(state.areas)
        self.tasks = list(state.tasks)

    def _check_shape(self, state: MachineState) -> None:
        mine = [(slot.gpa, slot.size) for slot in self.memory.slots]
        its = [(slot.gpa, len(slot.data)) for slot in state.slots]
        if mine != its or len(self.vcpus) != len(state.cpus):
            raise InvalidState(
                f"the snapshot is of a machine with {len(state.cpus)} vCPUs and memslots "
                f"{[(hex(gpa), hex(size)) for gpa, size in its]}, not of this one"
            )


def _capability(capabilities: Iterable[Capability], name: str) -> Capability | None:
    """What an engine says of one thing that it can or cannot do."""
    return next((can for can in capabilities if can.name == name), None)


def _is_user(privilege: str | None, arch: Arch, engine: EngineVm) -> bool:
    """Whether guests begin in the least privileged ring; without a word, as the engine would."""
    if privilege is None:
        by_default = _capability(engine.capabilities, "user_by_default")
        privilege = "user" if by_default is not None and by_default.have else "kernel"
    if privilege not in ("kernel", "user"):
        raise InvalidState(f'privilege {privilege!r}: there are "kernel" and "user"')
    if privilege == "user" and arch.tables is None:
        raise NotAvailable(
            f"privilege \"user\": {arch.name}'s guests begin in the kernel's mode; "
            "only x86-64 has a user's"
        )
    return privilege == "user"
