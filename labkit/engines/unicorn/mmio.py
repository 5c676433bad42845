"""Accesses to guest-physical holes: the instruction runs once with a page of its own in the hole."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.base import Exit, InternalErrorExit, MmioExit
from labkit.engines.unicorn.lib import LIB, MemHook

if TYPE_CHECKING:
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["FETCHES", "UNMAPPED", "Mmio"]

FETCHES = (uc.UC_ERR_FETCH_UNMAPPED, uc.UC_ERR_FETCH_PROT)
UNMAPPED = (*FETCHES, uc.UC_ERR_READ_UNMAPPED, uc.UC_ERR_WRITE_UNMAPPED, uc.UC_ERR_READ_PROT, uc.UC_ERR_WRITE_PROT)
_FETCH = (uc.UC_MEM_FETCH_UNMAPPED, uc.UC_MEM_FETCH_PROT)
_WRITE = (uc.UC_MEM_WRITE_UNMAPPED, uc.UC_MEM_WRITE_PROT)


class Mmio:
    """The MMIO accesses of one vCPU; `pending` is a read that waits for its value."""

    def __init__(self, vcpu: UnicornVcpu) -> None:
        self.vcpu, self.handle = vcpu, vcpu.handle
        self.pending: MmioExit | None = None

    def fault(self, pc: int) -> Exit | None:
        """A hole in guest memory. Which one is found by running the instruction again with hooks: any hook on memory makes all
        memory accesses six times slower, so none is there before it is needed."""
        faults: list[tuple[int, int, int, int]] = []

        def unmapped(_h: int, kind: int, gpa: int, size: int, value: int, _d: int) -> bool:
            faults.append((kind, gpa, size, value))
            return False

        hook = self.handle.hook(uc.UC_HOOK_MEM_UNMAPPED | uc.UC_HOOK_MEM_PROT, MemHook(unmapped))
        self.handle.flush_code()
        LIB.uc_emu_start(self.handle.h, pc, 0, 0, 1)
        self.handle.unhook(hook)
        self.handle.flush_code()
        if not faults:
            return self.vcpu.refuse("Unicorn met a hole in guest memory and did not find it again")
        kind, gpa, size, value = faults[0]
        if kind in _FETCH:
            return InternalErrorExit(f"instruction fetch from gpa {gpa:#x}, where no memslot is", pc)
        if kind in _WRITE:
            return self._write(gpa, size, value & (1 << 8 * size) - 1)
        self.pending = MmioExit(gpa, size, False, 0)
        return self.pending

    def finish(self) -> Exit | None:
        """Carry out the load that left with an MMIO read; a read-modify-write leaves again with its write."""
        assert self.pending is not None
        mmio, self.pending = self.pending, None
        data = (mmio.data & (1 << 8 * mmio.size) - 1).to_bytes(mmio.size, "little")
        return self._with_page(mmio.gpa, data)

    def _write(self, gpa: int, size: int, value: int) -> Exit | None:
        return self._with_page(gpa, bytes(size)) or MmioExit(gpa, size, True, value)

    def _with_page(self, gpa: int, data: bytes) -> Exit | None:
        page, offset = gpa & -4096, gpa & 4095
        span = 4096 if offset + len(data) <= 4096 else 8192
        buffer = ctypes.create_string_buffer(span + 4096)
        hva = -(-ctypes.addressof(buffer) // 4096) * 4096
        ctypes.memmove(hva + offset, data, len(data))
        if self.vcpu.vm.overlaps(page, span):
            return self.vcpu.refuse(f"an access of {len(data)} bytes at gpa {gpa:#x} runs across the end of a memslot")
        writes: list[MmioExit] = []

        def written(_h: int, _kind: int, at: int, count: int, value: int, _d: int) -> bool:
            writes.append(MmioExit(at, count, True, value & (1 << 8 * count) - 1))
            return True

        self.handle.map(page, hva, span, uc.UC_PROT_ALL)
        self.handle.flush_tlb()
        hook = self.handle.hook(uc.UC_HOOK_MEM_WRITE, MemHook(written), page, page + span - 1)
        self.handle.flush_code()
        try:
            exit = self.vcpu.native("each", 1)
        finally:
            self.handle.unhook(hook)
            self.handle.unmap(page, span)
            self.handle.flush_tlb()
        return exit or next(iter(writes), None)
