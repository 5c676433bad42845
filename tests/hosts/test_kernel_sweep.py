"""Every guest function of every x86 KVM selftest, run without its host half.

However it ends, that end has a name.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

import labkit as lk
from labkit.engines.exits import Exit
from labkit.ucall.calls import Ucall

BUDGET, EXITS, SECONDS = 300_000, 2_000, 20
ENDS = {
    "DONE",
    "ABORT",
    "shutdown",
    "halted",
    "internal-error",
    "budget",
    "bad-ucall",
    "pio",
    "mmio",
    "hypercall",
}


def guest_functions(program):
    return {
        name
        for name, symbol in program.symbols.items()
        if symbol.kind == "func" and "guest" in name and "." not in name
    }


def end_of(vm):
    """The last word of a guest that gets no answers, in at most BUDGET instructions."""
    for _ in range(EXITS):
        came = vm.run(BUDGET - vm.step)
        assert isinstance(came, Ucall | Exit)
        if vm.vcpus[0].state not in ("not started", "running") or vm.step >= BUDGET:
            break
    return came.cmd if isinstance(came, Ucall) else came.end


def checked_end(vm, who):
    """Run to the end; it must have a name, come in time, and leave what can be looked at."""
    started = time.monotonic()
    end = end_of(vm)
    assert end in ENDS or end.endswith("?") or end == "SYNC", (who, end)
    assert vm.step <= BUDGET and time.monotonic() - started < SECONDS, (who, end, vm.step)
    if end not in ("ABORT", "DONE"):
        assert repr(vm.look()) and vm.page_table().leaves.shape[0] and vm.events.shape[0] >= 0
    assert vm.pool.in_use.sum() <= 2
    return end


@pytest.mark.slow
def test_that_every_guest_function_of_every_binary_ends_with_a_typed_exit(selftests):
    paths = [
        path
        for folder in (selftests, selftests / "x86_64")
        for path in sorted(folder.iterdir())
        if path.is_file() and path.open("rb").read(4) == b"\x7fELF"
    ]
    programs = [lk.Program.load(path) for path in paths]
    common = set.intersection(*map(guest_functions, programs))  # the library's: once is enough
    ends = Counter()
    for program in programs:
        names = guest_functions(program)
        if program is not programs[0]:
            names -= common
        for name in sorted(names):
            with lk.Vm.create(program, name) as vm:
                ends[checked_end(vm, f"{name} of {program}")] += 1
    assert len(programs) > 70
    assert ends["DONE"] >= 5 and ends["budget"] >= 5 and ends["shutdown"] >= 1
