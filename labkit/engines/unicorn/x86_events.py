"""Exceptions of x86-64 delivered through the guest's own IDT (SDM vol. 3A chapter 6), which Unicorn leaves to its host."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from labkit.engines.base import Exit, ShutdownExit
from labkit.engines.unicorn.calibrate import calibrate

if TYPE_CHECKING:
    from labkit.engines.unicorn.vcpu import UnicornVcpu
    from labkit.engines.unicorn.x86_regs import X86Registers

__all__ = ["DB", "DF", "GP", "PF", "UD", "X86Events"]

DE, DB, BP, UD, DF, TS, NP, SS, GP, PF = 0, 1, 3, 6, 8, 10, 11, 12, 13, 14
WITH_ERROR = frozenset({DF, TS, NP, SS, GP, PF, 17, 21})
CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP})
MASK64 = (1 << 64) - 1
_CLEARED = 1 << 8 | 1 << 14 | 1 << 16 | 1 << 17  # TF NT RF VM


class _Fault(Exception):
    """A fault met while an event is delivered."""

    def __init__(self, vector: int, error: int, why: str) -> None:
        super().__init__(why)
        self.vector, self.error, self.why = vector, error, why


class X86Events:
    """Delivery of exceptions and software interrupts; the base of the x86 quirks."""

    regs: X86Registers

    def __init__(self, vcpu: UnicornVcpu) -> None:
        self.vcpu, self.handle = vcpu, vcpu.handle
        self.pending: list[int] = []  # vectors of the delivery that led to the last shutdown

    def exception(self, vector: int) -> Exit | None:
        """An exception that Unicorn reported: read what it was, clear Unicorn's memory of it, deliver it."""
        where, facts = calibrate(), [0, 0]

        def take(context: int) -> None:
            facts[0] = ctypes.c_uint32.from_address(context + where.error_code).value
            facts[1] = ctypes.c_int32.from_address(context + where.is_int).value
            ctypes.c_int32.from_address(context + where.old_exception).value = -1
            ctypes.c_int32.from_address(context + where.is_int).value = 0
            ctypes.c_uint32.from_address(context + where.error_code).value = 0

        self.handle.patch_context(take)
        error = facts[0] if vector in WITH_ERROR and not facts[1] else None
        return self.deliver(vector, error, software=bool(facts[1]))

    def invalid(self) -> Exit | None:
        """An instruction that Unicorn does not have: #UD."""
        return self.deliver(UD)

    def page_fault(self, gva: int, write: bool) -> Exit | None:
        """A page fault of an access that the host made for the guest."""
        self.regs.write("cr2", gva)
        user = self.regs.read("cs") & 3 == 3
        present = self.vcpu.translate(gva) is not None
        return self.deliver(PF, present | write << 1 | user << 2)

    def deliver(self, vector: int, error: int | None = None, software: bool = False) -> Exit | None:
        """Enter the guest's handler, by way of #DF if need be; a fault then is a triple fault (SDM vol. 3A table 6-5)."""
        self.vcpu.insns += 1
        first, chain = self.vcpu.quirks.pc(), [vector]
        why = ""
        for _ in range(3):
            try:
                self._enter(vector, error, software)
                self.vcpu.trace("exception", {"vector": chain[0], "error": error, "pc": first, "chain": tuple(chain)})
                return None
            except _Fault as fault:
                why = fault.why
                vector, error = self._combine(vector, fault)
                software = False
                if vector < 0:
                    break
                chain.append(vector)
        self.pending = chain
        return ShutdownExit(tuple(chain), first, self.regs.read("cr2"), why)

    @staticmethod
    def _combine(first: int, fault: _Fault) -> tuple[int, int | None]:
        if first == DF:
            return -1, None
        second = fault.vector
        if (first == PF and (second == PF or second in CONTRIBUTORY)) or (first in CONTRIBUTORY and second in CONTRIBUTORY):
            return DF, 0
        return second, fault.error

    def _enter(self, vector: int, error: int | None, software: bool) -> None:
        gate, ist, dpl, selector, interrupt = self._gate(vector, software)
        cpl, flags = self.regs.read("cs") & 3, self.regs.read("rflags")
        if software and dpl < cpl:
            raise _Fault(GP, vector * 8 + 2, f"vector {vector} has DPL {dpl}, the guest runs at CPL {cpl}")
        target = self._code_segment(selector, cpl, not software)
        old = {name: self.regs.read(name) for name in ("ss", "rsp", "cs", "rip")}
        rsp = self._stack(ist, target, cpl, old["rsp"]) & ~15
        resume = 0 if software or vector in (DB, BP) else 1 << 16  # a fault pushes RF
        frame = [old["ss"], old["rsp"], flags | resume, old["cs"], old["rip"]] + ([] if error is None else [error])
        rsp -= 8 * len(frame)
        self.regs.write_many({"cs": selector & ~3 | target} if target == cpl else {"cs": selector & ~3 | target, "ss": target})
        if not self.vcpu.vmem_write(rsp, struct.pack(f"<{len(frame)}Q", *reversed(frame))):
            self.regs.write_many({"cs": old["cs"], "ss": old["ss"]})
            self.regs.write("cr2", rsp & MASK64)
            raise _Fault(PF, 2, f"no writable stack at gva {rsp & MASK64:#x}")
        self.regs.write_many({"rsp": rsp & MASK64, "rip": gate, "rflags": flags & ~_CLEARED & ~(interrupt << 9)})

    def _gate(self, vector: int, software: bool) -> tuple[int, int, int, int, int]:
        """(handler, IST, DPL, selector, is interrupt gate) of the IDT entry (SDM vol. 3A 6.14.1)."""
        ext = 2 | (not software)
        base, limit = self.regs.read("idt_base"), self.regs.read("idt_limit")
        if 16 * vector + 15 > limit:
            raise _Fault(GP, 8 * vector + ext, f"the IDT (base {base:#x}, limit {limit:#x}) has no entry for vector {vector}")
        raw = self.vcpu.vmem_read(base + 16 * vector, 16)
        if raw is None:
            self.regs.write("cr2", (base + 16 * vector) & MASK64)
            raise _Fault(PF, 0, f"the IDT at gva {base:#x} is not mapped")
        low, selector, ist, kind, mid, high = struct.unpack("<HHBBHI4x", raw)
        if kind & 0x1F not in (0xE, 0xF):
            raise _Fault(GP, 8 * vector + ext, f"IDT entry {vector} is no gate (type {kind & 0x1F:#x})")
        if not kind & 0x80:
            raise _Fault(NP, 8 * vector + ext, f"IDT entry {vector} is not present")
        return low | mid << 16 | high << 32, ist & 7, kind >> 5 & 3, selector, int(kind & 1 == 0)

    def _code_segment(self, selector: int, cpl: int, hardware: bool) -> int:
        """The privilege level of the gate's code segment (SDM vol. 3A 6.12.1)."""
        if not selector & ~3:
            raise _Fault(GP, int(hardware), "a gate with a null code selector")
        base, limit = self.regs.read("gdt_base"), self.regs.read("gdt_limit")
        at = selector & ~7
        raw = self.vcpu.vmem_read(base + at, 8) if at + 7 <= limit and not selector & 4 else None
        if raw is None:
            raise _Fault(GP, selector & ~3 | hardware, f"code selector {selector:#x} is outside the GDT")
        access = raw[5]
        if access & 0x18 != 0x18 or not raw[6] & 0x20:
            raise _Fault(GP, selector & ~3 | hardware, f"selector {selector:#x} is no 64-bit code segment")
        if not access & 0x80:
            raise _Fault(NP, selector & ~3 | hardware, f"code segment {selector:#x} is not present")
        dpl = access >> 5 & 3
        if dpl > cpl:
            raise _Fault(GP, selector & ~3 | hardware, f"code segment {selector:#x} has DPL {dpl}, less privileged than CPL {cpl}")
        return cpl if access & 4 else dpl

    def _stack(self, ist: int, target: int, cpl: int, rsp: int) -> int:
        """The new stack pointer: IST, the TSS's RSP of the new level, or the present one (SDM vol. 3A 6.14.4)."""
        if not ist and target == cpl:
            return rsp
        base, limit = self.regs.read("tr_base"), self.regs.read("tr_limit")
        offset = 0x24 + 8 * (ist - 1) if ist else 4 + 8 * target
        raw = self.vcpu.vmem_read(base + offset, 8) if offset + 7 <= limit else None
        if raw is None:
            raise _Fault(TS, self.regs.read("tr") & ~3, f"the TSS (base {base:#x}, limit {limit:#x}) gives no stack")
        return int.from_bytes(raw, "little")
