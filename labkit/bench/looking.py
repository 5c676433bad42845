"""Scanning page tables, importing, and what a VM weighs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from labkit.arch import find_arch
from labkit.bench.measure import Result, at_most, best
from labkit.machine.memory import Memory
from labkit.machine.space import AddressSpace
from labkit.paging.scan import scan

__all__ = ["results"]

NR_LEAVES = 8600
BASE = 1 << 30  # the gva of the first of them
# in a process of its own each
WEIGH = r"""
import json
import labkit as lk
def rss():
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1])
program = lk.Program.compile('#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }')
lk.Vm.create(program).close()
before = rss()
vm = lk.Vm.create(program, memory=8 << 20)
vm.run_until_done()
print(json.dumps((rss() - before) / 1024))
"""
IMPORT = "import time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"


def results() -> Iterator[Result]:
    """Every figure of this file."""
    yield _scan()
    yield _import()
    yield _weight()


def _scan() -> Result:
    space = _scattered()
    table = scan(space.memory.read, space.mode, space.root_gpa)
    seconds = best(lambda: scan(space.memory.read, space.mode, space.root_gpa), 30)
    one_walk = best(lambda: space.walk(BASE), 30)
    walks = f"as single walks {one_walk * len(table) * 1e3:.0f} ms"
    return at_most(
        1.0,
        f"full scan of {len(table)} leaves",
        seconds * 1e3,
        "ms",
        note=f"{len(table.tables)} tables; {walks}",
    )


def _scattered() -> AddressSpace:
    """An address space with NR_LEAVES pages, in runs with holes between them."""
    memory = Memory()
    memory.add(0, 64 << 20)
    space = AddressSpace(memory, find_arch("x86_64").mode)
    rng = np.random.default_rng(1)
    left = NR_LEAVES
    gva = BASE
    while left:
        count = min(left, int(rng.integers(20, 200)))
        gfn = int(rng.integers(0, 8192))
        space.map(gva, gfn << 12, count)
        left -= count
        gva += count + int(rng.integers(1, 300)) << 12
    return space


def _import() -> Result:
    seconds = min(float(_python(IMPORT.format("labkit"))) for _ in range(5))
    python = min(float(_python(IMPORT.format("json, argparse"))) for _ in range(3))
    return at_most(
        0.4,
        "import labkit, warm",
        seconds,
        "s",
        note=f"json and argparse alone {python * 1e3:.0f} ms",
    )


def _weight() -> Result:
    return at_most(
        40.0,
        "a VM of 8 MiB",
        float(json.loads(_python(WEIGH))),
        "MiB RSS",
        note="over a process that made and closed one",
    )


def _python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout
