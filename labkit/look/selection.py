"""What a person has chosen in a view: one range of addresses, from its name to host memory."""

from __future__ import annotations

from labkit.arch.translation import Translation
from labkit.errors import LabError
from labkit.look.eyes import BLOCK
from labkit.look.snapshots import Selection
from labkit.machine.memory import PAGE
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm
from labkit.ucall.abi import BITMAP_BYTES, NR_SLOTS, UCALL_SIZE
from labkit.ucall.pool import Pool

__all__ = ["select"]


def select(vm: Vm, kind: str, value: int, vcpu: Vcpu | None = None) -> Selection | None:
    """The selection of a slot by its index, of an address, or of the page or block at a gpa.

    kind: "slot"; "gva", "register", "byte", "entry"; "page", "block". vcpu is the one whose page
    tables count (None: the first). None for any other kind, and for a slot that is none.
    """
    translation = vm.translation() if vcpu is None else vcpu.translation()
    if kind == "slot":
        return _slot(vm, value, translation)
    if kind in ("gva", "register", "byte", "entry"):
        label = vm.names.label(value)
        return _path(vm, kind, label, translation, gva=value, gpa=None, size=1)
    if kind in ("page", "block"):
        size = PAGE if kind == "page" else BLOCK
        # By way of the lowest gva that maps it
        gva = next(iter(vm.page_table(vcpu).maps(value & -size)), None)
        label = "" if gva is None else vm.names.label(gva)
        return _path(vm, kind, label, translation, gva=gva, gpa=value & -size, size=size)
    return None


def _slot(vm: Vm, index: int, translation: Translation | None) -> Selection | None:
    pool = vm.host_pool
    if pool is None or not 0 <= index < NR_SLOTS:
        return None
    gva = pool.gva + BITMAP_BYTES + UCALL_SIZE * index
    label = _holder(vm, pool, index)
    return _path(vm, "slot", label, translation, gva=gva, gpa=None, size=UCALL_SIZE, slot=index)


def _holder(vm: Vm, pool: Pool, index: int) -> str:
    """Who holds a slot, and with which command."""
    for slot in pool.snapshot(vm.step, frozenset()).held:
        if slot.index == index and slot.state != "free":
            owner = "owner unknown" if slot.vcpu is None else f"vCPU {slot.vcpu}"
            return f"{owner}, {slot.cmd}"
    return "free"


def _path(
    vm: Vm,
    kind: str,
    label: str,
    translation: Translation | None,
    gva: int | None,
    gpa: int | None,
    size: int,
    slot: int | None = None,
) -> Selection:
    """The selection of a gva, or of a gpa that no gva maps."""
    path: tuple[str, ...] = ()
    if gva is not None:
        walk = vm.machine.space.walk(gva, translation)
        path = tuple(str(step) for step in walk.steps)
        gpa = walk.gpa
    return Selection(kind, label, gva, gpa, _hva(vm, gpa), size, path, slot)


def _hva(vm: Vm, gpa: int | None) -> int | None:
    """The host address of a gpa; None for a hole."""
    if gpa is None:
        return None
    try:
        return vm.memory.hva(gpa)
    except LabError:
        return None
