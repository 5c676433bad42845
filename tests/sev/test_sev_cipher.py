"""The memory cipher: what the address tweak promises, and what the missing integrity does not."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import InvalidState
from labkit.sev.cipher import CONSTANTS, MemoryCipher, tweaks

KEY = bytes(range(16))
forms = st.sampled_from(["XE", "XEX"])
spas = st.integers(0, (1 << 48) - 1).map(lambda block: block * 16)
texts = st.integers(1, 700).flatmap(
    lambda n: st.binary(min_size=16, max_size=16).map(lambda block: block * n)
)


def blocks(data: bytes) -> list[bytes]:
    return [data[i : i + 16] for i in range(0, len(data), 16)]


@settings(deadline=None)
@given(forms, spas, texts)
def test_that_what_is_encrypted_decrypts_and_only_there(form: str, spa: int, plain: bytes) -> None:
    if spa + len(plain) > 1 << 52:
        spa -= len(plain)
    cipher = MemoryCipher(KEY, form)
    assert cipher.decrypt(spa, cipher.encrypt(spa, plain)) == plain
    assert MemoryCipher(bytes(16), form).decrypt(spa, cipher.encrypt(spa, plain)) != plain


@settings(deadline=None)
@given(forms, spas, spas, st.integers(1, 600))
def test_that_the_same_plaintext_at_two_addresses_shares_no_block(
    form: str, first: int, second: int, nr: int
) -> None:
    first, second = (spa % (1 << 51) for spa in (first, second))
    cipher = MemoryCipher(KEY, form)
    one, two = (cipher.encrypt(spa, bytes(16 * nr)) for spa in (first, second))
    apart = {first + 16 * i for i in range(nr)}.isdisjoint(second + 16 * i for i in range(nr))
    assert len(set(blocks(one))) == nr and (not apart or not set(blocks(one)) & set(blocks(two)))


@settings(deadline=None)
@given(forms, spas, spas, st.binary(min_size=64, max_size=64))
def test_that_moved_ciphertext_garbles_every_block(
    form: str, there: int, here: int, plain: bytes
) -> None:
    there, here = there % (1 << 51), here % (1 << 51)
    cipher = MemoryCipher(KEY, form)
    moved = cipher.decrypt(here, cipher.encrypt(there, plain))
    assert all(
        (a == b) == (here == there) for a, b in zip(blocks(moved), blocks(plain), strict=True)
    )


@settings(deadline=None)
@given(forms, spas, st.binary(min_size=80, max_size=80), st.integers(0, 639))
def test_that_one_flipped_bit_garbles_exactly_one_block(
    form: str, spa: int, plain: bytes, bit: int
) -> None:
    spa, cipher = spa % (1 << 51), MemoryCipher(KEY, form)
    raw = bytearray(cipher.encrypt(spa, plain))
    raw[bit // 8] ^= 1 << bit % 8
    wrong = [
        i
        for i, (a, b) in enumerate(
            zip(blocks(cipher.decrypt(spa, raw)), blocks(plain), strict=True)
        )
        if a != b
    ]
    assert wrong == [bit // 128]


@settings(deadline=None)
@given(spas, st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_that_replayed_ciphertext_decrypts_cleanly(spa: int, old: bytes, new: bytes) -> None:
    spa, cipher = spa % (1 << 51), MemoryCipher(KEY)
    recorded, memory = cipher.encrypt(spa, old), bytearray(32)
    cipher.encrypt_into(spa, new, memory)
    memory[:] = recorded
    assert cipher.decrypt(spa, memory) == old


@settings(deadline=None)
@given(forms, spas, st.binary(min_size=16, max_size=16), st.integers(1, 600))
def test_that_single_blocks_agree_with_runs(form: str, spa: int, plain: bytes, count: int) -> None:
    spa, cipher = spa % (1 << 51), MemoryCipher(KEY, form)
    assert blocks(cipher.encrypt(spa, plain * count)) == [
        cipher.encrypt(spa + 16 * i, plain) for i in range(count)
    ]


@settings(deadline=None)
@given(spas, st.binary(min_size=16, max_size=16))
def test_that_it_is_aes_between_two_xors(spa: int, plain: bytes) -> None:
    tweak = np.zeros(2, np.uint64)
    for i in range(48):
        if spa >> i + 4 & 1:
            tweak ^= CONSTANTS[i]
    aes = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    mask = int.from_bytes(tweak.tobytes(), "little")
    inner = aes.update((int.from_bytes(plain, "little") ^ mask).to_bytes(16, "little"))
    assert MemoryCipher(KEY, "XE").encrypt(spa, plain) == inner
    assert (
        int.from_bytes(MemoryCipher(KEY, "XEX").encrypt(spa, plain), "little")
        == int.from_bytes(inner, "little") ^ mask
    )


def test_that_constants_are_independent() -> None:
    rows = [int.from_bytes(row.tobytes(), "little") for row in CONSTANTS]
    for bit in range(
        128
    ):  # Gauss over GF(2): 48 constants span 48 dimensions, so no two addresses share a tweak
        pivot = next((i for i, row in enumerate(rows) if row & -row == 1 << bit), None)
        if pivot is not None:
            rows = [
                row ^ rows[pivot] if i != pivot and row >> bit & 1 else row
                for i, row in enumerate(rows)
            ]
    assert all(rows) and len(set(rows)) == 48


@pytest.mark.parametrize("size", [64 << 20])
def test_that_a_big_launch_needs_little_memory_and_works_in_place(size: int) -> None:
    cipher, memory = MemoryCipher(KEY), bytearray(size)
    tracemalloc.start()
    cipher.encrypt_into(0, memory, memory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20 and memory[-4096:] == cipher.encrypt(size - 4096, bytes(4096))


@pytest.mark.parametrize(("spa", "size"), [(8, 16), (16, 15), (-16, 16), ((1 << 52) - 16, 32)])
def test_that_half_blocks_are_refused(spa: int, size: int) -> None:
    with pytest.raises(InvalidState, match="16-byte blocks"):
        MemoryCipher(KEY).encrypt(spa, bytes(size))


@pytest.mark.parametrize(("key", "form"), [(b"", "XEX"), (bytes(32), "XE"), (KEY, "CBC")])
def test_that_other_keys_and_forms_are_refused(key: bytes, form: str) -> None:
    with pytest.raises(InvalidState, match="XE or XEX"):
        MemoryCipher(key, form)


def test_that_nothing_is_encrypted_to_nothing() -> None:
    assert MemoryCipher(KEY).encrypt(0, b"") == b"" and len(tweaks(np.array([], np.uint64))) == 0
