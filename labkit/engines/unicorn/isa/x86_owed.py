"""Exceptions and results that x86-64 instructions owe where Unicorn gives others.

Alignment, addresses that are not canonical, upper halves of registers, reserved bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.isa.x86_events import GP, NP, SS, UD, canonical
from labkit.engines.unicorn.isa.x86_operands import place, registers, wide
from labkit.engines.unicorn.isa.x86_regs import CODE64, DATA

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["OWED"]

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
_FSGSBASE = 1 << 16  # CR4
_ARITHMETIC = 0x8D5
_MONITOR = 1 << 3  # CPUID 1 ECX
_AVAILABLE_TSS, _BUSY = 0x9, 0x2  # types of a 64-bit system segment


def _do_unaligned(cpu: X86, trap: Trap) -> Exit | None:
    """An operand that must lie at a multiple of 16 and does not (SDM vol. 2, table 2-21)."""
    where = place(trap.data, trap.gva)
    is_stack = where is not None and where.is_stack and not canonical(where.gva(cpu.regs))
    return cpu.deliver(SS if is_stack else GP, 0)


def _do_cmpxchg32(cpu: X86, trap: Trap) -> Exit | None:
    """CMPXCHG of 32 bits: only what is written loses its upper half (SDM vol. 2A)."""
    where = place(trap.data, trap.gva)
    names = [wide(name) for name, _ in registers(trap.data)]
    source, accumulator = names[-1], cpu.regs.read("rax")
    if where is None:
        present = cpu.regs.read(names[0]) & MASK32
    else:
        gva = where.gva(cpu.regs)
        for at in (gva, gva + 3 & MASK64):
            if not canonical(at):
                return cpu.deliver(SS if where.is_stack else GP, 0)
            if cpu.core.memory.translate(at, uc.UC_PROT_WRITE) is None:
                return cpu.page_fault(at if at == gva else at & -4096, write=True)
        gpa = cpu.core.memory.translate(gva)
        if gpa is not None and not cpu.core.vm.overlaps(gpa, 4):
            return cpu.core.refuse("CMPXCHG on a device's memory, while RAX has an upper half")
        present = int.from_bytes(cpu.core.memory.read(gva, 4) or b"", "little")

    flags = cpu.regs.read("rflags") & ~_ARITHMETIC | _compared(accumulator & MASK32, present)
    new = cpu.regs.read(source) & MASK32
    is_equal = accumulator & MASK32 == present
    if where is not None:
        cpu.core.memory.write(gva, (new if is_equal else present).to_bytes(4, "little"))
    if not is_equal:
        return cpu.retire(trap, rax=present, rflags=flags)
    if where is None:
        return cpu.retire(trap, **{names[0]: new}, rflags=flags)
    return cpu.retire(trap, rflags=flags)


def _compared(a: int, b: int) -> int:
    """The flags of CMP of 32 bits."""
    result = a - b & MASK32
    flags = int(a < b) | (result == 0) << 6 | (result >> 31) << 7
    flags |= ((a ^ b ^ result) >> 4 & 1) << 4
    flags |= (not (result & 0xFF).bit_count() & 1) << 2
    return flags | ((a ^ b) & (a ^ result)) >> 31 << 11


def _do_clflush(cpu: X86, trap: Trap) -> Exit | None:
    """CLFLUSH faults as a load of a byte does (SDM vol. 2A)."""
    where = place(trap.data, trap.gva)
    assert where is not None, "CLFLUSH has a memory operand"
    gva = where.gva(cpu.regs)
    if not canonical(gva):
        return cpu.deliver(SS if where.is_stack else GP, 0)
    if cpu.core.memory.translate(gva) is None:
        return cpu.page_fault(gva, write=False)
    return cpu.retire(trap)


def _do_wrbase(cpu: X86, trap: Trap) -> Exit | None:
    """WRFSBASE and WRGSBASE of an address that is not canonical."""
    return cpu.deliver(GP, 0) if cpu.regs.read("cr4") & _FSGSBASE else cpu.deliver(UD)


def _do_ltr(cpu: X86, trap: Trap) -> Exit | None:
    """LTR: an available 64-bit TSS of the GDT, which becomes busy (SDM vol. 2A)."""
    if not cpu.privileged():
        return cpu.deliver(GP, 0)
    where = place(trap.data, trap.gva)
    if where is None:
        selector = cpu.regs.read(wide(registers(trap.data)[0][0])) & 0xFFFF
    else:
        gva = where.gva(cpu.regs)
        if not canonical(gva):
            return cpu.deliver(SS if where.is_stack else GP, 0)
        raw = cpu.core.memory.read(gva, 2)
        if raw is None:
            return cpu.page_fault(gva, write=False)
        selector = int.from_bytes(raw, "little")
    if not selector & ~3:
        return cpu.deliver(GP, 0)

    found = cpu.regs.descriptor(selector)
    base, limit = cpu.regs.read("gdt_base"), cpu.regs.read("gdt_limit")
    at = base + (selector & ~7)
    raw = cpu.core.memory.read(at, 16)
    is_outside = selector & 4 or found is None or (selector & ~7) + 15 > limit
    if is_outside or raw is None or found is None or raw[5] & 0x1F != _AVAILABLE_TSS:
        return cpu.deliver(GP, selector & ~3)
    if not raw[5] & 0x80:
        return cpu.deliver(NP, selector & ~3)
    cpu.core.memory.write(at + 5, bytes([raw[5] | _BUSY]))
    tss_base = int.from_bytes(raw[8:12], "little") << 32 | found[0]
    return cpu.retire(trap, tr=selector, tr_base=tss_base, tr_limit=found[1])


def _do_absent(cpu: X86, trap: Trap) -> Exit | None:
    """What CPUID does not announce is undefined, though Unicorn has it."""
    return cpu.deliver(UD)


def _do_monitor(cpu: X86, trap: Trap) -> Exit | None:
    """MONITOR and MWAIT as KVM has them where they are announced.

    Nothing is waited for (SDM vol. 2B).
    """
    if not cpu.cpu.leaf(1, 0)[2] & _MONITOR or not cpu.privileged():
        return cpu.deliver(UD)
    if cpu.regs.read("rcx"):  # no extension or hint is announced
        return cpu.deliver(GP, 0)
    return cpu.retire(trap)


def _do_rdpmc(cpu: X86, trap: Trap) -> Exit | None:
    """RDPMC always exists.

    Without performance counters every number is one too many (SDM vol. 2B).
    """
    return cpu.deliver(GP, 0)


def _do_syscall(cpu: X86, trap: Trap) -> Exit | None:
    """SYSCALL in long mode (SDM vol. 2B): Unicorn alone would only step over it."""
    if not cpu.regs.read("efer") & 1:
        return cpu.deliver(UD)
    star, flags = cpu.regs.read("star"), cpu.regs.read("rflags") & ~(1 << 16)  # RF
    selector = star >> 32 & 0xFFFC
    cpu.retire(
        trap,
        rcx=trap.gva + len(trap.data),
        r11=flags,
        rflags=flags & ~cpu.regs.read("sfmask") | 2,
    )
    cpu.regs.set_segment("cs", selector, CODE64)  # no descriptor table is asked
    cpu.regs.set_segment("ss", selector + 8, DATA)
    cpu.regs.set_ring(0)
    cpu.set_pc(cpu.regs.read("lstar"))
    return None


def _do_sysenter(cpu: X86, trap: Trap) -> Exit | None:
    return cpu.core.refuse(
        "SYSENTER and SYSEXIT are not modelled (AMD CPUs have none in long mode)"
    )


OWED: dict[str, Callable[[X86, Trap], Exit | None]] = {
    "unaligned": _do_unaligned,
    "cmpxchg32": _do_cmpxchg32,
    "clflush": _do_clflush,
    "wrbase": _do_wrbase,
    "ltr": _do_ltr,
    "absent": _do_absent,
    "syscall": _do_syscall,
    "sysenter": _do_sysenter,
    "monitor": _do_monitor,
    "rdpmc": _do_rdpmc,
}
"""By the kind of trap."""
