"""The whole VM as one snapshot, and what an encrypted one has beside: its map, its launch, one page through two eyes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap, PageState, PageStates, encryption_map
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress, LaunchStep, launch_steps
from labkit.look.snapshots import EventMark, Selection, VmSnapshot
from labkit.look.touch import operands
from labkit.look.vcpu import label_gva, look_at_memory, look_at_vcpu, next_slot, status_of
from labkit.machine.vm import STACK_PAGES
from labkit.paging.scan import PageTable
from labkit.session.listing import read_code
from labkit.ucall.pool import Ucall

__all__ = [
    "gpa_of",
    "look_at_encryption",
    "look_at_launch",
    "look_at_vm",
    "look_through_both",
    "page_states",
]

NOT_HERE = 0xFFFF_FFFF  # no ASID
LETTERS = {"SYNC": "S", "PRINTF": "P", "DONE": "D", "ABORT": "A", "UNHANDLED": "A"}


def look_at_vm(vm: Any, front: int = 0, selection: Selection | None = None) -> VmSnapshot:
    """Everything the dashboard draws; raises InvalidState for a vCPU in front that is not there."""
    if not 0 <= front < max(len(vm.vcpus), 1):
        raise InvalidState(f"there is no vCPU {front}")
    cpus = tuple(look_at_vcpu(vm, vcpu) for vcpu in vm.vcpus)
    cpu, pool = cpus[front] if cpus else None, vm.pool if vm._pool is not None else None
    status = status_of(cpu) if cpu else ""
    if cpu and not cpu.sealed:
        ops = operands(
            vm.arch.name,
            read_code(vm.vcpus[front].peek, cpu.pc, 15),
            vm.vcpus[front].regs.all(),
            cpu.pc,
            vm.vcpus[front].peek,
        )
        pool = replace(pool, next_slot=next_slot(vm, ops)) if pool is not None else None
    marks = tuple(
        EventMark(e.step, e.vcpu, LETTERS.get(e.cmd, "N") if isinstance(e, Ucall) else "X", e.what)
        for e in vm._events
    )
    states, table = {cpu.state for cpu in cpus}, vm.page_table()
    seen = VmSnapshot(
        vm.name,
        vm.arch.name,
        vm.backend,
        "no encryption",
        ", ".join(sorted(states)) or "no vCPU",
        vm.schedule.name.replace("_", " "),
        vm.step,
        front,
        cpus,
        pool,
        table,
        look_at_memory(vm),
        selection,
        marks,
        status,
    )
    return seen if vm.guest is None else _with_secrets(vm, seen)


def _with_secrets(vm: Any, seen: VmSnapshot) -> VmSnapshot:
    """What a protected VM has beside: the map, the launch, and one page through both eyes."""
    found, launch = look_at_encryption(vm, seen.page_table), look_at_launch(vm)
    said = ", ".join((found.protection, found.facts[-1], launch.state.name))
    eyes = look_through_both(vm, _page_to_show(vm, seen, found), None, seen.page_table)
    return replace(seen, protection=said, encryption=found, launch=launch, eyes=eyes)


def _page_to_show(vm: Any, seen: VmSnapshot, found: EncryptionMap) -> int:
    """The selected page; without one a page that disagrees, else the first stack of the vCPU in front."""
    chosen, tops = seen.selection, vm.machine.stacks[seen.vcpu : seen.vcpu + 1]
    places = [
        chosen.gpa if chosen is not None else None,
        *(part.gpa for part in found.disagreements[:1]),
        *(seen.page_table.walk(base + 4096 * STACK_PAGES - 1).gpa for base in tops),
        vm.memory.slots[0].gpa,
    ]
    return next((gpa for gpa in places if gpa is not None and vm.memory.slot(gpa) is not None), 0)


def page_states(vm: Any) -> list[PageStates]:
    """What the memory of a protected VM really is, by memslot: what was launched, and how the guest wrote it last; with SNP the RMP."""
    guest, out = vm.guest, list[PageStates]()
    known = guest.host.psp.guests.get(guest.vm.handle)
    for gpa, through, without in vm.machine.written():
        nr = len(through)
        ranges = [(m.spa, getattr(m, "size", 4096)) for m in guest.measured] + (
            known.unwrapped if known else []
        )
        launched = _marked(ranges, gpa, nr)
        for page, spa in guest.nested.pages.items():
            if 0 <= page - gpa < 4096 * nr:
                launched[(page - gpa) // 4096] = any(
                    0 <= spa - start < size for start, size in ranges
                )
        meant = _marked(
            ((4096 * pfn, 4096 * count) for pfn, count in guest.protected.ranges()), gpa, nr
        )
        private, facts = (launched | through) & ~without, dict[str, Any]()
        if guest.kind == "snp":
            owner, valid = np.zeros(nr, np.uint32), np.zeros(nr, np.bool_)
            for spa, entry in guest.host.rmp.entries.items():
                at = (guest.nested.gpa(spa) - gpa) // 4096
                if 0 <= at < nr:  # a page that belongs at another gpa is as good as somebody else's
                    owner[at], valid[at] = (
                        entry.asid if entry.gpa == gpa + 4096 * at else NOT_HERE,
                        entry.validated,
                    )
            private, facts = (
                owner == guest.vm.asid,
                {"owner": owner, "asid": guest.vm.asid, "validated": valid},
            )
        out.append(PageStates.of(gpa, private, meant, **facts))
    return out


def _marked(ranges: Iterable[tuple[int, int]], gpa: int, nr_pages: int) -> NDArray[np.bool_]:
    """Which of nr_pages from gpa on lie in ranges of (gpa, bytes)."""
    out = np.zeros(nr_pages, np.bool_)
    for start, size in ranges:
        out[max((start - gpa) // 4096, 0) : max(-(-(start + size - gpa) // 4096), 0)] = True
    return out


def look_at_encryption(vm: Any, table: PageTable | None = None) -> EncryptionMap:
    """Page tables (those of now) against memory."""
    if vm.guest is None:
        raise InvalidState(f"{vm.name} is not protected: nothing in it is encrypted")
    return encryption_map(
        table or vm.page_table(),
        page_states(vm),
        look_at_memory(vm),
        protection=vm.guest.kind,
        facts=(f"policy {vm.guest.policy:#x}",),
    )


def look_at_launch(vm: Any) -> LaunchProgress:
    """How far the launch of a protected VM is: each command as it went, each range with the digest after it."""
    guest, steps, done = vm.guest, list[LaunchStep](), 0
    measured = launch_steps(guest.measured)
    for one in guest.done:
        new = measured[done : one.nr_measured]
        done = one.nr_measured
        steps += [
            *new,
            *[LaunchStep(one.command, refused=one.status, found=one.refused)]
            * bool(one.refused or not new),
        ]
    slots = tuple((slot.gpa, slot.size) for slot in vm.memory.slots)
    planned = tuple((pfn * 4096, count) for pfn, count in guest.planned or guest.protected.ranges())
    return LaunchProgress(
        guest.kind.upper(),
        guest.state,
        tuple(steps),
        slots,
        planned,
        guest.policy,
        guest.measurement,
    )


def gpa_of(vm: Any, gpa: int | None, gva: int | None) -> int:
    """The one of two addresses that was given, as a gpa in memory: through the guest's own page tables, wherever the host may not walk."""
    if (gpa is None) == (gva is None):
        raise InvalidState(
            f"eyes() takes a gpa or a gva, not {'both' if gpa is not None else 'neither'}"
        )
    found = int(vm.machine.space.walk(gva).require() if gpa is None else gpa)
    vm.memory.hva(found)
    return found


def look_through_both(
    vm: Any, gpa: int, before: PageEyes | None, table: PageTable | None = None
) -> PageEyes:
    """The page that holds gpa, as host and guest see it; `before` is what somebody saw of the same page last."""
    page, space = gpa & -4096, vm.machine.space
    table = table or vm.page_table()
    gva = min(table.maps(page), default=None)
    walk = None if gva is None else table.walk(gva)
    through = space.is_protected(page) if walk is None else bool(walk.flags.get("c"))
    host = vm.memory.read(page, 4096)
    guest = vm.machine.plain(page, 4096) if through else host
    word = "" if walk is None or space.mode.c_bit is None else space.mode.c_word(through)
    slots = page_states(vm) if vm.guest is not None else []
    here = [
        slot.states[(page - slot.gpa) // 4096]
        for slot in slots
        if 0 <= page - slot.gpa < 4096 * len(slot.states)
    ]
    private = not {PageState.SHARED, PageState.UNLAUNCHED}.issuperset(here)
    what = label_gva(vm, gva) if gva is not None else ""
    old = (None, None, None) if before is None else (before.host, before.guest, before.step)
    return PageEyes(page, host, guest, old[0], old[1], private, word, what, gva, vm.step, old[2])
