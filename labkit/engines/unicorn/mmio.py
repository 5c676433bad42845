"""MMIO: an access to a guest-physical address without memslot leaves for the host.

Then the instruction is made whole again: it runs with pages of its own in the holes.
What it reads there must be known, so each read that is not ends the attempt and becomes an exit;
when all are known it runs to its end, and each of its writes becomes an exit behind it.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.exits import Exit, InternalErrorExit, MmioExit
from labkit.engines.unicorn.native.lib import LIB, MemHook, Page

if TYPE_CHECKING:
    from labkit.engines.unicorn.ending import Ending
    from labkit.engines.unicorn.isa.quirks import Quirks
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["Mmio"]

_FETCH = (uc.UC_MEM_FETCH_UNMAPPED, uc.UC_MEM_FETCH_PROT)
_WRITE = (uc.UC_MEM_WRITE_UNMAPPED, uc.UC_MEM_WRITE_PROT)
_UNMAPPED = uc.UC_HOOK_MEM_UNMAPPED | uc.UC_HOOK_MEM_PROT


class Mmio:
    """The accesses to holes of one vCPU's present instruction."""

    def __init__(self, vcpu: UnicornVcpu, quirks: Quirks, ending: Ending) -> None:
        self.vcpu, self.quirks, self.ending = vcpu, quirks, ending
        self.waiting: MmioExit | None = None  # a read whose value the host has yet to give
        self.reads: list[MmioExit] = []  # of the instruction that will run again, with their values
        self.writes: list[MmioExit] = []  # of an instruction that is over, not reported yet
        self._met: tuple[int, int, int] | None = None  # (kind, gpa, size) that ended an attempt
        # (gpa, size) of the access that led there, if it touches two pages
        self._crossing: tuple[int, int] | None = None

    def complete(self, value: int) -> bool:
        """Give the value of the read that left last; False when there was none."""
        if self.waiting is not None:
            self.waiting = replace(self.waiting, data=value & (1 << 8 * self.waiting.size) - 1)
        return self.waiting is not None

    def resume(self) -> Exit | None:
        """Do what must happen before the vCPU goes on."""
        if self.writes:
            return self.writes.pop(0)
        if self.waiting is None:
            return None
        self.reads.append(self.waiting)
        self.waiting = None
        return self.meet()

    def forget(self) -> None:
        """The vCPU goes on elsewhere."""
        self.waiting, self.reads = None, []

    def state(self) -> list[list[list[int]]]:
        """What a snapshot must keep."""
        waiting = [self.waiting] if self.waiting else []
        return [
            [[exit.gpa, exit.size, exit.is_write, exit.data] for exit in part]
            for part in (waiting, self.reads, self.writes)
        ]

    def set_state(self, state: list[list[list[int]]]) -> None:
        """Put `state` back."""
        waiting, self.reads, self.writes = (
            [MmioExit(gpa, size, bool(w), data) for gpa, size, w, data in part] for part in state
        )
        self.waiting = waiting[0] if waiting else None

    def meet(self) -> Exit | None:
        """Carry out the instruction at the program counter, which touches a hole."""
        vcpu, pc = self.vcpu, self.quirks.pc()
        pages = {page for read in self.reads for page in _pages(read.gpa, read.size)}
        before = vcpu.handle.context()
        while True:
            vcpu.guards.skip = self.quirks.pc()  # a breakpoint here has had its turn
            exit = self._attempt(pages)
            if self._met is None:
                self.reads = []
                if exit is None and self.writes:
                    return self.writes.pop(0)
                return exit

            vcpu.handle.set_context(before)
            self.quirks.set_pc(pc)
            self.writes.clear()
            kind, gpa, size = self._met
            if kind in _FETCH:
                return InternalErrorExit(
                    f"instruction fetch from gpa {gpa:#x}, where no memslot is", pc
                )

            if self._crossing is not None:
                gpa, size = self._crossing
            if any(vcpu.vm.overlaps(page, 4096) for page in _pages(gpa, size)):
                return vcpu.refuse(
                    f"an access of {size} bytes at gpa {gpa:#x} runs across the end of a memslot"
                )
            if kind not in _WRITE:
                self.waiting = MmioExit(gpa, size, False, 0)
                return self.waiting
            pages |= _pages(gpa, size)

    def _attempt(self, pages: set[int]) -> Exit | None:
        """Run the instruction with pages of ours in the holes.

        `_met` says what it touched beyond them.
        """
        handle = self.vcpu.handle
        buffers = self._filled(pages)
        for page, buffer in buffers.items():
            handle.map(page, buffer.hva, 4096, uc.UC_PROT_ALL)
        hooks = [
            handle.hook(_UNMAPPED, MemHook(self._unmapped)),
            handle.hook(uc.UC_HOOK_MEM_READ | uc.UC_HOOK_MEM_WRITE, MemHook(self._touched)),
        ]
        for page in pages:
            last = page + 4095
            hooks.append(handle.hook(uc.UC_HOOK_MEM_READ, MemHook(self._read), page, last))
            hooks.append(handle.hook(uc.UC_HOOK_MEM_WRITE, MemHook(self._written), page, last))
        handle.flush_tlb()
        handle.flush_code()

        self._met = self._crossing = None
        try:
            return self.vcpu.run_one()
        finally:
            for hook in hooks:
                handle.unhook(hook)
            for page in pages:
                handle.unmap(page, 4096)
            handle.flush_tlb()
            handle.flush_code()

    def _filled(self, pages: set[int]) -> dict[int, Page]:
        """Pages for these holes, with the values that the host gave."""
        buffers = {page: Page() for page in pages}
        for read in self.reads:
            for i, byte in enumerate(read.data.to_bytes(read.size, "little")):
                gpa = read.gpa + i
                hva = buffers[gpa & -4096].hva + (gpa & 4095)
                ctypes.c_uint8.from_address(hva).value = byte
        return buffers

    def _unmapped(self, _h: int, kind: int, gpa: int, size: int, _value: int, _d: int) -> bool:
        self._met = self._met or (kind, gpa, size)
        self.ending.by = "hole"
        return False

    def _touched(self, _h: int, _kind: int, gpa: int, size: int, _value: int, _d: int) -> bool:
        if self._met is None:
            self._crossing = (gpa, size) if (gpa & 4095) + size > 4096 else None
        return True

    def _read(self, h: int, kind: int, gpa: int, size: int, _value: int, _d: int) -> bool:
        if not any(read.gpa <= gpa and gpa + size <= read.gpa + read.size for read in self.reads):
            self._met = self._met or (kind, gpa, size)
            self.ending.by = "hole"
            LIB.uc_emu_stop(h)
        return True

    def _written(self, _h: int, _kind: int, gpa: int, size: int, value: int, _d: int) -> bool:
        self.writes.append(MmioExit(gpa, size, True, value & (1 << 8 * size) - 1))
        return True


def _pages(gpa: int, size: int) -> set[int]:
    return {gpa & -4096, gpa + size - 1 & -4096}
