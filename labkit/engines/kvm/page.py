"""The run page of a vCPU: struct kvm_run, as KVM shares it with us.

Documentation/virt/kvm/api.rst, section 5, "The kvm_run structure".
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

from labkit.engines.kvm.abi import CONSTANTS, MEMBERS, STRUCTS
from labkit.engines.kvm.places import GPR

__all__ = ["EXIT", "EXIT_REASON", "RunPage"]

# Where the union begins that holds what each exit has to say
EXIT = STRUCTS["kvm_run"].padding.offset
IMMEDIATE_EXIT = STRUCTS["kvm_run"].immediate_exit.offset
EXIT_REASON: int = STRUCTS["kvm_run"].exit_reason.offset // 4  # among the words of 4 bytes
GPRS = STRUCTS["kvm_run"].s.offset // 8
SYNC_REGS = CONSTANTS["KVM_SYNC_X86_REGS"]


class RunPage:
    """One vCPU's run page: as the structure `fields`, and as bytes and words, which is faster.

    The general registers lie in it too, in the order of struct kvm_regs: KVM puts them there at
    each exit, and takes them from there at an entry after `registers_changed` (KVM_CAP_SYNC_REGS).
    """

    def __init__(self, fd: int, size: int) -> None:
        self.mapping = mmap.mmap(fd, size)
        self.fields: Any = STRUCTS["kvm_run"].from_buffer(self.mapping)
        view = memoryview(self.mapping)
        self.u8: memoryview[int] = view
        self.u32: memoryview[int] = view.cast("I")
        self.u64: memoryview[int] = view.cast("Q")
        self.gprs: memoryview[int] = self.u64[GPRS : GPRS + len(GPR)]

    def member(self, name: str) -> Any:
        """What the present exit has to say, as the structure of that name in the union."""
        return MEMBERS[name].from_buffer(self.mapping, EXIT)

    def leave_at_once(self, wish: bool) -> None:
        """Let entries come back when KVM has completed what it had to (immediate_exit), or not."""
        self.u8[IMMEDIATE_EXIT] = wish

    def registers_changed(self) -> None:
        """Let KVM take the general registers from here at the next entry."""
        self.fields.kvm_dirty_regs |= SYNC_REGS

    def value(self, at: int, size: int) -> int:
        """The little-endian number of `size` bytes at a place in this page."""
        return int.from_bytes(self.u8[at : at + size], "little")

    def put_value(self, at: int, size: int, value: int) -> None:
        """Write the low `size` bytes of a number there."""
        self.u8[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def close(self) -> None:
        """Let go of the page; what was taken from `fields` must be gone by then."""
        del self.fields
        for view in (self.gprs, self.u32, self.u64, self.u8):
            view.release()
        # Somebody may still hold a part of it, such as the frame of an exception: it goes with it.
        with suppress(BufferError):
            self.mapping.close()
