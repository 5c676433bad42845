"""One machine: memory, address space and vCPUs on an engine, booted into the state that the selftests' guests expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from labkit.arch.desc import PagingMode
from labkit.arch.model import Arch, BootTables
from labkit.bits import align_up
from labkit.engines import need
from labkit.engines.base import (
    EngineVcpu,
    EngineVm,
    LoggingVm,
    Ownership,
    ParallelVm,
    ProtectingVm,
    Trace,
)
from labkit.engines.exits import Exit
from labkit.errors import InvalidState, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.machine.space import AddressSpace
from labkit.machine.sparsebit import Sparsebit

__all__ = ["STACK_PAGES", "Machine", "MachineState", "Protection"]

STACK_PAGES = 5  # DEFAULT_STACK_PGS
MOST_WRITES = 4096  # of the host between two snapshots, to be kept one by one
MAX_VCPUS = 512  # KVM_MAX_VCPUS of the selftests: one pool slot each


@dataclass(frozen=True)
class MachineState:
    """Everything that makes a machine what it is, bit for bit."""

    slots: tuple[tuple[int, bytes], ...]  # (gpa, contents)
    cpus: tuple[bytes, ...]
    space: Any
    stacks: tuple[int, ...]
    areas: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()


class Protection(Ownership, Protocol):
    """What makes a machine an encrypted one: its key, and which page frames are under it."""

    protected: Sparsebit
    inverted: bool
    on_encrypted: list[
        Callable[[str], None]
    ]  # called with the reason when the page tables become ciphertext

    @property
    def level(self) -> int:
        """1 memory, 2 registers too, 3 with ownership of pages."""

    def adopt_vcpu(self, registers: Callable[[], Mapping[str, int]]) -> None:
        """There is one vCPU more, and this reads its registers."""

    def connect(self, engine: ProtectingVm) -> None:
        """The engine that must be told when a page changes hands."""

    def mode(self, mode: PagingMode) -> PagingMode:
        """The page-table format with its encryption bit."""

    def look(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to access memory; raises what hardware would."""


