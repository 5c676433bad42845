"""Everything that a vCPU is, as bytes: KVM's structures, and what labkit keeps beside them.

In this order: magic and the length of the text; the text (JSON: the count, MSRs that KVM lacks,
what waits); the general registers; the structures of _PARTS; the MSRs.
"""

from __future__ import annotations

import ctypes
import json
import struct as packing
from typing import TYPE_CHECKING, Any

from labkit.engines.kvm.abi import STRUCTS, call, msrs, struct
from labkit.engines.kvm.places import GPR
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["restore", "save"]

_HEADER = packing.Struct("<4sI")
_MAGIC = b"LKK2"
# In the order in which they are restored: paging before what depends on it, events last
_PARTS = ("SREGS", "XCRS", "XSAVE", "DEBUGREGS", "MP_STATE", "VCPU_EVENTS")
_SIZES = {name: ctypes.sizeof(STRUCTS[f"kvm_{name.lower()}"]) for name in _PARTS}


def save(vcpu: KvmVcpu) -> bytes:
    """The state of a vCPU whose instruction is settled, or waits for a read from a hole."""
    facts = {
        "insns": vcpu.insns,
        "exact": vcpu.exact,
        "msrs": {str(index): value for index, value in vcpu.msrs.items()},
        "waiting": vcpu.waiting.save(),
    }
    text = json.dumps(facts).encode()
    parts = [bytes(vcpu.gprs)]
    for name in _PARTS:
        part = struct(f"kvm_{name.lower()}")
        call(vcpu.fd, f"KVM_GET_{name}", part)
        parts.append(bytes(part))
    return b"".join((_HEADER.pack(_MAGIC, len(text)), text, *parts, bytes(_read_msrs(vcpu))))


def restore(vcpu: KvmVcpu, state: bytes) -> None:
    """Put it back where nothing waits; raises InvalidState for bytes that are no such state."""
    if len(state) < _HEADER.size or state[:4] != _MAGIC:
        raise InvalidState("not a CPU state of the kvm engine")
    at = _HEADER.size + _HEADER.unpack_from(state)[1]

    facts = json.loads(state[_HEADER.size : at])
    vcpu.insns = facts["insns"]
    vcpu.exact = facts["exact"]
    vcpu.msrs = {int(index): value for index, value in facts["msrs"].items()}
    vcpu.waiting.restore(facts["waiting"])

    vcpu.gprs[:] = memoryview(state[at : at + 8 * len(GPR)]).cast("Q")
    vcpu.page.registers_changed()
    vcpu.regs.kept.clear()
    at += 8 * len(GPR)

    for name in _PARTS:
        part = STRUCTS[f"kvm_{name.lower()}"].from_buffer_copy(state, at)
        call(vcpu.fd, f"KVM_SET_{name}", part)
        at += _SIZES[name]
        if name == "SREGS":
            vcpu.page.fields.cr8 = part.cr8
    _restore_msrs(vcpu, state, at)


def _read_msrs(vcpu: KvmVcpu) -> Any:
    table = msrs(vcpu.vm.saved_msrs)
    call(vcpu.fd, "KVM_GET_MSRS", table)
    return table


def _restore_msrs(vcpu: KvmVcpu, state: bytes, at: int) -> None:
    """Write those that differ from what KVM has now."""
    now = _read_msrs(vcpu)
    saved = type(now).from_buffer_copy(state, at)
    different = {
        old.index: old.data
        for old, new in zip(saved.entries, now.entries, strict=True)
        if old.data != new.data
    }
    if not different:
        return
    taken = call(vcpu.fd, "KVM_SET_MSRS", msrs(different))
    if taken != len(different):
        names = ", ".join(map(hex, different))
        raise InvalidState(f"vCPU {vcpu.index}: KVM does not take back MSRs {names}")
