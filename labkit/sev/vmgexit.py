"""What a host does at VMGEXIT, as KVM does: it knows only what the guest tells it.

Source: sev_handle_vmgexit() in arch/x86/kvm/svm/sev.c. The request is copied once and then checked
and used; the page is raw DRAM, so one that the guest left private is noise and refused. A scratch
area must lie in the GHCB page, as version 2 of the protocol wants it, which is what INIT2 agrees
on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.engines.exits import Exit, HaltExit, InternalErrorExit, SystemEventExit, VmgexitExit
from labkit.machine.memory import PAGE
from labkit.sev.cpu import GHCB_MSR
from labkit.sev.ghcb import GHCB, GhcbReason, answer_ghcb, parse_ghcb
from labkit.sev.ghcb_msr import (
    KVM_SYSTEM_EVENT_SEV_TERM,
    MsrHost,
    answer_msr,
    parse_msr,
    term_text,
)
from labkit.sev.vmgexit_events import FEATURES, Answer, Call, answer_event

if TYPE_CHECKING:
    from labkit.engines.base import EngineVcpu
    from labkit.sev.guest import ProtectedGuest

__all__ = ["answer", "complete"]

_MSR = f"msr_{GHCB_MSR:#x}"

# Of GHCBData[63:32] after PAGE_STATE
_PSC_MSR_ERROR = 1 << 31


def answer(
    guest: ProtectedGuest, index: int, vcpu: EngineVcpu, ghcb: int, port: int
) -> tuple[Exit, int | None]:
    """What KVM makes of a VMGEXIT of vCPU `index` with this value in the MSR (`ghcb`).

    Gives an exit for user space, and the hva when it is a ucall through the GHCB, which is an OUT
    to `port`. A VmgexitExit with a request is one that was answered: the guest goes on.
    """
    guest.awaited.pop(index, None)
    name = parse_msr(ghcb).name
    if name == "GHCB":
        return _answer_page(guest, index, vcpu, ghcb, port)

    said = answer_msr(ghcb, _msr_host(guest, index, vcpu))
    if said is None:
        why = f"KVM ends a guest that asks for {name} without SNP"
        if name == "TERM":
            why = term_text(ghcb)
        return SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (ghcb,), why), None

    if name == "REGISTER_GPA":
        guest.registered[index] = ghcb & -PAGE
    vcpu.set_regs({_MSR: said})
    if name == "AP_RESET_HOLD":
        return HaltExit(), None
    return VmgexitExit(ghcb, name, f"{said:#x}"), None


def _msr_host(guest: ProtectedGuest, index: int, vcpu: EngineVcpu) -> MsrHost:
    def cpuid(leaf: int, sub: int) -> tuple[int, int, int, int]:
        return guest.cpu.seen_by(index, vcpu.read_reg("cr4"), leaf, sub)

    def page_state(gfn: int, op: int) -> int:
        return _PSC_MSR_ERROR if guest.page_state_change(gfn, op) else 0

    return MsrHost(guest.c_bit, cpuid, guest.level > 2, features=FEATURES, page_state=page_state)


def _answer_page(
    guest: ProtectedGuest, index: int, vcpu: EngineVcpu, gpa: int, port: int
) -> tuple[Exit, int | None]:
    wrong = _wrong_place(guest, index, vcpu, gpa)
    if wrong is not None:
        return wrong, None

    page = guest.memory.read(gpa, PAGE)
    call = Call(guest, vcpu, index, gpa, page, parse_ghcb(page, guest.level > 2), port)
    refused = call.request.refused
    said = answer_event(call) if refused is None else refused
    _write_reply(call, said)
    if call.awaited is not None:
        guest.awaited[index] = call.awaited
    if isinstance(said, Exit):
        return said, call.ucall
    return VmgexitExit(gpa, call.request.name, _words(said)), call.ucall


def _wrong_place(guest: ProtectedGuest, index: int, vcpu: EngineVcpu, gpa: int) -> Exit | None:
    """What comes of a GHCB at a place where the host cannot have one."""
    is_snp = guest.level > 2
    is_there = gpa != 0 and guest.memory.slot(gpa) is not None
    if not is_there or (is_snp and guest.host.rmp.entry(gpa).assigned):
        why = "no answer: KVM finds no page there that it may write"
        return VmgexitExit(gpa, "GHCB", why)
    if is_snp and guest.registered.get(index) != gpa:
        why = f"KVM_RUN: EINVAL, the GHCB at gpa {gpa:#x} was never registered"
        return InternalErrorExit(why, vcpu.read_reg("rip"))
    return None


def _write_reply(call: Call, said: Answer) -> None:
    """Write into the page what the guest is told, unless its VM ends or nobody answers it."""
    if isinstance(said, Exit) and call.awaited is None and call.ucall is None:
        return
    reply = bytearray(call.page)
    for offset, data in call.edits.items():
        reply[offset : offset + len(data)] = data
    GHCB.put(reply, "valid_bitmap", 0)
    if isinstance(said, GhcbReason):
        answer_ghcb(reply, refused=said)
    else:
        answer_ghcb(reply, said if isinstance(said, dict) else {})
    call.guest.memory.write(call.gpa, bytes(reply))


def _words(said: dict[str, int] | GhcbReason) -> str:
    if isinstance(said, GhcbReason):
        return f"refused: {said.name}"
    if not said:
        return "done"
    return ", ".join(f"{name}={value:#x}" for name, value in said.items())


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
