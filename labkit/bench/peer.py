"""The peer: a bare `unicorn.Uc` from Python, with the memory and registers of a labkit VM."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from labkit.engines.unicorn.native import bare
from labkit.lab import Vm

__all__ = ["Bare", "copied_memory"]


def copied_memory(vm: Vm) -> tuple[mmap.mmap, int]:
    """A copy of a VM's memory, and its hva; it lives as long as the copy is held."""
    slot = vm.memory.slots[0]
    memory = mmap.mmap(-1, slot.size)
    memory[:] = slot.data[:]
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Bare:
    """The same guest without labkit: one Uc, whose only hook ends a run at every IN."""

    def __init__(self, vm: Vm) -> None:
        self.memory, hva = copied_memory(vm)
        self.uc: Any = bare.open_uc(hva, len(self.memory), vm.vcpus[0].regs.all())
        self.start = vm.vcpus[0].pc
        bare.stop_at_in(self.uc, lambda _port, _size: 0)

    def run(self, pc: int, count: int = 0) -> int:
        """emu_start, and where it stopped."""
        self.uc.emu_start(pc, 0, count=count)
        return int(bare.pc(self.uc))
