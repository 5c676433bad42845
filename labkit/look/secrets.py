"""What a protected VM has beside: its encryption map, its launch, one page through two eyes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap, PageState, PageStates
from labkit.look.encryption_map import encryption_map
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress, LaunchStep, launch_steps
from labkit.look.memory import look_at_memory
from labkit.machine.memory import PAGE
from labkit.paging.scan import PageTable
from labkit.session.vm import Vm
from labkit.sev.guest import ProtectedGuest

__all__ = [
    "gpa_of",
    "look_at_encryption",
    "look_at_launch",
    "look_through_both",
    "page_states",
]

NOT_HERE = 0xFFFF_FFFF  # no ASID: a page that is as good as somebody else's
Range = tuple[int, int]  # (address, bytes)


# --- what memory really is


def page_states(vm: Vm) -> list[PageStates]:
    """What the memory of a protected VM really is, by memslot.

    A page is private when a launch command encrypted it or the guest wrote it last through its
    key, and the guest did not write it last without; under SNP, when the RMP says so.
    """
    guest = vm.need_guest()
    states = []
    for gpa, through_key, without_key in vm.machine.written():
        nr_pages = len(through_key)
        private = (_launched(guest, gpa, nr_pages) | through_key) & ~without_key
        meant = [(PAGE * pfn, PAGE * count) for pfn, count in guest.protected.ranges()]
        protected = _marked(meant, gpa, nr_pages)
        if guest.kind == "snp":
            states.append(_owned(guest, gpa, protected))
        else:
            states.append(PageStates.of(gpa, private, protected))
    return states


def _launched(guest: ProtectedGuest, gpa: int, nr_pages: int) -> NDArray[np.bool_]:
    """Which pages a launch command encrypted, or a packet brought encrypted.

    Commands name system physical addresses; where the host exchanged pages in its nested table,
    the page at a gpa is another.
    """
    ranges: list[Range] = [(m.spa, getattr(m, "size", PAGE)) for m in guest.measured]
    known = guest.host.psp.guests.get(guest.vm.handle)
    if known is not None:
        ranges += known.unwrapped

    launched = _marked(ranges, gpa, nr_pages)
    for page, spa in guest.nested.pages.items():
        if 0 <= page - gpa < PAGE * nr_pages:
            launched[(page - gpa) // PAGE] = _holds(ranges, spa)
    return launched


def _owned(guest: ProtectedGuest, gpa: int, protected: NDArray[np.bool_]) -> PageStates:
    """The pages of one memslot as the RMP has them."""
    nr_pages = len(protected)
    owner = np.zeros(nr_pages, np.uint32)
    validated = np.zeros(nr_pages, np.bool_)
    for spa, entry in guest.host.rmp.entries.items():
        at = (guest.nested.gpa(spa) - gpa) // PAGE
        if 0 <= at < nr_pages:
            is_at_home = entry.gpa == gpa + PAGE * at
            owner[at] = entry.asid if is_at_home else NOT_HERE
            validated[at] = entry.validated
    asid = guest.vm.asid
    return PageStates.of(gpa, owner == asid, protected, owner, validated, asid)


def _marked(ranges: Iterable[Range], gpa: int, nr_pages: int) -> NDArray[np.bool_]:
    """Which of nr_pages from gpa on lie, if only in part, in ranges of (gpa, bytes)."""
    marked = np.zeros(nr_pages, np.bool_)
    for start, size in ranges:
        first = (start - gpa) // PAGE
        end = -(-(start + size - gpa) // PAGE)
        marked[max(first, 0) : max(end, 0)] = True
    return marked


def _holds(ranges: Sequence[Range], spa: int) -> bool:
    return any(0 <= spa - start < size for start, size in ranges)


# --- looking


def look_at_encryption(vm: Vm, table: PageTable | None = None) -> EncryptionMap:
    """Page tables against memory; `table` is the address space if somebody has scanned it already.

    Raises InvalidState for a VM that is not protected.
    """
    if vm.guest is None:
        raise InvalidState(f"{vm.name} is not protected: nothing in it is encrypted")
    return encryption_map(
        vm.page_table() if table is None else table,
        page_states(vm),
        look_at_memory(vm),
        protection=vm.guest.kind,
        facts=(f"policy {vm.guest.policy:#x}",),
    )


def look_at_launch(vm: Vm) -> LaunchProgress:
    """How far the launch of a protected VM is: each command, each range with the digest after it.

    A command that measured nothing, or was refused, is a step of its own. Raises InvalidState for
    a VM that is not protected.
    """
    guest = vm.need_guest()
    measured = launch_steps(guest.measured)
    steps: list[LaunchStep] = []
    nr_done = 0
    for command in guest.done:
        new = measured[nr_done : command.nr_measured]
        nr_done = command.nr_measured
        steps += new
        if command.refused or not new:
            refused, found = command.status, command.refused
            steps.append(LaunchStep(command.command, refused=refused, found=found))

    planned = guest.planned or guest.protected.ranges()
    return LaunchProgress(
        protection=guest.kind.upper(),
        state=guest.state,
        steps=tuple(steps),
        slots=tuple((slot.gpa, slot.size) for slot in vm.memory.slots),
        planned=tuple((pfn * PAGE, count) for pfn, count in planned),
        policy=guest.policy,
        measurement=guest.measurement,
    )


def gpa_of(vm: Vm, gpa: int | None, gva: int | None) -> int:
    """The one of two addresses that was given, as a gpa in memory.

    A gva goes through the guest's own page tables, wherever the host may not walk. Raises
    InvalidState without exactly one, PageFault and MemoryFault for one where nothing is.
    """
    if gpa is not None and gva is not None:
        raise InvalidState("eyes() takes a gpa or a gva, not both")
    if gva is not None:
        gpa = vm.machine.space.walk(gva, vm.translation()).require()
    if gpa is None:
        raise InvalidState("eyes() takes a gpa or a gva, not neither")
    vm.memory.hva(gpa)
    return gpa


def look_through_both(vm: Vm, gpa: int, table: PageTable | None = None) -> PageEyes:
    """The page that holds a gpa, as host and guest see it; nothing is marked as changed."""
    space = vm.machine.space
    page = gpa & -PAGE
    if table is None:
        table = vm.page_table()
    gva = min(table.maps(page), default=None)
    if gva is None:
        through_key = space.is_protected(page)
        word = ""
    else:
        through_key = bool(table.walk(gva).flags.get("c"))
        word = "" if space.mode.c_bit is None else space.mode.c_word(through_key)

    host = vm.memory.read(page, PAGE)
    return PageEyes(
        gpa=page,
        host=host,
        guest=vm.machine.plain(page, PAGE) if through_key else host,
        private=_is_private(vm, page),
        word=word,
        what="" if gva is None else vm.names.label(gva),
        gva=gva,
        step=vm.step,
    )


def _is_private(vm: Vm, page: int) -> bool:
    """Whether memory holds ciphertext there."""
    if vm.guest is None:
        return False
    for slot in page_states(vm):
        if 0 <= page - slot.gpa < PAGE * len(slot.states):
            state = PageState(int(slot.states[(page - slot.gpa) // PAGE]))
            return state not in (PageState.SHARED, PageState.UNLAUNCHED)
    return False
