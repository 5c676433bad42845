"""What a host does at VMGEXIT, as KVM does (sev_handle_vmgexit() in arch/x86/kvm/svm/sev.c): it knows only what the guest tells it.

The request is copied once and then checked and used; the page is raw DRAM, so one that the guest left private is noise and refused.
A scratch area must lie in the GHCB page, as version 2 of the protocol wants it, which is what INIT2 agrees on. Where the model
simplifies: KVM leaves changes of page state to its user space, here the host makes them at once, and 2 MiB as 512 small pages.
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
    VmgexitExit,
)
from labkit.errors import InvalidState
from labkit.machine.memory import PAGE
from labkit.sev.cpu import GHCB_MSR

# isort: off
from labkit.sev.ghcb import (
    GHCB,
    KVM_SYSTEM_EVENT_SEV_TERM,
    GhcbReason,
    GhcbRequest,
    MsrHost,
    answer_ghcb,
    answer_msr,
    decode_io,
    parse_ghcb,
    parse_msr,
    scratch_offset,
    term_text,
)

if TYPE_CHECKING:
    from labkit.engines.base import EngineVcpu
    from labkit.sev.guest import ProtectedGuest

__all__ = ["Awaited", "answer", "complete"]

MSR = f"msr_{GHCB_MSR:#x}"
FEATURES = 1 << 0  # of the hypervisor: SNP; KVM also offers bit 1, the starting of APs
KVM_EPERM = -1 & (1 << 64) - 1
_GP = (
    13 | 3 << 8 | 1 << 31
)  # exception 13, valid: the guest's #VC handler raises it (APM vol. 2 15.20)
_MASK32, _INT_MAX = 0xFFFF_FFFF, 0x7FFF_FFFF
_PSC_MSR_ERROR = 1 << 31  # of GHCBData[63:32]
_PSC_GENERIC, _PSC_HEADER, _PSC_ENTRY = (
    0x100 << 32,
    1 << 32 | 1,
    1 << 32 | 2,
)  # of sw_exit_info_2 (asm/sev-common.h)
Answer = (
    Exit | dict[str, int] | GhcbReason
)  # for the host's user space; registers for the guest; or why not


@dataclass(frozen=True)
class Awaited:
    """Where in a GHCB the value goes that user space will give: a register, or bytes at an offset."""

    gpa: int
    size: int
    offset: int | None = None
    keep: int = 0  # what stays of RAX


@dataclass
class _Call:
    """One request, and what it is answered with beside its result."""

    guest: ProtectedGuest
    vcpu: EngineVcpu
    index: int
    gpa: int  # of the GHCB
    page: bytes
    request: GhcbRequest
    port: int  # of ucalls
    ucall: int | None = None
    awaited: Awaited | None = None
    edits: dict[int, bytes] = field(
        default_factory=dict
    )  # of the shared buffer, by offset in the page

    def reg(self, name: str) -> int:
        return self.request.regs.get(name, 0)

    def scratch(self, size: int) -> int | None:
        return scratch_offset(self.gpa, self.request.scratch, size)


def answer(
    guest: ProtectedGuest, index: int, vcpu: EngineVcpu, ghcb: int, port: int
) -> tuple[Exit, int | None]:
    """What KVM makes of a VMGEXIT with this MSR: an exit for user space, and the hva when it is a ucall through the GHCB.

    A VmgexitExit with a request is one that was answered: the guest goes on.
    """
    guest.awaited.pop(index, None)
    name = parse_msr(ghcb).name
    if name == "GHCB":
        return _page(guest, index, vcpu, ghcb, port)
    said = answer_msr(
        ghcb,
        MsrHost(
            guest.c_bit,
            lambda leaf, sub: guest.cpu.seen_by(index, vcpu.read_reg("cr4"), leaf, sub),
            guest.level > 2,
            features=FEATURES,
            page_state=lambda gfn, op: _PSC_MSR_ERROR if guest.page_state_change(gfn, op) else 0,
        ),
    )
    if said is None:
        why = (
            term_text(ghcb)
            if name == "TERM"
            else f"KVM ends a guest that asks for {name} without SNP"
        )
        return SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (ghcb,), why), None
    if name == "REGISTER_GPA":
        guest.registered[index] = ghcb & -PAGE
    vcpu.set_regs({MSR: said})
    return HaltExit() if name == "AP_RESET_HOLD" else VmgexitExit(ghcb, name, f"{said:#x}"), None


def _page(
    guest: ProtectedGuest, index: int, vcpu: EngineVcpu, gpa: int, port: int
) -> tuple[Exit, int | None]:
    if (
        not gpa
        or guest.memory.slot(gpa) is None
        or (guest.level > 2 and guest.host.rmp.entry(gpa).assigned)
    ):
        return VmgexitExit(
            gpa, "GHCB", "no answer: KVM finds no page there that it may write"
        ), None
    if guest.level > 2 and guest.registered.get(index) != gpa:
        return InternalErrorExit(
            f"KVM_RUN: EINVAL, the GHCB at gpa {gpa:#x} was never registered", vcpu.read_reg("rip")
        ), None
    page = guest.memory.read(gpa, PAGE)
    call = _Call(guest, vcpu, index, gpa, page, parse_ghcb(page, guest.level > 2), port)
    said = call.request.refused or _ANSWERS.get(call.request.name, _unhandled)(call)
    reply = bytearray(page)
    for offset, data in call.edits.items():
        reply[offset : offset + len(data)] = data
    if isinstance(said, dict | GhcbReason) or call.awaited is not None or call.ucall is not None:
        GHCB.put(reply, "valid_bitmap", 0)
        refused = isinstance(said, GhcbReason)
        answer_ghcb(reply, said if isinstance(said, dict) else {}, said if refused else None)  # type: ignore[arg-type]
        guest.memory.write(gpa, bytes(reply))
    if call.awaited is not None:
        guest.awaited[index] = call.awaited
    if isinstance(said, Exit):
        return said, call.ucall
    words = (
        f"refused: {said.name}"
        if isinstance(said, GhcbReason)
        else ", ".join(f"{k}={v:#x}" for k, v in said.items()) or "done"
    )
    return VmgexitExit(gpa, call.request.name, words), call.ucall


def complete(guest: ProtectedGuest, index: int, value: int) -> bool:
    """Give the guest the value that its last request reads; False when it reads none."""
    to = guest.awaited.get(index)
    if to is None:
        return False
    value &= (1 << 8 * to.size) - 1
    page = bytearray(guest.memory.read(to.gpa, PAGE))
    if to.offset is None:
        answer_ghcb(page, {"rax": to.keep | value})
    else:
        page[to.offset : to.offset + to.size] = value.to_bytes(to.size, "little")
    guest.memory.write(to.gpa, bytes(page))
    return True


# --- one function an event


def _io(call: _Call) -> Answer:
    port = decode_io(call.request.info_1)
    size = port.size * (call.request.info_2 if port.is_string else 1)
    if not port.size:
        return {} if not call.request.info_1 >> 4 & 7 else GhcbReason.INVALID_INPUT
    if size > _INT_MAX:
        return InternalErrorExit(
            f"KVM_RUN: EINVAL, {size:#x} bytes of string I/O", call.vcpu.read_reg("rip")
        )
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
    if not port.is_write:
        call.awaited = Awaited(call.gpa, size, None, call.reg("rax") & ~mask if size < 4 else 0)
    return PioExit(port.port, size, port.is_write, call.reg("rax") & mask if port.is_write else 0)


def _area(call: _Call, size: int, is_write: bool, exit: Callable[[int], Exit]) -> Answer:
    """An exit whose bytes go through the scratch area."""
    offset = call.scratch(size)
    if offset is None:
        return GhcbReason.INVALID_SCRATCH_AREA
    call.awaited = Awaited(call.gpa, 0 if is_write else size, offset)
    return exit(int.from_bytes(call.page[offset : offset + size], "little") if is_write else 0)


def _mmio(call: _Call) -> Answer:
    gpa, size, is_write = (
        call.request.info_1,
        call.request.info_2,
        call.request.name == "MMIO_WRITE",
    )
    if not size or size > 8:
        return GhcbReason.INVALID_INPUT if size else {}
    return _area(call, size, is_write, lambda data: MmioExit(gpa, size, is_write, data))


def _cpuid(call: _Call) -> Answer:
    leaf, sub = call.reg("rax") & _MASK32, call.reg("rcx") & _MASK32
    seen = call.guest.cpu.seen_by(call.index, call.vcpu.read_reg("cr4"), leaf, sub)
    return dict(zip(("rax", "rbx", "rcx", "rdx"), seen, strict=True))


def _msr(call: _Call) -> Answer:
    index = call.reg("rcx") & _MASK32
    try:
        if not call.request.info_1:
            value = call.vcpu.read_reg(f"msr_{index:#x}")
            return {"rax": value & _MASK32, "rdx": value >> 32}
        _write_msr(call, index, (call.reg("rdx") & _MASK32) << 32 | call.reg("rax") & _MASK32)
    except InvalidState:
        return {"sw_exit_info_1": 1, "sw_exit_info_2": _GP}
    return {}


def _write_msr(call: _Call, index: int, value: int) -> None:
    if index in call.guest.cpu.read_only_msrs:
        raise InvalidState(f"MSR {index:#x} is read-only")
    regs = {f"msr_{index:#x}": value}
    if index in (
        IA32_TSC,
        IA32_TSC_ADJUST,
    ):  # a guest's write to either moves both (SDM vol. 3B 18.17.3)
        other = IA32_TSC ^ IA32_TSC_ADJUST ^ index
        by = value - call.vcpu.read_reg(f"msr_{index:#x}")
        regs[f"msr_{other:#x}"] = call.vcpu.read_reg(f"msr_{other:#x}") + by & (1 << 64) - 1
    call.vcpu.set_regs(regs)


def _hypercall(call: _Call) -> Answer:
    if call.reg("cpl"):
        return {"rax": KVM_EPERM}
    call.awaited = Awaited(call.gpa, 8)
    return HypercallExit(
        call.reg("rax"), tuple(call.reg(name) for name in ("rbx", "rcx", "rdx", "rsi"))
    )


def _dr7(call: _Call) -> Answer:
    if call.request.name == "READ_DR7":
        return {"rax": call.vcpu.read_reg("dr7")}
    call.vcpu.set_regs({"dr7": call.reg("rax") & _MASK32})
    return {}


def _jump_table(call: _Call) -> Answer:
    if call.request.info_1 > 1:
        return GhcbReason.INVALID_INPUT
    if call.request.info_1:
        return {"sw_exit_info_2": call.guest.jump_table}
    call.guest.jump_table = call.request.info_2
    return {}


def _page_states(call: _Call) -> Answer:
    """A list of page-state changes (GHCB specification, chapter 4): a header of two 16-bit numbers, then an 8-byte entry each."""
    offset = call.scratch(8)
    if offset is None:
        return GhcbReason.INVALID_SCRATCH_AREA
    header, entries = call.page[offset : offset + 8], offset + 8
    first, last = (int.from_bytes(header[at : at + 2], "little") for at in (0, 2))
    if call.scratch(8 * (last + 2)) is None:
        return {"sw_exit_info_2": _PSC_HEADER}
    for at in range(first, last + 1):
        here = slice(entries + 8 * at, entries + 8 * at + 8)
        entry = int.from_bytes(call.page[here], "little")
        done, gfn, op, nr_pages = (
            entry & 0xFFF,
            entry >> 12 & (1 << 40) - 1,
            entry >> 52 & 0xF,
            512 if entry >> 56 & 1 else 1,
        )
        if done > nr_pages or gfn % nr_pages:
            return {"sw_exit_info_2": _PSC_ENTRY}
        if op in (1, 2) and any(
            call.guest.page_state_change(gfn + i, op) for i in range(done, nr_pages)
        ):
            return {"sw_exit_info_2": _PSC_GENERIC}
        call.edits[here.start] = (entry & ~0xFFF | nr_pages).to_bytes(
            8, "little"
        )  # the guest sees how far its host has come
        call.edits[offset] = (at + 1).to_bytes(2, "little")
    return {}


def _term(call: _Call) -> Answer:
    return SystemEventExit(
        KVM_SYSTEM_EVENT_SEV_TERM, (call.gpa,), "the guest asked to be terminated, through its GHCB"
    )


def _unhandled(call: _Call) -> Answer:
    why = f"KVM_RUN: KVM has no answer to {call.request.name} (exit code {call.request.code:#x})"
    return InternalErrorExit(why, call.vcpu.read_reg("rip"))


def _done(call: _Call) -> Answer:
    return {}


_ANSWERS: dict[str, Callable[[_Call], Answer]] = {
    "IOIO": _io,
    "MMIO_READ": _mmio,
    "MMIO_WRITE": _mmio,
    "CPUID": _cpuid,
    "MSR": _msr,
    "VMMCALL": _hypercall,
    "READ_DR7": _dr7,
    "WRITE_DR7": _dr7,
    "AP_JUMP_TABLE": _jump_table,
    "PAGE_STATE": _page_states,
    "TERM": _term,
    "RDPMC": lambda call: {"sw_exit_info_1": 1, "sw_exit_info_2": _GP},
    "AP_HLT_LOOP": lambda call: HaltExit(),
    "HV_FEATURES": lambda call: {"sw_exit_info_2": FEATURES},
    **dict.fromkeys(("INVD", "WBINVD", "MONITOR", "MWAIT", "NMI_COMPLETE"), _done),
}
