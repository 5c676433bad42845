"""Plain code, ucall round trips, stepping and creation, against a bare Uc."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from labkit.bench.measure import Result, best, best_pair
from labkit.bench.peer import Bare
from labkit.engines.unicorn.native import bare
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["program", "results"]

GUEST = """
#include "labkit.h"
static uint64_t words[512];
void guest_plain(uint64_t n)
{
	uint64_t sum = n;

	for (uint64_t i = 0; i < n; i++) {
		words[i & 511] ^= sum;
		sum = sum * 6364136223846793005UL + words[(i * 7) & 511];
	}
	GUEST_SYNC(sum);
}
void guest_ucalls(uint64_t n)
{
	for (;;)
		GUEST_SYNC(n++);
}
"""
LOOPS, ROUNDS = 60_000_000, 1_000
TURNS = 60  # of some 10 ms each: where cores have two threads, what the other one does costs either side up to a third
ROUNDS_PLAIN = 8
EXACT = (
    1 << 60
)  # without a count, a stop at IN takes effect at the end of the block: later instructions have run by then


@cache
def program() -> Program:
    """The guests of this file, compiled once."""
    return Program.compile(GUEST, name="bench.c")


def _vm(entry: str, argument: int = 0) -> Vm:
    vm = Vm.create(program(), entry)
    vm.vcpus[0].args_set(argument)
    return vm


def _plain(count: int | None) -> tuple[float, float]:
    """Each round with a new VM and a new Uc: where the translated loop and its data happen to lie makes up to 40 %."""
    rounds = []
    for _ in range(ROUNDS_PLAIN):
        vm = _vm("guest_plain", LOOPS)
        peer = Bare(vm)
        bare.stop_at_in(peer.uc, lambda _port, _size: 0)
        rounds.append(
            (
                best(partial(vm.vcpus[0].run, count), 1),
                best(partial(peer.run, peer.start, count or 0), 1),
            )
        )
        vm.close()
    return min(a for a, _ in rounds), min(b for _, b in rounds)


def results() -> Iterator[Result]:
    """Every figure of this file."""
    ours, peer = _plain(None)
    yield Result(
        "plain code, unbounded",
        peer / ours,
        "of bare Unicorn",
        0.9,
        True,
        f"{ours * 1e3:.0f} ms, bare {peer * 1e3:.0f} ms",
    )
    ours, peer = _plain(1 << 40)
    yield Result(
        "plain code, max_insns against count=",
        peer / ours,
        "of bare Unicorn",
        0.9,
        True,
        f"{ours * 1e3:.0f} ms, bare {peer * 1e3:.0f} ms",
    )
    yield _ucalls()
    yield _stepping()
    yield _create()


def _ucalls() -> Result:
    return _rounds(
        "ucall round trip with decode", "guest_ucalls", "run", EXACT, "exit and resume", 0.6
    )


def _stepping() -> Result:
    return _rounds("stepping", "guest_plain", "step", 1, "a count=1 loop", 0.5)


def _rounds(name: str, entry: str, method: str, count: int, what: str, target: float) -> Result:
    """One of our calls against one `emu_start` of that count, again and again, taking turns."""
    vm = _vm(entry, LOOPS)
    peer = Bare(vm)
    bare.stop_at_in(peer.uc, lambda _port, _size: 0)
    at, once = [peer.start], getattr(vm.vcpus[0], method)

    def ours() -> None:
        for _ in range(ROUNDS):
            once()

    def theirs() -> None:
        pc = at[0]
        for _ in range(ROUNDS):
            pc = peer.run(pc, count)
        at[0] = pc

    mine, bare_time = best_pair(ours, theirs, TURNS)
    return Result(
        name,
        bare_time / mine,
        f"of bare Unicorn: {what}",
        target,
        True,
        f"{ROUNDS / mine / 1e3:.1f} k/s, bare {ROUNDS / bare_time / 1e3:.1f} k/s",
    )


def _create() -> Result:
    seconds = best(lambda: Vm.create(program(), "guest_plain").close(), 30)
    vm = _vm("guest_plain")
    uc = best(lambda: Bare(vm), 10)
    return Result(
        "Vm.create with a 512-slot pool, warm",
        seconds * 1e3,
        "ms",
        6.0,
        False,
        f"a bare Uc with its 8 MiB {uc * 1e3:.1f} ms",
    )
