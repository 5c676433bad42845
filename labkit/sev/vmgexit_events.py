"""What KVM makes of one request in a GHCB page, one function an event.

Source: sev_handle_vmgexit() in arch/x86/kvm/svm/sev.c and the handlers of intercepts that it calls;
GHCB specification (AMD 56421) chapter 4. Where the model simplifies: KVM leaves changes of page
state to its user space, here the host makes them at once, and 2 MiB as 512 small pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labkit.arch.x86_cpu import IA32_TSC, IA32_TSC_ADJUST
from labkit.engines.exits import (
    Exit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    MmioExit,
    PioExit,
    SystemEventExit,
)
from labkit.errors import InvalidState
from labkit.sev.ghcb import GhcbReason, GhcbRequest, decode_io, scratch_offset
from labkit.sev.ghcb_msr import KVM_SYSTEM_EVENT_SEV_TERM
from labkit.sev.rmp import PRIVATE, SHARED

if TYPE_CHECKING:
    from labkit.engines.base import EngineVcpu
    from labkit.sev.guest import ProtectedGuest

__all__ = ["FEATURES", "Answer", "Awaited", "Call", "answer_event"]

# Of the hypervisor: SNP; KVM also offers bit 1, the starting of APs
FEATURES = 1 << 0

_MASK32, _MASK64 = 0xFFFF_FFFF, (1 << 64) - 1
_INT_MAX = 0x7FFF_FFFF

# In RAX
_KVM_EPERM = -1 & _MASK64

# Exception 13, valid: the guest's #VC handler raises it (APM vol. 2 15.20)
_GP = 13 | 3 << 8 | 1 << 31

# Of sw_exit_info_2 (asm/sev-common.h)
_PSC_GENERIC = 0x100 << 32
_PSC_HEADER = 1 << 32 | 1
_PSC_ENTRY = 1 << 32 | 2

# An exit for the host's user space; registers for the guest; or why the page is refused
Answer = Exit | dict[str, int] | GhcbReason


@dataclass(frozen=True)
class Awaited:
    """Where in a GHCB at gpa the value goes that user space will give.

    That is RAX (offset None), or bytes at an offset. size is in bytes; keep is what stays of RAX.
    """

    gpa: int
    size: int
    offset: int | None = None
    keep: int = 0


@dataclass
class Call:
    """One request, and what it is answered with beside its result.

    gpa is that of the GHCB, page a copy of it, port the one of ucalls. ucall is the hva of a ucall
    through the GHCB; edits are changes of the shared buffer, by offset in the page.
    """

    guest: ProtectedGuest
    vcpu: EngineVcpu
    index: int
    gpa: int
    page: bytes
    request: GhcbRequest
    port: int
    ucall: int | None = None
    awaited: Awaited | None = None
    edits: dict[int, bytes] = field(default_factory=dict)

    def reg(self, name: str) -> int:
        """A register as the guest gave it, 0 when it gave none."""
        return self.request.regs.get(name, 0)

    def scratch(self, size: int) -> int | None:
        """The offset of the scratch area; None when so many bytes are not in the page."""
        return scratch_offset(self.gpa, self.request.scratch, size)


def answer_event(call: Call) -> Answer:
    """What the request comes to; the call may say more beside it (`ucall`, `awaited`, `edits`)."""
    return _ANSWERS.get(call.request.name, _unhandled)(call)


# --- I/O and MMIO


def _io(call: Call) -> Answer:
    port = decode_io(call.request.info_1)
    if not port.size:
        has_no_size = not call.request.info_1 >> 4 & 7
        return {} if has_no_size else GhcbReason.INVALID_INPUT

    size = port.size
    if port.is_string:
        size *= call.request.info_2
    if size > _INT_MAX:
        why = f"KVM_RUN: EINVAL, {size:#x} bytes of string I/O"
        return InternalErrorExit(why, call.vcpu.read_reg("rip"))
    if not size:
        return {}

    if port.is_string:
        return _area(
            call, size, port.is_write, lambda data: PioExit(port.port, size, port.is_write, data)
        )
    if port.port == call.port and "rax" in call.request.regs:
        call.ucall = call.reg("rax")
        return {}

    mask = (1 << 8 * size) - 1
    if port.is_write:
        return PioExit(port.port, size, True, call.reg("rax") & mask)
    # An IN of four bytes clears the upper half of RAX
    keep = call.reg("rax") & ~mask if size < 4 else 0
    call.awaited = Awaited(call.gpa, size, None, keep)
    return PioExit(port.port, size, False, 0)


def _mmio(call: Call) -> Answer:
    gpa, size = call.request.info_1, call.request.info_2
    is_write = call.request.name == "MMIO_WRITE"
    if not size:
        return {}
    if size > 8:
        return GhcbReason.INVALID_INPUT
    return _area(call, size, is_write, lambda data: MmioExit(gpa, size, is_write, data))


def _area(call: Call, size: int, is_write: bool, exit: Callable[[int], Exit]) -> Answer:
    """An exit whose bytes go through the scratch area."""
    offset = call.scratch(size)
    if offset is None:
        return GhcbReason.INVALID_SCRATCH_AREA
    if is_write:
        call.awaited = Awaited(call.gpa, 0, offset)
        return exit(int.from_bytes(call.page[offset : offset + size], "little"))
    call.awaited = Awaited(call.gpa, size, offset)
    return exit(0)


# --- registers of the CPU


def _cpuid(call: Call) -> Answer:
    leaf, sub = call.reg("rax") & _MASK32, call.reg("rcx") & _MASK32
    seen = call.guest.cpu.seen_by(call.index, call.vcpu.read_reg("cr4"), leaf, sub)
    return dict(zip(("rax", "rbx", "rcx", "rdx"), seen, strict=True))


def _msr(call: Call) -> Answer:
    index = call.reg("rcx") & _MASK32
    is_write = call.request.info_1
    try:
        if is_write:
            value = (call.reg("rdx") & _MASK32) << 32 | call.reg("rax") & _MASK32
            _write_msr(call, index, value)
            return {}
        value = call.vcpu.read_reg(f"msr_{index:#x}")
    except InvalidState:
        return {"sw_exit_info_1": 1, "sw_exit_info_2": _GP}
    return {"rax": value & _MASK32, "rdx": value >> 32}


def _write_msr(call: Call, index: int, value: int) -> None:
    """Set an MSR; raises InvalidState for one that is read-only or not there."""
    if index in call.guest.cpu.read_only_msrs:
        raise InvalidState(f"MSR {index:#x} is read-only")
    name = f"msr_{index:#x}"
    regs = {name: value}
    if index in (IA32_TSC, IA32_TSC_ADJUST):
        # A guest's write to either moves both (SDM vol. 3B 18.17.3)
        other = IA32_TSC_ADJUST if index == IA32_TSC else IA32_TSC
        other_name = f"msr_{other:#x}"
        by = value - call.vcpu.read_reg(name)
        regs[other_name] = call.vcpu.read_reg(other_name) + by & _MASK64
    call.vcpu.set_regs(regs)


def _no_performance_counter(call: Call) -> Answer:
    return {"sw_exit_info_1": 1, "sw_exit_info_2": _GP}


def _dr7(call: Call) -> Answer:
    if call.request.name == "READ_DR7":
        return {"rax": call.vcpu.read_reg("dr7")}
    call.vcpu.set_regs({"dr7": call.reg("rax") & _MASK32})
    return {}


# --- what a guest wants of its hypervisor


def _hypercall(call: Call) -> Answer:
    if call.reg("cpl"):
        return {"rax": _KVM_EPERM}
    call.awaited = Awaited(call.gpa, 8)
    args = tuple(call.reg(name) for name in ("rbx", "rcx", "rdx", "rsi"))
    return HypercallExit(call.reg("rax"), args)


def _jump_table(call: Call) -> Answer:
    """Set (0) or get (1) the address of the AP jump table."""
    if call.request.info_1 > 1:
        return GhcbReason.INVALID_INPUT
    if call.request.info_1:
        return {"sw_exit_info_2": call.guest.jump_table}
    call.guest.jump_table = call.request.info_2
    return {}


def _page_states(call: Call) -> Answer:
    """A list of page-state changes (GHCB specification, chapter 4).

    It is a header of two 16-bit numbers, the current and the last entry, then 8 bytes an entry.
    """
    offset = call.scratch(8)
    if offset is None:
        return GhcbReason.INVALID_SCRATCH_AREA
    header = call.page[offset : offset + 8]
    first, last = int.from_bytes(header[:2], "little"), int.from_bytes(header[2:4], "little")
    if call.scratch(8 * (last + 2)) is None:
        return {"sw_exit_info_2": _PSC_HEADER}

    for number in range(first, last + 1):
        wrong = _page_state(call, offset + 8 + 8 * number)
        if wrong:
            return {"sw_exit_info_2": wrong}
        call.edits[offset] = (number + 1).to_bytes(2, "little")
    return {}


def _page_state(call: Call, at: int) -> int:
    """Carry out the entry at this offset of the page; gives what is wrong with it, 0: nothing."""
    entry = int.from_bytes(call.page[at : at + 8], "little")
    done = entry & 0xFFF
    gfn = entry >> 12 & (1 << 40) - 1
    op = entry >> 52 & 0xF
    is_large = entry >> 56 & 1
    nr_pages = 512 if is_large else 1

    if done > nr_pages or gfn % nr_pages:
        return _PSC_ENTRY
    if op in (PRIVATE, SHARED):
        for page in range(gfn + done, gfn + nr_pages):
            if call.guest.page_state_change(page, op):
                return _PSC_GENERIC

    # The guest sees how far its host has come
    call.edits[at] = (entry & ~0xFFF | nr_pages).to_bytes(8, "little")
    return 0


def _features(call: Call) -> Answer:
    return {"sw_exit_info_2": FEATURES}


def _halt(call: Call) -> Answer:
    return HaltExit()


def _term(call: Call) -> Answer:
    why = "the guest asked to be terminated, through its GHCB"
    return SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (call.gpa,), why)


def _nothing(call: Call) -> Answer:
    """Events that need nothing of a host without caches and sleeping vCPUs."""
    return {}


def _unhandled(call: Call) -> Answer:
    why = f"KVM_RUN: KVM has no answer to {call.request.name} (exit code {call.request.code:#x})"
    return InternalErrorExit(why, call.vcpu.read_reg("rip"))


_ANSWERS: dict[str, Callable[[Call], Answer]] = {
    "IOIO": _io,
    "MMIO_READ": _mmio,
    "MMIO_WRITE": _mmio,
    "CPUID": _cpuid,
    "MSR": _msr,
    "RDPMC": _no_performance_counter,
    "READ_DR7": _dr7,
    "WRITE_DR7": _dr7,
    "VMMCALL": _hypercall,
    "AP_JUMP_TABLE": _jump_table,
    "AP_HLT_LOOP": _halt,
    "PAGE_STATE": _page_states,
    "HV_FEATURES": _features,
    "TERM": _term,
    "INVD": _nothing,
    "WBINVD": _nothing,
    "MONITOR": _nothing,
    "MWAIT": _nothing,
    "NMI_COMPLETE": _nothing,
}
