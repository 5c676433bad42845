"""Everything that a vCPU is, as bytes: KVM's structures one after the other, and what labkit keeps beside them."""

from __future__ import annotations

import ctypes
import json
import struct as packing
from ast import literal_eval
from typing import TYPE_CHECKING, Any

from labkit.engines import base
from labkit.engines.kvm.abi import STRUCTS, call, msrs, struct
from labkit.engines.kvm.regs import GPR
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["restore", "save"]

_HEADER = packing.Struct("<4sI")
_MAGIC = b"LKK1"
# In the order in which they are restored: paging before what depends on it, events last
_PARTS = ("SREGS", "XCRS", "XSAVE", "DEBUGREGS", "MP_STATE", "VCPU_EVENTS")
_SIZES = {name: ctypes.sizeof(STRUCTS[f"kvm_{name.lower()}"]) for name in _PARTS}


def save(vcpu: KvmVcpu) -> bytes:
    """The state of a vCPU whose instruction is settled, or waits for a read from a hole."""
    replay, size = list(vcpu.replay), vcpu.replay_size
    if (
        vcpu.pending == "read" and vcpu.awaits is not None
    ):  # KVM keeps what it has read so far to itself: the instruction begins again
        at, size = vcpu.awaits
        replay = [
            *vcpu.answers,
            (vcpu.u64[at // 8 - 1], int.from_bytes(vcpu.u8[at : at + size], "little")),
        ]
    facts = {
        "insns": vcpu.insns,
        "exact": vcpu.exact,
        "msrs": {str(k): v for k, v in vcpu.msrs.items()},
        "replay": replay,
        "size": size,
        "queue": [(type(exit).__name__, repr((*vars(exit).values(),))) for exit in vcpu.queue],
        "awaits": None if vcpu.pending else vcpu.awaits,
        "wrote": vcpu.wrote,
    }
    text = json.dumps(facts).encode()
    parts = [bytes(vcpu.gprs)]
    for name in _PARTS:
        part = struct(f"kvm_{name.lower()}")
        call(vcpu.fd, f"KVM_GET_{name}", part)
        parts.append(bytes(part))
    return b"".join((_HEADER.pack(_MAGIC, len(text)), text, *parts, bytes(_read_msrs(vcpu))))


def _read_msrs(vcpu: KvmVcpu) -> Any:
    table = msrs(vcpu.vm.saved_msrs)
    call(vcpu.fd, "KVM_GET_MSRS", table)
    return table


def restore(vcpu: KvmVcpu, state: bytes) -> None:
    """Put it back; raises InvalidState for bytes that are no such state."""
    if len(state) < _HEADER.size or state[:4] != _MAGIC:
        raise InvalidState("not a CPU state of the kvm engine")
    at = _HEADER.size + _HEADER.unpack_from(state)[1]
    facts = json.loads(state[_HEADER.size : at])
    vcpu.insns, vcpu.exact = facts["insns"], facts["exact"]
    vcpu.msrs = {int(k): v for k, v in facts["msrs"].items()}
    vcpu.replay, vcpu.replay_size = [(gpa, value) for gpa, value in facts["replay"]], facts["size"]
    vcpu.queue[:] = (getattr(base, name)(*literal_eval(values)) for name, values in facts["queue"])
    vcpu.awaits, vcpu.wrote = facts["awaits"], facts["wrote"]
    vcpu.gprs[:] = memoryview(state[at : at + 8 * len(GPR)]).cast("Q")
    vcpu.run_page.kvm_dirty_regs |= 1
    vcpu.regs.kept.clear()
    at += 8 * len(GPR)
    for name in _PARTS:
        part = STRUCTS[f"kvm_{name.lower()}"].from_buffer_copy(state, at)
        call(vcpu.fd, f"KVM_SET_{name}", part)
        at += _SIZES[name]
        if name == "SREGS":
            vcpu.run_page.cr8 = part.cr8
    table = _read_msrs(vcpu)
    was = type(table).from_buffer_copy(state, at)
    wrong = {
        old.index: old.data
        for old, now in zip(was.entries, table.entries, strict=True)
        if old.data != now.data
    }
    if wrong and call(vcpu.fd, "KVM_SET_MSRS", msrs(wrong)) != len(wrong):
        raise InvalidState(
            f"vCPU {vcpu.index}: KVM does not take back MSRs {', '.join(map(hex, wrong))}"
        )
