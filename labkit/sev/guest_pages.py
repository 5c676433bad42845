"""The pages of one encrypted guest: which are private, and who owns them.

An SNP guest's ownership is in the RMP and the nested page table, and the engine is told of it. For
guests of other kinds there is a nested page table and nobody owns a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import InvalidState
from labkit.machine.memory import PAGE, Memory
from labkit.machine.sparsebit import Sparsebit
from labkit.sev.kvm_host import KvmVm
from labkit.sev.nested import NestedTable
from labkit.sev.rmp import PRIVATE, RmpEntry, RmpFault, guest_access, host_access
from labkit.sev.snp import SnpState

if TYPE_CHECKING:
    from labkit.engines.base import ProtectingVm

__all__ = ["GuestPages"]


class GuestPages:
    """The pages of one guest: which are private, what stands behind each gpa, and whose it is.

    protected has the pfns that are private, or will be by the launch. Ownership is enforced once
    the firmware is done with the pages, which is when the guest runs.
    """

    def __init__(self, memory: Memory, vm: KvmVm, protected: Sparsebit) -> None:
        self.memory = memory
        self.vm = vm
        self.protected = protected
        self.nested = NestedTable()
        self._engine: ProtectingVm | None = None

    @property
    def _is_owned(self) -> bool:
        return self.vm.snp is not None and self.vm.snp.state is SnpState.RUNNING

    def entry(self, gpa: int) -> RmpEntry:
        """The RMP's entry of the page of DRAM behind a gpa."""
        return self.vm.host.rmp.entry(self.nested.spa(gpa))

    def set_private(self, gpa: int, size: int, private: bool) -> None:
        """Make these pages private or shared, before the launch; size is in bytes.

        Raises InvalidState for what is no run of whole pages of memory.
        """
        where = f"gpa {gpa:#x}, {size:#x} bytes"
        if gpa % PAGE or size % PAGE or size <= 0:
            raise InvalidState(f"{where}: private memory comes in whole pages")
        if not all(map(self.memory.slot, range(gpa, gpa + size, PAGE))):
            raise InvalidState(
                f"{where}: no memslot holds all of it, so nothing can be private there"
            )
        if private:
            self.protected.set(gpa // PAGE, size // PAGE)
        else:
            self.protected.clear(gpa // PAGE, size // PAGE)

    # --- the engine

    def connect(self, engine: ProtectingVm) -> None:
        """The engine that runs the guest, which must be told when a page changes hands."""
        self._engine = engine

    def publish(self) -> None:
        """Tell the engine of every page: after the launch, and when the RMP was put back."""
        if not self._is_owned:
            return
        self.vm.host.rmp.on_change = self._changed
        for slot in self.memory.slots:
            self._tell(slot.gpa, slot.size)

    def _changed(self, spa: int) -> None:
        self._tell(self.nested.gpa(spa), PAGE)

    def _tell(self, gpa: int, size: int) -> None:
        if self._engine is None:
            return
        asid = self.vm.asid
        assigned, usable = [], []
        for page in range(gpa, gpa + size, PAGE):
            entry = self.entry(page)
            assigned.append(entry.assigned)
            usable.append(guest_access(entry, asid, page, private=True, is_write=False) is None)
        self._engine.own_pages(gpa, np.array(assigned), np.array(usable))

    # --- what changes hands

    def remap(self, gpa: int, other: int) -> None:
        """The host has exchanged two pages in the nested page table."""
        self.nested.exchange(gpa, other)
        self.publish()

    def change_state(self, gfn: int, op: int) -> int:
        """The guest wants a page private (1) or shared (2).

        Gives 0, or the error that the guest is told: 1, for a page without memory too.
        """
        gpa = gfn * PAGE
        if self.memory.slot(gpa) is None:
            return 1
        rmp = self.vm.host.rmp
        if rmp.page_state_change(self.nested.spa(gpa), self.vm.asid, gpa, op):
            return 1
        if op == PRIVATE:
            self.protected.set(gfn)
        else:
            self.protected.clear(gfn)
        return 0

    def pvalidate(self, gpa: int, size: int, validate: bool) -> tuple[int, bool] | RmpFault:
        """The guest's PVALIDATE on a page of its own: (EAX, CF), or what it meets."""
        rmp = self.vm.host.rmp
        return rmp.pvalidate(self.nested.spa(gpa), self.vm.asid, gpa, validate, size)

    # --- who may access them

    def guest_fault(self, gpa: int, private: bool, is_write: bool) -> RmpFault | None:
        """What an access of the guest to its page meets, None: nothing."""
        return guest_access(self.entry(gpa), self.vm.asid, gpa, private, is_write)

    def check_host_write(self, gpa: int, size: int) -> None:
        """Raise InvalidState where the RMP gives a page to a guest (APM vol. 2 15.36).

        Its facts are gpa, the first byte that cannot be written, and fault.
        """
        if not self._is_owned:
            return
        for page in range(gpa & -PAGE, gpa + size, PAGE):
            fault = host_access(self.entry(page), is_write=True)
            if fault is not None:
                first = max(page, gpa)
                raise InvalidState(
                    f"host write to gpa {first:#x}: {fault.why}", gpa=first, fault=fault
                )
