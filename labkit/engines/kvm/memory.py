"""Guest-virtual memory as a vCPU itself would find it, read by the host without leaving a trace."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from labkit.arch.desc import LAST
from labkit.arch.x86 import X86_PXXV48_4K as MODE
from labkit.engines.kvm.regs import Registers

if TYPE_CHECKING:
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["GuestMemory"]

CR0_PG = 1 << 31  # paging is on
PAGE = 4096


class GuestMemory:
    """Look-ups under one vCPU's present CR3; a hole is a 0, a None, or the end of what is read."""

    def __init__(self, vm: KvmVm, regs: Registers) -> None:
        self.vm = vm
        self.regs = regs

    def gpa(self, gva: int) -> int | None:
        """The gpa behind a gva, None where nothing is mapped.

        Not from KVM_TRANSLATE, which leaves accessed bits in the guest's tables.
        """
        if not self.regs.read("cr0") & CR0_PG:
            return gva
        if not MODE.canonical(gva):
            return None

        table = MODE.root(self.regs.read("cr3"))
        for level in MODE.levels:
            hva = self.vm.hva(table + 8 * level.index(gva))
            entry = ctypes.c_uint64.from_address(hva).value if hva else 0
            if not MODE.present(entry):
                return None
            if level.leaf is LAST or not MODE.table(entry):
                return MODE.frame(level, entry) + (gva & level.size - 1)
            table = MODE.pa.get(entry)
        return None

    def hva(self, gva: int) -> int:
        """The host address behind a gva; 0 where nothing is, or no memslot."""
        gpa = self.gpa(gva)
        return 0 if gpa is None else self.vm.hva(gpa)

    def fetch(self, gva: int, size: int) -> bytes:
        """Up to `size` bytes from a gva on, as far as they are mapped."""
        data = b""
        while len(data) < size:
            at = gva + len(data)
            hva = self.hva(at)
            if not hva:
                break
            left_in_page = PAGE - at % PAGE
            data += ctypes.string_at(hva, min(size - len(data), left_in_page))
        return data
