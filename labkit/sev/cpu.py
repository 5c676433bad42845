"""What an encrypted guest's CPU says about encryption: one CPUID leaf and two MSRs.

Source: APM vol. 3 (24594) appendix E, leaf 0x8000001F; APM vol. 2 (24593) 15.34.10 (SEV_STATUS) and
15.35 (GHCB).
"""

from __future__ import annotations

from labkit.arch.x86_cpu import CpuModel
from labkit.errors import InvalidState
from labkit.sev.ghcb_msr import msr_response

__all__ = [
    "GHCB_MSR",
    "LEAF",
    "LEVELS",
    "SEV_STATUS_MSR",
    "announce",
    "encryption_leaf",
    "sev_status",
]

LEAF = 0x8000_001F
GHCB_MSR, SEV_STATUS_MSR = 0xC001_0130, 0xC001_0131

# Each level has all bits of those below: 1 memory, 2 registers too, 3 with ownership of pages
LEVELS = {"sev": 1, "sev-es": 2, "snp": 3}

# Milan and later have the C-bit there (Rome and earlier: 47)
C_BIT = 51

# Of a TD with 48 guest-physical address bits
TDX_SHARED_BIT = 47

_HIGHEST_LEAF = 0x8000_0000

# Bits of EAX: SEV, SEV-ES, SNP; and that the host need not flush caches before encrypting in place
_FEATURES = (1, 3, 4)
_COHERENT = 1 << 10


def encryption_leaf(
    protect: str, c_bit: int, reduction: int = 0, nr_asids: int = 0, min_sev_asid: int = 0
) -> tuple[int, int, int, int]:
    """CPUID 0x8000001F as (EAX, EBX, ECX, EDX).

    EAX has the features, EBX the C-bit's position and the physical address bits that it costs, ECX
    the number of ASIDs, EDX the least ASID of plain SEV. Raises InvalidState for what has no place
    there.
    """
    if protect not in LEVELS or not 32 <= c_bit <= 63 or not 0 <= reduction < 64:
        raise InvalidState(
            f"protect {protect!r}, C-bit {c_bit}, {reduction} address bits less: "
            f"wants {', '.join(LEVELS)}, 32..63, 0..63"
        )
    features = sum(1 << bit for bit in _FEATURES[: LEVELS[protect]])
    return features | _COHERENT, c_bit | reduction << 6, nr_asids, min_sev_asid


def sev_status(protect: str) -> int:
    """MSR 0xc0010131: bits 0, 1, 2 say SEV, SEV-ES, SNP."""
    return (1 << LEVELS[protect]) - 1


def announce(
    cpu: CpuModel, protect: str, asked: int | None, nr_asids: int, min_sev_asid: int
) -> int:
    """Let CPUID and the MSRs of a CPU model say what its VM is; returns the encryption bit.

    A leaf that is there already says where the bit is, and `asked` (None: wherever) must agree. For
    "tdx" nothing is said: its shared bit is the TD's own choice. Raises InvalidState for a bit that
    cannot be had.
    """
    if asked is not None and not 32 <= asked < 52:
        raise InvalidState(
            f"c_bit={asked}: the encryption bit is one of the bits 32 to 51 of an entry",
            c_bit=asked,
        )
    if protect == "tdx":
        return TDX_SHARED_BIT if asked is None else asked

    wanted = C_BIT if asked is None else asked
    cpu.cpuid.setdefault((LEAF, 0), encryption_leaf(protect, wanted, 0, nr_asids, min_sev_asid))
    highest, ebx, ecx, edx = cpu.cpuid[_HIGHEST_LEAF, 0]
    cpu.cpuid[_HIGHEST_LEAF, 0] = (max(highest, LEAF), ebx, ecx, edx)
    cpu.msrs |= {SEV_STATUS_MSR: sev_status(protect), GHCB_MSR: 0}
    cpu.read_only_msrs |= {SEV_STATUS_MSR}

    c_bit = cpu.cpuid[LEAF, 0][1] & 0x3F
    if asked is not None and asked != c_bit:
        raise InvalidState(
            f"c_bit={asked}, but CPUID {LEAF:#x} of the CPU model says {c_bit}", c_bit=asked
        )
    if LEVELS[protect] > 1:
        # What KVM leaves there at reset
        cpu.msrs[GHCB_MSR] = msr_response("SEV_INFO", min=1, max=2, c_bit=c_bit)
    return c_bit
