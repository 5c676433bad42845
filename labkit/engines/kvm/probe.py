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
from labkit.arch.x86_cpu import IA32_TSC, CpuModel
from labkit.engines.base import BudgetExit, Capability, DebugExit, Exit, PioExit
from labkit.engines.kvm.abi import call, msrs
from labkit.engines.kvm.kinds import UD
from labkit.engines.kvm.step import ENABLE, HW_BP
from labkit.errors import LabError

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu
    from labkit.engines.kvm.vm import KvmVm

__all__ = ["probe"]

PML4, PDPT, PD, TABLES, CODE, IDT, STACK, RING0_STACK, DATA, SIZE = (
    0x1000 * i for i in range(1, 11)
)
HANDLER = CODE + 0x800  # of every exception and of SYSCALL
NOPS, LEAVE = b"\x90" * 4, b"\xec"  # in al, dx
LOOPS = 3000
LOOP = (
    b"\xb9" + LOOPS.to_bytes(4, "little") + b"\xff\xc9\x75\xfc" + LEAVE
)  # mov ecx, LOOPS; 1: dec ecx; jnz 1b
FENCE = b"\x90\x0f\xae\xf0\x90" + LEAVE  # nop; mfence; nop
SIMD = b"\x66\x48\x0f\x6e\xc0\xd9\xe8" + LEAVE  # movq xmm0, rax; fld1
GIB = 1 << 30
LOAD = b"\x8a\x04\x25" + (GIB + DATA).to_bytes(4, "little") + LEAVE  # mov al, [GIB + DATA]
STORE = b"\x88\x04\x25" + DATA.to_bytes(4, "little") + b"\x90" + LEAVE  # mov [DATA], al
CPUID = (
    b"\xb8\7\0\0\0\x31\xc9\x0f\xa2\xba\0\x10\0\0" + LEAVE
)  # mov eax, 7; xor ecx, ecx; cpuid; mov edx, 0x1000
NATIVE = 50e-9  # seconds an instruction; emulation takes twenty times that
T = TypeVar("T")
WATCH = 1 << 16 | 2  # DR7: DR0 is on and breaks on writes of one byte


