"""Operations for which a compiler calls its runtime library: each compiler and architecture."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.errors import NotAvailable
from labkit.guest.compilers import ARCHES, find_compiler

SOURCE = r"""
#include "labkit.h"
volatile uint64_t a_low, a_high, b_low, b_high;
void guest_code(void)
{
	volatile unsigned __int128 a = (unsigned __int128)a_high << 64 | a_low;
	volatile unsigned __int128 b = (unsigned __int128)b_high << 64 | b_low;
	volatile __int128 x = a, y = b;
	unsigned __int128 results[] = {
		a / b, a % b, x / y, x % y, a * b, a << (b & 127), a >> (b & 127), x >> (b & 127),
	};
	int shown = sizeof(results) / sizeof(results[0]);

	for (int i = 0; i < shown; i++)
		GUEST_SYNC2((uint64_t)results[i], (uint64_t)(results[i] >> 64));
	GUEST_SYNC2(__builtin_popcountll(a_low), __builtin_parityll(a_low));
	GUEST_SYNC2(__builtin_clzll(a_low | 1), __builtin_ctzll(a_low | 1ull << 63));
	GUEST_SYNC2(__builtin_ffsll(a_low), __builtin_clrsbll(a_low));
	GUEST_SYNC2(__builtin_bswap64(a_low), __builtin_popcount(a_low));
	GUEST_DONE();
}
"""
M64, M128 = (1 << 64) - 1, (1 << 128) - 1
WORDS = st.one_of(
    st.integers(0, M128), st.integers(0, M64), st.sampled_from([1, 2, M128, M64, 1 << 127, 1 << 64])
)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def expected(a: int, b: int) -> list[tuple[int, int]]:
    """What Python says of the same operations."""
    x, y, by = signed(a, 128), signed(b, 128), b & 127
    quotient = abs(x) // abs(y)
    if (x < 0) != (y < 0):
        quotient = -quotient
    wide = [a // b, a % b, quotient, x - quotient * y, a * b, a << by, a >> by, x >> by]
    low = a & M64
    behind_sign = signed(low, 64) if signed(low, 64) >= 0 else ~signed(low, 64)
    return [(value & M64, value >> 64 & M64) for value in wide] + [
        (low.bit_count(), low.bit_count() & 1),
        (64 - (low | 1).bit_length(), ((low | 1 << 63) & -(low | 1 << 63)).bit_length() - 1),
        ((low & -low).bit_length(), 63 - behind_sign.bit_length()),
        (int.from_bytes(low.to_bytes(8, "little"), "big"), (low & 0xFFFFFFFF).bit_count()),
    ]


@pytest.fixture(scope="module", params=[(c, a) for c in ("zig", "gcc", "clang") for a in ARCHES])
def guest(request):
    compiler, arch = request.param
    try:
        find_compiler(compiler, arch)
    except NotAvailable as error:
        pytest.skip(str(error))
    return lk.Program.compile(SOURCE, compiler=compiler, arch=arch)


@settings(max_examples=5, deadline=None)
@given(a=WORDS, b=WORDS.filter(bool))
def test_that_what_a_compiler_calls_is_linked_and_right(guest, a, b):
    with lk.Vm.create(guest) as vm:
        for name, value in (("a_low", a), ("a_high", a >> 64), ("b_low", b), ("b_high", b >> 64)):
            vm.write_guest_global(name, value & M64)
        came = vm.run_until_done()
        assert [tuple(uc.args[:2]) for uc in came[:-1]] == expected(a, b)


def test_that_a_guest_without_such_calls_carries_none():
    guest = lk.Program.compile('#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }')
    assert "__udivti3" not in set(guest.symbols)
