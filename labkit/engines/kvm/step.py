"""Stepping on KVM: exactly one instruction, one REP iteration or one exception delivery at a time, as on the default engine.

KVM_GUESTDBG_SINGLESTEP alone is not that. Its step over a faulting instruction ends behind the handler's first instruction, so
debug registers hold the handlers that may be entered next. A REP instruction that KVM emulates runs many iterations, so it is
given a count of one. A HLT would lose its exit, so it runs without being stepped. Behind IRET, SWAPGS, ENDBR64, the groups of
the fences and of RDRAND, kvm_pvm stops one instruction too late, so a debug register holds the place behind them too. MOV SS
keeps the trap away from the next instruction (SDM vol. 3A 6.8.3); where KVM stops between the two, both are stepped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.engines.base import Exit
from labkit.engines.disasm import disassemble
from labkit.engines.kvm.abi import CONSTANTS, EXITS, call, struct
from labkit.engines.kvm.regs import GPR

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["ENABLE", "HW_BP", "HW_BREAKPOINTS", "Kind", "Stepper", "kind_of"]

DEBUG = EXITS["KVM_EXIT_DEBUG"]
ENABLE, STEP, HW_BP = (
    CONSTANTS[f"KVM_GUESTDBG_{name}"] for name in ("ENABLE", "SINGLESTEP", "USE_HW_BP")
)
SYNC_REGS, SYNC_SREGS = CONSTANTS["KVM_SYNC_X86_REGS"], CONSTANTS["KVM_SYNC_X86_SREGS"]
HW_BREAKPOINTS = 4
RIP, RCX, RSP, FLAGS = (GPR[name] for name in ("rip", "rcx", "rsp", "rflags"))
ZF, RF = 1 << 6, 1 << 16
DE, DB, BP, UD, NP, SS, GP, PF, MF, XM = 0, 1, 3, 6, 11, 12, 13, 14, 16, 19
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_STRINGS = frozenset(b"\x6c\x6d\x6e\x6f\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
_COMPARES = frozenset(b"\xa6\xa7\xae\xaf")
_LATE = (b"\x01", b"\x1e", b"\xae", b"\xc7")  # behind 0F
_FAR = frozenset(
    b"\xca\xcb\xcf"
)  # RET to another segment, IRET: RIP lies on top of the stack, CS behind it


class Kind(NamedTuple):
    """What matters of an instruction before it is stepped."""

    length: int  # of prefixes and opcode: of a string instruction and of HLT, all of it
    halts: bool
    string: bool
    rep: int  # 0, 0xF2 or 0xF3 of a string instruction
    compares: bool
    narrow: bool  # counts in ECX
    vector: int  # of an exception that it may raise beside #UD #GP #PF
    selector: int  # where on the stack it finds its next CS; 0 for what leads to CPL3 whatever lies there, -1 for what stays
    behind: int  # bytes of all of it, where KVM may not stop behind it or must not; else 0
    shadow: bool  # it loads SS
    locked: bool

    @property
    def mask(self) -> int:
        """The bits of RCX that count iterations."""
        return 0xFFFFFFFF if self.narrow else (1 << 64) - 1


@lru_cache(4096)
def kind_of(code: bytes) -> Kind:
    """From the first bytes of an instruction."""
    rep, at, narrow, wide = 0, 0, False, 4
    while at < len(code) - 1 and code[at] in _PREFIXES:
        rep, narrow, at = (
            code[at] if code[at] in (0xF2, 0xF3) else rep,
            narrow or code[at] == 0x67,
            at + 1,
        )
        wide = 2 if code[at - 1] == 0x66 else wide
    if at < len(code) - 1 and code[at] >> 4 == 4:  # REX
        wide = 8 if code[at] & 8 else wide
        at += 1
    opcode, second = code[at] if code else 0, code[at + 1 : at + 2]
    string = opcode in _STRINGS
    selector = (
        wide if opcode in _FAR else 0 if opcode == 0x0F and second in (b"\x07", b"\x35") else -1
    )  # SYSRET, SYSEXIT
    shadow = opcode == 0x8E and bool(second) and second[0] & 0x38 == 0x10
    insn = (
        next(disassemble("x86_64", code, 0), None)
        if shadow or (opcode == 0x0F and second in _LATE)
        else None
    )
    locked = 0xF0 in code[:at] or (
        opcode in (0x86, 0x87) and bool(second) and second[0] < 0xC0
    )  # XCHG with memory
    return Kind(
        at + 1,
        opcode == 0xF4,
        string,
        rep if string else 0,
        opcode in _COMPARES,
        narrow,
        _vector(opcode, second),
        selector,
        insn.size if insn else 0,
        shadow,
        locked,
    )


def _vector(opcode: int, second: bytes) -> int:
    match opcode:
        case 0xF6 | 0xF7:
            return DE
        case 0xCC:
            return BP
        case 0xCD:
            return second[0] if second else GP
        case 0xF1:
            return DB
        case 0x8E | 0xCA | 0xCB | 0xCF:
            return NP
        case 0x9B | 0xD8 | 0xD9 | 0xDA | 0xDB | 0xDC | 0xDD | 0xDE | 0xDF:
            return MF
        case 0x0F:
            return XM
        case _:
            return SS


class Stepper:
    """Steps one vCPU; `control` is what KVM_SET_GUEST_DEBUG was told last."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu = vcpu
        self.control: tuple[int, tuple[int, ...]] = (0, ())
        self.sregs = vcpu.run_page.s.sregs
        self._pages: dict[int, int] = {}  # gva of a page -> hva, under one CR3
        self._cr3 = -1
        self.inside = False  # a REP instruction that has iterations left

    def debug(self, control: int, gvas: tuple[int, ...] = (), kinds: int = 0) -> None:
        """KVM_SET_GUEST_DEBUG, when it is not so already; execution breakpoints in DR0 to DR3 (SDM vol. 3B 17.2), others as DR7 says.

        KVM notes the RIP that a step begins at and takes the trap flag away when registers are set to another later (kvm_set_rflags()).
        """
        run = self.vcpu.run_page
        if control & STEP and run.kvm_dirty_regs:
            call(self.vcpu.fd, "KVM_SET_REGS", run.s.regs)
            run.kvm_dirty_regs = 0
        elif self.control == (control, gvas):
            return
        wish = struct("kvm_guest_debug", control=control)
        for i, gva in enumerate(gvas):
            wish.debugreg[i] = gva
            wish.debugreg[7] |= 2 << 2 * i | kinds  # global enable; R/W and LEN 0: an instruction
        call(self.vcpu.fd, "KVM_SET_GUEST_DEBUG", wish)
        self.control = control, gvas

    def free(self) -> Exit | None:
        """Let the guest run up to a breakpoint, if there are any; one where it stands is stepped over, which may end in an exit."""
        gvas = tuple(sorted(self.vcpu.breakpoints))
        exit, before = None, self.vcpu.insns
        if self.vcpu.gprs[RIP] in gvas:
            with closing(self.steps()) as steps:
                exit = next(
                    exit
                    for exit in steps
                    if exit is not None or (self.vcpu.insns > before and not self.inside)
                )
        self.debug(ENABLE | HW_BP if gvas else 0, gvas)
        return exit

    def steps(self) -> Generator[Exit | None, None, None]:
        """One step after the other: an exit, or None for a step that is over or interrupted by somebody who wants a look around."""
        vcpu = self.vcpu
        ctypes.memmove(
            ctypes.addressof(self.sregs),
            ctypes.addressof(vcpu.regs.get("SREGS")),
            ctypes.sizeof(self.sregs),
        )
        vcpu.run_page.kvm_valid_regs = (
            SYNC_REGS | SYNC_SREGS
        )  # KVM keeps the special registers in the run page too
        self._pages.clear()
        try:
            while True:
                yield self._step()
        finally:
            vcpu.run_page.kvm_valid_regs = SYNC_REGS

    def _step(self) -> Exit | None:
        vcpu = self.vcpu
        self.inside = False
        kind = kind_of(self._peek(vcpu.gprs[RIP]))
        vcpu.need_step(self._ring_behind(kind))
        if kind.halts and not self.sregs.cs.selector & 3:
            self.debug(0)
            return vcpu.stay()
        self.debug(ENABLE | STEP | HW_BP, self._landings(kind))
        start, cs = vcpu.gprs[RIP], self.sregs.cs.selector
        exit = self._iterate(kind) if kind.rep else vcpu.stay()
        if exit is None and vcpu.gprs[RIP] in self.control[1]:
            self._hide_trap(start, cs)
        if kind.locked:
            vcpu.locked_at = vcpu.vm.retired()
        if kind.shadow and exit is None and vcpu.gprs[RIP] == start + kind.behind:
            done = vcpu.insns
            exit, vcpu.insns = self._step(), done
        return exit

    def _hide_trap(self, start: int, cs: int) -> None:
        """In a handler: the flags that were pushed have TF, which the step needed and the guest never set."""
        rsp = self.vcpu.gprs[RSP]
        for gva in (rsp, rsp + 8):  # RIP, CS and RFLAGS lie above an error code, or alone
            pushed = self.vcpu.fetch(gva, 24)
            rip = int.from_bytes(pushed[:8], "little")
            if (
                len(pushed) == 24
                and start <= rip < start + 16
                and pushed[8:16] == cs.to_bytes(8, "little")
            ):
                ctypes.memset(self.vcpu.hva(gva + 17), pushed[17] & ~1, 1)
                return

    def _landings(self, kind: Kind) -> tuple[int, ...]:
        """Where to stop, whatever KVM takes for a step: the handlers that may come, and behind some instructions."""
        rip, rsp = self.vcpu.gprs[RIP], self.vcpu.gprs[RSP]
        if kind.behind and not kind.shadow:
            return self._elsewhere(rip + kind.behind, *self._handlers(PF, GP, UD))
        target = self._peek(rsp)[: kind.selector] if kind.selector > 0 else b""
        if target:
            return self._elsewhere(int.from_bytes(target, "little"), *self._handlers(PF, GP, NP))
        return self._elsewhere(
            *self._handlers(PF, GP, UD, SS if kind.selector > 0 else kind.vector)
        )

    def _elsewhere(self, *gvas: int) -> tuple[int, ...]:
        """Without repetition, and without where the guest is: KVM would stop there at once, whatever RF says."""
        return tuple(dict.fromkeys(gva for gva in gvas if gva != self.vcpu.gprs[RIP]))

    def _ring_behind(self, kind: Kind) -> int:
        """The privilege level to which an instruction leads: KVM_GUESTDBG_SINGLESTEP that is wrong there is wrong from here on."""
        ring: int = self.sregs.cs.selector & 3
        if kind.selector < 0 or ring:
            return ring
        if not kind.selector:
            return 3
        return int.from_bytes(self._peek(self.vcpu.gprs[RSP] + kind.selector)[:2], "little") & 3

    def _iterate(self, kind: Kind) -> Exit | None:
        """One iteration of a REP instruction, or the fault that the last one met."""
        vcpu, gprs, mask = self.vcpu, self.vcpu.gprs, kind.mask
        if not gprs[RCX] & mask or self._events().raw[0] & 0xFF:  # exception.injected
            return vcpu.stay()
        before, left = vcpu.insns, gprs[RCX]
        with self.once(kind):
            exit = vcpu.stay()
            vcpu.settle()
        if exit is None and vcpu.insns == before and gprs[RCX] != left:
            vcpu.insns += 1
        return exit

    @contextmanager
    def once(self, kind: Kind) -> Iterator[None]:
        """Around one iteration of a REP instruction (SDM vol. 2B REP): it is told that it is the last, then stands where one leads."""
        vcpu, gprs, mask = self.vcpu, self.vcpu.gprs, kind.mask
        start, left, gprs[RCX] = gprs[RIP], gprs[RCX] & mask, 1
        vcpu.run_page.kvm_dirty_regs |= SYNC_REGS
        yield
        if gprs[RCX] & mask == 0:
            over = left == 1 or (kind.compares and bool(gprs[FLAGS] & ZF) != (kind.rep == 0xF3))
            gprs[RCX], gprs[RIP] = left - 1, start + kind.length if over else start
            gprs[FLAGS] = gprs[FLAGS] & ~RF if over else gprs[FLAGS] | RF  # SDM vol. 3B 17.3.1.1
            self.inside = not over
            vcpu.run_page.kvm_dirty_regs |= SYNC_REGS
        else:  # a fault, or a read from a hole: nothing was done; KVM_SET_REGS drops a fault that is not delivered yet
            events, gprs[RCX] = self._events(), left
            call(vcpu.fd, "KVM_SET_REGS", vcpu.run_page.s.regs)
            call(vcpu.fd, "KVM_SET_VCPU_EVENTS", events)

    def _events(self) -> Any:
        events = struct("kvm_vcpu_events")
        call(self.vcpu.fd, "KVM_GET_VCPU_EVENTS", events)
        return events

    def _peek(self, gva: int) -> bytes:
        """The bytes at gva, of one page; b"" where nothing is mapped."""
        if self.sregs.cr3 != self._cr3:
            self._pages.clear()
            self._cr3 = self.sregs.cr3
        page = gva & -4096
        hva = self._pages.get(page)
        if hva is None:
            hva = self._pages[page] = self.vcpu.hva(page)
        return ctypes.string_at(hva + gva - page, min(15, page + 4096 - gva)) if hva else b""

    def _handlers(self, *vectors: int) -> list[int]:
        """Where these exceptions would lead, from the guest's IDT as it is now."""
        base, limit = self.sregs.idt.base, self.sregs.idt.limit
        found = []
        for vector in vectors:
            at = base + 16 * vector
            gate = self._peek(at) if 16 * vector + 15 <= limit else b""
            if len(gate) >= 12:
                found.append(int.from_bytes(gate[0:2] + gate[6:12], "little"))
        return found
