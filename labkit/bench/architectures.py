"""The other architectures: plain code against a bare engine of the same kind, ucalls and steps against x86-64's."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from functools import cache, partial

from labkit.arch import ARCHES
from labkit.bench.engine import GUEST, LOOPS
from labkit.bench.measure import Result, best, best_pair
from labkit.engines.unicorn.native.bare import open_twin
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["results"]

COUNT, ROUNDS = 2_000, 5
AS_X86 = 1 / 1.5


@cache
def _program(arch: str) -> Program:
    return Program.compile(GUEST, arch=arch, name="bench.c")


def _vm(arch: str, entry: str, argument: int) -> Vm:
    vm = Vm.create(_program(arch), entry)
    vm.vcpus[0].args_set(argument)
    return vm


def _plain(arch: str) -> tuple[float, float]:
    """Seconds of ours and of a bare engine, the best of some rounds with new VMs, as in engine.py."""
    rounds = []
    for _ in range(ROUNDS):
        vm = _vm(arch, "guest_plain", LOOPS // 2)
        slot, vcpu = vm.memory.slots[0], vm.machine.engine.vcpus[0]  # type: ignore[attr-defined]
        memory = mmap.mmap(-1, slot.size)
        memory[:] = slot.data[:]
        hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        twin = open_twin(vcpu, hva, slot.size, vm.gva_of("ucall_arch_do_ucall"))
        rounds.append(
            (best(vm.vcpus[0].run, 1), best(partial(twin.run, vm.gva_of("guest_plain")), 1))
        )
        twin.close()
        vm.close()
    return min(a for a, _ in rounds), min(b for _, b in rounds)


def _many(arch: str, entry: str, method: str) -> Callable[[], None]:
    vm = _vm(arch, entry, LOOPS)
    once = getattr(vm.vcpus[0], method)

    def work() -> None:
        for _ in range(COUNT):
            once()

    return work


def results() -> Iterator[Result]:
    """Every figure of this file."""
    first, *others = ARCHES
    for arch in others:
        ours, bare = _plain(arch)
        yield Result(
            f"{arch}: plain code, unbounded",
            bare / ours,
            "of bare Unicorn",
            0.9,
            True,
            f"{ours * 1e3:.0f} ms, bare {bare * 1e3:.0f} ms",
        )
        for name, entry, method in (
            ("ucall round trip", "guest_ucalls", "run"),
            ("stepping", "guest_plain", "step"),
        ):
            mine, theirs = best_pair(
                _many(arch, entry, method), _many(first, entry, method), ROUNDS
            )
            yield Result(
                f"{arch}: {name}",
                theirs / mine,
                f"of {first}'s",
                AS_X86,
                True,
                f"{COUNT / mine / 1e3:.1f} k/s, {first} {COUNT / theirs / 1e3:.1f} k/s",
            )
