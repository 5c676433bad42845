"""Guest-physical memory by use: what lies where in the memslots."""

from __future__ import annotations

from dataclasses import replace

from labkit.look.snapshots import MemoryMap, MemoryRange
from labkit.session.vm import Vm

__all__ = ["look_at_memory"]


def look_at_memory(vm: Vm) -> MemoryMap:
    """What a VM's memory is used for; neighbours of one use are one range."""
    space = vm.machine.space
    ranges: list[MemoryRange] = []
    for use in space.uses:
        part = MemoryRange(use.gpa, use.nr_pages, use.kind, space.is_protected(use.gpa))
        if ranges and _continues(ranges[-1], part):
            ranges[-1] = replace(ranges[-1], nr_pages=ranges[-1].nr_pages + part.nr_pages)
        else:
            ranges.append(part)
    slots = tuple((slot.gpa, slot.size) for slot in vm.memory.slots)
    return MemoryMap(slots, tuple(ranges), vm.step)


def _continues(last: MemoryRange, part: MemoryRange) -> bool:
    """Whether a range goes on where the last one ends, with the same use and protection."""
    if last.kind != part.kind or last.protected != part.protected:
        return False
    return last.end == part.gpa
