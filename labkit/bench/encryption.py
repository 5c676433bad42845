"""What encrypting guest memory costs, against bare AES from the same library."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

from labkit.bench.measure import Result, best, best_pair
from labkit.guest.program import Program
from labkit.lab import Vm
from labkit.sev.cipher import PAGE, MemoryCipher

__all__ = ["results"]

PAGES, LAUNCH = 100, 64 << 20
GUEST = """
#include "labkit.h"
void guest_code(volatile uint64_t *pages, uint64_t nr_pages, uint64_t rounds)
{
	for (uint64_t i = 0; i < rounds; i++)
		for (uint64_t page = 0; page < nr_pages; page++)
			pages[512 * page + (8 * page & 511)] += i;
	GUEST_SYNC(rounds);
}
"""
WORKING_SET, SWEEP = (
    (64, 200_000),
    (480, 4_000),
)  # pages, rounds; the sweep is wider than Unicorn's TLB


def results() -> Iterator[Result]:
    """Every figure of this file."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = MemoryCipher(bytes(range(16)))
    bare = Cipher(algorithms.AES(cipher.key), modes.ECB()).encryptor()
    plain, raw = bytes(PAGES * PAGE), bytearray(PAGES * PAGE)
    ours, theirs = best_pair(
        lambda: cipher.encrypt_into(0, plain, raw), lambda: bare.update(plain), 200
    )
    speed = (len(plain) / ours / 1e6, len(plain) / theirs / 1e6)
    yield Result(
        f"encrypting {PAGES} pages",
        theirs / ours,
        "x",
        0.3,
        True,
        f"{speed[0]:.0f} MB/s, AES-ECB {speed[1]:.0f} MB/s",
    )
    page = best(lambda: [cipher.encrypt(i * PAGE, plain[:PAGE]) for i in range(100)], 20)
    yield Result(
        "encrypting one page", page * 1e4, "us", 45.0, False, "the mean of 100 pages, one call each"
    )
    yield _launch(cipher)
    for name, work, target in (
        ("64-page working set", WORKING_SET, 0.8),
        ("sweep of 480 pages", SWEEP, 0.25),
    ):
        rounds = [[_guest(protect, *work) for protect in ("sev", None)] for _ in range(4)]
        ours, theirs = (min(column) for column in zip(*rounds, strict=True))
        yield Result(
            f"encrypted guest, {name}",
            theirs / ours,
            "of the same guest unprotected",
            target,
            True,
            f"{ours * 1e3:.0f} ms, unprotected {theirs * 1e3:.0f} ms",
        )
    yield _host_read()


def _guest(protect: str | None, nr_pages: int, rounds: int) -> float:
    """CPU seconds of the guest; its pages were decrypted once before."""
    program = Program.compile(GUEST, name="encryption.c")
    with Vm.create(program, protect=protect, memory=16 << 20, launch=protect is None) as vm:
        gva = vm.alloc(nr_pages * PAGE)
        vm.vcpus[0].args_set(gva, nr_pages, rounds)
        if protect:
            vm.launch()
        vm.run(10_000)  # begun: every page was touched
        return best(lambda: vm.run(), 1)


def _host_read() -> Result:
    with Vm.create(Program.compile(GUEST, name="encryption.c"), protect="sev") as vm:
        vm.memory.read(0, 4 << 20)
        seconds = best(lambda: vm.memory.read(0, 4 << 20), 20)
        return Result(
            "host read of a clean 4 MiB",
            seconds * 1e3,
            "ms",
            2.0,
            False,
            "of an encrypted guest that did not run meanwhile",
        )


def _launch(cipher: MemoryCipher) -> Result:
    memory = bytearray(LAUNCH)
    seconds = best(lambda: cipher.encrypt_into(0, memory, memory), 2)
    tracemalloc.start()
    cipher.encrypt_into(0, memory, memory)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return Result(
        f"encrypting {LAUNCH >> 20} MiB in place",
        peak,
        "MiB extra",
        16.0,
        False,
        f"{seconds * 1e3:.0f} ms",
    )
