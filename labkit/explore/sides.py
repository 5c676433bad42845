"""What is left of one run when it is over, kept for a comparison: events, registers, memory, and names for places in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.errors import LabError
from labkit.paging.scan import PageTable
from labkit.session.events import Event
from labkit.session.explain import ending
from labkit.ucall.pool import Ucall

if TYPE_CHECKING:
    from labkit.session.running import Came

__all__ = ["Side", "look_back"]

U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Side:
    """One engine's half of a comparison."""

    name: str
    backend: str
    end: str
    why: str
    log: tuple[Event | Ucall, ...]
    states: tuple[str, ...]
    regs: tuple[Mapping[str, int], ...]
    slots: tuple[tuple[int, int, bytes], ...]  # gpa, hva, contents
    page_table: PageTable
    can: frozenset[
        str
    ]  # what the engine declares; "counted" when it counted every instruction of this run
    label: Callable[[int], str]

    def gpas(self, values: U64) -> U64:
        """The gpa behind each value that is a host address in this VM's memory; all ones for any other."""
        found = np.full(len(values), ~np.uint64(0))
        for gpa, hva, data in self.slots:
            offset = values - np.uint64(hva)  # wraps below the slot, to more than any size
            found = np.where(offset < np.uint64(len(data)), offset + np.uint64(gpa), found)
        return found

    def place(self, gpa: int) -> str:
        """A gpa with the first gva that maps it and what lies there."""
        gva = next(iter(self.page_table.maps(gpa)), None)
        return (
            f"gpa {gpa:#x}"
            if gva is None
            else f"gpa {gpa:#x} = gva {gva:#x} {self.label(gva)}".rstrip()
        )

    @cached_property
    def tables(self) -> Mapping[int, tuple[int, int]]:
        """Page tables by gpa: depth, and the first gva that each translates."""
        mode, found = self.page_table.mode, {self.page_table.root: (0, 0)}
        todo = list(found.items())
        for gpa, (depth, gva) in todo:
            for index, entry in enumerate(
                np.frombuffer(self.page_table.tables.get(gpa, b""), mode.dtype).tolist()
            ):
                below, level = mode.pa.get(entry), mode.levels[depth]
                if (
                    depth + 1 < len(mode.levels)
                    and mode.present(entry)
                    and below in self.page_table.tables
                    and below not in found
                ):
                    found[below] = depth + 1, gva + (index << level.shift)
                    todo.append((below, found[below]))
        return found

    def entry(self, gpa: int) -> str:
        """A page-table entry by its place: level, index, and the gva that it translates."""
        depth, gva = self.tables[gpa & -4096]
        level, index = self.page_table.mode.levels[depth], (gpa & 4095) // 8
        gva = self.page_table.mode.extend(gva + (index << level.shift))
        return f"{level}[{index:#x}] of gva {gva:#x} {self.label(gva)}".rstrip()


def look_back(vm: Any, drive: Callable[[Any], Came | None]) -> Side:
    """Run a VM to its end and keep what is left; a LabError of the run is an end too."""
    try:
        end, why = ending(vm, drive(vm))
    except LabError as err:
        end, why = type(err).__name__, str(err)
    slots = tuple(
        (slot.gpa, slot.hva, vm.memory.read(slot.gpa, slot.size)) for slot in vm.memory.slots
    )
    can = [can.name for can in vm.capabilities if can.have] + ["counted"] * all(
        vcpu.exact for vcpu in vm.vcpus
    )
    states, regs = (
        zip(*((vcpu.state, vcpu.cpu.get_regs()) for vcpu in vm.vcpus), strict=True)
        if vm.vcpus
        else ((), ())
    )
    return Side(
        vm.name,
        vm.backend,
        end,
        why,
        tuple(vm.log),
        states,
        regs,
        slots,
        vm.page_table(),
        frozenset(can),
        vm.names.label,
    )
