"""The KVM ABI of x86-64 as far as labkit uses it: structures, ioctl numbers, exit reasons.

Documentation/virt/kvm/api.rst. tests/engines/test_kvm_abi.py compiles C against <linux/kvm.h>
and compares every size, offset and number with these.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Mapping, Sequence
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from functools import cache
from typing import Any

__all__ = [
    "CAPS",
    "CONSTANTS",
    "EXITS",
    "IOCTLS",
    "MEMBERS",
    "STRUCTS",
    "Struct",
    "call",
    "cpuid2",
    "enter",
    "msrs",
    "struct",
]

Struct = ctypes.Structure
enter = fcntl.ioctl  # for KVM_RUN and numbers: it releases the GIL and is the fastest way in

# A member is name:type, or name:type*count; the types are B H I Q as in Python's struct module, and
# structures above.
_SEGMENT = (
    "base:Q limit:I selector:H type:B present:B dpl:B db:B s:B l:B g:B avl:B unusable:B padding:B"
)
_LAYOUT = {
    "kvm_regs": (
        "rax:Q rbx:Q rcx:Q rdx:Q rsi:Q rdi:Q rsp:Q rbp:Q "
        "r8:Q r9:Q r10:Q r11:Q r12:Q r13:Q r14:Q r15:Q rip:Q rflags:Q"
    ),
    "kvm_segment": _SEGMENT,
    "kvm_dtable": "base:Q limit:H padding:H*3",
    "kvm_sregs": (
        "cs:kvm_segment ds:kvm_segment es:kvm_segment fs:kvm_segment gs:kvm_segment "
        "ss:kvm_segment tr:kvm_segment ldt:kvm_segment gdt:kvm_dtable idt:kvm_dtable "
        "cr0:Q cr2:Q cr3:Q cr4:Q cr8:Q efer:Q apic_base:Q interrupt_bitmap:Q*4"
    ),
    "kvm_fpu": (
        "fpr:B*128 fcw:H fsw:H ftwx:B pad1:B last_opcode:H last_ip:Q last_dp:Q "
        "xmm:B*256 mxcsr:I pad2:I"
    ),
    "kvm_debugregs": "db:Q*4 dr6:Q dr7:Q flags:Q reserved:Q*9",
    "kvm_vcpu_events": "raw:Q*8",
    "kvm_mp_state": "mp_state:I",
    "kvm_xsave": "region:I*1024",
    "kvm_xcr": "xcr:I reserved:I value:Q",
    "kvm_xcrs": "nr_xcrs:I flags:I xcrs:kvm_xcr*16 padding:Q*16",
    "kvm_msr_entry": "index:I reserved:I data:Q",
    "kvm_msrs": "nmsrs:I pad:I",
    "kvm_msr_list": "nmsrs:I",
    "kvm_cpuid_entry2": "function:I index:I flags:I eax:I ebx:I ecx:I edx:I padding:I*3",
    "kvm_cpuid2": "nent:I padding:I",
    "kvm_guest_debug": "control:I pad:I debugreg:Q*8",
    "kvm_translation": "linear_address:Q physical_address:Q valid:B writeable:B usermode:B pad:B*5",
    "kvm_userspace_memory_region": (
        "slot:I flags:I guest_phys_addr:Q memory_size:Q userspace_addr:Q"
    ),
    "kvm_dirty_log": "slot:I padding1:I dirty_bitmap:Q",
    "kvm_enable_cap": "cap:I flags:I args:Q*4 pad:B*64",
    "kvm_device_attr": "flags:I group:I attr:Q addr:Q",
    "kvm_sync_regs": "regs:kvm_regs sregs:kvm_sregs events:kvm_vcpu_events",
    "kvm_run": (
        "request_interrupt_window:B immediate_exit:B padding1:B*6 exit_reason:I "
        "ready_for_interrupt_injection:B if_flag:B flags:H cr8:Q apic_base:Q padding:B*256 "
        "kvm_valid_regs:Q kvm_dirty_regs:Q s:kvm_sync_regs"
    ),
}
# The members of the union in struct kvm_run, from where it begins (kvm_run.padding)
_MEMBERS = {
    "io": "direction:B size:B port:H count:I data_offset:Q",
    "mmio": "phys_addr:Q data:B*8 len:I is_write:B",
    "internal": "suberror:I ndata:I data:Q*16",
    "emulation_failure": "suberror:I ndata:I flags:Q insn_size:B insn_bytes:B*15",
    "fail_entry": "hardware_entry_failure_reason:Q cpu:I",
    "msr": "error:B pad:B*7 reason:I index:I data:Q",
    "system_event": "type:I ndata:I data:Q*16",
    "debug": "exception:I pad:I pc:Q dr6:Q dr7:Q",
}
_TYPES: dict[str, Any] = {"B": u8, "H": u16, "I": u32, "Q": u64}


def _field(text: str) -> tuple[str, Any]:
    name, _, kind = text.partition(":")
    kind, _, count = kind.partition("*")
    element = _TYPES[kind]
    return name, element * int(count) if count else element


def _declare(name: str, layout: str) -> Any:
    fields = [_field(text) for text in layout.split()]
    _TYPES[name] = type(name, (Struct,), {"_fields_": fields})
    return _TYPES[name]


STRUCTS = {name: _declare(name, layout) for name, layout in _LAYOUT.items()}
MEMBERS = {name: _declare(name, layout) for name, layout in _MEMBERS.items()}

_NONE, _W, _R = 0, 1, 2  # asm-generic/ioctl.h: the caller writes, the caller reads
KVMIO = 0xAE


def _number(nr: int, direction: int = _NONE, name: str = "") -> int:
    """The number of an ioctl, with the size of its structure if it has one (_IOC)."""
    size = ctypes.sizeof(STRUCTS[name]) if name else 0
    return direction << 30 | size << 16 | KVMIO << 8 | nr


IOCTLS = {
    "KVM_GET_API_VERSION": _number(0),
    "KVM_CREATE_VM": _number(1),
    "KVM_CHECK_EXTENSION": _number(3),
    "KVM_GET_MSR_INDEX_LIST": _number(2, _R | _W, "kvm_msr_list"),
    "KVM_GET_VCPU_MMAP_SIZE": _number(4),
    "KVM_GET_SUPPORTED_CPUID": _number(5, _R | _W, "kvm_cpuid2"),
    "KVM_CREATE_VCPU": _number(0x41),
    "KVM_GET_DIRTY_LOG": _number(0x42, _W, "kvm_dirty_log"),
    "KVM_SET_USER_MEMORY_REGION": _number(0x46, _W, "kvm_userspace_memory_region"),
    "KVM_SET_TSS_ADDR": _number(0x47),
    "KVM_RUN": _number(0x80),
    "KVM_GET_REGS": _number(0x81, _R, "kvm_regs"),
    "KVM_SET_REGS": _number(0x82, _W, "kvm_regs"),
    "KVM_GET_SREGS": _number(0x83, _R, "kvm_sregs"),
    "KVM_SET_SREGS": _number(0x84, _W, "kvm_sregs"),
    "KVM_TRANSLATE": _number(0x85, _R | _W, "kvm_translation"),
    "KVM_GET_MSRS": _number(0x88, _R | _W, "kvm_msrs"),
    "KVM_SET_MSRS": _number(0x89, _W, "kvm_msrs"),
    "KVM_GET_FPU": _number(0x8C, _R, "kvm_fpu"),
    "KVM_SET_FPU": _number(0x8D, _W, "kvm_fpu"),
    "KVM_SET_CPUID2": _number(0x90, _W, "kvm_cpuid2"),
    "KVM_SET_GUEST_DEBUG": _number(0x9B, _W, "kvm_guest_debug"),
    "KVM_GET_MP_STATE": _number(0x98, _R, "kvm_mp_state"),
    "KVM_SET_MP_STATE": _number(0x99, _W, "kvm_mp_state"),
    "KVM_GET_VCPU_EVENTS": _number(0x9F, _R, "kvm_vcpu_events"),
    "KVM_SET_VCPU_EVENTS": _number(0xA0, _W, "kvm_vcpu_events"),
    "KVM_GET_DEBUGREGS": _number(0xA1, _R, "kvm_debugregs"),
    "KVM_SET_DEBUGREGS": _number(0xA2, _W, "kvm_debugregs"),
    "KVM_ENABLE_CAP": _number(0xA3, _W, "kvm_enable_cap"),
    "KVM_SET_TSC_KHZ": _number(0xA2),
    "KVM_GET_TSC_KHZ": _number(0xA3),
    "KVM_GET_XSAVE": _number(0xA4, _R, "kvm_xsave"),
    "KVM_SET_XSAVE": _number(0xA5, _W, "kvm_xsave"),
    "KVM_GET_XCRS": _number(0xA6, _R, "kvm_xcrs"),
    "KVM_SET_XCRS": _number(0xA7, _W, "kvm_xcrs"),
    "KVM_SET_DEVICE_ATTR": _number(0xE1, _W, "kvm_device_attr"),
    "KVM_GET_DEVICE_ATTR": _number(0xE2, _W, "kvm_device_attr"),
}
EXITS = {
    "KVM_EXIT_UNKNOWN": 0,
    "KVM_EXIT_IO": 2,
    "KVM_EXIT_DEBUG": 4,
    "KVM_EXIT_HLT": 5,
    "KVM_EXIT_MMIO": 6,
    "KVM_EXIT_SHUTDOWN": 8,
    "KVM_EXIT_FAIL_ENTRY": 9,
    "KVM_EXIT_INTR": 10,
    "KVM_EXIT_INTERNAL_ERROR": 17,
    "KVM_EXIT_SYSTEM_EVENT": 24,
    "KVM_EXIT_X86_RDMSR": 29,
    "KVM_EXIT_X86_WRMSR": 30,
}
CAPS = {
    "KVM_CAP_USER_MEMORY": 3,
    "KVM_CAP_SET_GUEST_DEBUG": 23,
    "KVM_CAP_VCPU_EVENTS": 41,
    "KVM_CAP_DEBUGREGS": 50,
    "KVM_CAP_XSAVE": 55,
    "KVM_CAP_XCRS": 56,
    "KVM_CAP_TSC_CONTROL": 60,
    "KVM_CAP_MAX_VCPUS": 66,
    "KVM_CAP_SYNC_REGS": 74,
    "KVM_CAP_VCPU_ATTRIBUTES": 127,
    "KVM_CAP_IMMEDIATE_EXIT": 136,
    "KVM_CAP_X86_USER_SPACE_MSR": 188,
}
CONSTANTS = {
    "KVM_API_VERSION": 12,
    "KVM_MEM_LOG_DIRTY_PAGES": 1,
    "KVM_SYNC_X86_REGS": 1,
    "KVM_SYNC_X86_SREGS": 2,
    "KVM_CPUID_FLAG_SIGNIFCANT_INDEX": 1,
    "KVM_GUESTDBG_ENABLE": 1,
    "KVM_GUESTDBG_SINGLESTEP": 2,
    "KVM_GUESTDBG_USE_HW_BP": 0x20000,
    "KVM_MSR_EXIT_REASON_INVAL": 1,
    "KVM_MSR_EXIT_REASON_UNKNOWN": 2,
    "KVM_INTERNAL_ERROR_EMULATION": 1,
    "KVM_VCPU_TSC_CTRL": 0,
    "KVM_VCPU_TSC_OFFSET": 0,
}

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def call(fd: int, name: str, argument: ctypes.Structure | int) -> int:
    """An ioctl on a structure of any size, or a number, without the GIL; what it returns.

    Raises OSError with the ioctl's name. fcntl.ioctl keeps the GIL for structures over 1024 bytes.
    """
    given = argument if isinstance(argument, int) else ctypes.addressof(argument)
    done: int = _LIBC.ioctl(fd, IOCTLS[name], given)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return done


def struct(name: str, **fields: int) -> Any:
    """A zeroed structure of that C name with these fields set."""
    return STRUCTS[name](**fields)


_ENTRIES = {"kvm_cpuid2": "kvm_cpuid_entry2", "kvm_msrs": "kvm_msr_entry"}


@cache
def _table(head: str, count: int) -> type[Struct]:
    """A structure with a flexible array of this length.

    Its ioctl number has the size of the head alone.
    """
    entry = STRUCTS[_ENTRIES[head]]
    fields = [("count", u32), ("padding", u32), ("entries", entry * count)]
    return type(f"{head}_{count}", (Struct,), {"_fields_": fields})


def cpuid2(entries: Sequence[tuple[int, ...]]) -> Any:
    """struct kvm_cpuid2 of entries (function, index, flags, eax, ebx, ecx, edx)."""
    return _table("kvm_cpuid2", len(entries))(len(entries), 0, tuple(entries))


def msrs(values: Mapping[int, int]) -> Any:
    """struct kvm_msrs of these indices and values."""
    entries = tuple((index, 0, value) for index, value in values.items())
    return _table("kvm_msrs", len(values))(len(values), 0, entries)
