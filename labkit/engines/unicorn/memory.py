"""Guest-virtual memory as one vCPU itself would reach it: through its tables, with its rights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.unicorn.native.lib import LIB, QUICK, Handle

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Machine
    from labkit.engines.unicorn.isa.quirks import Quirks

__all__ = ["GuestMemory"]


class GuestMemory:
    """The memory of one vCPU; `quirks` says with which rights, and is there before anybody asks."""

    quirks: Quirks

    def __init__(self, vm: Machine, handle: Handle) -> None:
        self.vm, self.handle = vm, handle
        self._gpa = ctypes.c_uint64()
        self._gpa_at = ctypes.byref(self._gpa)

    def read(self, gva: int, size: int) -> bytes | None:
        """What lies there; None when the guest would fault."""
        if self.vm.mmu is not None:
            return self.vm.mmu.access(self.handle, gva, size, self.quirks.ring())

        buffer = ctypes.create_string_buffer(size)
        read = self._quietly(LIB.uc_vmem_read, gva, uc.UC_PROT_READ, buffer, size)
        return buffer.raw if read else None

    def write(self, gva: int, data: bytes) -> bool:
        """Write, permissions and dirty bits included; False when the guest would fault."""
        if self.vm.mmu is not None:
            ring = self.quirks.ring()
            return self.vm.mmu.access(self.handle, gva, len(data), ring, data) is not None
        return self._quietly(LIB.uc_vmem_write, gva, uc.UC_PROT_WRITE, data, len(data))

    def translate(self, gva: int, access: int = uc.UC_PROT_READ) -> int | None:
        """The gpa behind a gva, None when the access would fault."""
        if self.vm.mmu is not None:
            return self.vm.mmu.translate(self.handle, gva, access, self.quirks.ring())

        if self._quietly(QUICK.uc_vmem_translate, gva, access, self._gpa_at):
            return self._gpa.value
        return None

    def fetch(self, gva: int, size: int) -> bytes:
        """Code as the CPU would fetch it, up to the first byte that it could not."""
        data = b""
        while len(data) < size:
            at = gva + len(data)
            gpa = self.translate(at, uc.UC_PROT_EXEC)
            if gpa is None:
                break
            part = self.vm.read(gpa, min(size - len(data), 4096 - (at & 4095)))
            if not part:
                break
            data += part
        return data

    def _quietly(self, function: Callable[..., int], gva: int, *args: object) -> bool:
        """Whether that worked.

        A failed look of ours must not stay behind where the guest looks for its faults.
        """
        trace = self.quirks.fault_trace
        if trace is None:
            return not function(self.handle.h, gva, *args)

        get, put = trace
        before = get()
        failed = function(self.handle.h, gva, *args)
        if failed:
            put(before)
        return not failed
