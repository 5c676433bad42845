"""How time grows with size: each size twice the one before, until a second is reached.

The exponent is the slope of the line through the logarithms of the larger sizes: 1 is linear, and
more than 1.1 means that somebody's afternoon ends early.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import labkit as lk
from labkit.bench.measure import Result, at_most

__all__ = ["exponent", "results"]

ENOUGH = 1.0  # CPU seconds
MOST = 1.1  # exponent
FITTED = 4  # sizes, the largest ones: small ones cost what does not grow
GUEST = """#include "labkit.h"
void guest_code(void) { for (;;) GUEST_SYNC(1); }
"""

# (size) -> the work to be timed, prepared for that size
Prepare = Callable[[int], Callable[[], object]]


def results() -> Iterator[Result]:
    """The exponents of what grows during an afternoon."""
    program = lk.Program.compile(GUEST)
    lk.Vm.create(program).run()
    yield _grown("ucalls", partial(_ucalls, program), 1000, 1 << 16)
    yield _grown("vm.events after ucalls", partial(_events, program), 1000, 1 << 15)
    yield _grown("vm.alloc of pages", partial(_alloc, program), 256, 1 << 15)
    yield _grown("page_table().df of pages", partial(_pages, program), 1024, 1 << 15)
    yield _grown("vCPUs of a VM", partial(_vcpus, program), 8, 512)
    yield _constant("10 x vm.look() after ucalls", partial(_look, program), 1000, 1 << 15)


def _ucalls(program: lk.Program, size: int) -> Callable[[], object]:
    vm = lk.Vm.create(program)
    return lambda: [vm.run() for _ in range(size)]


def _said(program: lk.Program, size: int) -> lk.Vm:
    vm = lk.Vm.create(program)
    for _ in range(size):
        vm.run()
    return vm


def _events(program: lk.Program, size: int) -> Callable[[], object]:
    vm = _said(program, size)
    return lambda: vm.events


def _look(program: lk.Program, size: int) -> Callable[[], object]:
    vm = _said(program, size)
    vm.look()  # the first one reads the program's lines
    return lambda: [vm.look() for _ in range(10)]


def _alloc(program: lk.Program, size: int) -> Callable[[], object]:
    vm = lk.Vm.create(program, memory=(size << 12) + (64 << 20))
    return lambda: [vm.alloc(4096) for _ in range(size)]


def _pages(program: lk.Program, size: int) -> Callable[[], object]:
    vm = lk.Vm.create(program, memory=(size << 12) + (64 << 20))
    vm.alloc(size << 12)
    return lambda: vm.page_table().df


def _vcpus(program: lk.Program, size: int) -> Callable[[], object]:
    return lambda: lk.Vm.create(program, nr_vcpus=size)


def _times(prepare: Prepare, first: int, last: int) -> list[tuple[int, float]]:
    """(size, CPU seconds), the size doubled until ENOUGH is reached, or the last one."""
    found = []
    size = first
    while size <= last:
        work = prepare(size)
        gc.collect()
        start = time.process_time()
        work()
        found.append((size, time.process_time() - start))
        if found[-1][1] > ENOUGH:
            break
        size *= 2
    return found


def exponent(times: Sequence[tuple[int, float]]) -> float:
    """The slope of log(seconds) over log(size), by least squares."""
    points = [(math.log(size), math.log(max(seconds, 1e-6))) for size, seconds in times]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def _grown(name: str, prepare: Prepare, first: int, last: int) -> Result:
    return _result(MOST, name, _times(prepare, first, last))


def _constant(name: str, prepare: Prepare, first: int, last: int) -> Result:
    return _result(0.3, name, _times(prepare, first, last))


def _result(most: float, name: str, times: Sequence[tuple[int, float]]) -> Result:
    said = ", ".join(f"{size}: {seconds * 1e3:.1f} ms" for size, seconds in times[-3:])
    return at_most(most, name, exponent(times[-FITTED:]), "power of the size", note=said)
