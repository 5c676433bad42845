"""The kvm engine against the C library of the kernel's selftests, on the same KVM.

Both are built and run here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from labkit.bench.engine import program
from labkit.bench.measure import Pair, Result, at_least, at_most, best, fastest
from labkit.errors import NotAvailable
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["results"]

KERNEL = Path(__file__).resolve().parents[2] / "tests" / "kernel"
EXITS = 10_000  # PIO exits in one turn
SYNCS = 2_000  # GUEST_SYNC round trips in one turn
TURNS = 4  # ours and the peer's in turn
GUEST = """
#include "labkit.h"
static volatile uint64_t pages[1024] __attribute__((aligned(4096)));
void guest_pio(void)
{
	for (;;)
		asm volatile("inb $0x80, %%al" : : : "rax");
}
void guest_writes(void)
{
	for (uint64_t n = 1;; n++) {
		pages[0] = pages[512] = n;
		GUEST_SYNC(n);
	}
}
"""


def results() -> Iterator[Result]:
    """Every figure of this file; raises NotAvailable without KVM or what the C peer is built of."""
    _peer()
    yield _pio()
    yield _syncs("kernel", 1.0)
    if _is_emulated():  # elsewhere both rings are as fast as the CPU
        yield _syncs("user", 3.5)
    yield _create()
    yield _restore()


@cache
def _guests() -> Program:
    return Program.compile(GUEST, name="bench_kvm.c")


@cache
def _peer() -> Path:
    """The C program, built for this run; raises NotAvailable with what is missing."""
    if not KERNEL.is_dir():
        raise NotAvailable(f"the figures need labkit's repository, for {KERNEL}/build.sh")
    built = subprocess.run(
        [KERNEL / "build.sh"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if built.returncode:
        raise NotAvailable(built.stderr.strip())
    selftests = built.stdout.splitlines()[-1]
    peer = Path(tempfile.mkdtemp(prefix="labkit-bench-")) / "peer"
    done = subprocess.run([KERNEL / "peer.sh", selftests, peer], capture_output=True, text=True)
    if done.returncode:
        raise NotAvailable(f"the C peer does not build: {done.stderr[-500:]}")
    return peer


def _peer_seconds(what: str, count: int) -> float:
    """CPU seconds of one round in C, of `count` rounds."""
    done = subprocess.run([_peer(), what, str(count)], capture_output=True, text=True, check=True)
    nanoseconds = float(done.stdout.split()[-1])
    return nanoseconds * 1e-9


def _is_emulated() -> bool:
    """Whether this KVM emulates the guest's ring 0 in software."""
    with Vm.create(_guests(), "guest_pio", backend="kvm") as vm:
        [native] = [one for one in vm.capabilities if one.name == "native_speed"]
        return not native.have


def _pio() -> Result:
    with Vm.create(_guests(), "guest_pio", backend="kvm") as vm:
        cpu = vm.vcpus[0].cpu

        def work() -> None:
            for _ in range(EXITS):
                cpu.run()
                cpu.read_reg("rdi")

        return _rounds(0.8, "bare PIO exits with registers", "pio", EXITS, work)


def _syncs(privilege: str, target: float) -> Result:
    with Vm.create(program(), "guest_ucalls", backend="kvm", privilege=privilege) as vm:
        run = vm.vcpus[0].run

        def work() -> None:
            for _ in range(SYNCS):
                run()

        name = f"GUEST_SYNC round trips, {privilege} privilege"
        return _rounds(target, name, "sync", SYNCS, work)


def _rounds(target: float, name: str, what: str, count: int, work: Callable[[], None]) -> Result:
    """`work`, which does `count` rounds, against as many in C."""

    def one_turn() -> Pair:
        return best(work, 3) / count, _peer_seconds(what, count)

    ours, theirs = fastest(one_turn() for _ in range(TURNS))
    return at_least(
        target,
        name,
        theirs / ours,
        "of the C library",
        note=f"{1e-3 / ours:.1f} k/s, C {1e-3 / theirs:.1f} k/s",
    )


def _create() -> Result:
    def work() -> None:
        Vm.create(program(), "guest_plain", backend="kvm").close()

    def one_turn() -> Pair:
        return best(work, 40), _peer_seconds("create", 30)

    ours, theirs = fastest(one_turn() for _ in range(TURNS))
    return at_most(
        2.0,
        "Vm.create and close on kvm",
        ours / theirs,
        "times the C library",
        note=f"{ours * 1e3:.2f} ms, C {theirs * 1e3:.2f} ms; {os.cpu_count()} CPUs",
    )


def _restore() -> Result:
    seconds = []
    with Vm.create(_guests(), "guest_writes", backend="kvm", memory=8 << 20) as vm:
        vm.run()
        state = vm.snapshot()
        for _ in range(200):
            vm.run()
            start = time.process_time()
            vm.restore(state)
            seconds.append(time.process_time() - start)
    return at_most(
        0.3,
        "restore after 2 written pages of 8 MiB",
        min(seconds) * 1e3,
        "ms",
        note="registers, pool and events too",
    )
