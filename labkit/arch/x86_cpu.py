"""What CPUID and RDMSR answer on labkit's x86-64 machine: a table per VM.

The lab may edit it before the first run. Only what the default engine executes faithfully is
announced: no AVX (VEX is wrong in Unicorn), no SVM/VMX, XSAVE with x87 and SSE only, 40 physical
address bits. Leaves as in SDM vol. 2A CPUID and APM vol. 3 appendix E; KVM's own leaves as in
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from labkit.bits import bit
from labkit.checked import checked

__all__ = ["APIC_BASE", "IA32_TSC", "IA32_TSC_ADJUST", "MAXPHYADDR", "XCR0_SUPPORTED", "CpuModel"]

MAXPHYADDR = 40
XCR0_SUPPORTED = 0b11  # x87 | SSE
WITH_SUBLEAVES = (4, 7, 0xB, 0xD)
OSXSAVE = bit(27)  # CPUID leaf 1, ECX
CR4_OSXSAVE = bit(18)
IA32_TSC = 0x10
APIC_BASE = 0x1B
IA32_TSC_ADJUST = 0x3B
TSC_KHZ = 1_000_000  # the virtual clock ticks once an instruction; guests are told 1 GHz

Quad = tuple[int, int, int, int]  # EAX, EBX, ECX, EDX


def _mask(*bits: int) -> int:
    """The integer with these bits set."""
    return sum(bit(number) for number in bits)


def _text(text: bytes) -> tuple[int, ...]:
    """A text as registers hold it, four bytes each."""
    return struct.unpack(f"<{len(text) // 4}I", text)


# fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clfsh mmx fxsr sse sse2
_EDX1 = _mask(0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26)
# sse3 ssse3 cx16 sse4.1 sse4.2 popcnt xsave rdrand hypervisor
_ECX1 = _mask(0, 9, 13, 19, 20, 23, 26, 30, 31)
_EBX7 = _mask(0, 7, 9, 18, 20)  # fsgsbase smep erms rdseed smap
_EDX_EXT = _EDX1 & 0x0183F3FF | _mask(11, 20, 26, 27, 29)  # syscall nx pdpe1gb rdtscp lm
_VENDOR = _text(b"AuthenticAMD")  # in EBX, EDX, ECX
_BRAND = _text(b"labkit virtual CPU".ljust(48, b"\0"))
_KVM = _text(b"KVMKVMKVM\0\0\0")


def _default_cpuid() -> dict[tuple[int, int], Quad]:
    table: dict[tuple[int, int], Quad] = {
        (0, 0): (0xD, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
        (1, 0): (0x00830F10, 0x0000_0800, _ECX1, _EDX1),  # family 17h
        (7, 0): (0, _EBX7, 0, 0),
        (0xD, 0): (XCR0_SUPPORTED, 576, 576, 0),
        (0x4000_0000, 0): (0x4000_0001, _KVM[0], _KVM[1], _KVM[2]),
        (0x4000_0001, 0): (0, 0, 0, 0),
        (0x8000_0000, 0): (0x8000_0008, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
        (0x8000_0001, 0): (0x00830F10, 0, bit(0), _EDX_EXT),  # lahf
        (0x8000_0007, 0): (0, 0, 0, bit(8)),  # invariant TSC
        (0x8000_0008, 0): (MAXPHYADDR | 48 << 8, 0, 0, 0),
    }
    for i in range(3):
        eax, ebx, ecx, edx = _BRAND[4 * i : 4 * i + 4]
        table[0x8000_0002 + i, 0] = (eax, ebx, ecx, edx)
    return table


def _default_msrs() -> dict[int, int]:
    variable_mtrrs = range(0x200, 0x210)
    fixed_mtrrs = (0x250, 0x258, 0x259, *range(0x268, 0x270))
    return {
        APIC_BASE: 0xFEE0_0900,
        0x8B: 0x0830_1055,  # IA32_BIOS_SIGN_ID: the microcode's revision
        0xFE: 0x508,  # IA32_MTRRCAP
        0x179: 0,  # IA32_MCG_CAP
        0x17A: 0,  # IA32_MCG_STATUS
        0x1A0: 1,  # IA32_MISC_ENABLE
        0x277: 0x0007_0406_0007_0406,  # IA32_PAT
        0x2FF: 0xC00,  # IA32_MTRR_DEF_TYPE
        0xC001_0015: bit(24),  # HWCR
        0xC000_0103: 0,  # TSC_AUX
        **dict.fromkeys(variable_mtrrs, 0),
        **dict.fromkeys(fixed_mtrrs, 0),
    }


@checked
@dataclass
class CpuModel:
    """What a CPU says of itself.

    CPUID leaves by (leaf, subleaf) -> (eax, ebx, ecx, edx), and MSRs by number with their reset
    values.
    """

    cpuid: dict[tuple[int, int], Quad] = field(default_factory=_default_cpuid)
    msrs: dict[int, int] = field(default_factory=_default_msrs)
    read_only_msrs: frozenset[int] = frozenset({0xFE, 0x8B, 0x179})
    tsc_khz: int = TSC_KHZ

    @property
    def vendor(self) -> str:
        """The vendor's name in leaf 0: "AuthenticAMD"."""
        _, ebx, ecx, edx = self.leaf(0, 0)
        return struct.pack("<3I", ebx, edx, ecx).decode("latin-1")

    def leaf(self, eax: int, ecx: int) -> Quad:
        """What CPUID returns for this leaf: zeros for one that is not there (AMD: APM vol. 3)."""
        if (eax, ecx) in self.cpuid:
            return self.cpuid[eax, ecx]
        # Without subleaves ECX makes no difference.
        if eax not in WITH_SUBLEAVES and (eax, 0) in self.cpuid:
            return self.cpuid[eax, 0]
        return (0, 0, 0, 0)

    def seen_by(self, index: int, cr4: int, eax: int, ecx: int) -> Quad:
        """The same as one vCPU sees it: leaf 1 has its APIC id, and OSXSAVE as in CR4."""
        a, b, c, d = self.leaf(eax, ecx)
        if eax == 1:
            b = b & 0x00FF_FFFF | index << 24
            c &= ~OSXSAVE
            if cr4 & CR4_OSXSAVE:
                c |= OSXSAVE
        return a, b, c, d

    def copy(self) -> CpuModel:
        """An independent model with the same tables."""
        return CpuModel(dict(self.cpuid), dict(self.msrs), self.read_only_msrs, self.tsc_khz)
