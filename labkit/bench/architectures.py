"""The other architectures: plain code against a bare engine, ucalls and steps against x86-64's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

from labkit.arch import ARCHES
from labkit.bench.engine import GUEST, LOOPS
from labkit.bench.measure import Pair, Result, at_least, best, best_pair, fastest
from labkit.bench.peer import copied_memory
from labkit.engines.unicorn.native.bare import open_twin
from labkit.guest.program import Program
from labkit.lab import Vm

__all__ = ["results"]

CALLS, ROUNDS = 2_000, 5
AS_X86 = 1 / 1.5


def results() -> Iterator[Result]:
    """Every figure of this file."""
    first, *others = ARCHES
    for arch in others:
        yield _plain(arch)
        yield _against(first, arch, "ucall round trip", "guest_ucalls", "run")
        yield _against(first, arch, "stepping", "guest_plain", "step")


@cache
def _program(arch: str) -> Program:
    return Program.compile(GUEST, arch=arch, name="bench.c")


def _vm(arch: str, entry: str, argument: int) -> Vm:
    vm = Vm.create(_program(arch), entry)
    vm.vcpus[0].args_set(argument)
    return vm


def _plain(arch: str) -> Result:
    ours, bare = fastest(_plain_round(arch) for _ in range(ROUNDS))
    # It was 0.9 while a run without a budget went uncounted. Each block pays for the hook that
    # counts it: with blocks of 5 to 22 instructions as here 10 to 15 %, in an empty one up to 40 %.
    return at_least(
        0.8,
        f"{arch}: plain code, unbounded",
        bare / ours,
        "of bare Unicorn",
        note=f"{ours * 1e3:.0f} ms, bare {bare * 1e3:.0f} ms",
    )


def _plain_round(arch: str) -> Pair:
    """One run of ours and of a bare engine, with a new VM as in engine.py."""
    with _vm(arch, "guest_plain", LOOPS // 2) as vm:
        memory, hva = copied_memory(vm)
        vcpu = vm.machine.engine.vcpus[0]  # type: ignore[attr-defined]
        twin = open_twin(vcpu, hva, len(memory), vm.gva_of("ucall_arch_do_ucall"))
        ours = best(vm.vcpus[0].run, 1)
        bare = best(partial(twin.run, vm.gva_of("guest_plain")), 1)
        twin.close()
        return ours, bare


def _against(first: str, arch: str, what: str, entry: str, method: str) -> Result:
    """The same calls on one architecture and on the first."""
    ours, theirs = best_pair(_calls(arch, entry, method), _calls(first, entry, method), ROUNDS)
    return at_least(
        AS_X86,
        f"{arch}: {what}",
        theirs / ours,
        f"of {first}'s",
        note=f"{CALLS / ours / 1e3:.1f} k/s, {first} {CALLS / theirs / 1e3:.1f} k/s",
    )


def _calls(arch: str, entry: str, method: str) -> Callable[[], None]:
    vm = _vm(arch, entry, LOOPS)
    once = getattr(vm.vcpus[0], method)

    def work() -> None:
        for _ in range(CALLS):
            once()

    return work
