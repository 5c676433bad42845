"""Questions about this machine's KVM, each answered by a guest of a few bytes in ring 0 or ring 3.

A KVM that cannot even run the guest of a question answers it with no.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from labkit.arch.model import BootTables
from labkit.arch.x86_boot import TSS_OFFSET, X86_64
from labkit.arch.x86_cpu import IA32_TSC, CpuModel
from labkit.engines.exits import BudgetExit, DebugExit, Exit, PioExit
from labkit.engines.kvm.abi import call, msrs
from labkit.engines.kvm.kinds import UD
from labkit.engines.kvm.step import ENABLE, HW_BP
from labkit.errors import LabError

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu
    from labkit.engines.kvm.vm import KvmVm

__all__ = [
    "KERNEL",
    "TRAPS",
    "USER",
    "breaks",
    "calls",
    "identifies",
    "keeps_time",
    "loads_from_gib",
    "logs",
    "nests",
    "pace",
    "reaches_port",
    "runs_simd",
    "steps",
    "watches",
]

KERNEL, USER = False, True  # rings

# gpas of a guest's pages, which are its gvas too
PML4, PDPT, PD, TABLES, CODE, IDT, STACK, RING0_STACK, DATA, SIZE = (
    0x1000 * i for i in range(1, 11)
)
HANDLER = CODE + 0x800  # of every exception and of SYSCALL
GIB = 1 << 30  # a second gva of all of it
PRESENT_WRITABLE_USER = 7
LEAF = 0x80  # of an entry above the last level

PORT = 0x1000  # in DX
LEAVE = b"\xec"  # in al, dx
NOPS = b"\x90" * 4
LOOPS = 3000
# mov ecx, LOOPS; 1: dec ecx; jnz 1b
LOOP = b"\xb9" + LOOPS.to_bytes(4, "little") + b"\xff\xc9\x75\xfc"
# nop; mfence; nop
FENCE = b"\x90\x0f\xae\xf0\x90"
# movq xmm0, rax; fld1
SIMD = b"\x66\x48\x0f\x6e\xc0\xd9\xe8"
# mov al, [GIB + DATA]
LOAD = b"\x8a\x04\x25" + (GIB + DATA).to_bytes(4, "little")
# mov [DATA], al; nop
STORE = b"\x88\x04\x25" + DATA.to_bytes(4, "little") + b"\x90"
# mov eax, 7; xor ecx, ecx; cpuid; mov edx, PORT
CPUID = b"\xb8\7\0\0\0\x31\xc9\x0f\xa2\xba\0\x10\0\0"
RDTSC, SYSCALL, UD2 = b"\x0f\x31", b"\x0f\x05", b"\x0f\x0b"
INTERRUPTS = {"INT1": b"\xf1", "INT3": b"\xcc", "INT n": b"\xcd\x77"}

WATCH = 1 << 16 | 2  # DR7: DR0 is on and breaks on writes of one byte (SDM vol. 3B 17.2.4)
Answer = TypeVar("Answer")


class _Guest:
    """One vCPU that stands at `code` and leaves behind it, with a few pages for both rings."""

    def __init__(self, vm: KvmVm, code: bytes, user: bool) -> None:
        self.vm = vm
        self.end = CODE + len(code) + len(LEAVE)
        self.memory = mmap.mmap(-1, SIZE)
        self._put_tables()
        self.put(HANDLER, LEAVE)
        self.put(CODE, code + LEAVE)
        vm.add_memslot(0, ctypes.addressof(ctypes.c_char.from_buffer(self.memory)), SIZE)

        self.vcpu: KvmVcpu = vm.create_vcpu(0, lambda kind, facts: None)
        regs = X86_64.reset(BootTables(PML4, TABLES, IDT, TABLES + TSS_OFFSET, user))
        self.vcpu.set_regs(regs | {"rip": CODE, "rsp": STACK + 0xF00, "rdx": PORT})

    def _put_tables(self) -> None:
        leaf = LEAF | PRESENT_WRITABLE_USER
        self.put(PML4, struct.pack("<Q", PDPT | PRESENT_WRITABLE_USER))
        # The second is a leaf of 1 GiB, for LOAD alone.
        self.put(PDPT, struct.pack("<2Q", PD | PRESENT_WRITABLE_USER, leaf))
        self.put(PD, struct.pack("<Q", leaf))  # 2 MiB

        assert X86_64.tables is not None and X86_64.idt is not None
        self.put(TABLES, X86_64.tables(TABLES, RING0_STACK + 0x1000))
        idt = bytearray(X86_64.idt([HANDLER] * 256))
        idt[5::16] = b"\xee" * 256  # DPL 3
        self.put(IDT, bytes(idt))

    def put(self, at: int, data: bytes) -> None:
        """Write memory."""
        self.memory[at : at + len(data)] = data

    def left_at_end(self, came: Exit) -> bool:
        """Whether it ran to the IN behind its code."""
        return isinstance(came, PioExit) and self.vcpu.read_reg("rip") == self.end

    def runs_to_end(self) -> bool:
        """Let it run, and say whether it did."""
        return self.left_at_end(self.vcpu.run())

    def pushed(self) -> int:
        """Let it run; what lies on top of the handler's stack then, -1 when none was reached."""
        came = self.vcpu.run()
        rsp = self.vcpu.read_reg("rsp")
        if not isinstance(came, PioExit) or rsp > SIZE - 8:
            return -1
        return int.from_bytes(self.memory[rsp : rsp + 8], "little")


