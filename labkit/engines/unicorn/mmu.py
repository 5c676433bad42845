"""Encrypted guest memory on Unicorn.

There are two views of every page, and a walker of our own that picks one at each TLB miss. The raw
view is what DRAM holds and all that a host sees; the plain one is what the guest's key makes of it.
As in a coherence protocol a page is good in one view, or in both as long as nobody writes: a write
through one makes the other stale, and before a stale one is used it is encrypted or decrypted
again. The state of a page is one byte (see mmu.c), read by both sides.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from ctypes import c_int, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from unicorn import unicorn_const as uc

from labkit.engines.unicorn.isa.x86_regs import PLAIN
from labkit.engines.unicorn.native.lib import LIB, Handle, MemHook, Page
from labkit.engines.unicorn.native.mmu_code import MACHINE_CODE
from labkit.engines.unicorn.native.stubs import executable, host
from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.arch.desc import PagingMode
    from labkit.engines.base import GuestFault, Ownership

__all__ = ["FAULT", "NEED", "NONCANONICAL", "NOT_YOURS", "Mmu"]

FAULT, NONCANONICAL, NEED, NOT_YOURS = range(1, 5)  # `why` of mmu.c
READ, WRITE, FETCH = 16, 17, 18  # uc_mem_type
PLAIN_STALE, RAW_STALE, _, _, WROTE_PRIVATE, WROTE_SHARED, ASSIGNED, UNUSABLE = (
    1 << bit for bit in range(8)
)  # as in mmu.c
WROTE = WROTE_PRIVATE | WROTE_SHARED
KEPT = WROTE | ASSIGNED | UNUSABLE  # whatever happens to the bytes
PLAIN_AT = 1 << 44  # where the plain view of gpa 0 lies in Unicorn's own physical memory
PROBE_AT = 1 << 45
AS_CS_SAYS = 4
MAX_SLOTS = 16
_ACCESS = {uc.UC_PROT_READ: READ, uc.UC_PROT_WRITE: WRITE, uc.UC_PROT_EXEC: FETCH}
_REGS = ("cr0", "cr3", "cr4", "rflags", "cs")


# fmt: off
_FACTS = (
    "nxe", "levels", "frame", "reserved", "c_bit", "inverted", "plain_at", "peek", "ring", "probed",
    "probe_at", "why", "code", "gva", "gpa", "type", "nr_slots",
)
# fmt: on


class _Slot(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in ("gpa", "size", "raw", "plain", "state")]


class _Facts(ctypes.Structure):
    """`struct mmu` of mmu.c."""

    _fields_ = [
        ("reg_read", c_void_p),
        ("regs", c_uint64 * 5),
        *((name, c_uint64) for name in _FACTS),
        ("slots", _Slot * MAX_SLOTS),
    ]


class _Entry(ctypes.Structure):
    """`uc_tlb_entry`."""

    _fields_ = [("paddr", c_uint64), ("perms", c_int)]


@cache
def _fill() -> tuple[int, Any]:
    """mmu.c's `fill`: its address, and the same as a Python callable."""
    code = MACHINE_CODE.get(("fill", host()))
    if code is None:
        raise NotAvailable(
            f"encrypted guests need x86-64 or arm64 as host, not {platform.machine()}"
        )

    try:
        address = executable(bytes.fromhex(code))
    except OSError as err:
        raise NotAvailable(f"encrypted guests need memory that can be executed: {err}") from err
    form = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint64, c_int, ctypes.POINTER(_Entry), c_void_p)
    return address, form(address)


@dataclass
class _View:
    """One memslot: where its raw bytes lie, and the plain ones beside them."""

    gpa: int
    size: int
    raw: memoryview
    plain: mmap.mmap
    hva: int  # of plain
    state: NDArray[np.uint8]  # one per page
    spa: NDArray[np.uint64]  # of each page: which page of DRAM stands behind it


