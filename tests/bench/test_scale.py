"""The exponent of growth is that of the times it is fitted to."""

from __future__ import annotations

import pytest

from labkit.bench.scale import exponent

SIZES = [1000 << step for step in range(6)]


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_that_a_power_law_gives_its_power(power):
    assert exponent([(size, 1e-6 * size**power) for size in SIZES]) == pytest.approx(power)


def test_that_work_that_is_quadratic_is_over_the_promise():
    assert exponent([(size, size * size * 1e-8 + 1e-4) for size in SIZES]) > 1.1
