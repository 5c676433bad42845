"""Segments of struct kvm_sregs: KVM wants all of a descriptor, where a CPU is told a selector."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.engines.kvm.abi import call, struct
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["load_segment", "make_busy_tss"]

RPL, TI = 3, 4  # of a selector: privilege, and whether it is in the LDT (SDM vol. 3A 3.4.2)
BUSY_TSS = {
    "type": 11,
    "present": 1,
    "dpl": 0,
    "db": 0,
    "s": 0,
    "l": 0,
    "g": 0,
    "avl": 0,
    "unusable": 0,
}


def make_busy_tss(sregs: Any) -> None:
    """Give TR the attributes that a CPU in 64-bit mode insists on (SDM vol. 3C 27.3.1.2)."""
    _fill(sregs.tr, BUSY_TSS)


def load_segment(vcpu: KvmVcpu, sregs: Any, name: str, selector: int) -> None:
    """Load a segment register as MOV does, from the tables that `sregs` points at.

    Raises InvalidState for a selector behind which there is no segment, or for CS no 64-bit code.
    """
    segment = getattr(sregs, name)
    if not selector & ~RPL:
        ctypes.memset(ctypes.addressof(segment), 0, ctypes.sizeof(segment))
        _fill(segment, {"selector": selector, "unusable": 1, "dpl": selector & RPL})
        return

    table = sregs.ldt if selector & TI else sregs.gdt
    gva = table.base + (selector & ~(RPL | TI))
    raw = vcpu.memory.fetch(gva, 8) if selector | RPL | TI <= table.limit else b""
    # It leaves the accessed bits of a CPU's own look-up.
    call(vcpu.fd, "KVM_TRANSLATE", struct("kvm_translation", linear_address=gva))

    descriptor = int.from_bytes(raw, "little")
    is_long = bool(descriptor >> 53 & 1)  # L
    if len(raw) < 8 or (name == "cs" and not is_long):
        table_name = "LDT" if selector & TI else "GDT"
        raise InvalidState(
            f"{name} = {selector:#x}: the {table_name} has no such segment", name=name
        )
    _fill(segment, {"selector": selector, **_attributes(descriptor)})


def _attributes(descriptor: int) -> dict[str, int]:
    """The members of struct kvm_segment, from a descriptor (SDM vol. 3A 3.4.5)."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    granular = descriptor >> 55 & 1
    return {
        "base": descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000,
        "limit": limit << 12 | 0xFFF if granular else limit,
        "type": descriptor >> 40 & 15,
        "s": descriptor >> 44 & 1,
        "dpl": descriptor >> 45 & 3,
        "present": descriptor >> 47 & 1,
        "avl": descriptor >> 52 & 1,
        "l": descriptor >> 53 & 1,
        "db": descriptor >> 54 & 1,
        "g": granular,
        "unusable": 0,
    }


def _fill(segment: Any, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(segment, name, value)
