"""What this machine's KVM really does, found out with guests of a few bytes; once in a process."""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from labkit.arch.model import BootTables
from labkit.arch.x86_boot import TSS_OFFSET, X86_64
from labkit.arch.x86_cpu import CpuModel
from labkit.engines.base import BudgetExit, Capability, DebugExit, Exit, InternalErrorExit, PioExit
from labkit.engines.kvm.step import ENABLE, HW_BP
from labkit.errors import LabError

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["probe"]

PML4, PDPT, PD, TABLES, CODE, IDT, STACK, RING0_STACK, DATA, SIZE = (0x1000 * i for i in range(1, 11))
NOPS, LEAVE = b"\x90" * 4, b"\xec"  # in al, dx
LOOPS = 3000
LOOP = b"\xb9" + LOOPS.to_bytes(4, "little") + b"\xff\xc9\x75\xfc" + LEAVE  # mov ecx, LOOPS; 1: dec ecx; jnz 1b
STORE = b"\x88\x04\x25" + DATA.to_bytes(4, "little") + b"\x90" + LEAVE  # mov [DATA], al
CPUID = b"\xb8\7\0\0\0\x31\xc9\x0f\xa2\xba\0\x10\0\0" + LEAVE  # mov eax, 7; xor ecx, ecx; cpuid; mov edx, 0x1000
NATIVE = 50e-9  # seconds an instruction; emulation takes twenty times that
T = TypeVar("T")
WATCH = 1 << 16 | 2  # DR7: DR0 is on and breaks on writes of one byte


class _Guest:
    """One vCPU with a few pages, mapped one to one for both rings."""

    def __init__(self, vm: KvmVm, code: bytes, user: bool) -> None:
        self.vm, self.memory = vm, mmap.mmap(-1, SIZE)
        self.put(PML4, struct.pack("<Q", PDPT | 7))
        self.put(PDPT, struct.pack("<Q", PD | 7))
        self.put(PD, struct.pack("<Q", 0x87))  # 2 MiB
        assert X86_64.tables is not None and X86_64.idt is not None
        self.put(TABLES, X86_64.tables(TABLES, RING0_STACK + 0x1000))
        self.put(IDT, X86_64.idt([CODE + 0x800] * 256))
        self.put(CODE + 0x800, LEAVE)
        self.put(CODE, code)
        vm.add_memslot(0, ctypes.addressof(ctypes.c_char.from_buffer(self.memory)), SIZE)
        self.vcpu: KvmVcpu = vm.create_vcpu(0, lambda kind, facts: None)
        regs = X86_64.reset(BootTables(PML4, TABLES, IDT, TABLES + TSS_OFFSET, user))
        self.vcpu.set_regs(regs | {"rip": CODE, "rsp": STACK + 0xF00, "rdx": 0x1000})

    def put(self, at: int, data: bytes) -> None:
        self.memory[at:at + len(data)] = data

    def left(self, came: Exit, length: int) -> bool:
        """Whether it ran to the IN at the end."""
        return isinstance(came, PioExit) and self.vcpu.read_reg("rip") == CODE + length


def _steps(guest: _Guest) -> bool:
    return all(guest.vcpu.run(1) == BudgetExit(1) and guest.vcpu.read_reg("rip") == CODE + i for i in (1, 2, 3))


def _breaks(guest: _Guest) -> bool:
    guest.vcpu.set_breakpoints(frozenset({CODE + 2}))
    return guest.vcpu.run() == DebugExit(CODE + 2) and guest.left(guest.vcpu.run(), 5)


def _watches(guest: _Guest) -> bool:
    guest.vcpu.stepper.debug(ENABLE | HW_BP, (DATA,), WATCH)
    return isinstance(guest.vcpu.stay_free(), DebugExit) and guest.vcpu.read_reg("rip") == CODE + 7


def _traps(guest: _Guest) -> bool:
    return not isinstance(guest.vcpu.run(), InternalErrorExit)


def _logs(guest: _Guest) -> bool:
    guest.vm.pages_written()
    return guest.left(guest.vcpu.run(), 9) and DATA in guest.vm.pages_written()


def _identifies(guest: _Guest) -> bool:
    return guest.left(guest.vcpu.run(), len(CPUID)) and guest.vcpu.read_reg("rbx") == guest.vm.cpu.leaf(7, 0)[1]


