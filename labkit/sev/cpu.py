"""What an encrypted guest's CPU says about encryption: one CPUID leaf and two MSRs.

Source: APM vol. 3 (24594) appendix E, leaf 0x8000001F; APM vol. 2 (24593) 15.34.10 (SEV_STATUS) and 15.35 (GHCB).
"""

from __future__ import annotations

from labkit.errors import InvalidState

__all__ = ["GHCB_MSR", "LEAF", "LEVELS", "SEV_STATUS_MSR", "encryption_leaf", "sev_status"]

LEAF, GHCB_MSR, SEV_STATUS_MSR = 0x8000_001F, 0xC001_0130, 0xC001_0131
LEVELS = {"sev": 1, "sev-es": 2, "snp": 3}  # each level has all bits of those below
_EAX = (1, 3, 4)  # SEV, SEV-ES, SNP
_COHERENT = 1 << 10


def encryption_leaf(
    protect: str, c_bit: int, reduction: int = 0, nr_asids: int = 0, min_sev_asid: int = 0
) -> tuple[int, int, int, int]:
    """CPUID 0x8000001F: features, C-bit position and address bits it costs, ASIDs, the least ASID of plain SEV."""
    if protect not in LEVELS or not 32 <= c_bit <= 63 or not 0 <= reduction < 64:
        raise InvalidState(
            f"protect {protect!r}, C-bit {c_bit}, {reduction} address bits less: wants {', '.join(LEVELS)}, 32..63, 0..63"
        )
    eax = sum(1 << bit for bit in _EAX[: LEVELS[protect]]) | _COHERENT
    return eax, c_bit | reduction << 6, nr_asids, min_sev_asid


def sev_status(protect: str) -> int:
    """MSR 0xc0010131: bits 0, 1, 2 say SEV, SEV-ES, SNP."""
    return (1 << LEVELS[protect]) - 1
