"""Sparsebit against a plain set of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labkit as lk
from labkit.machine.sparsebit import Sparsebit

TOP = 64
range_of_bits = st.tuples(st.integers(0, TOP - 1), st.integers(1, 12))
steps = st.lists(st.tuples(st.booleans(), range_of_bits), max_size=30)


def apply(bits, sets, start, count):
    if sets:
        bits.set(start, count)
    else:
        bits.clear(start, count)


@given(steps=steps, probe=range_of_bits)
def test_that_it_is_a_set_of_numbers(steps, probe):
    bits = Sparsebit()
    model = set()
    for sets, (start, count) in steps:
        apply(bits, sets, start, count)
        if sets:
            model |= {*range(start, start + count)}
        else:
            model -= {*range(start, start + count)}
        assert {b for start, n in bits.ranges() for b in range(start, start + n)} == model
        assert len(bits) == len(model)
    start, count = probe
    wanted = {*range(start, start + count)}
    assert bits.is_set(start, count) == (wanted <= model)
    assert bits.next_clear(start, count) == next(
        b for b in range(start, 2 * TOP) if not model & {*range(b, b + count)}
    )
    assert bits.copy() == bits == Sparsebit(bits.ranges())
    assert (start in bits) == (start in model)


@given(steps=steps)
def test_that_neighbouring_runs_are_one(steps):
    bits = Sparsebit()
    for sets, (start, count) in steps:
        apply(bits, sets, start, count)
    runs = list(bits.ranges())
    assert all(start + count < after for (start, count), (after, _) in pairwise(runs))


def test_that_a_copy_is_independent_and_the_text_shows_the_runs():
    bits = Sparsebit([(1, 2)])
    bits.copy().set(9)
    assert 9 not in bits
    assert repr(bits) == "<Sparsebit 2 set: 0x1+0x2>"
    assert repr(Sparsebit()) == "<Sparsebit 0 set: none>"


def test_that_all_of_64_bits_can_be_set_and_no_more():
    bits = Sparsebit([(0, 1 << 64)])
    assert len([*bits.ranges()]) == 1
    assert bits.is_set((1 << 64) - 1)
    for start, count in ((-1, 1), (0, 0), ((1 << 64) - 1, 2), (5, -1)):
        with pytest.raises(lk.InvalidState, match="not a range"):
            bits.set(start, count)
