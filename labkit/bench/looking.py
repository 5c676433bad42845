"""Scanning page tables, importing, and what a VM weighs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from labkit.arch import find_arch
from labkit.bench.measure import Result, best
from labkit.machine.memory import Memory
from labkit.machine.space import AddressSpace
from labkit.paging.scan import scan

__all__ = ["results"]

LEAVES = 8600
WEIGH = r"""
import json, resource
import labkit as lk
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
program = lk.Program.compile('#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }')
lk.Vm.create(program).close()
before = rss()
vm = lk.Vm.create(program, memory=8 << 20)
vm.run_until_done()
print(json.dumps((rss() - before) / 1024))
"""
IMPORT = "import time; t = time.perf_counter(); import labkit; print(time.perf_counter() - t)"


def results() -> Iterator[Result]:
    """Every figure of this file."""
    yield _scan()
    seconds = min(float(_python(IMPORT)) for _ in range(5))
    yield Result(
        "import labkit, warm",
        seconds,
        "s",
        0.4,
        False,
        f"json and argparse alone {_startup() * 1e3:.0f} ms",
    )
    weight = float(json.loads(_python(WEIGH)))
    yield Result(
        "a VM of 8 MiB", weight, "MiB RSS", 40.0, False, "over a process that made and closed one"
    )


def _scan() -> Result:
    memory = Memory()
    memory.add(0, 64 << 20)
    space = AddressSpace(memory, find_arch("x86_64").mode)
    rng = np.random.default_rng(1)
    left, gva = LEAVES, 1 << 30
    while left:
        count = min(left, int(rng.integers(20, 200)))
        space.map(gva, int(rng.integers(0, 8192)) << 12, count)
        left, gva = left - count, gva + (count + int(rng.integers(1, 300)) << 12)
    table = scan(memory.read, space.mode, space.root_gpa)
    seconds = best(lambda: scan(memory.read, space.mode, space.root_gpa), 30)
    one = best(lambda: space.walk(1 << 30), 30)
    return Result(
        f"full scan of {len(table)} leaves",
        seconds * 1e3,
        "ms",
        1.0,
        False,
        f"{len(table.tables)} tables; as single walks {one * len(table) * 1e3:.0f} ms",
    )


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    ).stdout


def _startup() -> float:
    return min(float(_python(IMPORT.replace("labkit", "json, argparse"))) for _ in range(3))
