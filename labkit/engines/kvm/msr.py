"""MSRs by number: KVM's own, those of the VM's table that KVM lacks, and the offset of the TSC."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from labkit.arch.x86_cpu import IA32_TSC
from labkit.engines import need
from labkit.engines.kvm.abi import CONSTANTS, call, msrs, struct
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["number_of", "read_msr", "read_tsc_offset", "write_msr", "write_tsc_offset"]


def number_of(name: str) -> int:
    """The number in a name such as msr_0x10; raises InvalidState for any other name."""
    table, _, number = name.partition("_")
    try:
        index = int(number, 0) if table == "msr" else -1
    except ValueError:
        index = -1
    if not 0 <= index < 1 << 32:
        raise InvalidState(f"x86-64 has no register {name!r}", name=name)
    return index


def read_msr(vcpu: KvmVcpu, index: int) -> int:
    """An MSR; raises InvalidState when this CPU has none."""
    if index in vcpu.msrs:
        return vcpu.msrs[index]
    table = msrs({index: 0})
    if call(vcpu.fd, "KVM_GET_MSRS", table) == 1:
        return int(table.entries[0].data)
    value = vcpu.host_msr(index)
    if value is None:
        raise InvalidState(f"this CPU has no MSR '{index:#x}'", name=f"msr_{index:#x}")
    return value


def write_msr(vcpu: KvmVcpu, index: int, value: int) -> None:
    """Set an MSR.

    Raises InvalidState when this CPU has none or does not take the value, NotAvailable for a TSC
    that is fixed.
    """
    if index == IA32_TSC:
        need(vcpu.vm, "tsc")
    if call(vcpu.fd, "KVM_SET_MSRS", msrs({index: value})) == 1:
        return
    if not vcpu.set_host_msr(index, value):
        raise InvalidState(
            f"this CPU has no MSR '{index:#x}', or it does not take {value:#x}",
            name=f"msr_{index:#x}",
        )


def read_tsc_offset(vcpu: KvmVcpu) -> int:
    """What KVM adds to the host's TSC for this vCPU, as far as it says (KVM_VCPU_TSC_OFFSET)."""
    place = ctypes.c_uint64(0)
    if _has_offset(vcpu):
        call(vcpu.fd, "KVM_GET_DEVICE_ATTR", _offset_in(place))
    return place.value


def write_tsc_offset(vcpu: KvmVcpu, value: int) -> None:
    """Set it; raises NotAvailable for a TSC that is fixed, InvalidState where KVM lets nobody."""
    need(vcpu.vm, "tsc")
    if _has_offset(vcpu):
        call(vcpu.fd, "KVM_SET_DEVICE_ATTR", _offset_in(ctypes.c_uint64(value)))
    elif value:
        raise InvalidState(
            "this KVM does not let the TSC's offset be set", name="tsc_offset", value=value
        )


def _has_offset(vcpu: KvmVcpu) -> bool:
    return bool(vcpu.vm.has("KVM_CAP_VCPU_ATTRIBUTES"))


def _offset_in(place: ctypes.c_uint64) -> Any:
    """struct kvm_device_attr for the offset, which is read into that place or from it."""
    return struct(
        "kvm_device_attr",
        group=CONSTANTS["KVM_VCPU_TSC_CTRL"],
        attr=CONSTANTS["KVM_VCPU_TSC_OFFSET"],
        addr=ctypes.addressof(place),
    )