def _ask(
    question: Callable[[_Guest], Answer], code: bytes, user: bool, otherwise: Answer
) -> Answer:
    """The answer of a new guest in that ring, or `otherwise` when this KVM does not run it."""
    from labkit.engines.kvm.vm import KvmVm

    try:
        with closing(KvmVm("x86_64", CpuModel(), ())) as vm:
            vm.deadline = 1.0
            return question(_Guest(vm, code, user))
    except LabError:
        return otherwise


def _trial(code: bytes) -> Callable[[Callable[[_Guest], bool]], Callable[[bool], bool]]:
    """Make a question about a guest that runs `code` one about a ring, KERNEL or USER."""

    def made(question: Callable[[_Guest], bool]) -> Callable[[bool], bool]:
        def ask(user: bool) -> bool:
            return _ask(question, code, user, False)

        ask.__doc__ = question.__doc__
        return ask

    return made


@_trial(FENCE)
def steps(guest: _Guest) -> bool:
    """Whether a step is one instruction; behind a fence some take one too many."""
    for length in (1, 4, 5):
        came = guest.vcpu.run(1)
        if came != BudgetExit(1) or guest.vcpu.read_reg("rip") != CODE + length:
            return False
    return True


@_trial(NOPS)
def breaks(guest: _Guest) -> bool:
    """Whether a debug register stops before an instruction, and then lets it go."""
    guest.vcpu.set_breakpoints(frozenset({CODE + 2}))
    return guest.vcpu.run() == DebugExit(CODE + 2) and guest.runs_to_end()


@_trial(STORE)
def watches(guest: _Guest) -> bool:
    """Whether a debug register stops behind a store."""
    guest.vcpu.stepper.debug(ENABLE | HW_BP, (DATA,), WATCH)
    came = guest.vcpu.stay_free()
    behind_store = CODE + len(STORE) - 1
    return isinstance(came, DebugExit) and guest.vcpu.read_reg("rip") == behind_store


@_trial(STORE)
def logs(guest: _Guest) -> bool:
    """Whether the dirty log has a page that was written."""
    guest.vm.pages_written()
    return guest.runs_to_end() and DATA in guest.vm.pages_written()


@_trial(CPUID)
def identifies(guest: _Guest) -> bool:
    """Whether CPUID gives the VM's values."""
    return guest.runs_to_end() and guest.vcpu.read_reg("rbx") == guest.vm.cpu.leaf(7, 0)[1]


@_trial(LOAD)
def loads_from_gib(guest: _Guest) -> bool:
    """Whether a leaf of 1 GiB maps memory."""
    return guest.runs_to_end()


@_trial(SIMD)
def runs_simd(guest: _Guest) -> bool:
    """Whether SSE and the x87 work."""
    return guest.runs_to_end()


@_trial(b"")
def reaches_port(guest: _Guest) -> bool:
    """Whether IOPL 3 opens a port where the TSS has no bitmap."""
    guest.vcpu.set_regs({"rflags": 3 << 12 | 2, "tr_limit": 0x67})
    return guest.runs_to_end()


@_trial(SYSCALL)
def calls(guest: _Guest) -> bool:
    """Whether SYSCALL leads to ring 0."""
    efer_sce = guest.vcpu.read_reg("efer") | 1
    guest.vcpu.set_regs({"efer": efer_sce, "star": 8 << 32, "lstar": HANDLER})
    return isinstance(guest.vcpu.run(), PioExit) and guest.vcpu.read_reg("cs") == 8


@_trial(UD2)
def nests(guest: _Guest) -> bool:
    """Whether a gate that is not present is #NP, with an error code that says which one."""
    guest.put(IDT + 16 * UD + 5, b"\x0e")
    return guest.pushed() == 8 * UD + 3


@_trial(RDTSC)
def keeps_time(guest: _Guest) -> bool:
    """Whether a TSC that was set is the one that the guest then reads."""
    call(guest.vcpu.fd, "KVM_SET_MSRS", msrs({IA32_TSC: 1 << 60}))
    return guest.runs_to_end() and guest.vcpu.read_reg("rdx") >> 28 == 1


def _traps(guest: _Guest) -> bool:
    """Whether its handler has the address behind the interrupt."""
    return guest.pushed() == guest.end - len(LEAVE)


TRAPS = {name: _trial(code)(_traps) for name, code in INTERRUPTS.items()}


def pace(user: bool) -> float:
    """Seconds an instruction, once KVM knows the pages; infinite where a loop does not end."""
    return _ask(_pace, LOOP, user, float("inf"))


def _pace(guest: _Guest) -> float:
    took = float("inf")
    for _ in range(3):
        guest.vcpu.set_regs({"rip": CODE})
        begin = time.perf_counter()
        if not guest.runs_to_end():
            return float("inf")
        took = min(took, (time.perf_counter() - begin) / (2 * LOOPS))
    return took