class _Guest:
    """One vCPU with a few pages, mapped one to one for both rings."""

    def __init__(self, vm: KvmVm, code: bytes, user: bool) -> None:
        self.vm, self.code, self.memory = vm, code, mmap.mmap(-1, SIZE)
        self.put(PML4, struct.pack("<Q", PDPT | 7))
        self.put(PDPT, struct.pack("<2Q", PD | 7, 0x87))  # a leaf of 1 GiB, for LOAD alone
        self.put(PD, struct.pack("<Q", 0x87))  # 2 MiB
        assert X86_64.tables is not None and X86_64.idt is not None
        self.put(TABLES, X86_64.tables(TABLES, RING0_STACK + 0x1000))
        idt = bytearray(X86_64.idt([HANDLER] * 256))
        idt[5::16] = b"\xee" * 256  # DPL 3
        self.put(IDT, bytes(idt))
        self.put(HANDLER, LEAVE)
        self.put(CODE, code)
        vm.add_memslot(0, ctypes.addressof(ctypes.c_char.from_buffer(self.memory)), SIZE)
        self.vcpu: KvmVcpu = vm.create_vcpu(0, lambda kind, facts: None)
        regs = X86_64.reset(BootTables(PML4, TABLES, IDT, TABLES + TSS_OFFSET, user))
        self.vcpu.set_regs(regs | {"rip": CODE, "rsp": STACK + 0xF00, "rdx": 0x1000})

    def put(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data

    def left(self, came: Exit, length: int) -> bool:
        """Whether it ran to the IN at the end."""
        return isinstance(came, PioExit) and self.vcpu.read_reg("rip") == CODE + length

    def pushed(self) -> int:
        """What lies on top of a handler's stack; -1 when none was reached."""
        came, rsp = self.vcpu.run(), self.vcpu.read_reg("rsp")
        return (
            int.from_bytes(self.memory[rsp : rsp + 8], "little")
            if isinstance(came, PioExit) and rsp <= SIZE - 8
            else -1
        )


def _steps(guest: _Guest) -> bool:
    return all(
        guest.vcpu.run(1) == BudgetExit(1) and guest.vcpu.read_reg("rip") == CODE + i
        for i in (1, 4, 5)
    )


def _breaks(guest: _Guest) -> bool:
    guest.vcpu.set_breakpoints(frozenset({CODE + 2}))
    return guest.vcpu.run() == DebugExit(CODE + 2) and guest.left(guest.vcpu.run(), 5)


def _watches(guest: _Guest) -> bool:
    guest.vcpu.stepper.debug(ENABLE | HW_BP, (DATA,), WATCH)
    return isinstance(guest.vcpu.stay_free(), DebugExit) and guest.vcpu.read_reg("rip") == CODE + 7


def _ends(guest: _Guest) -> bool:
    return guest.left(guest.vcpu.run(), len(guest.code))


def _reaches(guest: _Guest) -> bool:
    guest.vcpu.set_regs({"rflags": 3 << 12 | 2, "tr_limit": 0x67})
    return _ends(guest)


def _traps(guest: _Guest) -> bool:
    """Whether its handler has the address behind the interrupt."""
    return guest.pushed() == CODE + len(guest.code)


def _keeps_time(guest: _Guest) -> bool:
    """Whether a TSC that was set is the one that the guest then reads."""
    call(guest.vcpu.fd, "KVM_SET_MSRS", msrs({IA32_TSC: 1 << 60}))
    return _ends(guest) and guest.vcpu.read_reg("rdx") >> 28 == 1


def _nests(guest: _Guest) -> bool:
    """Whether a gate that is not present is #NP, with an error code that says which one."""
    guest.put(IDT + 16 * UD + 5, b"\x0e")
    return guest.pushed() == 8 * UD + 3


def _calls(guest: _Guest) -> bool:
    guest.vcpu.set_regs(
        {"efer": guest.vcpu.read_reg("efer") | 1, "star": 8 << 32, "lstar": HANDLER}
    )
    return isinstance(guest.vcpu.run(), PioExit) and guest.vcpu.read_reg("cs") == 8


def _logs(guest: _Guest) -> bool:
    guest.vm.pages_written()
    return guest.left(guest.vcpu.run(), 9) and DATA in guest.vm.pages_written()


def _identifies(guest: _Guest) -> bool:
    return (
        guest.left(guest.vcpu.run(), len(CPUID))
        and guest.vcpu.read_reg("rbx") == guest.vm.cpu.leaf(7, 0)[1]
    )


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


def _rings(question: Callable[[_Guest], T], code: bytes, otherwise: T) -> list[T]:
    """The answers at CPL0 and at CPL3."""
    return [_ask(question, code, user, otherwise) for user in (False, True)]


@cache
def probe() -> tuple[Capability, ...]:
    """The capabilities of this machine's KVM, with what was seen."""
    step, step_user = _rings(_steps, FENCE, False)
    return (
        *_debugging(step, step_user),
        *_speed(step_user),
        *_cpu(),
        Capability(
            "snapshot",
            True,
            "registers, XSAVE, MSRs, memory bit for bit; the TSC goes on, from where it was if it can be set",
        ),
        Capability(
            "dirty_log",
            _ask(_logs, STORE, False, False),
            "KVM_MEM_LOG_DIRTY_PAGES: a restore writes back what was written",
        ),
        Capability(
            "count",
            False,
            "nobody counts a run without max_insns: the clock moves by one with each exit, `exact` is False",
        ),
        Capability(
            "pool_history",
            False,
            "in a run without max_insns nobody tells of locked instructions: a slot of the pool is taken "
            "`since` its ucall, and `uses` counts what the host saw",
        ),
        Capability(
            "deterministic",
            False,
            "real time; but runs with max_insns or a schedule with a quantum are stepped, and repeat",
        ),
        Capability("parallel_vcpus", True, 'schedule="parallel": a thread and a real CPU each'),
        Capability(
            "exceptions",
            False,
            "KVM brings an exception to its handler inside the guest and tells nobody",
        ),
        Capability(
            "triple_fault_vectors",
            False,
            "KVM_EXIT_SHUTDOWN does not say which exceptions led there",
        ),
        Capability("protect", False, "labkit encrypts guests of its default engine only"),
        Capability(
            "hypercalls",
            False,
            "KVM answers VMCALL and VMMCALL itself, with -KVM_ENOSYS (kvm_pvm at CPL0 never ends them)",
        ),
    )


def _debugging(step: bool, step_user: bool) -> tuple[Capability, ...]:
    breaks, watches = (
        step and _ask(_breaks, NOPS + LEAVE, False, False),
        _ask(_watches, STORE, False, False),
    )
    return (
        Capability(
            "step",
            step,
            "at CPL0: one instruction, one REP iteration, one exception delivery; a guest that steps itself (TF) "
            "does so only while it is not stepped"
            if step
            else "KVM_GUESTDBG_SINGLESTEP does not stop behind one instruction here",
        ),
        Capability(
            "step_user",
            step_user,
            "at CPL3 too"
            if step_user
            else "at CPL3 a step's trap goes to the guest's own #DB handler here, and a step that leads there (IRET, SYSRET) runs on: "
            'a VM that must step, count or break needs privilege="kernel"',
        ),
        Capability(
            "breakpoints",
            breaks,
            "any number: 4 in debug registers, more by stepping"
            if breaks
            else "a debug register on an instruction does not stop there here",
        ),
        Capability(
            "watchpoints",
            watches,
            "debug registers on data"
            if watches
            else "a debug register on data does not stop a store here",
        ),
    )


def _speed(step_user: bool) -> tuple[Capability, ...]:
    kernel, user = _rings(_pace, LOOP, float("inf"))
    told = f"{kernel * 1e9:.0f} ns an instruction at CPL0, {user * 1e9:.0f} ns at CPL3"
    by_default = kernel > NATIVE >= user and step_user
    if by_default:
        why = f"ring 0 is emulated here ({told}), and steps are exact in both rings"
    elif kernel > NATIVE >= user:
        why = f'ring 0 is emulated here ({told}), but only there a step is one instruction: say privilege="user" for speed'
    else:
        why = f"ring 0 is as fast as it gets here ({told})"
    return (
        Capability("native_speed", kernel <= NATIVE, told),
        Capability("native_speed_user", user <= NATIVE, told),
        Capability("user_by_default", by_default, why),
    )


def _cpu() -> tuple[Capability, ...]:
    cpuid, gib = _rings(_identifies, CPUID, False), _rings(_ends, LOAD, False)
    calls, iopl, simd = (
        _ask(_calls, b"\x0f\x05", True, False),
        _ask(_reaches, LEAVE, True, False),
        _ask(_ends, SIMD, False, False),
    )
    nests = _ask(_nests, b"\x0f\x0b", False, False)
    lost = [
        f"{name} at CPL{3 * ring}"
        for name, code in (("INT1", b"\xf1"), ("INT3", b"\xcc"), ("INT n", b"\xcd\x77"))
        for ring, came in enumerate(_rings(_traps, code, False))
        if not came
    ]
    tsc = _ask(_keeps_time, b"\x0f\x31" + LEAVE, False, False)
    return (
        Capability(
            "tsc",
            tsc,
            "a guest's TSC can be set and moved"
            if tsc
            else "here a guest's TSC is the host's: KVM takes IA32_TSC and KVM_VCPU_TSC_OFFSET without an error, and nothing "
            "changes; nor does CR4.TSD",
        ),
        Capability(
            "software_interrupts",
            not lost,
            f"here these do not reach their handler, or not with the address behind them: "
            f"{', '.join(lost)}"
            if lost
            else "INT1, INT3 and INT n, from both rings",
        ),
        Capability(
            "nested_faults",
            nests,
            "a fault on the way to a handler is what the manual says"
            if nests
            else "here what is wrong with a gate, its segment or its stack on the way to a handler becomes #DF, or is not looked at",
        ),
        Capability(
            "simd",
            simd,
            "x87 and SSE in both rings"
            if simd
            else "at CPL0 this KVM emulates neither x87 nor most of SSE (nor XGETBV, RDTSCP, POPCNT, MONITOR): such an instruction "
            'is an internal error that names it; CPL3 (privilege="user") runs natively',
        ),
        Capability(
            "syscall",
            calls,
            "SYSCALL leads from CPL3 to CPL0"
            if calls
            else "here SYSCALL at CPL3 goes on at LSTAR, but at CPL3 and with the user's CS and SS",
        ),
        Capability(
            "iopl",
            iopl,
            "IOPL 3 lets CPL3 at every port"
            if iopl
            else "here CPL3 reaches a port by the bitmap of its TSS alone, whatever IOPL says",
        ),
        Capability(
            "huge_pages",
            all(gib),
            "leaves of 2 MiB and 1 GiB"
            if all(gib)
            else "2 MiB only: here a leaf of 1 GiB is a page fault for its reserved bits (KVM_GET_SUPPORTED_CPUID has no pdpe1gb): map "
            "its memory with smaller pages",
        ),
        Capability(
            "cpuid",
            all(cpuid),
            "leaf 7 of a guest is "
            + " and ".join(
                f"{'the VM' if own else 'the host'}'s at {ring}"
                for ring, own in zip(("CPL0", "CPL3"), cpuid, strict=True)
            ),
        ),
        Capability(
            "msr_table",
            False,
            "a guest finds all of KVM's MSRs; those that KVM lacks are the VM's own table's",
        ),
    )