class Machine:
    """A machine without ucalls: what the selftests call a barebones VM."""

    def __init__(
        self,
        arch: Arch,
        engine: EngineVm,
        memory: Memory,
        privilege: str | None = "kernel",
        protection: Protection | None = None,
    ) -> None:
        if privilege is None:
            privilege = (
                "user"
                if any(can.name == "user_by_default" and can.have for can in engine.capabilities)
                else "kernel"
            )
        if privilege not in ("kernel", "user"):
            raise InvalidState(f'privilege {privilege!r}: there are "kernel" and "user"')
        if privilege == "user" and arch.tables is None:
            raise NotAvailable(
                f"privilege \"user\": {arch.name}'s guests begin in the kernel's mode; only x86-64 has a user's"
            )
        self.arch, self.engine, self.memory, self.is_user = (
            arch,
            engine,
            memory,
            privilege == "user",
        )
        for slot in memory.slots:
            engine.add_memslot(slot.gpa, slot.hva, slot.size)
        memory.on_write += [engine.memory_written, self._note]
        self._logging = engine if isinstance(engine, LoggingVm) else None
        self._parallel = engine if isinstance(engine, ParallelVm) else None
        self._base: MachineState | None = (
            None  # what pages written by guest and host are counted from
        )
        self._written: list[tuple[int, int]] | None = (
            None  # (gpa, bytes) by the host; None: not known
        )
        self._protecting = (
            engine if isinstance(engine, ProtectingVm) and protection is not None else None
        )
        self._protection = protection
        self.space = (
            AddressSpace(memory, arch.mode, self.is_user)
            if protection is None
            else self._protect(protection)
        )
        self.space.check_size = self._check_size
        self.vcpus: list[EngineVcpu] = []
        self.stacks: list[int] = []  # gva of each vCPU's stack, lowest byte
        self.tasks: list[
            int
        ] = []  # gva of each vCPU's own descriptor page, where guests run as users
        self.areas: list[int] = []  # gpa of each vCPU's own memory, where the architecture wants it
        self.preset: dict[str, int] = {}  # registers that every vCPU begins with
        self.tables_gva = self.idt_gva = self.handlers_gva = self.vectors_gva = 0

    def _protect(self, protection: Protection) -> AddressSpace:
        if self._protecting is None:
            raise NotAvailable(
                f'the {self.engine.name} engine cannot encrypt guests: use backend="unicorn"'
            )
        if self.is_user and protection.level > 1:
            raise NotAvailable(
                'privilege "user": only CPL0 can write the GHCB\'s MSR, and without it a guest reaches no host'
            )
        mode = protection.mode(self.arch.mode)
        self._protecting.protect(mode, protection, protection.inverted, protection.level)
        protection.connect(self._protecting)
        self.memory.on_look += [protection.look, self._protecting.memory_needed]
        protection.on_encrypted.append(self.seal)
        return AddressSpace(self.memory, mode, self.is_user, protection.protected)

    @property
    def usual_schedule(self) -> str:
        """The deterministic one, unless it would have to count instructions in a ring where the engine cannot."""
        uncounted = self.is_user and any(
            can.name == "step_user" and not can.have for can in self.engine.capabilities
        )
        return "parallel" if uncounted else "round_robin"

    def _check_size(self, page_size: int) -> None:
        if page_size > 2 << 20:
            need(self.engine, "huge_pages")

    def seal(self, why: str) -> None:
        """The guest was launched: from here on the host can follow no page table, and only the guest's eye sees private pages.

        Without a reason, it was not yet.
        """
        self.space.sealed, self.space.eye = why, self.plain if why else self.memory.read

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the guest's key shows it: as the guest's own page walker reads it."""
        return (
            self.memory.read(gpa, size)
            if self._protecting is None
            else self._protecting.plain(gpa, size)
        )

    def written(self) -> list[tuple[int, Any, Any]]:
        """How the guest wrote its pages last: (gpa of the memslot, through its key, without it), arrays of one bool a page."""
        return [] if self._protecting is None else self._protecting.written()

    def poke(self, gpa: int, data: bytes) -> None:
        """Write memory as the guest's own kernel would, through its key where it is private."""
        if self._protecting is None:
            self.memory.write(gpa, data)
        else:
            self._protecting.write_plain(gpa, data)

    def swap_pages(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table; raises NotAvailable without protection."""
        if self._protecting is None:
            raise NotAvailable("only an encrypted machine has a nested page table to play with")
        self._protecting.swap(gpa, other)

    def boot(self) -> None:
        """Allocate the machine's own tables (x86: GDT, TSS, IDT) and the table of guest exception handlers."""
        arch = self.arch
        if arch.tables is not None:
            self.tables_gva = self.space.alloc(PAGE, "tables")
            self.space.write(self.tables_gva, arch.tables(self.tables_gva, 0))
        if arch.idt is not None:
            self.idt_gva = self.space.alloc(PAGE, "tables")
        self.handlers_gva = self.space.alloc(8 * arch.nr_vectors, "tables")

    def install_handlers(self, handlers: Sequence[int]) -> None:
        """Point the exception table at the guest's own entry stubs."""
        assert self.arch.idt is not None
        self.space.write(self.idt_gva, self.arch.idt(handlers))

    def create_vcpu(self, entry: int, trace: Trace) -> EngineVcpu:
        """Add a vCPU with a stack of its own that will begin at `entry` with its index as first argument."""
        index = len(self.vcpus)
        if index >= MAX_VCPUS:
            raise InvalidState(
                f"a VM has at most {MAX_VCPUS} vCPUs, as the selftests' KVM_MAX_VCPUS"
            )
        self.space.guard()  # a stack that overflows faults there, instead of eating what lies below
        self.stacks.append(self.space.alloc(STACK_PAGES * PAGE, "stacks"))
        if self.is_user:
            self.tasks.append(self._make_task())
        if self.arch.area:
            size = self.arch.area  # which is its alignment too
            self.areas.append(
                align_up(self.space.alloc_pages(2 * size // PAGE - 1, "tables"), size)
            )
        vcpu = self.engine.create_vcpu(index, trace)
        self._attach(vcpu)
        self.reset_vcpu(index, entry)
        return vcpu

    def _make_task(self) -> int:
        """A descriptor page whose exceptions go to a stack of its own: vCPUs must not meet on one."""
        top = self.space.alloc(STACK_PAGES * PAGE, "stacks") + STACK_PAGES * PAGE
        gva = self.space.alloc(PAGE, "tables")
        assert self.arch.tables is not None
        self.space.write(gva, self.arch.tables(gva, top))
        return gva

    def adopt_vcpu(self, trace: Trace) -> None:
        """Add a vCPU whose state will come from a snapshot."""
        self._attach(self.engine.create_vcpu(len(self.vcpus), trace))

    def _attach(self, vcpu: EngineVcpu) -> None:
        self.vcpus.append(vcpu)
        if self._protection is not None:
            self._protection.adopt_vcpu(vcpu.get_regs)

    def reset_vcpu(self, index: int, entry: int) -> None:
        """Bring a vCPU back to its reset state at `entry` (vcpu_arch_set_entry_point() and more)."""
        arch, top = self.arch, self.stacks[index] + STACK_PAGES * PAGE
        gdt, area = (
            self.tasks[index] if self.is_user else self.tables_gva,
            self.areas[index] if self.areas else 0,
        )
        tables = BootTables(
            self.space.root_gpa,
            gdt,
            self.idt_gva,
            gdt + arch.tss_offset,
            self.is_user,
            arch.root_field.put(self.space.root_gpa) | arch.mode.selector,
            self.vectors_gva,
            area,
        )
        for offset, data in arch.area_image(tables).items():
            self.memory.write(area + offset, data)
        own = {arch.cpu_id: index} if arch.cpu_id else {}
        regs = (
            arch.reset(tables)
            | self.preset
            | own
            | {arch.pc: entry, arch.sp: top - arch.stack_bias, arch.arguments[0]: index}
        )
        self.vcpus[index].set_regs(regs)

    def set_arguments(self, index: int, values: Sequence[int]) -> None:
        """Set the integer arguments of the entry function (vcpu_args_set)."""
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
            {name: value & (1 << 64) - 1 for name, value in zip(names, values, strict=False)}
        )

    def run_parallel(self, indices: Sequence[int]) -> tuple[int, Exit]:
        """Run these vCPUs at once, on real threads, until one exits; raises NotAvailable for an engine that cannot."""
        if self._parallel is None:
            why = next(
                (can.why for can in self.engine.capabilities if can.name == "parallel_vcpus"),
                "it does not say why",
            )
            raise NotAvailable(
                f'schedule "parallel": the {self.engine.name} engine runs vCPUs one after the other: {why}'
            )
        return self._parallel.run_parallel(indices)

    def pause(self) -> None:
        """Stop vCPUs that run at once, if there are any."""
        if self._parallel is not None:
            self._parallel.pause()

    def stack_of(self, gva: int) -> int | None:
        """The vCPU whose stack a gva lies in."""
        return next(
            (i for i, base in enumerate(self.stacks) if base <= gva < base + STACK_PAGES * PAGE),
            None,
        )

    def state(self) -> MachineState:
        """All memory, CPU and allocator state."""
        cpus = tuple(vcpu.save() for vcpu in self.vcpus)
        slots = tuple(
            (slot.gpa, self.memory.read(slot.gpa, slot.size)) for slot in self.memory.slots
        )
        views = [] if self._protecting is None else self._protecting.views_state()
        tables = (
            self.tables_gva,
            self.idt_gva,
            self.handlers_gva,
            self.vectors_gva,
            dict(self.preset),
        )
        state = MachineState(
            slots,
            cpus,
            (views, self.space.state(), tables),
            tuple(self.stacks),
            tuple(self.areas),
            tuple(self.tasks),
        )
        self._begin_log(state)
        return state

    def set_state(self, state: MachineState) -> None:
        """Put a state back; raises InvalidState when it is of a machine with other memslots or vCPUs."""
        mine = [(slot.gpa, slot.size) for slot in self.memory.slots]
        if mine != [(gpa, len(data)) for gpa, data in state.slots] or len(self.vcpus) != len(
            state.cpus
        ):
            raise InvalidState(
                f"the snapshot is of a machine with {len(state.cpus)} vCPUs and memslots "
                f"{[(hex(gpa), hex(len(data))) for gpa, data in state.slots]}, not of this one"
            )
        for vcpu, blob in zip(self.vcpus, state.cpus, strict=True):
            vcpu.restore(
                blob
            )  # before memory, which an instruction that was under way may still change
        for gpa, data in self._changed(state):
            self.memory.put(gpa, data)
        self._begin_log(state, fresh=state is self._base)
        views, space, tables = state.space
        self.tables_gva, self.idt_gva, self.handlers_gva, self.vectors_gva, self.preset = tables
        if self._protecting is not None:
            self._protecting.set_views_state(views)
        self.space.set_state(space)
        self.stacks, self.areas, self.tasks = (
            list(state.stacks),
            list(state.areas),
            list(state.tasks),
        )

    def _changed(self, state: MachineState) -> Sequence[tuple[int, bytes]]:
        """What of a state's memory to write back: the pages written since, where engine and host know them; else all."""
        if state is not self._base or self._written is None or self._logging is None:
            return state.slots
        pages = {
            page for gpa, size in self._written for page in range(gpa & -PAGE, gpa + size, PAGE)
        }
        pages.update(self._logging.pages_written())
        return [
            (page, data[page - gpa : page - gpa + PAGE])
            for gpa, data in state.slots
            for page in pages
            if gpa <= page < gpa + len(data)
        ]

    def _begin_log(self, state: MachineState, fresh: bool = False) -> None:
        """From here on, know what differs from this state."""
        if self._logging is not None:
            if not fresh or self._written is None:
                self._logging.pages_written()
            self._base, self._written = state, []

    def _note(self, gpa: int, size: int) -> None:
        """The host wrote memory."""
        if self._written is not None:
            self._written.append((gpa, size))
            if len(self._written) > MOST_WRITES:
                self._written = None

    def close(self) -> None:
        """Release the engine; memory goes with the last reference."""
        self.engine.close()
