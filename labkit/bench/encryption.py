"""What encrypting guest memory costs, against bare AES from the same library."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

from labkit.bench.measure import Pair, Result, at_least, at_most, best, best_pair, fastest
from labkit.guest.program import Program
from labkit.lab import Vm
from labkit.machine.memory import PAGE
from labkit.sev.cipher import MemoryCipher

__all__ = ["results"]

NR_PAGES = 100  # encrypted at once, or one by one
LAUNCH = 64 << 20  # bytes of a guest that is launched
CLEAN = 4 << 20  # bytes that the host reads
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


def results() -> Iterator[Result]:
    """Every figure of this file."""
    cipher = MemoryCipher(bytes(range(16)))
    yield _pages(cipher)
    yield _single_page(cipher)
    yield _launch(cipher)
    yield _guest(0.8, "64-page working set", nr_pages=64, rounds=200_000)
    # wider than Unicorn's TLB
    yield _guest(0.25, "sweep of 480 pages", nr_pages=480, rounds=4_000)
    yield _host_read()


def _pages(cipher: MemoryCipher) -> Result:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    bare = Cipher(algorithms.AES(cipher.key), modes.ECB()).encryptor()
    plain = bytes(NR_PAGES * PAGE)
    raw = bytearray(len(plain))
    ours, theirs = best_pair(
        lambda: cipher.encrypt_into(0, plain, raw), lambda: bare.update(plain), 200
    )
    megabytes = len(plain) / 1e6
    return at_least(
        0.3,
        f"encrypting {NR_PAGES} pages",
        theirs / ours,
        "x",
        note=f"{megabytes / ours:.0f} MB/s, AES-ECB {megabytes / theirs:.0f} MB/s",
    )


def _single_page(cipher: MemoryCipher) -> Result:
    page = bytes(PAGE)

    def work() -> None:
        for gfn in range(NR_PAGES):
            cipher.encrypt(gfn * PAGE, page)

    seconds = best(work, 20) / NR_PAGES
    return at_most(
        45.0,
        "encrypting one page",
        seconds * 1e6,
        "us",
        note=f"the mean of {NR_PAGES} pages, one call each",
    )


def _launch(cipher: MemoryCipher) -> Result:
    memory = bytearray(LAUNCH)
    seconds = best(lambda: cipher.encrypt_into(0, memory, memory), 2)
    tracemalloc.start()
    cipher.encrypt_into(0, memory, memory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return at_most(
        16.0,
        f"encrypting {LAUNCH >> 20} MiB in place",
        peak / 2**20,
        "MiB extra",
        note=f"{seconds * 1e3:.0f} ms",
    )


def _guest(target: float, name: str, nr_pages: int, rounds: int) -> Result:
    def one_turn() -> Pair:
        protected = _guest_seconds("sev", nr_pages, rounds)
        return protected, _guest_seconds(None, nr_pages, rounds)

    ours, theirs = fastest(one_turn() for _ in range(4))
    return at_least(
        target,
        f"encrypted guest, {name}",
        theirs / ours,
        "of the same guest unprotected",
        note=f"{ours * 1e3:.0f} ms, unprotected {theirs * 1e3:.0f} ms",
    )


def _guest_seconds(protect: str | None, nr_pages: int, rounds: int) -> float:
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
        vm.memory.read(0, CLEAN)
        seconds = best(lambda: vm.memory.read(0, CLEAN), 20)
    return at_most(
        2.0,
        f"host read of a clean {CLEAN >> 20} MiB",
        seconds * 1e3,
        "ms",
        note="of an encrypted guest that did not run meanwhile",
    )
