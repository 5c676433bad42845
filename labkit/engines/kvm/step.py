"""Stepping on KVM: one instruction, one REP iteration or one exception delivery at a time.

So it is on the default engine, and KVM_GUESTDBG_SINGLESTEP alone is not that:

- Its step over a faulting instruction ends behind the handler's first instruction, so debug
  registers hold the handlers that may be entered next.
- A REP instruction that KVM emulates runs many iterations, so it is given a count of one.
- A HLT would lose its exit, so it runs without being stepped.
- Behind IRET, SWAPGS, ENDBR64, the groups of the fences and of RDRAND, kvm_pvm stops one
  instruction too late, so a debug register holds the place behind them too.
- MOV SS keeps the trap away from the next instruction (SDM vol. 3A 6.8.3); where KVM stops between
  the two, both are stepped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from labkit.engines.exits import Exit
from labkit.engines.kvm.abi import CONSTANTS, call, struct
from labkit.engines.kvm.kinds import GP, NP, PF, SS, UD, Kind, kind_of
from labkit.engines.kvm.places import GPR
from labkit.engines.kvm.repeat import events_of, one_iteration

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["ENABLE", "HW_BP", "HW_BREAKPOINTS", "Stepper"]

ENABLE, STEP, HW_BP = (
    CONSTANTS[f"KVM_GUESTDBG_{name}"] for name in ("ENABLE", "SINGLESTEP", "USE_HW_BP")
)
SYNC_REGS, SYNC_SREGS = CONSTANTS["KVM_SYNC_X86_REGS"], CONSTANTS["KVM_SYNC_X86_SREGS"]
HW_BREAKPOINTS = 4
RIP, RCX, RSP = GPR["rip"], GPR["rcx"], GPR["rsp"]
PAGE = 4096
LONGEST = 15  # bytes of an instruction (SDM vol. 2A 2.3.11)
TF = 1  # in the second byte of RFLAGS
GATE = 16  # bytes of an entry of the IDT (SDM vol. 3A 6.14.1)


class Stepper:
    """Steps one vCPU."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu = vcpu
        # What KVM_SET_GUEST_DEBUG was told last: its flags, and the gvas in DR0 to DR3
        self.control: tuple[int, tuple[int, ...]] = (0, ())
        self.sregs = vcpu.page.fields.s.sregs
        self._pages: dict[int, int] = {}  # gva of a page -> hva, under one CR3
        self._cr3 = -1

    def debug(self, control: int, gvas: tuple[int, ...] = (), kinds: int = 0) -> None:
        """KVM_SET_GUEST_DEBUG, when it is not so already.

        Execution breakpoints in DR0 to DR3 (SDM vol. 3B 17.2), others as the bits of DR7 in `kinds`
        say. KVM notes the RIP that a step begins at, and takes the trap flag away when registers
        are set to another later (kvm_set_rflags()).
        """
        fields = self.vcpu.page.fields
        if control & STEP and fields.kvm_dirty_regs:
            call(self.vcpu.fd, "KVM_SET_REGS", fields.s.regs)
            fields.kvm_dirty_regs = 0
        elif self.control == (control, gvas):
            return

        wish = struct("kvm_guest_debug", control=control)
        for i, gva in enumerate(gvas):
            wish.debugreg[i] = gva
            wish.debugreg[7] |= 2 << 2 * i | kinds  # global enable; R/W and LEN 0: an instruction
        call(self.vcpu.fd, "KVM_SET_GUEST_DEBUG", wish)
        self.control = control, gvas

    def free(self) -> Exit | None:
        """Prepare a run up to a breakpoint, if there are any.

        One where the guest stands is stepped over, which may end in an exit.
        """
        gvas = tuple(sorted(self.vcpu.breakpoints))
        exit = self._step_over() if self.vcpu.gprs[RIP] in gvas else None
        self.debug(ENABLE | HW_BP if gvas else 0, gvas)
        return exit

    def _step_over(self) -> Exit | None:
        """The instruction where the guest stands, with all its iterations."""
        vcpu = self.vcpu
        before = vcpu.insns
        with closing(self.steps()) as steps:
            for exit in steps:
                is_over = vcpu.insns > before and not vcpu.waiting.inside_rep
                if exit is not None or is_over:
                    return exit
        return None

    def steps(self) -> Generator[Exit | None, None, None]:
        """One step after the other, for ever.

        Each is an exit, or None for a step that is over, or was interrupted by somebody who wants
        to look around.
        """
        vcpu = self.vcpu
        ctypes.memmove(
            ctypes.addressof(self.sregs),
            ctypes.addressof(vcpu.regs.get("SREGS")),
            ctypes.sizeof(self.sregs),
        )
        # KVM keeps the special registers in the run page too.
        vcpu.page.fields.kvm_valid_regs = SYNC_REGS | SYNC_SREGS
        self._pages.clear()
        try:
            while True:
                yield self._step()
        finally:
            vcpu.page.fields.kvm_valid_regs = SYNC_REGS

    def _step(self) -> Exit | None:
        vcpu = self.vcpu
        vcpu.waiting.inside_rep = False
        start = vcpu.gprs[RIP]
        kind = kind_of(self._peek(start))
        vcpu.need_step(self._ring_behind(kind))

        cs = self.sregs.cs.selector
        if kind.halts and not cs & 3:
            self.debug(0)
            return vcpu.stay()

        self.debug(ENABLE | STEP | HW_BP, self._landings(kind))
        exit = self._iterate(kind) if kind.rep else vcpu.stay()
        if exit is None and vcpu.gprs[RIP] in self.control[1]:
            self._hide_trap(start, cs)
        if kind.locked:
            vcpu.locked_at = vcpu.vm.retired()
        if kind.shadow and exit is None and vcpu.gprs[RIP] == start + kind.behind:
            done = vcpu.insns
            exit = self._step()
            vcpu.insns = done
        return exit

    def _iterate(self, kind: Kind) -> Exit | None:
        """One iteration of a REP instruction, or the fault that the last one met."""
        vcpu, gprs = self.vcpu, self.vcpu.gprs
        exception_injected = 0xFF  # of the first word of struct kvm_vcpu_events
        if not gprs[RCX] & kind.mask or events_of(vcpu).raw[0] & exception_injected:
            return vcpu.stay()

        before, left = vcpu.insns, gprs[RCX]
        with one_iteration(vcpu, kind):
            exit = vcpu.stay()
            vcpu.settle()
        if exit is None and vcpu.insns == before and gprs[RCX] != left:
            vcpu.insns += 1
        return exit

    def _hide_trap(self, start: int, cs: int) -> None:
        """In a handler: the flags that were pushed have TF, which only the step needed."""
        memory = self.vcpu.memory
        rsp = self.vcpu.gprs[RSP]
        for gva in (rsp, rsp + 8):  # RIP, CS and RFLAGS lie above an error code, or alone
            pushed = memory.fetch(gva, 24)
            rip = int.from_bytes(pushed[:8], "little")
            from_here = start <= rip < start + 16 and pushed[8:16] == cs.to_bytes(8, "little")
            if len(pushed) == 24 and from_here:
                ctypes.memset(memory.hva(gva + 17), pushed[17] & ~TF, 1)
                return

    # --- where a step may lead

    def _landings(self, kind: Kind) -> tuple[int, ...]:
        """Where to stop, whatever KVM takes for a step.

        That is at the handlers that may come, and behind some instructions.
        """
        rip, rsp = self.vcpu.gprs[RIP], self.vcpu.gprs[RSP]
        if kind.behind and not kind.shadow:
            return self._elsewhere(rip + kind.behind, *self._handlers(PF, GP, UD))
        if kind.selector <= 0:
            return self._elsewhere(*self._handlers(PF, GP, UD, kind.vector))

        target = self._peek(rsp)[: kind.selector]
        if not target:
            return self._elsewhere(*self._handlers(PF, GP, UD, SS))
        return self._elsewhere(int.from_bytes(target, "little"), *self._handlers(PF, GP, NP))

    def _elsewhere(self, *gvas: int) -> tuple[int, ...]:
        """Without repetition, and without where the guest is.

        There KVM would stop at once, whatever RF says.
        """
        rip = self.vcpu.gprs[RIP]
        return tuple(dict.fromkeys(gva for gva in gvas if gva != rip))

    def _ring_behind(self, kind: Kind) -> int:
        """The ring to which an instruction leads.

        A KVM_GUESTDBG_SINGLESTEP that is wrong there is wrong from here on.
        """
        ring: int = self.sregs.cs.selector & 3
        if kind.selector < 0 or ring:
            return ring
        if not kind.selector:
            return 3
        selector = self._peek(self.vcpu.gprs[RSP] + kind.selector)[:2]
        return int.from_bytes(selector, "little") & 3

    def _handlers(self, *vectors: int) -> list[int]:
        """Where these exceptions would lead, from the guest's IDT as it is now."""
        base, limit = self.sregs.idt.base, self.sregs.idt.limit
        found = []
        for vector in vectors:
            offset = GATE * vector
            if offset + GATE - 1 > limit:
                continue
            gate = self._peek(base + offset)
            if len(gate) >= 12:
                found.append(int.from_bytes(gate[0:2] + gate[6:12], "little"))
        return found

    def _peek(self, gva: int) -> bytes:
        """The bytes at gva, of one page; b"" where nothing is mapped."""
        if self.sregs.cr3 != self._cr3:
            self._pages.clear()
            self._cr3 = self.sregs.cr3
        page = gva & -PAGE
        hva = self._pages.get(page)
        if hva is None:
            hva = self._pages[page] = self.vcpu.memory.hva(page)
        if not hva:
            return b""
        return ctypes.string_at(hva + gva - page, min(LONGEST, page + PAGE - gva))
