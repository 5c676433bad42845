"""Masks and alignment against arithmetic that is obviously right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.bits import align_down, align_up, bit, genmask, is_aligned

sizes = st.integers(0, 40).map(bit)


@pytest.mark.parametrize(
    ("hi", "lo", "mask"),
    [(0, 0, 1), (7, 4, 0xF0), (51, 12, 0xFFFFFFFFFF000), (63, 0, (1 << 64) - 1)],
)
def test_that_genmask_sets_the_bits_from_hi_to_lo(hi, lo, mask):
    assert genmask(hi, lo) == mask == sum(bit(n) for n in range(lo, hi + 1))


@pytest.mark.parametrize(("hi", "lo"), [(3, 4), (3, -1), (-2, -3)])
def test_that_genmask_refuses_a_range_that_is_none(hi, lo):
    with pytest.raises(ValueError, match="genmask"):
        genmask(hi, lo)


@given(st.integers(0, 1 << 64), sizes)
def test_that_alignment_finds_the_nearest_multiples(value, size):
    down, up = align_down(value, size), align_up(value, size)
    assert down % size == up % size == 0
    assert down <= value <= up
    assert value - down < size
    assert up - value < size
    assert is_aligned(value, size) == (value % size == 0) == (down == up)
