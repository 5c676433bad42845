"""What encrypting guest memory costs, against bare AES from the same library."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

from labkit.bench.measure import Result, best, best_pair
from labkit.sev.cipher import PAGE, MemoryCipher

__all__ = ["results"]

PAGES, LAUNCH = 100, 64 << 20


def results() -> Iterator[Result]:
    """Every figure of this file."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = MemoryCipher(bytes(range(16)))
    bare = Cipher(algorithms.AES(cipher.key), modes.ECB()).encryptor()
    plain, raw = bytes(PAGES * PAGE), bytearray(PAGES * PAGE)
    ours, theirs = best_pair(lambda: cipher.encrypt_into(0, plain, raw), lambda: bare.update(plain), 200)
    speed = (len(plain) / ours / 1e6, len(plain) / theirs / 1e6)
    yield Result(f"encrypting {PAGES} pages", theirs / ours, "x", 0.3, True, f"{speed[0]:.0f} MB/s, AES-ECB {speed[1]:.0f} MB/s")
    page = best(lambda: [cipher.encrypt(i * PAGE, plain[:PAGE]) for i in range(100)], 20)
    yield Result("encrypting one page", page * 1e4, "us", 45.0, False, "the mean of 100 pages, one call each")
    yield _launch(cipher)


def _launch(cipher: MemoryCipher) -> Result:
    memory = bytearray(LAUNCH)
    seconds = best(lambda: cipher.encrypt_into(0, memory, memory), 2)
    tracemalloc.start()
    cipher.encrypt_into(0, memory, memory)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return Result(f"encrypting {LAUNCH >> 20} MiB in place", peak, "MiB extra", 16.0, False, f"{seconds * 1e3:.0f} ms")