def _pace(guest: _Guest) -> float:
    """Seconds an instruction, once the pages are known to KVM."""
    took = float("inf")
    for _ in range(3):
        guest.vcpu.set_regs({"rip": CODE})
        begin = time.perf_counter()
        if not guest.left(guest.vcpu.run(), len(LOOP)):
            return float("inf")
        took = min(took, (time.perf_counter() - begin) / (2 * LOOPS))
    return took


def _ask(question: Callable[[_Guest], T], code: bytes, user: bool, otherwise: T) -> T:
    from labkit.engines.kvm.vm import KvmVm

    try:
        with closing(KvmVm("x86_64", CpuModel(), ())) as vm:
            vm.deadline = 1.0
            return question(_Guest(vm, code, user))
    except LabError:
        return otherwise


@cache
def probe() -> tuple[Capability, ...]:
    """The capabilities of this machine's KVM, with what was seen."""
    nops = NOPS + LEAVE
    step, step_user = (_ask(_steps, nops, user, False) for user in (False, True))
    kernel, user = (_ask(_pace, LOOP, ring, float("inf")) for ring in (False, True))
    watches, traps = _ask(_watches, STORE, False, False), _ask(_traps, b"\xcc" + LEAVE, False, False)
    cpuid = [_ask(_identifies, CPUID, ring, False) for ring in (False, True)]
    told = f"{kernel * 1e9:.0f} ns an instruction at CPL0, {user * 1e9:.0f} ns at CPL3"
    by_default = kernel > NATIVE >= user and step_user
    if by_default:
        why = f"ring 0 is emulated here ({told}), and steps are exact in both rings"
    elif kernel > NATIVE >= user:
        why = f"ring 0 is emulated here ({told}), but only there a step is one instruction: say privilege=\"user\" for speed"
    else:
        why = f"ring 0 is as fast as it gets here ({told})"
    return (
        Capability("step", step, "at CPL0: one instruction, one REP iteration, one exception delivery" if step else
                   "KVM_GUESTDBG_SINGLESTEP does not stop behind one instruction here"),
        Capability("step_user", step_user, "at CPL3 too" if step_user else
                   "at CPL3 this KVM's single step runs on: a VM that must step, count or break needs privilege=\"kernel\""),
        Capability("breakpoints", step and _ask(_breaks, nops, False, False), "any number: 4 in debug registers, more by stepping"),
        Capability("watchpoints", watches, "debug registers on data" if watches else
                   "a debug register on data does not stop a store here"),
        Capability("snapshot", True, "registers, XSAVE, MSRs and memory bit for bit; the TSC goes on from where it was"),
        Capability("dirty_log", _ask(_logs, STORE, False, False), "KVM_MEM_LOG_DIRTY_PAGES: a restore writes back what was written"),
        Capability("count", False, "nobody counts a run without max_insns: the clock moves by one with each exit, `exact` is False"),
        Capability("deterministic", False, "real time; but runs with max_insns or a schedule with a quantum are stepped, and repeat"),
        Capability("parallel_vcpus", True, "schedule=\"parallel\": a thread and a real CPU each"),
        Capability("native_speed", kernel <= NATIVE, told),
        Capability("native_speed_user", user <= NATIVE, told),
        Capability("user_by_default", by_default, why),
        Capability("software_interrupts", traps, "INT3 and INT n at CPL0" if traps else "INT3 at CPL0 ends in KVM's internal error here"),
        Capability("cpuid", all(cpuid), "leaf 7 of a guest is " + " and ".join(
            f"{'the VM' if own else 'the host'}'s at {ring}" for ring, own in zip(("CPL0", "CPL3"), cpuid, strict=True))),
        Capability("msr_table", False, "a guest finds all of KVM's MSRs; those that KVM lacks are the VM's own table's"),
        Capability("exceptions", False, "KVM brings an exception to its handler inside the guest and tells nobody"),
        Capability("triple_fault_vectors", False, "KVM_EXIT_SHUTDOWN does not say which exceptions led there"),
        Capability("protect", False, "labkit encrypts guests of its default engine only"),
        Capability("hypercalls", False, "KVM answers VMCALL and VMMCALL itself, with -KVM_ENOSYS (kvm_pvm at CPL0 never ends them)"),
    )
