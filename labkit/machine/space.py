"""Guest-physical pages, virtual ranges and the page tables between them: what lies where."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from labkit.arch.desc import PagingMode
from labkit.arch.translation import Translation
from labkit.bits import align_up
from labkit.errors import InvalidState, OutOfMemory, PageFault
from labkit.machine.memory import PAGE, Memory
from labkit.machine.sparsebit import Sparsebit
from labkit.paging.build import PageTableBuilder
from labkit.paging.walk import Read, Walk, walk

__all__ = ["AddressSpace", "SpaceState", "Use"]

MIN_GVA = 0x2000  # KVM_UTIL_MIN_VADDR
MIN_PFN = 2  # KVM_UTIL_MIN_PFN
TABLES_GPA = 0x180000  # KVM_GUEST_PAGE_TABLE_MIN_PADDR, a hint


@dataclass(frozen=True, order=True)
class Use:
    """What some guest-physical pages were allocated for."""

    gpa: int
    nr_pages: int
    kind: str


@dataclass(frozen=True)
class SpaceState:
    """What the allocators of an address space know, for a snapshot."""

    used: tuple[tuple[int, int], ...]  # (first pfn, how many)
    valid: tuple[tuple[int, int], ...]  # (first virtual page number, how many)
    uses: tuple[Use, ...]
    tables: frozenset[int]
    root_gpa: int


class AddressSpace:
    """Physical pages, virtual ranges and the page tables between them, as kvm_util keeps them.

    Attributes: memory, mode (the page-table format), user (every page is one, for guests at CPL3),
    protected (pfns that are encrypted, or will be at launch; None: nothing ever is), sealed (why
    the host cannot follow these page tables any longer), used (pfns), valid (virtual page numbers
    that something lies at), uses (by gpa), tables (gpas of the page tables).
    """

    def __init__(
        self,
        memory: Memory,
        mode: PagingMode,
        user: bool = False,
        protected: Sparsebit | None = None,
    ) -> None:
        self.memory = memory
        self.mode = mode
        self.user = user
        self.protected = protected
        self.sealed = ""
        # Refuses pages of a size, in bytes, that the CPU does not have.
        self.check_size: Callable[[int], None] = _any_size
        # Guest-physical memory as the guest's own walker sees it.
        self.eye: Read = memory.read
        self.used = Sparsebit()
        self.valid = Sparsebit()
        self.uses: list[Use] = []
        self.tables: set[int] = set()
        self.builder = PageTableBuilder(memory.read, memory.write, self._alloc_table, mode)

    @property
    def root_gpa(self) -> int:
        """The root table, for CR3."""
        return self.builder.root_gpa

    # --- allocating

    def alloc_pages(
        self, nr_pages: int, kind: str, min_gpa: int = MIN_PFN * PAGE, protected: bool = True
    ) -> int:
        """Physical pages in a row (__vm_phy_pages_alloc), protected where the VM can; their gpa.

        min_gpa is a hint. Raises OutOfMemory when there is no such gap.
        """
        self.check_open(f"allocate {kind}")
        if nr_pages < 1:
            raise InvalidState(f"{nr_pages} pages cannot be allocated")
        pfn = self._gap(nr_pages, min_gpa // PAGE)
        if pfn is None and min_gpa > MIN_PFN * PAGE:
            pfn = self._gap(nr_pages, MIN_PFN)
        if pfn is None:
            free = sum(slot.size for slot in self.memory.slots) // PAGE - len(self.used)
            raise OutOfMemory(
                f"no {nr_pages} free guest pages in a row for {kind} ({free} are free in all; "
                f"give the VM more: memory=)",
                nr_pages=nr_pages,
                free=free,
            )

        self.used.set(pfn, nr_pages)
        if self.protected is not None and protected:
            self.protected.set(pfn, nr_pages)
        self._note(Use(pfn * PAGE, nr_pages, kind))
        return pfn * PAGE

    def _note(self, use: Use) -> None:
        """Enter a use in the order of gpas; most lie behind all others."""
        if not self.uses or self.uses[-1] < use:
            self.uses.append(use)
        else:
            insort(self.uses, use)

    def _gap(self, nr_pages: int, min_pfn: int) -> int | None:
        """The first of so many free pages in a row, inside one memslot."""
        for slot in self.memory.slots:
            pfn = self.used.next_clear(max(min_pfn, slot.gpa // PAGE), nr_pages)
            if (pfn + nr_pages) * PAGE <= slot.gpa + slot.size:
                return pfn
        return None

    def _free_pages(self, gpa: int, nr_pages: int, kind: str) -> None:
        self.uses.remove(Use(gpa, nr_pages, kind))
        self.used.clear(gpa // PAGE, nr_pages)
        if self.protected is not None:
            self.protected.clear(gpa // PAGE, nr_pages)

    def _alloc_table(self, size: int) -> int:
        gpa = self.alloc_pages(align_up(size, PAGE) // PAGE, "page tables", TABLES_GPA)
        self.tables.add(gpa)
        return gpa

    def unused_gva(self, nr_pages: int, min_gva: int = MIN_GVA) -> int:
        """A free virtual range (vm_vaddr_unused_gap); raises OutOfMemory when there is none.

        Only the lower half of the address space is searched, from min_gva on.
        """
        if min_gva < 0:
            raise InvalidState(f"min_gva {min_gva:#x} is no address")
        vpn = self.valid.next_clear(align_up(min_gva, PAGE) // PAGE, nr_pages)
        if (vpn + nr_pages) * PAGE > 1 << (self.mode.va_bits - 1):
            raise OutOfMemory(
                f"no {nr_pages} free virtual pages in a row from gva {min_gva:#x} on",
                nr_pages=nr_pages,
            )
        return vpn * PAGE

    def guard(self) -> None:
        """Keep the next free virtual page unmapped for ever."""
        self.valid.set(self.unused_gva(1) // PAGE)

    def alloc(
        self,
        size: int,
        kind: str = "alloc",
        min_gva: int = MIN_GVA,
        writable: bool = True,
        nx: bool = True,
        protected: bool = True,
        **flags: bool,
    ) -> int:
        """Zeroed memory of at least size bytes, mapped page by page (vm_vaddr_alloc); its gva.

        Raises OutOfMemory, with everything as it was but for page tables, and InvalidState.
        """
        if size < 1:
            raise InvalidState(f"alloc of {size} bytes")
        nr_pages = align_up(size, PAGE) // PAGE
        gva = self.unused_gva(nr_pages, min_gva)
        gpa = self.alloc_pages(nr_pages, kind, protected=protected)
        try:
            self.map(gva, gpa, nr_pages, writable=writable, nx=nx, **flags)
        except OutOfMemory:  # for a table
            self._free_pages(gpa, nr_pages, kind)
            raise
        self.memory.zero(gpa, nr_pages * PAGE)
        return gva

    def map(
        self,
        gva: int,
        gpa: int,
        nr_pages: int = 1,
        page_size: int = PAGE,
        writable: bool = True,
        nx: bool = False,
        **flags: bool,
    ) -> None:
        """Map physical pages (virt_map), with the encryption bit where they are protected.

        Raises InvalidState for a mapped range, NotAvailable for a page size that the engine's CPU
        does not have.
        """
        self.check_open(f"map gva {gva:#x}")
        self.check_size(page_size)
        nr_small_pages = nr_pages * page_size // PAGE
        wanted = {"user": self.user}
        if self.protected is not None:
            wanted["c"] = self.protected.is_set(gpa // PAGE, nr_small_pages)
        wanted |= flags
        self.builder.map(gva, gpa, nr_pages, page_size, writable=writable, nx=nx, **wanted)
        self.valid.set(gva // PAGE, nr_small_pages)

    # --- what the host may do

    def is_protected(self, gpa: int) -> bool:
        """Whether the page is encrypted, or will be at launch."""
        return self.protected is not None and gpa // PAGE in self.protected

    def check_open(self, what: str) -> None:
        """Raise InvalidState when page tables are closed to the host, saying what it wanted."""
        if self.sealed:
            raise InvalidState(f"the host cannot {what}: {self.sealed}")

    # --- translating

    def walk(self, gva: int, through: Translation | None = None) -> Walk:
        """How gva is translated now, as the guest's own walker sees it; never raises.

        Through the VM's own tables, or those that a vCPU has loaded.
        """
        if through is None:
            return walk(self.eye, self.mode, self.root_gpa, gva)
        return walk(self.eye, through.mode, through.root, gva)

    def host_walk(self, gva: int) -> Walk:
        """The walk of a host that does not know better; never raises.

        It goes through DRAM as it is, where tables of an encrypted guest are ciphertext.
        """
        return walk(self.memory.read, self.mode, self.root_gpa, gva)

    def pieces(self, gva: int, size: int, through: Translation | None) -> list[tuple[int, int]]:
        """(gpa, bytes) of a virtual range, page by page.

        Raises PageFault at the first page that is not there, InvalidState when page tables are
        closed to the host.
        """
        self.check_open(f"walk page tables for gva {gva:#x}")
        parts: list[tuple[int, int]] = []
        end = gva + size
        while gva < end:
            found = self.walk(gva, through)
            gpa = found.require()
            if self.memory.slot(gpa) is None:
                raise _no_memslot(gva, found)
            count = min(end - gva, PAGE - gva % PAGE)
            parts.append((gpa, count))
            gva += count
        return parts

    def read(self, gva: int, size: int, through: Translation | None = None) -> bytes:
        """Guest-virtual memory; raises PageFault with the walk when a page is not there."""
        return b"".join(
            self.memory.read(gpa, count) for gpa, count in self.pieces(gva, size, through)
        )

    def write(self, gva: int, data: bytes, through: Translation | None = None) -> None:
        """Write guest-virtual memory, read-only pages included, as a debugger does.

        Raises PageFault, with nothing written, when a page is not there.
        """
        done = 0
        for gpa, count in self.pieces(gva, len(data), through):
            self.memory.write(gpa, data[done : done + count])
            done += count

    def peek(self, gva: int, size: int, through: Translation | None = None) -> bytes:
        """Guest-virtual memory as the guest itself sees it, encrypted or not.

        For pictures, where a host could not look. Raises PageFault when a page is not there.
        """
        if not self.sealed:
            return self.read(gva, size, through)
        data = b""
        while len(data) < size:
            at = gva + len(data)
            found = self.walk(at, through)
            is_encrypted = found.flags.get("c", False)
            read = self.eye if is_encrypted else self.memory.read
            count = min(size - len(data), PAGE - at % PAGE)
            part = read(found.require(), count)
            if not part:
                raise _no_memslot(at, found)
            data += part
        return data

    # --- snapshots

    def state(self) -> SpaceState:
        """What the allocators know, for a snapshot."""
        return SpaceState(
            used=tuple(self.used.ranges()),
            valid=tuple(self.valid.ranges()),
            uses=tuple(self.uses),
            tables=frozenset(self.tables),
            root_gpa=self.root_gpa,
        )

    def set_state(self, state: SpaceState) -> None:
        """Put `state` back."""
        self.used = Sparsebit(state.used)
        self.valid = Sparsebit(state.valid)
        self.uses = list(state.uses)
        self.tables = set(state.tables)
        self.builder.root_gpa = state.root_gpa


def _any_size(page_size: int) -> None:
    """A CPU that has pages of all sizes."""


def _no_memslot(gva: int, found: Walk) -> PageFault:
    return PageFault(
        f"gva {gva:#x} is mapped to gpa {found.gpa:#x}, where no memslot is", gva=gva, walk=found
    )
