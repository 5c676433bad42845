"""Values that x86-64 MSRs refuse."""

from __future__ import annotations

__all__ = ["has_memory_types"]

_PAT, _MTRR_DEF_TYPE = 0x277, 0x2FF
_FIXED_MTRRS = frozenset({0x250, 0x258, 0x259, *range(0x268, 0x270)})
_MTRR_TYPES = frozenset({0, 1, 4, 5, 6})


def has_memory_types(index: int, value: int) -> bool:
    """Whether an MSR of memory types gets types that exist (SDM vol. 3A 12.11, 12.12)."""
    if index == _PAT:
        return all(byte in (0, 1, 4, 5, 6, 7) for byte in value.to_bytes(8, "little"))
    if index in _FIXED_MTRRS:
        return all(byte in _MTRR_TYPES for byte in value.to_bytes(8, "little"))
    if index == _MTRR_DEF_TYPE:
        return not value & ~0xCFF and value & 0xFF in _MTRR_TYPES
    return True
