"""x86-64 guests with encrypted registers.

What would leave for the host is #VC, and VMGEXIT is the way out. Which instructions are intercepted
is KVM's choice (init_vmcb(), sev_es_init_vmcb() in arch/x86/kvm/svm of Linux 6.12); which of them
leave by themselves ("automatic exits": HLT, PAUSE, a nested page fault, SHUTDOWN) is the hardware's
(APM vol. 2 15.35). Where an exception and the intercept compete, the exception comes first (APM
vol. 2 15.9, 15.10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from labkit.engines.exits import Exit, VmgexitExit
from labkit.engines.unicorn.isa.traps import SIZES, Trap, pio_form
from labkit.engines.unicorn.isa.x86_events import GP, UD, VC

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["GHCB_MSR", "HANDLERS", "PVALIDATE", "pvalidate"]

PVALIDATE, GHCB_MSR = b"\xf2\x0f\x01\xff", 0xC001_0130
# MSRs that KVM lets a SEV-ES guest have directly: EFER, PAT, STAR..SFMASK, bases, SYSENTER, GHCB,
# SEV_STATUS
_DIRECT_MSRS = frozenset(
    {
        0xC000_0080,
        0x277,
        *range(0xC000_0081, 0xC000_0085),
        *range(0xC000_0100, 0xC000_0103),
        0x174,
        0x175,
        0x176,
        GHCB_MSR,
        0xC001_0131,
    }
)
_MONITOR = 1 << 3  # CPUID 1 ECX
_PCE = 1 << 8  # CR4


def _vc(cpu: X86, code: int) -> Exit | None:
    return cpu.deliver(VC, code)


def _cpuid(cpu: X86, trap: Trap) -> Exit | None:
    return _vc(cpu, 0x72)


def _io(cpu: X86, trap: Trap) -> Exit | None:
    if trap.kind == "string_pio":
        immediate, size = None, SIZES[trap.mnemonic[-1]]
    else:
        immediate, _, size = pio_form(trap.data)
    port = cpu.regs.read("rdx") & 0xFFFF if immediate is None else immediate
    if cpu.privileged() or cpu.port_allowed(port, size):
        return _vc(cpu, 0x7B)
    return cpu.deliver(GP, 0)


def _msr(cpu: X86, trap: Trap) -> Exit | None:
    if cpu.privileged() and cpu.regs.read("rcx") & 0xFFFFFFFF not in _DIRECT_MSRS:
        return _vc(cpu, 0x7C)
    return cpu.do(trap)


def _call(cpu: X86, trap: Trap) -> Exit | None:
    """VMGEXIT is VMMCALL with a REP prefix.

    AMD CPUs have no VMCALL, and KVM cannot patch code that it cannot read.
    """
    if trap.mnemonic.endswith("vmcall"):
        return cpu.deliver(UD)
    if trap.data[0] not in b"\xf2\xf3":
        return _vc(cpu, 0x81)
    cpu.retire(trap)
    return VmgexitExit(cpu.regs.read(f"msr_{GHCB_MSR:#x}"))


def _counter(cpu: X86, trap: Trap) -> Exit | None:
    if cpu.privileged() or cpu.regs.read("cr4") & _PCE:
        return _vc(cpu, 0x6F)
    return cpu.deliver(GP, 0)


def _monitor(cpu: X86, trap: Trap) -> Exit | None:
    if not cpu.cpu.leaf(1, 0)[2] & _MONITOR or not cpu.privileged():
        return cpu.deliver(UD)
    return _vc(cpu, 0x8B if trap.mnemonic == "mwait" else 0x8A)


def _flush(cpu: X86, trap: Trap) -> Exit | None:
    if not cpu.privileged():
        return cpu.deliver(GP, 0)
    return _vc(cpu, 0x76 if trap.mnemonic == "invd" else 0x89)


def _dr7(cpu: X86, trap: Trap) -> Exit | None:
    if not cpu.privileged():
        return cpu.deliver(GP, 0)
    is_write = trap.op_str.startswith("dr7")
    return _vc(cpu, 0x37 if is_write else 0x27)


def _unknown(cpu: X86, trap: Trap) -> Exit | None:
    if trap.data.startswith(PVALIDATE):
        return pvalidate(cpu)
    return cpu.do(trap)


HANDLERS: dict[str, Callable[[X86, Trap], Exit | None]] = {
    "cpuid": _cpuid,
    "pio": _io,
    "string_pio": _io,
    "rdmsr": _msr,
    "wrmsr": _msr,
    "hypercall": _call,
    "rdpmc": _counter,
    "monitor": _monitor,
    "flush": _flush,
    "dr7": _dr7,
    "unknown": _unknown,
}


def pvalidate(cpu: X86) -> Exit | None:
    """PVALIDATE (APM vol. 3): RAX gva, ECX[0] 2 MiB, EDX[0] validate.

    EAX says how it went, CF that nothing changed.
    """
    vm, regs, pc = cpu.core.vm, cpu.regs, cpu.pc()
    if vm.level < 3 or vm.mmu is None:
        return cpu.deliver(UD)
    if not cpu.privileged():
        return cpu.deliver(GP, 0)
    gva, is_huge = regs.read("rax"), regs.read("rcx") & 1
    gpa = cpu.core.memory.translate(gva)
    if gpa is None:
        return cpu.page_fault(gva, write=False)

    if is_huge:
        size = 1 << 21
    else:
        size, gpa = 4096, gpa & -4096
    found = vm.mmu.cipher.pvalidate(gpa, size, bool(regs.read("rdx") & 1))
    cpu.core.sync()  # its translations may be of pages that it gave up
    if not isinstance(found, tuple):
        return cpu.not_yours(found, gva, gpa, True)
    cpu.retire(
        Trap("unknown", pc, PVALIDATE, "pvalidate", ""),
        rax=found[0],
        rflags=regs.read("rflags") & ~0x8D5 | found[1],
    )
    return None