class Mmu:
    """The memory of one protected VM, for all its vCPUs."""

    def __init__(self, mode: PagingMode, cipher: Ownership, inverted: bool) -> None:
        if mode.c_bit is None:
            raise InvalidState(f"{mode.name} has no encryption bit")
        self.cipher, self.views, self._probe = cipher, list[_View](), Page()
        self.address, self._call = _fill()
        self.facts = _Facts(
            ctypes.cast(LIB.uc_reg_read, c_void_p), (c_uint64 * 5)(*(PLAIN[name] for name in _REGS))
        )
        self._entry = _Entry()

        facts = self.facts
        facts.nxe = 1
        facts.levels = len(mode.levels)
        facts.frame = mode.pa.mask
        facts.reserved = mode.reserved
        facts.c_bit = 1 << mode.c_bit
        facts.inverted = inverted
        facts.plain_at = PLAIN_AT
        facts.ring = AS_CS_SAYS

    def add(self, gpa: int, hva: int, size: int) -> _View:
        """A new memslot.

        Until somebody encrypts it, what lies in it is ciphertext like any other bytes.
        """
        if len(self.views) == MAX_SLOTS:
            raise InvalidState(f"a protected VM has at most {MAX_SLOTS} memslots")
        raw = memoryview((ctypes.c_uint8 * size).from_address(hva)).cast("B")
        plain = mmap.mmap(-1, size)
        plain_hva = ctypes.addressof(ctypes.c_char.from_buffer(plain))
        nr_pages = size // 4096
        state = np.full(nr_pages, PLAIN_STALE, np.uint8)
        spa = gpa + 4096 * np.arange(nr_pages, dtype=np.uint64)
        view = _View(gpa, size, raw, plain, plain_hva, state, spa)
        self.facts.slots[len(self.views)] = _Slot(gpa, size, hva, view.hva, state.ctypes.data)
        self.views.append(view)
        self.facts.nr_slots = len(self.views)
        return view

    def attach(self, handle: Handle) -> None:
        """Let an engine look addresses up here."""
        for view in self.views:
            handle.map(PLAIN_AT + view.gpa, view.hva, view.size, uc.UC_PROT_ALL)
        handle.map(PROBE_AT, self._probe.hva, 4096, uc.UC_PROT_ALL)
        handle.ctl_write(uc.UC_CTL_TLB_TYPE, c_int(uc.UC_TLB_VIRTUAL))
        handle.hook(uc.UC_HOOK_TLB_FILL, self.address, data=ctypes.addressof(self.facts))

    # --- the two views

    def _at(self, gpa: int) -> tuple[_View, int] | None:
        """The view that holds a gpa, and the number of the page in it."""
        for view in self.views:
            if view.gpa <= gpa < view.gpa + view.size:
                return view, (gpa - view.gpa) // 4096
        return None

    def _pages(self, gpa: int, size: int) -> list[tuple[_View, int, int]]:
        """(view, first page, page behind the last) of a range, as far as memslots go."""
        found = []
        for view in self.views:
            if gpa < view.gpa + view.size and view.gpa < gpa + size:
                begin = max(gpa - view.gpa, 0)
                end = min(gpa + size - view.gpa, view.size)
                found.append((view, begin // 4096, -(-end // 4096)))
        return found

    def settle(self, gpa: int, size: int = 1) -> bool:
        """Make both views of these pages good; True when plain bytes were made anew.

        TLBs must be flushed behind it.
        """
        made = False
        for view, first, last in self._pages(gpa, size):
            stale = np.flatnonzero(view.state[first:last] & (PLAIN_STALE | RAW_STALE)) + first
            for page in stale.tolist():
                made |= self._settle_page(view, page)
        self.unsee()
        return made

    def _settle_page(self, view: _View, page: int) -> bool:
        cut = slice(4096 * page, 4096 * page + 4096)
        spa = int(view.spa[page])
        made = bool(view.state[page] & PLAIN_STALE)
        with memoryview(view.plain) as plain:
            if made:
                self.cipher.decrypt_into(spa, view.raw[cut], plain[cut])
            else:
                self.cipher.encrypt_into(spa, plain[cut], view.raw[cut])
        view.state[page] &= ~np.uint8(PLAIN_STALE | RAW_STALE)
        return made

    def unsee(self) -> None:
        """Every TLB was flushed, or will be before it is used again."""
        for view in self.views:
            view.state &= np.uint8(PLAIN_STALE | RAW_STALE | KEPT)

    def publish(self, gpa: int, size: int) -> bool:
        """The host is about to look: encrypt what the guest wrote.

        True when something was, and TLBs must be flushed.
        """
        late = False
        for view, first, last in self._pages(gpa, size):
            stale = np.flatnonzero(view.state[first:last] & RAW_STALE) + first
            for page in stale.tolist():
                self._settle_page(view, page)
                late = True
        if late:
            self.unsee()
        return late

    def host_wrote(self, gpa: int, size: int) -> None:
        """The host changed the raw view, which it had looked at before."""
        for view, first, last in self._pages(gpa, size):
            view.state[first:last] = view.state[first:last] & KEPT | PLAIN_STALE
        self.unsee()

    def swap(self, gpa: int, other: int) -> None:
        """Exchange the pages of DRAM behind two gpas, as a host can in its nested page table."""
        one, two = self._at(gpa), self._at(other)
        if one is None or two is None:
            raise InvalidState(f"gpa {gpa:#x} and {other:#x}: not both lie in memslots")
        self.publish(gpa & -4096, 4096)
        self.publish(other & -4096, 4096)

        (a, i), (b, j) = one, two
        cut_a = slice(4096 * i, 4096 * i + 4096)
        cut_b = slice(4096 * j, 4096 * j + 4096)
        a.raw[cut_a], b.raw[cut_b] = bytes(b.raw[cut_b]), bytes(a.raw[cut_a])
        a.spa[i], b.spa[j] = int(b.spa[j]), int(a.spa[i])
        # How its bytes were written goes along
        a.state[i], b.state[j] = int(b.state[j]), int(a.state[i])

        for at in (gpa, other):
            self.host_wrote(at & -4096, 4096)

    def own(self, gpa: int, assigned: Any, usable: Any) -> None:
        """Pages from gpa on are a guest's (no shared write), this guest's to use privately.

        That is as far as memslots go. TLBs must be flushed.
        """
        for view, first, last in self._pages(gpa, 4096 * len(assigned)):
            before = (gpa - view.gpa) // 4096
            part = slice(first - before, last - before)
            bits = np.where(assigned[part], ASSIGNED, 0) | np.where(usable[part], 0, UNUSABLE)
            others = view.state[first:last] & ~np.uint8(ASSIGNED | UNUSABLE)
            view.state[first:last] = others | bits.astype(np.uint8)
        self.unsee()

    def not_yours(self) -> GuestFault:
        """What the access meets that was just stopped for its page's owner.

        A walk (code 2) reads, whatever it is for.
        """
        facts = self.facts
        is_write = facts.type == WRITE and facts.code != 2
        fault = self.cipher.guest_fault(facts.gpa, facts.code != 0, is_write)
        assert fault is not None, (
            f"gpa {facts.gpa:#x}: the owner's table and the state of the page disagree"
        )
        return fault

    def plain(self, gpa: int, size: int) -> bytes:
        """Memory as the key shows it, as far as the memslot goes.

        What was not decrypted yet is, and no guest need notice.
        """
        place = self._at(gpa)
        if place is None:
            return b""
        view, first = place[0], place[1]
        size = min(size, view.gpa + view.size - gpa)
        for page in range(first, (gpa + size - view.gpa + 4095) // 4096):
            if view.state[page] & PLAIN_STALE:
                self.settle(view.gpa + 4096 * page)
        return view.plain[gpa - view.gpa : gpa - view.gpa + size]

    def write_plain(self, gpa: int, data: bytes) -> None:
        """Write through the key, within one memslot."""
        place = self._at(gpa)
        if place is None or gpa + len(data) > place[0].gpa + place[0].size:
            raise InvalidState(f"{len(data)} bytes at gpa {gpa:#x} do not fit into a memslot")

        view, first = place
        self.plain(gpa, len(data))  # what lies around them must be good
        begin, end = gpa - view.gpa, gpa - view.gpa + len(data)
        view.plain[begin:end] = data
        for page in range(first, (end - 1) // 4096 + 1):
            view.state[page] |= RAW_STALE | WROTE_PRIVATE

    # --- the guest's own accesses, made by the host for it

    def translate(self, handle: Handle, gva: int, access: int, ring: int) -> int | None:
        """The gpa behind a gva, None when the access would fault.

        Nothing is marked accessed or dirty.
        """
        self.facts.peek = 1
        try:
            return self._walk(handle, gva, _ACCESS[access], ring)
        finally:
            self.facts.peek = 0

    def _walk(self, handle: Handle, gva: int, kind: int, ring: int) -> int | None:
        self.facts.ring = ring
        try:
            while not self._call(handle.h, gva, kind, self._entry, ctypes.addressof(self.facts)):
                if self.facts.why != NEED:
                    return None
                self.settle(self.facts.gpa)
            return int(self._entry.paddr) + (gva & 4095)
        finally:
            self.facts.ring = AS_CS_SAYS

    def access(
        self, handle: Handle, gva: int, size: int, ring: int, data: bytes | None = None
    ) -> bytes | None:
        """Read, or write data, as the guest itself would.

        It goes through its tables and the view that they name; None for a fault.
        """
        kind = READ if data is None else WRITE
        places = []
        at = gva
        while at < gva + size:
            hpa = self._walk(handle, at, kind, ring)
            if hpa is None:
                return None
            count = min(4096 - (at & 4095), gva + size - at)
            places.append((hpa, count))
            at += count

        out = b""
        for hpa, count in places:
            bytes_of = self._bytes(hpa, count)
            if bytes_of is None:
                return None
            if data is not None:
                bytes_of[:] = data[len(out) : len(out) + count]
            out += bytes(bytes_of)
        return out

    def _bytes(self, hpa: int, size: int) -> memoryview | None:
        """The bytes at an address of Unicorn's physical memory, within one page."""
        is_plain = hpa >= PLAIN_AT
        gpa = hpa - PLAIN_AT if is_plain else hpa
        place = self._at(gpa)
        if place is None:
            return None

        view = place[0]
        whole = view.raw
        if is_plain:
            whole = memoryview((ctypes.c_uint8 * view.size).from_address(view.hva)).cast("B")
        offset = gpa - view.gpa
        return whole[offset : offset + size]

    def where(self, handle: Handle, pc: int, page: int) -> int:
        """The gva in `page` that the instruction at pc touches first.

        Unicorn's callback tells only the page. The instruction runs with a page of ours there, and
        all of it is undone.
        """
        seen, before = list[int](), handle.context()

        def touched(_h: int, _kind: int, hpa: int, _size: int, _value: int, _d: int) -> bool:
            seen.append(hpa - PROBE_AT)
            LIB.uc_emu_stop(handle.h)
            return True

        hook = handle.hook(
            uc.UC_HOOK_MEM_READ | uc.UC_HOOK_MEM_WRITE, MemHook(touched), PROBE_AT, PROBE_AT + 4095
        )
        self.facts.probed, self.facts.probe_at = page, PROBE_AT
        try:
            handle.flush_tlb()
            handle.flush_code()
            handle.run(pc, 1)
        finally:
            self.facts.probe_at = 0
            handle.unhook(hook)
            handle.set_context(before)
            handle.flush_tlb()
            handle.flush_code()
        return page & -4096 | seen[0] if seen else page

    # --- snapshots

    def written(self) -> list[tuple[int, NDArray[np.bool_], NDArray[np.bool_]]]:
        """For each memslot its gpa, and how the guest wrote each page last.

        The two arrays say for each page: last through its key, last without.
        """
        return [
            (view.gpa, view.state & WROTE_PRIVATE != 0, view.state & WROTE_SHARED != 0)
            for view in self.views
        ]

    def state(self) -> list[tuple[bytes, bytes]]:
        """What a snapshot keeps beside the raw bytes.

        That is which page of DRAM is where, and how the guest wrote each last.
        """
        return [(view.spa.tobytes(), (view.state & KEPT).tobytes()) for view in self.views]

    def set_state(self, state: list[tuple[bytes, bytes]]) -> None:
        """Put `state` back; the raw bytes are put back by whoever holds them."""
        for view, (spas, wrote) in zip(self.views, state, strict=True):
            view.spa[:] = np.frombuffer(spas, np.uint64)
            view.state[:] = np.frombuffer(wrote, np.uint8) | PLAIN_STALE
