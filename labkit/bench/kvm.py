"""The kvm engine against the C library of the kernel's selftests on the same KVM, both built and run here."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from labkit.bench.engine import program
from labkit.bench.measure import Result, best
from labkit.errors import NotAvailable
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["results"]

KERNEL = Path(__file__).resolve().parents[2] / "tests" / "kernel"
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
    program = Path(tempfile.mkdtemp(prefix="labkit-bench-")) / "peer"
    done = subprocess.run(
        [KERNEL / "peer.sh", built.stdout.splitlines()[-1], program], capture_output=True, text=True
    )
    if done.returncode:
        raise NotAvailable(f"the C peer does not build: {done.stderr[-500:]}")
    return program


def _theirs(what: str, count: int) -> float:
    """CPU seconds of one round in C."""
    done = subprocess.run([_peer(), what, str(count)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) * 1e-9


def _against(what: str, count: int, ours: Callable[[], object], rounds: int) -> tuple[float, float]:
    """CPU seconds of one round, here and in C, the best of some turns."""
    pairs = [(best(ours, 3 if rounds > 1 else 40) / rounds, _theirs(what, count)) for _ in range(4)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def results() -> Iterator[Result]:
    """Every figure of this file."""
    _peer()
    with Vm.create(_guests(), "guest_pio", backend="kvm") as vm:
        emulated = not next(c.have for c in vm.capabilities if c.name == "native_speed")
        yield _rounds("bare PIO exits with registers", "pio", 10_000, 0.8, _pio(vm))
    yield _syncs("kernel", 1.0)
    if emulated:  # elsewhere both rings are as fast as the CPU
        yield _syncs("user", 3.5)
    yield _create()
    yield _restore()


def _pio(vm: Vm) -> Callable[[], object]:
    cpu = vm.vcpus[0].cpu

    def rounds() -> None:
        for _ in range(10_000):
            cpu.run()
            cpu.read_reg("rdi")

    return rounds


def _syncs(privilege: str, target: float) -> Result:
    with Vm.create(program(), "guest_ucalls", backend="kvm", privilege=privilege) as vm:
        run = vm.vcpus[0].run

        def rounds() -> None:
            for _ in range(2000):
                run()

        return _rounds(
            f"GUEST_SYNC round trips, {privilege} privilege", "sync", 2000, target, rounds
        )


def _rounds(name: str, what: str, count: int, target: float, work: Callable[[], object]) -> Result:
    ours, theirs = _against(what, count, work, count)
    return Result(
        name,
        theirs / ours,
        "of the C library",
        target,
        True,
        f"{1e-3 / ours:.1f} k/s, C {1e-3 / theirs:.1f} k/s",
    )


def _create() -> Result:
    def work() -> None:
        Vm.create(program(), "guest_plain", backend="kvm").close()

    ours, theirs = _against("create", 30, work, 1)
    return Result(
        "Vm.create and close on kvm",
        ours / theirs,
        "times the C library",
        2.0,
        False,
        f"{ours * 1e3:.2f} ms, C {theirs * 1e3:.2f} ms; {os.cpu_count()} CPUs",
    )


def _restore() -> Result:
    with Vm.create(_guests(), "guest_writes", backend="kvm", memory=8 << 20) as vm:
        vm.run()
        state, seconds = vm.snapshot(), []
        for _ in range(200):
            vm.run()
            start = time.process_time()
            vm.restore(state)
            seconds.append(time.process_time() - start)
    return Result(
        "restore after 2 written pages of 8 MiB",
        min(seconds) * 1e3,
        "ms",
        0.3,
        False,
        "registers, pool and events too",
    )
