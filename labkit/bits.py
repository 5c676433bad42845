"""Bit masks and alignment, with the kernel's names."""

from __future__ import annotations

__all__ = ["align_down", "align_up", "bit", "genmask", "is_aligned"]


def bit(n: int) -> int:
    """The integer with only bit n set (the kernel's BIT_ULL)."""
    return 1 << n


def genmask(hi: int, lo: int) -> int:
    """The integer with bits hi..lo set, both included (the kernel's GENMASK_ULL)."""
    if lo < 0 or hi < lo:
        raise ValueError(f"genmask({hi}, {lo}): wants hi >= lo >= 0")
    return (1 << (hi + 1)) - (1 << lo)


def align_down(value: int, size: int) -> int:
    """The largest multiple of size (a power of two) that is not above value."""
    return value & -size


def align_up(value: int, size: int) -> int:
    """The smallest multiple of size (a power of two) that is not below value."""
    return (value + size - 1) & -size


def is_aligned(value: int, size: int) -> bool:
    """Whether value is a multiple of size (a power of two)."""
    return value & (size - 1) == 0
