"""What is left of one run when it is over, kept for a comparison.

Events, registers, memory, and names for places in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from labkit.errors import LabError
from labkit.paging.scan import PageTable
from labkit.session.events import Happened
from labkit.session.explain import ending
from labkit.session.vm import Vm

if TYPE_CHECKING:
    from labkit.session.running import Came

__all__ = ["NO_GPA", "AnyVm", "Memslot", "Pair", "Side", "engine_names", "look_back"]

AnyVm = TypeVar("AnyVm", bound=Vm)
U64 = NDArray[np.uint64]

NO_GPA = ~np.uint64(0)
"""What `Side.gpas` gives for a value that is no address of the VM's memory."""


class Memslot(NamedTuple):
    """One range of a VM's memory, and what it held in the end."""

    gpa: int
    hva: int
    data: bytes


@dataclass(frozen=True)
class Side:
    """One engine's half of a comparison.

    end is a word, and why a sentence, "" for a good end. states and regs have an element per vCPU.
    can has the names of what the engine declares, and "counted" when it counted every instruction
    of this run. label says what lies at a gva.
    """

    name: str
    backend: str
    end: str
    why: str
    log: tuple[Happened, ...]
    states: tuple[str, ...]
    regs: tuple[Mapping[str, int], ...]
    slots: tuple[Memslot, ...]
    page_table: PageTable
    can: frozenset[str]
    label: Callable[[int], str]

    def gpas(self, values: U64) -> U64:
        """The gpa behind each value that is a host address of this VM's memory, else NO_GPA."""
        found = np.full(len(values), NO_GPA)
        for slot in self.slots:
            offset = values - np.uint64(slot.hva)  # wraps below the slot, to more than any size
            inside = offset < np.uint64(len(slot.data))
            found = np.where(inside, offset + np.uint64(slot.gpa), found)
        return found

    def place(self, gpa: int) -> str:
        """A gpa with the first gva that maps it and what lies there."""
        gvas = self.page_table.maps(gpa)
        if not gvas:
            return f"gpa {gpa:#x}"
        return f"gpa {gpa:#x} = gva {gvas[0]:#x} {self.label(gvas[0])}".rstrip()

    @cached_property
    def tables(self) -> Mapping[int, tuple[int, int]]:
        """Page tables by gpa: depth, and the first gva that each translates."""
        root = self.page_table.root
        found = {root: (0, 0)}
        todo = [root]
        for gpa in todo:  # it grows on the way
            for below, place in self._tables_below(gpa, *found[gpa]):
                if below not in found:
                    found[below] = place
                    todo.append(below)
        return found

    def _tables_below(
        self, gpa: int, depth: int, gva: int
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """The tables that one points to: gpa of each, and (depth, first gva) as in `tables`."""
        mode = self.page_table.mode
        level = mode.levels[depth]
        if depth + 1 == len(mode.levels):
            return
        present, is_table = mode.present_at(level), mode.table_at(level)
        data = self.page_table.tables.get(gpa, b"")
        for index, entry in enumerate(np.frombuffer(data, mode.dtype).tolist()):
            if not present(entry) or not is_table(entry):
                continue
            below = mode.next_table(level).get(entry)
            if below in self.page_table.tables:
                yield below, (depth + 1, gva + (index << level.shift))

    def tables_of(self, gpas: U64) -> U64:
        """The page table that each gpa lies in, by the gpa of its start; NO_GPA for any other."""
        starts, sizes = self._table_ranges
        at = np.searchsorted(starts, gpas, side="right") - 1
        offset = gpas - starts[at]  # it wraps below the first one, to more than any size
        return np.where(offset < sizes[at], starts[at], NO_GPA)

    @cached_property
    def _table_ranges(self) -> tuple[U64, U64]:
        """Where each page table starts, in order, and how many bytes it has."""
        starts = sorted(self.tables)
        sizes = [len(self.page_table.tables.get(gpa, b"")) for gpa in starts]
        return np.array(starts, np.uint64), np.array(sizes, np.uint64)

    def entry(self, gpa: int) -> str:
        """A page-table entry by its place: level, index, and the gva that it translates."""
        mode = self.page_table.mode
        table = int(self.tables_of(np.array([gpa], np.uint64))[0])
        depth, table_gva = self.tables[table]
        level = mode.levels[depth]
        index = (gpa - table) // mode.entry_size
        gva = mode.extend(table_gva + (index << level.shift))
        return f"{level}[{index:#x}] of gva {gva:#x} {self.label(gva)}".rstrip()


@dataclass(frozen=True)
class Pair:
    """The first side of a comparison and one that is held against it, with the engines' names."""

    one: Side
    other: Side
    names: tuple[str, str]


def look_back(vm: AnyVm, drive: Callable[[AnyVm], Came | None]) -> Side:
    """Run a VM to its end and keep what is left; a LabError of the run is an end too."""
    try:
        end, why = ending(vm, drive(vm))
    except LabError as err:
        end, why = type(err).__name__, str(err)

    can = {capability.name for capability in vm.capabilities if capability.have}
    if all(vcpu.exact for vcpu in vm.vcpus):
        can.add("counted")
    return Side(
        name=vm.name,
        backend=vm.backend,
        end=end,
        why=why,
        log=tuple(vm.log),
        states=tuple(vcpu.state for vcpu in vm.vcpus),
        regs=tuple(vcpu.cpu.get_regs() for vcpu in vm.vcpus),
        slots=tuple(
            Memslot(slot.gpa, slot.hva, vm.memory.read(slot.gpa, slot.size))
            for slot in vm.memory.slots
        ),
        page_table=vm.page_table(),
        can=frozenset(can),
        label=vm.names.label,
    )


def engine_names(sides: Sequence[Side]) -> tuple[str, ...]:
    """The engines' names, with a number where one occurs again: ("unicorn", "unicorn 2")."""
    names = [side.backend for side in sides]
    numbered = []
    for index, name in enumerate(names):
        nr_before = names[:index].count(name)
        numbered.append(f"{name} {nr_before + 1}" if nr_before else name)
    return tuple(numbered)
