"""Where each x86-64 register lies in KVM's structures; the names are the default engine's too."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from labkit.arch.x86_cpu import IA32_TSC
from labkit.engines.kvm.abi import STRUCTS

__all__ = ["GPR", "NAMED_MSRS", "NAMES", "PLACES", "SAVED_MSRS", "SEGMENTS", "WIDTHS", "Place"]

# The general registers, RIP and RFLAGS: their index among the words of struct kvm_regs
GPR = {field[0]: i for i, field in enumerate(STRUCTS["kvm_regs"]._fields_)}
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
XMM = tuple(f"xmm{i}" for i in range(16))
MXCSR_WORD, XSTATE_BV_WORD = 24 // 4, 512 // 4  # in an XSAVE area
SSE_STATE = 1 << 1
XMM_SIZE = 16  # bytes
NAMED_MSRS = {
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "sfmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "tsc_adjust": 0x3B,
}
TSC_AUX, MISC_ENABLE, PAT = 0xC000_0103, 0x1A0, 0x277
# Those of a snapshot. The TSC is the last: others move it.
SAVED_MSRS = (*NAMED_MSRS.values(), TSC_AUX, MISC_ENABLE, PAT, IA32_TSC)


class Place(NamedTuple):
    """A register in one of KVM's structures."""

    what: str  # the structure is KVM_GET_...'s and KVM_SET_...'s
    get: Callable[[Any], int]
    set: Callable[[Any, int], None]


def _member(what: str, path: str) -> Place:
    """A member, or with a dot a member's member."""
    outer, _, inner = path.rpartition(".")
    holder = attrgetter(outer) if outer else None

    def put(state: Any, value: int) -> None:
        setattr(holder(state) if holder else state, inner, value)

    return Place(what, attrgetter(path), put)


def _breakpoint(index: int) -> Place:
    """DR0 to DR3."""

    def put(state: Any, value: int) -> None:
        state.db[index] = value

    return Place("DEBUGREGS", lambda state: int(state.db[index]), put)


def _xmm(index: int) -> Place:
    cut = slice(XMM_SIZE * index, XMM_SIZE * (index + 1))

    def put(state: Any, value: int) -> None:
        state.xmm[cut] = list(value.to_bytes(XMM_SIZE, "little"))

    return Place("FPU", lambda state: int.from_bytes(bytes(state.xmm[cut]), "little"), put)


def _xcr0() -> Place:
    """The first of the extended control registers, and the only one there is."""

    def put(state: Any, value: int) -> None:
        state.xcrs[0].value = value

    return Place("XCRS", lambda state: int(state.xcrs[0].value), put)


def _mxcsr() -> Place:
    """MXCSR lies in the XSAVE area alone: KVM_GET_FPU and KVM_SET_FPU leave it out.

    (kvm_arch_vcpu_ioctl_set_fpu in arch/x86/kvm/x86.c; SDM vol. 1 table 13-1.)
    """

    def put(state: Any, value: int) -> None:
        state.region[MXCSR_WORD] = value
        state.region[XSTATE_BV_WORD] |= SSE_STATE

    return Place("XSAVE", lambda state: int(state.region[MXCSR_WORD]), put)


# All but the general registers, which lie in the run page, and the MSRs
PLACES = {
    **{name: _member("SREGS", f"{name}.selector") for name in SEGMENTS},
    **{name: _member("SREGS", name) for name in ("cr0", "cr2", "cr3", "cr4", "cr8")},
    **{f"dr{i}": _breakpoint(i) for i in range(4)},
    "dr6": _member("DEBUGREGS", "dr6"),
    "dr7": _member("DEBUGREGS", "dr7"),
    "fs_base": _member("SREGS", "fs.base"),
    "gs_base": _member("SREGS", "gs.base"),
    "mxcsr": _mxcsr(),
    "gdt_base": _member("SREGS", "gdt.base"),
    "gdt_limit": _member("SREGS", "gdt.limit"),
    "idt_base": _member("SREGS", "idt.base"),
    "idt_limit": _member("SREGS", "idt.limit"),
    "tr": _member("SREGS", "tr.selector"),
    "tr_base": _member("SREGS", "tr.base"),
    "tr_limit": _member("SREGS", "tr.limit"),
    "ldt": _member("SREGS", "ldt.selector"),
    "ldt_base": _member("SREGS", "ldt.base"),
    "ldt_limit": _member("SREGS", "ldt.limit"),
    "efer": _member("SREGS", "efer"),
    **{name: _xmm(i) for i, name in enumerate(XMM)},
    "xcr0": _xcr0(),
}
# Bits of a register, where they are not 64
WIDTHS = {
    **dict.fromkeys((*SEGMENTS, "tr", "ldt", "gdt_limit", "idt_limit"), 16),
    **dict.fromkeys(("tr_limit", "ldt_limit", "mxcsr"), 32),
    **dict.fromkeys(XMM, 8 * XMM_SIZE),
}
_NOT_LISTED = ("ldt_base", "ldt_limit")  # no guest of labkit's has an LDT
# What a list of all registers has, in this order
NAMES = (
    *GPR,
    *(name for name in PLACES if name not in (*_NOT_LISTED, *XMM, "xcr0")),
    *NAMED_MSRS,
    *XMM,
    "xcr0",
    "tsc_offset",
)
