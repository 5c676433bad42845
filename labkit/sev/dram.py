"""DRAM as the secure processor sees it: the guest's memory, and VMSAs far behind it.

Addresses are system physical.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from labkit.errors import MemoryFault, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.sev.nested import NestedTable

__all__ = ["VMSA_AT", "Dram"]

# Where no memslot can be
VMSA_AT = 1 << 40


class Dram:
    """Reads and writes by system physical address.

    `vmsa(index)` gives the page of a vCPU in whose registers only the CPU writes, None as long as
    its page is what hypervisor and firmware left in it (`pages`). `nested()` gives the nested page
    table of now.

    Where the model simplifies: a VMSA of the first kind is made when somebody looks, from the
    registers as they are; a host that wrote into it would make VMRUN load garbage, which is refused
    instead.
    """

    def __init__(
        self, memory: Memory, vmsa: Callable[[int], bytes | None], nested: Callable[[], NestedTable]
    ) -> None:
        self.memory = memory
        self.vmsa = vmsa
        self.nested = nested
        self.pages: list[bytes] = []

    def add_vmsa(self) -> int:
        """One more VMSA; returns its address."""
        self.pages.append(bytes(PAGE))
        return VMSA_AT + PAGE * (len(self.pages) - 1)

    def read(self, spa: int, size: int, /) -> bytes:
        """What lies there, encrypted or not; raises MemoryFault for a hole."""
        if spa < VMSA_AT:
            return b"".join(self.memory.read(gpa, count) for gpa, count in self._parts(spa, size))
        index, offset = self._place(spa, size)
        page = self.vmsa(index) or self.pages[index]
        return page[offset : offset + size]

    def write(self, spa: int, data: bytes, /) -> None:
        """Write it.

        Raises MemoryFault for a hole, NotAvailable for a VMSA that belongs to its guest.
        """
        if spa < VMSA_AT:
            for gpa, count in self._parts(spa, len(data)):
                self.memory.write(gpa, data[:count])
                data = data[count:]
            return

        index, offset = self._place(spa, len(data))
        if self.vmsa(index) is not None:
            raise NotAvailable(
                f"spa {spa:#x} is the VMSA of vCPU {index}: "
                f"a vCPU that would load garbage from it is not modelled"
            )
        old = self.pages[index]
        self.pages[index] = old[:offset] + data + old[offset + len(data) :]

    def _parts(self, spa: int, size: int) -> list[tuple[int, int]]:
        """Where the guest has these bytes, as (gpa, bytes).

        They are one part until a host exchanges pages, then one for each page.
        """
        table = self.nested()
        ends = [spa]
        if table.pages:
            ends += range((spa & -PAGE) + PAGE, spa + size, PAGE)
        ends.append(spa + size)
        return [(table.gpa(at & -PAGE) + at % PAGE, end - at) for at, end in pairwise(ends)]

    def _place(self, spa: int, size: int) -> tuple[int, int]:
        """Which VMSA these bytes are in, and where in it."""
        index, offset = divmod(spa - VMSA_AT, PAGE)
        if index >= len(self.pages) or offset + size > PAGE:
            raise MemoryFault(
                f"{size} bytes at spa {spa:#x}: no DRAM there "
                f"(VMSAs: {len(self.pages)} pages from {VMSA_AT:#x} on)",
                spa=spa,
            )
        return index, offset
