"""What the exits of KVM mean in labkit's words (struct kvm_run in Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from labkit.engines.base import Exit, HaltExit, InternalErrorExit, MmioExit, PioExit, ShutdownExit
from labkit.engines.disasm import disassemble
from labkit.engines.kvm.abi import CONSTANTS, EXITS, MEMBERS, STRUCTS
from labkit.engines.kvm.regs import GPR

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["HANDLERS", "on_io"]

UNION = STRUCTS["kvm_run"].padding.offset
RIP, RCX = GPR["rip"], GPR["rcx"]


def _member(vcpu: KvmVcpu, name: str) -> Any:
    return MEMBERS[name].from_buffer(vcpu.page, UNION)


def on_io(vcpu: KvmVcpu) -> Exit:
    """IN and OUT; the instruction is brought to its end when somebody looks at registers, or by the next run."""
    word, count, at = vcpu.u32[UNION // 4], vcpu.u32[UNION // 4 + 1], vcpu.u64[UNION // 8 + 1]
    size, port = word >> 8 & 255, word >> 16
    vcpu.insns += 1
    vcpu.pending = "pio"
    if word & 1:  # OUT
        parts = [
            int.from_bytes(vcpu.u8[at + size * i : at + size * (i + 1)], "little")
            for i in range(count)
        ]
        vcpu.queue += [PioExit(port, size, True, data) for data in parts[1:]]
        return PioExit(port, size, True, parts[0])
    vcpu.u8[at : at + size * count] = bytes(size * count)
    vcpu.awaits, vcpu.took_many = (
        (at, size),
        count > 1,
    )  # elements of a REP INS: the first is the one that leaves, see settle()
    return _in_exit(port, size)


@cache
def _in_exit(port: int, size: int) -> PioExit:
    return PioExit(port, size, False, 0)


def _on_hlt(vcpu: KvmVcpu) -> Exit:
    vcpu.insns += 1
    return HaltExit()


def _on_mmio(vcpu: KvmVcpu) -> Exit | None:
    gpa, size, is_write, at = (
        vcpu.u64[UNION // 8],
        vcpu.u32[UNION // 4 + 4],
        bool(vcpu.u8[UNION + 20]),
        UNION + 8,
    )
    if is_write:
        vcpu.pending = "write"
        vcpu.insns += (
            vcpu.wrote_at != vcpu.gprs[RIP]
        )  # an access of more than 8 bytes leaves in parts, behind the instruction
        vcpu.wrote_at = vcpu.gprs[RIP]
        return MmioExit(gpa, size, True, int.from_bytes(vcpu.u8[at : at + size], "little"))
    if vcpu.replay and vcpu.replay[0][0] == gpa:  # a restored state began this instruction again
        vcpu.u8[at : at + size] = vcpu.replay.pop(0)[1].to_bytes(size, "little")
        return None
    vcpu.replay.clear()
    place = vcpu.gprs[RIP], vcpu.gprs[RCX]  # an iteration of a REP instruction
    if place != vcpu.read_at or any(gpa == read for read, _ in vcpu.answers):
        vcpu.answers.clear()
    vcpu.u8[at : at + 8] = bytes(8)
    vcpu.pending, vcpu.awaits, vcpu.read_at = "read", (at, size), place
    return MmioExit(gpa, size, False, 0)


def _on_shutdown(vcpu: KvmVcpu) -> Exit:
    vcpu.insns += 1
    pc, cr2 = int(vcpu.gprs[RIP]), vcpu.regs.read("cr2")
    return ShutdownExit(
        (), pc, cr2, "a fault met a fault while it was delivered; which ones, KVM does not say"
    )


def _on_system_event(vcpu: KvmVcpu) -> Exit:
    return InternalErrorExit(
        f"KVM system event {_member(vcpu, 'system_event').type}", int(vcpu.gprs[RIP])
    )


def _on_fail_entry(vcpu: KvmVcpu) -> Exit:
    reason = _member(vcpu, "fail_entry").hardware_entry_failure_reason
    return InternalErrorExit(
        f"the CPU refuses to enter this state (hardware reason {reason:#x})", int(vcpu.gprs[RIP])
    )


def _on_internal_error(vcpu: KvmVcpu) -> Exit:
    suberror, pc = _member(vcpu, "internal").suberror, int(vcpu.gprs[RIP])
    data = vcpu.fetch(pc, 15)
    insn = next(disassemble(vcpu.vm.arch, data, pc), None)
    gpa = vcpu.gpa(pc + len(data)) if len(data) < 15 else None
    if gpa is not None and insn is None:
        return InternalErrorExit(f"instruction fetch from gpa {gpa:#x}, where no memslot is", pc)
    emulation = suberror == CONSTANTS["KVM_INTERNAL_ERROR_EMULATION"]
    why = (
        "KVM cannot emulate this instruction"
        if emulation
        else f"KVM internal error, suberror {suberror}"
    )
    return InternalErrorExit(
        why, pc, data[: insn.size] if insn else data, insn.text if insn else ""
    )


def _on_intr(vcpu: KvmVcpu) -> Exit | None:
    return vcpu.asked(in_time=True)


def _on_x86_rdmsr(vcpu: KvmVcpu) -> None:
    """An MSR that KVM lacks: from the VM's own table; one that is nowhere gives the guest #GP."""
    msr = _member(vcpu, "msr")
    value = vcpu.host_msr(msr.index)
    msr.error, msr.data = value is None, value or 0


def _on_x86_wrmsr(vcpu: KvmVcpu) -> None:
    msr = _member(vcpu, "msr")
    msr.error = msr.index in vcpu.vm.cpu.read_only_msrs or not vcpu.set_host_msr(
        msr.index, msr.data
    )


HANDLERS: dict[int, Callable[[KvmVcpu], Exit | None]] = {
    EXITS["KVM_EXIT_IO"]: on_io,
    EXITS["KVM_EXIT_HLT"]: _on_hlt,
    EXITS["KVM_EXIT_MMIO"]: _on_mmio,
    EXITS["KVM_EXIT_SHUTDOWN"]: _on_shutdown,
    EXITS["KVM_EXIT_FAIL_ENTRY"]: _on_fail_entry,
    EXITS["KVM_EXIT_INTR"]: _on_intr,
    EXITS["KVM_EXIT_INTERNAL_ERROR"]: _on_internal_error,
    EXITS["KVM_EXIT_X86_RDMSR"]: _on_x86_rdmsr,
    EXITS["KVM_EXIT_X86_WRMSR"]: _on_x86_wrmsr,
    EXITS["KVM_EXIT_SYSTEM_EVENT"]: _on_system_event,
}
