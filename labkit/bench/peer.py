"""The peer: a bare `unicorn.Uc` from Python, booted with the memory and registers of a labkit VM."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from labkit.engines.unicorn.native import bare
from labkit.lab import Vm

__all__ = ["Bare"]


class Bare:
    """The same guest without labkit: one Uc, no hooks but those asked for."""

    def __init__(self, vm: Vm) -> None:
        slot = vm.memory.slots[0]
        self.memory = mmap.mmap(-1, slot.size)
        self.memory[:] = slot.data[:]
        self._hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.uc: Any = bare.open_uc(self._hva, slot.size, vm.vcpus[0].regs.all())
        self.start = vm.vcpus[0].pc

    def run(self, pc: int, count: int = 0) -> int:
        """emu_start, and where it stopped."""
        self.uc.emu_start(pc, 0, count=count)
        return int(bare.pc(self.uc))
