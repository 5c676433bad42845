"""What the exits of KVM mean in labkit's words (struct kvm_run in Documentation/virt/kvm/api.rst).

A handler gets the vCPU as the exit left it. It returns labkit's exit, or None when the guest goes
on without anybody hearing of it; what is left of the instruction it hands to `vcpu.waiting`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from labkit.engines.disasm import disassemble
from labkit.engines.exits import Exit, HaltExit, InternalErrorExit, MmioExit, PioExit, ShutdownExit
from labkit.engines.kvm.abi import CONSTANTS, EXITS, MEMBERS
from labkit.engines.kvm.page import EXIT
from labkit.engines.kvm.places import GPR

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["HANDLERS", "on_io"]

RIP = GPR["rip"]
LONGEST = 15  # bytes of an instruction (SDM vol. 2A 2.3.11)
IO, MMIO = MEMBERS["io"], MEMBERS["mmio"]
# Where these members lie in the run page, counted in words of 4 and of 8 bytes, or in bytes
IO_WORD = EXIT // 4  # direction, size, port
IO_COUNT = (EXIT + IO.count.offset) // 4
IO_DATA_OFFSET = (EXIT + IO.data_offset.offset) // 8
MMIO_GPA = EXIT // 8
MMIO_DATA = EXIT + MMIO.data.offset
MMIO_LEN = (EXIT + MMIO.len.offset) // 4
MMIO_IS_WRITE = EXIT + MMIO.is_write.offset


def on_io(vcpu: KvmVcpu) -> Exit:
    """IN and OUT, one element; KVM ends the instruction when it is settled, or in the next run."""
    page = vcpu.page
    word, count, at = page.u32[IO_WORD], page.u32[IO_COUNT], page.u64[IO_DATA_OFFSET]
    is_out, size, port = word & 1, word >> 8 & 0xFF, word >> 16
    vcpu.insns += 1
    if not is_out:
        vcpu.waiting.port_read(at, size, count)
        return _in_exit(port, size)

    first, *more = (
        PioExit(port, size, True, page.value(at + size * i, size)) for i in range(count)
    )
    vcpu.waiting.port_written(more)
    return first


@cache
def _in_exit(port: int, size: int) -> PioExit:
    return PioExit(port, size, False, 0)


def _on_hlt(vcpu: KvmVcpu) -> Exit:
    vcpu.insns += 1
    return HaltExit()


def _on_mmio(vcpu: KvmVcpu) -> Exit | None:
    page = vcpu.page
    gpa, size = page.u64[MMIO_GPA], page.u32[MMIO_LEN]
    if page.u8[MMIO_IS_WRITE]:
        if vcpu.waiting.stored(gpa):
            vcpu.insns += 1
        return MmioExit(gpa, size, True, page.value(MMIO_DATA, size))

    is_known = vcpu.waiting.loads(gpa, MMIO_DATA, size)
    return None if is_known else MmioExit(gpa, size, False, 0)


def _on_shutdown(vcpu: KvmVcpu) -> Exit:
    vcpu.insns += 1
    why = "a fault met a fault while it was delivered; which ones, KVM does not say"
    return ShutdownExit((), vcpu.gprs[RIP], vcpu.regs.read("cr2"), why)


def _on_system_event(vcpu: KvmVcpu) -> Exit:
    event = vcpu.page.member("system_event").type
    return InternalErrorExit(f"KVM system event {event}", vcpu.gprs[RIP])


def _on_fail_entry(vcpu: KvmVcpu) -> Exit:
    reason = vcpu.page.member("fail_entry").hardware_entry_failure_reason
    why = f"the CPU refuses to enter this state (hardware reason {reason:#x})"
    return InternalErrorExit(why, vcpu.gprs[RIP])


def _on_internal_error(vcpu: KvmVcpu) -> Exit:
    suberror = vcpu.page.member("internal").suberror
    pc = vcpu.gprs[RIP]
    data = vcpu.memory.fetch(pc, LONGEST)
    insn = next(disassemble(vcpu.vm.arch, data, pc), None)

    if insn is None and len(data) < LONGEST:
        gpa = vcpu.memory.gpa(pc + len(data))
        if gpa is not None:
            why = f"instruction fetch from gpa {gpa:#x}, where no memslot is"
            return InternalErrorExit(why, pc)

    if suberror == CONSTANTS["KVM_INTERNAL_ERROR_EMULATION"]:
        why = "KVM cannot emulate this instruction"
    else:
        why = f"KVM internal error, suberror {suberror}"
    if insn is None:
        return InternalErrorExit(why, pc, data)
    return InternalErrorExit(why, pc, data[: insn.size], insn.text)


def _on_intr(vcpu: KvmVcpu) -> Exit | None:
    return vcpu.asked(in_time=True)


def _on_x86_rdmsr(vcpu: KvmVcpu) -> None:
    """An MSR that KVM lacks: from the VM's own table; one that is nowhere gives the guest #GP."""
    msr = vcpu.page.member("msr")
    value = vcpu.host_msr(msr.index)
    msr.error = value is None
    msr.data = value or 0


def _on_x86_wrmsr(vcpu: KvmVcpu) -> None:
    msr = vcpu.page.member("msr")
    is_read_only = msr.index in vcpu.vm.cpu.read_only_msrs
    msr.error = is_read_only or not vcpu.set_host_msr(msr.index, msr.data)


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
