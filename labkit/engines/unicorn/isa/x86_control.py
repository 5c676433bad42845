"""Moves to control registers on x86-64.

Unicorn takes any value, a CPU refuses some with #GP (SDM vol. 3A 2.5, vol. 2B MOV).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from labkit.arch.x86_cpu import XCR0_SUPPORTED
from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.isa.x86_events import GP, UD

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["CONTROL"]

_PE, _ET, _NW, _CD, _PG = 1 << 0, 1 << 4, 1 << 29, 1 << 30, 1 << 31  # CR0
_CR0 = 0xE005_003F  # the bits that mean something; others are dropped
_PAE, _PCIDE, _OSXSAVE = 1 << 5, 1 << 17, 1 << 18  # CR4
# VME PVI TSD DE PSE PAE PGE PCE OSFXSR OSXMMEXCPT are always there; MCE comes with its CPUID bit
_CR4 = 0x7EF
_CR4_IF = {  # bit of CR4 -> CPUID leaf, register (EAX to EDX), bit that announces it
    6: (1, 3, 7),
    11: (7, 2, 2),
    16: (7, 1, 0),
    17: (1, 2, 17),
    18: (1, 2, 26),
    20: (7, 1, 7),
    21: (7, 1, 20),
    22: (7, 2, 3),
}


def _cr0(cpu: X86, value: int) -> bool:
    """64-bit code cannot turn paging off."""
    write_back_without_cache = value & _NW and not value & _CD
    return bool(value >> 32 or not value & _PE or not value & _PG or write_back_without_cache)


def _cr3(cpu: X86, value: int) -> bool:
    """Above MAXPHYADDR only the C-bit, where there is one."""
    mmu = cpu.core.vm.mmu
    if mmu is not None:
        value &= ~mmu.facts.c_bit
    maxphyaddr = cpu.cpu.leaf(0x8000_0008, 0)[0] & 0xFF
    return bool(value >> maxphyaddr)


def _cr4(cpu: X86, value: int) -> bool:
    """What CPUID does not announce is reserved; 64-bit code keeps PAE, and the number of levels."""
    known = _CR4
    for bit, (leaf, register, at) in _CR4_IF.items():
        if cpu.cpu.leaf(leaf, 0)[register] >> at & 1:
            known |= 1 << bit

    sets_pcide = value & _PCIDE and not cpu.regs.read("cr4") & _PCIDE
    wrong_pcid = sets_pcide and cpu.regs.read("cr3") & 0xFFF
    return bool(value & ~known or not value & _PAE or wrong_pcid)


def _cr8(cpu: X86, value: int) -> bool:
    return value > 15


_REFUSES = {"cr0": _cr0, "cr2": lambda cpu, value: False, "cr3": _cr3, "cr4": _cr4, "cr8": _cr8}


def _mov(cpu: X86, trap: Trap) -> Exit | None:
    """Check what is moved, then move it; CR1, CR5 and the like are undefined.

    Of reads only CR8's comes here: Unicorn has no APIC.
    """
    name, _, source = trap.op_str.partition(", ")
    if source == "cr8":
        if not cpu.privileged():
            return cpu.deliver(GP, 0)
        return cpu.retire(trap, **{name: cpu.regs.read("cr8")})
    if name not in _REFUSES:
        return cpu.deliver(UD)
    value = cpu.regs.read(source)
    if not cpu.privileged() or _REFUSES[name](cpu, value):
        return cpu.deliver(GP, 0)
    if name == "cr0":
        value = value & _CR0 | _ET
    return cpu.retire(trap, **{name: value})


def _xgetbv(cpu: X86, trap: Trap) -> Exit | None:
    if not cpu.regs.read("cr4") & _OSXSAVE:
        return cpu.deliver(UD)
    if cpu.regs.read("rcx") & 0xFFFFFFFF:
        return cpu.deliver(GP, 0)
    return cpu.retire(trap, rax=cpu.extra["xcr0"] & 0xFFFFFFFF, rdx=cpu.extra["xcr0"] >> 32)


def _xsetbv(cpu: X86, trap: Trap) -> Exit | None:
    """SDM vol. 2C XSETBV: x87 always, only what CPUID leaf 0xD offers."""
    if not cpu.regs.read("cr4") & _OSXSAVE:
        return cpu.deliver(UD)
    value = (cpu.regs.read("rdx") & 0xFFFFFFFF) << 32 | cpu.regs.read("rax") & 0xFFFFFFFF
    wrong = cpu.regs.read("rcx") & 0xFFFFFFFF or not value & 1 or value & ~XCR0_SUPPORTED
    if wrong or not cpu.privileged():
        return cpu.deliver(GP, 0)
    cpu.extra["xcr0"] = value
    return cpu.retire(trap)


CONTROL: dict[str, Callable[[X86, Trap], Exit | None]] = {
    "control": _mov,
    "xgetbv": _xgetbv,
    "xsetbv": _xsetbv,
}
"""By the kind of trap."""
