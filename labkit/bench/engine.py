"""Plain code, ucall round trips, stepping and creation, against a bare Uc."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from labkit.bench.measure import Pair, Result, at_least, at_most, best, best_pair, fastest
from labkit.bench.peer import Bare
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["GUEST", "LOOPS", "program", "results"]

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
LOOPS = 60_000_000  # of guest_plain
PLAIN_ROUNDS = 8
PLAIN_BUDGET = 1 << 40  # instructions, more than guest_plain has

CALLS = 1_000  # round trips or steps in one turn
# Of some 10 ms each: where cores have two threads, what the other one does costs either side up to
# a third.
TURNS = 60

# Without a count, a stop at IN takes effect at the end of the block: later instructions have run by
# then. So a peer that shall stop exactly is given one that it never reaches.
EXACT = 1 << 60


@cache
def program() -> Program:
    """The guests of this file, compiled once."""
    return Program.compile(GUEST, name="bench.c")


def results() -> Iterator[Result]:
    """Every figure of this file."""
    yield _plain("plain code, unbounded", None)
    yield _plain("plain code, max_insns against count=", PLAIN_BUDGET)
    yield _ucalls()
    yield _stepping()
    yield _create()


def _vm(entry: str, argument: int = 0) -> Vm:
    vm = Vm.create(program(), entry)
    vm.vcpus[0].args_set(argument)
    return vm


def _plain(name: str, count: int | None) -> Result:
    ours, peer = fastest(_plain_round(count) for _ in range(PLAIN_ROUNDS))
    return at_least(
        0.9,
        name,
        peer / ours,
        "of bare Unicorn",
        note=f"{ours * 1e3:.0f} ms, bare {peer * 1e3:.0f} ms",
    )


def _plain_round(count: int | None) -> Pair:
    """One run of either side, with a new VM and a new Uc.

    Where the translated loop and its data happen to lie makes up to 40 %.
    """
    with _vm("guest_plain", LOOPS) as vm:
        peer = Bare(vm)
        ours = best(partial(vm.vcpus[0].run, count), 1)
        theirs = best(partial(peer.run, peer.start, count or 0), 1)
        return ours, theirs


def _ucalls() -> Result:
    return _calls(
        0.6,
        "ucall round trip with decode",
        entry="guest_ucalls",
        method="run",
        count=EXACT,
        peer_does="exit and resume",
    )


def _stepping() -> Result:
    return _calls(
        0.5,
        "stepping",
        entry="guest_plain",
        method="step",
        count=1,
        peer_does="a count=1 loop",
    )


def _calls(target: float, name: str, entry: str, method: str, count: int, peer_does: str) -> Result:
    """One of our calls against one `emu_start` of that count, again and again, taking turns."""
    vm = _vm(entry, LOOPS)
    once = getattr(vm.vcpus[0], method)
    peer = Bare(vm)
    pc = peer.start

    def ours() -> None:
        for _ in range(CALLS):
            once()

    def theirs() -> None:
        nonlocal pc
        for _ in range(CALLS):
            pc = peer.run(pc, count)

    mine, bare = best_pair(ours, theirs, TURNS)
    return at_least(
        target,
        name,
        bare / mine,
        f"of bare Unicorn: {peer_does}",
        note=f"{CALLS / mine / 1e3:.1f} k/s, bare {CALLS / bare / 1e3:.1f} k/s",
    )


def _create() -> Result:
    seconds = best(lambda: Vm.create(program(), "guest_plain").close(), 30)
    vm = _vm("guest_plain")
    peer = best(lambda: Bare(vm), 10)
    return at_most(
        6.0,
        "Vm.create with a 512-slot pool, warm",
        seconds * 1e3,
        "ms",
        note=f"a bare Uc with its 8 MiB {peer * 1e3:.1f} ms",
    )
