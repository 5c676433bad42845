"""Exceptions of x86-64 delivered through the guest's own IDT (SDM vol. 3A chapter 6).

Unicorn leaves that to its host.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.base import GuestFault
from labkit.engines.disasm import disassemble, memory_operands
from labkit.engines.exits import Exit, MemoryFaultExit, ShutdownExit
from labkit.engines.unicorn.isa.x86_operands import place, registers, wide
from labkit.engines.unicorn.mmu import NOT_YOURS
from labkit.engines.unicorn.native.calibrate import CC_OP_EFLAGS, calibrate

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core
    from labkit.engines.unicorn.isa.traps import Trap
    from labkit.engines.unicorn.isa.x86_regs import X86Registers

__all__ = [
    "DB",
    "DF",
    "GP",
    "MF",
    "NM",
    "NP",
    "PF",
    "SS",
    "UD",
    "VC",
    "XM",
    "X86Events",
    "canonical",
]

DE, DB, BP, UD, NM, DF, TS, NP, SS, GP, PF, MF, XM = 0, 1, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 19
VC = 29
WITH_ERROR = frozenset({DF, TS, NP, SS, GP, PF, 17, 21})
CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP, VC})
MASK64 = (1 << 64) - 1
_STACK = ("push", "pop", "call", "ret", "enter", "leave")
_SAVED = ("cs", "ss", "rip", "rsp", "rflags")
_CLEARED = 1 << 8 | 1 << 14 | 1 << 16 | 1 << 17  # TF NT RF VM
_RF = 1 << 16


class _Fault(Exception):
    """A fault met while an event is delivered.

    With an exit, one that is the host's: the event comes again.
    """

    def __init__(self, vector: int, error: int, why: str, exit: Exit | None = None) -> None:
        super().__init__(why)
        self.vector, self.error, self.why, self.exit = vector, error, why, exit


def canonical(gva: int) -> bool:
    """Whether bits 63 to 47 are all the same (4-level paging)."""
    return gva >> 47 in (0, 0x1FFFF)


# QEMU's hflags of what there is none of here: SMM (19), SVM (20, 21), MPX (25, 26), reserved.
_NO_GUESTS_HFLAGS = 0b111 << 19 | 0x7F << 25


class X86Events:
    """Delivery of exceptions and software interrupts; the base of the x86 quirks."""

    regs: X86Registers

    def __init__(self, core: Core) -> None:
        self.core, self.handle = core, core.handle
        self.pending: list[int] = []  # vectors of the delivery that led to the last shutdown

    def exception(self, vector: int) -> Exit | None:
        """Deliver an exception that Unicorn reported.

        Read what it was, clear Unicorn's memory of it, deliver it.
        """
        code, software = self.forget_exception()
        if software or vector not in WITH_ERROR:
            return self.deliver(vector, None, software)
        return self.deliver(*self._refine(vector, code))

    def _refine(self, vector: int, error: int) -> tuple[int, int]:
        """What hardware would say where Unicorn says otherwise.

        RMW faults as a write at once, and a stack that is not canonical is #SS.
        """
        is_read_fault = vector == PF and not error & 0x12
        if (vector, error) != (GP, 0) and not is_read_fault:
            return vector, error

        data = self.core.memory.fetch(self.regs.read("rip"), 15)
        operands = memory_operands("x86_64", data)
        if vector == PF:
            is_rmw = any(op.reads and op.writes for op in operands)
            return PF, error | 2 if is_rmw else error

        where = place(data, self.regs.read("rip"))
        if where is not None and where.is_stack and not canonical(where.gva(self.regs)):
            return SS, 0
        bases = []
        insn = next(disassemble("x86_64", data, 0), None)
        if insn and insn.mnemonic.startswith(_STACK):
            bases.append("rbp" if insn.mnemonic == "leave" else "rsp")
        is_stack = any(not canonical(self.regs.read(base)) for base in bases)
        return (SS if is_stack else GP), 0

    def forget_exception(self) -> tuple[int, bool]:
        """Clear what Unicorn remembers of its last exception.

        Returns the error code, and whether it was INT n.
        """
        facts = self._error_code()
        where = calibrate()

        def forget(context: int) -> None:
            ctypes.c_int32.from_address(context + where.old_exception).value = -1
            ctypes.c_int32.from_address(context + where.is_int).value = 0
            ctypes.c_int32.from_address(context + where.error_code).value = 0

        self.handle.patch_context(forget)
        return facts

    def _error_code(self) -> tuple[int, bool]:
        blob, where = self.handle.context(), calibrate()
        return struct.unpack_from("<I", blob, where.error_code)[0], blob[where.is_int] == 1

    def is_fetch_fault(self, vector: int | None) -> bool:
        """A fault on the way to an instruction, which then never began."""
        if vector == GP:
            return self._is_beyond_canonical()
        if vector != PF:
            return False
        error = self._error_code()[0]
        nxe, smep = self.regs.read("efer") & 1 << 11, self.regs.read("cr4") & 1 << 20
        if nxe or smep:  # the I/D bit is there
            return bool(error & 16)

        gva, pc = self.regs.read("cr2"), self.regs.read("rip")
        is_next_page = not gva & 4095 and 0 < gva - pc < 4096
        return not error & 2 and (gva == pc or is_next_page)

    def _is_beyond_canonical(self) -> bool:
        """Whether code ran off the last canonical address of the lower half.

        Unicorn finds that out for a whole block, before its first instruction.
        """
        pc = self.regs.read("rip")
        in_last_page = pc >> 12 == (1 << 47) - 1 >> 12
        return not canonical(pc) or (in_last_page and not self.core.counting.tally.holds(pc))

    def refuses(self, trap: Trap) -> bool:
        """Whether a MOV to SS loads a null selector that is not of the present level (SDM vol. 2B).

        At CPL3 none is allowed, and Unicorn says so.
        """
        names = registers(trap.data)
        if len(names) < 2 or self.regs.read("cs") & 3:
            return False
        value = self.regs.read(wide(names[1][0])) & 0xFFFF
        return 0 < value < 4

    def refused(self) -> Exit | None:
        """#GP for it."""
        return self.deliver(GP, 0)

    def came_before(self, vector: int | None) -> bool:
        """A breakpoint of the guest's own on execution: the instruction there never began."""
        if vector != DB:
            return False
        read = self.regs.read
        pc, dr6, dr7 = read("rip"), read("dr6"), read("dr7")
        return any(
            dr7 >> 2 * i & 3 and not dr7 >> 16 + 4 * i & 3 and dr6 >> i & 1 and read(f"dr{i}") == pc
            for i in range(4)
        )

    def restore_flags(self) -> None:
        """Mend the flags after a fault at an instruction with a hook.

        Unicorn worked the flags out for it, and on the way back forgets that it did.
        """

        def patch(context: int) -> None:
            ctypes.c_int32.from_address(context + calibrate().cc_op).value = CC_OP_EFLAGS

        self.handle.patch_context(patch)

    def drop_resume_flag(self) -> None:
        """Drop RF: only the instruction behind an IRET is resumed (SDM vol. 3B 17.3.1.1).

        In Unicorn RF lasts to the next jump (QEMU's gen_eob).
        """
        if self.core.insns == self.core.resumed:
            return
        self.core.resumed = None
        flags = self.regs.read("rflags")
        if flags & _RF:
            self.regs.write("rflags", flags & ~_RF)

    def wants_short_block(self) -> bool:
        """The guest steps itself (TF), or the instruction stands behind STI or MOV SS."""
        return bool(self._hflags() & (1 << 8 | 1 << 3))

    def strange_mode(self) -> str:
        """Code is read as 64-bit code, and looked through as such."""
        is_64bit = self._hflags() & 1 << 15
        if is_64bit:
            return ""
        return "the CPU left 64-bit mode, and this engine runs no other"

    def ring(self) -> int:
        """The level that memory is accessed with."""
        return self._hflags() & 3

    def miss(self, error: int | None, gva: int) -> Exit | None:
        """A fault that labkit's own walker found (SDM vol. 3A 4.7).

        No error code: the address is not canonical.
        """
        if error is None:
            return self.deliver(*self._refine(GP, 0))
        self.regs.write("cr2", gva)
        return self.deliver(*self._refine(PF, error))

    def not_yours(self, fault: GuestFault, gva: int, gpa: int, private: bool) -> Exit | None:
        """A page that is not this guest's to use so (APM vol. 2 15.36.10).

        The guest gets #VC with the address in CR2, or the host an exit.
        """
        if fault.kind != "#VC":
            return MemoryFaultExit(gpa & -4096, private, fault.error_code, fault.why)
        self.regs.write("cr2", gva)
        return self.deliver(VC, fault.error_code)

    def _hflags(self) -> int:
        return int(struct.unpack_from("<I", self.handle.context(), calibrate().hflags)[0])

    def strange_state(self, context: bytes) -> str:
        """Why a context is no state of a guest here: it would be one inside SVM or SMM."""
        hflags, hflags2 = struct.unpack_from("<II", context, calibrate().hflags)
        (own,) = struct.unpack_from("<I", self.handle.context(), calibrate().hflags + 4)
        if hflags & _NO_GUESTS_HFLAGS or hflags2 != own:
            return f"hflags {hflags:#x}, hflags2 {hflags2:#x}"
        return ""

    def shorten_block(self) -> None:
        """Let the next block be one instruction.

        It is as behind MOV SS, where Unicorn wants to see about interrupts.
        """

        def patch(context: int) -> None:
            ctypes.c_uint32.from_address(context + calibrate().hflags).value |= 1 << 3

        self.handle.patch_context(patch)

    def invalid(self) -> Exit | None:
        """An instruction that Unicorn does not have: #UD; it says so of INT 6 too."""
        pc = self.regs.read("rip")
        if self.core.memory.fetch(pc, 2) != b"\xcd\x06":
            return self.deliver(UD)
        self.regs.write("rip", pc + 2)
        return self.deliver(UD, software=True)

    def page_fault(self, gva: int, write: bool) -> Exit | None:
        """A page fault of an access that the host made for the guest."""
        self.regs.write("cr2", gva & MASK64)
        return self.deliver(PF, self._page_error(gva, write, self.regs.read("cs") & 3))

    def _page_error(self, gva: int, write: bool, ring: int) -> int:
        error = 0
        if self.core.memory.translate(gva) is not None:
            error |= 1
        if write:
            error |= 2
        if ring == 3:
            error |= 4
        return error

    def deliver(self, vector: int, error: int | None = None, software: bool = False) -> Exit | None:
        """Enter the guest's handler, by way of #DF if need be.

        A fault then is a triple fault (SDM vol. 3A table 6-5).
        """
        self.drop_resume_flag()
        self.core.retire()
        old = {name: self.regs.read(name) for name in _SAVED}
        chain, first_error = [vector], error
        while True:
            try:
                self._enter(vector, error, software, old)
            except _Fault as fault:
                if fault.exit is not None:
                    self.core.unretire()
                    self.regs.set_ring(old["cs"] & 3)
                    return fault.exit
                if vector == DF:
                    self.regs.set_ring(old["cs"] & 3)
                    self.pending = chain
                    return ShutdownExit(tuple(chain), old["rip"], self.regs.read("cr2"), fault.why)
                if software:  # a fault lies at the INT itself
                    old["rip"] -= self._size_of_int(vector, old["rip"])
                vector, error = self._combine(vector, fault)
                software = False
                chain.append(vector)
            else:
                self.core.trace(
                    "exception",
                    {
                        "vector": chain[0],
                        "error": first_error,
                        "pc": old["rip"],
                        "chain": tuple(chain),
                    },
                )
                return None

    def _size_of_int(self, vector: int, behind: int) -> int:
        """Bytes of the software interrupt that ends there: INT3 has one, INT n two."""
        is_int_n = self.core.memory.fetch(behind - 2, 2) == b"\xcd\x03"
        return 1 if vector == BP and not is_int_n else 2

    @staticmethod
    def _combine(first: int, fault: _Fault) -> tuple[int, int]:
        """What a fault while `first` is delivered becomes.

        A double fault, or an exception of its own.
        """
        second = fault.vector
        behind_page_fault = first == PF and (second == PF or second in CONTRIBUTORY)
        both_contribute = first in CONTRIBUTORY and second in CONTRIBUTORY
        if behind_page_fault or both_contribute:
            return DF, 0
        return second, fault.error

    def _enter(self, vector: int, error: int | None, software: bool, old: dict[str, int]) -> None:
        ring, external = old["cs"] & 3, int(not software)
        self._look_as(0, ring)
        handler, ist, dpl, selector, interrupt = self._gate(vector, external)
        if software and dpl < ring:
            raise _Fault(
                GP, vector * 8 + 2, f"vector {vector} has DPL {dpl}, the guest runs at CPL {ring}"
            )
        code, target = self._code_segment(selector, ring, external)
        if not canonical(handler):
            raise _Fault(
                GP,
                external,
                f"the handler of vector {vector} lies at {handler:#x}, which is not canonical",
            )
        rsp = self._stack(ist, target, ring, old["rsp"], external) & ~15
        resume = 0 if software or vector in (DB, BP) else _RF  # a fault pushes RF
        self._look_as(target, ring)
        frame = [old["ss"], old["rsp"], old["rflags"] | resume, old["cs"], old["rip"]]
        if error is not None:
            frame.append(error)
        rsp = self._push(rsp, frame, target, external)
        if selector & ~3 | target != old["cs"]:
            self.regs.set_segment("cs", selector & ~3 | target, code)
        if target != ring:
            self.regs.set_segment(
                "ss", target, (0, 0, 0)
            )  # null, with the new level (SDM vol. 3A 6.14.2)
        flags = old["rflags"] & ~_CLEARED & ~(interrupt << 9)
        self.regs.write_many({"rsp": rsp, "rip": handler, "rflags": flags})

    def _look_as(self, level: int, ring: int) -> None:
        """Access memory at this level.

        The CPU reads its own tables in ring 0, wherever the guest was.
        """
        if ring:
            self.regs.set_ring(level)

    def _push(self, rsp: int, words: list[int], ring: int, external: int) -> int:
        bottom = rsp - 8 * len(words) & MASK64
        if not canonical(bottom) or not canonical(rsp - 8 & MASK64):
            raise _Fault(SS, external, f"the stack lies at {bottom:#x}, which is not canonical")
        if not self.core.memory.write(bottom, struct.pack(f"<{len(words)}Q", *reversed(words))):
            self._check_owner(bottom)
            gva = self._missing(rsp, len(words), bottom)
            self.regs.write("cr2", gva)
            error = self._page_error(gva, True, ring)
            raise _Fault(PF, error, f"no writable stack at gva {gva:#x}")
        return bottom

    def _missing(self, rsp: int, nr_words: int, bottom: int) -> int:
        """The first of so many words below rsp that cannot be written."""
        for i in range(nr_words):
            gva = rsp - 8 * i - 8 & MASK64
            if self.core.memory.translate(gva, uc.UC_PROT_WRITE) is None:
                return gva
        return bottom

    def _check_owner(self, gva: int) -> None:
        """Raise for the write that just failed, when it did for its page's owner."""
        mmu = self.core.vm.mmu
        if mmu is None or mmu.facts.why != NOT_YOURS:
            return
        fault, facts = mmu.not_yours(), mmu.facts
        if fault.kind == "#VC":
            self.regs.write("cr2", gva)
            raise _Fault(VC, fault.error_code, fault.why)
        raise _Fault(
            VC,
            0,
            fault.why,
            MemoryFaultExit(facts.gpa & -4096, facts.code != 0, fault.error_code, fault.why),
        )

    def _gate(self, vector: int, external: int) -> tuple[int, int, int, int, int]:
        """(handler, IST, DPL, selector, is interrupt gate) of an IDT entry (SDM 3A 6.14.1)."""
        base, limit = self.regs.read("idt_base"), self.regs.read("idt_limit")
        if 16 * vector + 15 > limit:
            raise _Fault(
                GP,
                8 * vector + 2 + external,
                f"the IDT (base {base:#x}, limit {limit:#x}) has no entry {vector}",
            )
        raw = self.core.memory.read(base + 16 * vector & MASK64, 16)
        if raw is None:
            self.regs.write("cr2", base + 16 * vector & MASK64)
            raise _Fault(PF, 0, f"the IDT at gva {base:#x} is not mapped")
        low, selector, ist, kind, mid, high = struct.unpack("<HHBBHI4x", raw)
        if kind & 0x1F not in (0xE, 0xF):
            raise _Fault(
                GP,
                8 * vector + 2 + external,
                f"IDT entry {vector} is no gate (type {kind & 0x1F:#x})",
            )
        if not kind & 0x80:
            raise _Fault(NP, 8 * vector + 2 + external, f"IDT entry {vector} is not present")
        return low | mid << 16 | high << 32, ist & 7, kind >> 5 & 3, selector, int(kind & 1 == 0)

    def _code_segment(
        self, selector: int, ring: int, external: int
    ) -> tuple[tuple[int, int, int], int]:
        """The gate's code segment and the privilege level that it leads to (SDM vol. 3A 6.12.1)."""
        error = selector & ~3 | external
        if not selector & ~3:
            raise _Fault(GP, external, "a gate with a null code selector")
        found = self.regs.descriptor(selector)
        self._look_as(0, ring)
        if found is None:
            raise _Fault(GP, error, f"code selector {selector:#x} is outside its descriptor table")
        access = found[2] >> 8
        if access & 0x18 != 0x18 or not found[2] & 1 << 21:
            raise _Fault(GP, error, f"selector {selector:#x} is no 64-bit code segment")
        dpl = access >> 5 & 3
        if dpl > ring:
            raise _Fault(
                GP,
                error,
                f"code segment {selector:#x} has DPL {dpl}, less privileged than CPL {ring}",
            )
        if not access & 0x80:
            raise _Fault(NP, error, f"code segment {selector:#x} is not present")
        return found, ring if access & 4 else dpl

    def _stack(self, ist: int, target: int, ring: int, rsp: int, external: int) -> int:
        """The new stack pointer.

        It is IST, the TSS's RSP of the new level, or the present one (SDM vol. 3A 6.14.4).
        """
        if not ist and target == ring:
            return rsp
        base, limit = self.regs.read("tr_base"), self.regs.read("tr_limit")
        if ist:
            offset = 0x24 + 8 * (ist - 1)
        else:
            offset = 4 + 8 * target
        if offset + 7 > limit:
            raise _Fault(
                TS,
                self.regs.read("tr") & ~3 | external,
                f"the TSS (base {base:#x}, limit {limit:#x}) gives no stack",
            )
        raw = self.core.memory.read(base + offset & MASK64, 8)
        if raw is None:
            self.regs.write("cr2", base + offset & MASK64)
            raise _Fault(PF, 0, f"the TSS at gva {base:#x} is not mapped")
        return int.from_bytes(raw, "little")
