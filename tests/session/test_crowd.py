"""A crowd of threads that calls everything of a few VMs; who is refused tries something else.

`make stress` has it do so for ten minutes on each engine (LABKIT_STRESS, seconds).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from random import Random

import pytest

import labkit as lk

SECONDS = float(os.environ.get("LABKIT_STRESS", "4"))
SOURCE = """#include "labkit.h"
volatile uint64_t counter;
__attribute__((noinline)) void leaf(uint64_t v) { counter += v; GUEST_SYNC(v); }
void guest_code(uint64_t vcpu) { for (;;) leaf(vcpu + 1); }
"""


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


def press(vm: lk.Vm, act: str) -> None:
    """A click in a view, as a browser sends it."""
    widget = vm.show()
    widget._receive(widget, {"act": act}, [])
    widget.close()


# Whatever leaves the VM a whole one; what is drawn is a number of instructions.
CALLS: dict[str, Callable[[lk.Vm, int], object]] = {
    "run": lambda vm, n: vm.run(n),
    "vcpu.run": lambda vm, n: vm.vcpus[n % 2].run(n),
    "step": lambda vm, n: vm.vcpus[n % 2].step(),
    "step_line": lambda vm, n: vm.vcpus[n % 2].step_line(n + 100),
    "next_line": lambda vm, n: vm.vcpus[n % 2].next_line(n + 100),
    "finish": lambda vm, n: vm.vcpus[n % 2].finish(n + 100),
    "run_to": lambda vm, n: vm.vcpus[n % 2].run_to("leaf", n + 100),
    "stop": lambda vm, n: vm.stop(),
    "write": lambda vm, n: vm.write("counter", n.to_bytes(8, "little")),
    "memory.write": lambda vm, n: vm.memory.write(vm.gva2gpa(vm.gva_of("counter")), b"x"),
    "write_guest_global": lambda vm, n: vm.write_guest_global("counter", n),
    "sync_global_to_guest": lambda vm, n: vm.sync_global_to_guest("counter"),
    "sync_global_from_guest": lambda vm, n: vm.sync_global_from_guest("counter"),
    "break_at": lambda vm, n: vm.vcpus[n % 2].break_at("leaf"),
    "set_breakpoints": lambda vm, n: vm.vcpus[n % 2].set_breakpoints(set()),
    "set_entry": lambda vm, n: vm.vcpus[n % 2].set_entry("guest_code"),
    "restore": lambda vm, n: vm.restore(vm.snapshot()),
    "snapshot": lambda vm, n: vm.snapshot(),
    "fork": lambda vm, n: vm.fork().close(),
    "look": lambda vm, n: vm.look(n % 2),
    "vcpu.look": lambda vm, n: vm.vcpus[n % 2].look(),
    "pool": lambda vm, n: vm.pool,
    "pool_history": lambda vm, n: vm.pool_history,
    "events": lambda vm, n: vm.events,
    "page_table": lambda vm, n: vm.page_table().df,
    "memory_map": lambda vm, n: vm.memory_map(),
    "memory.read": lambda vm, n: vm.memory.read(4096, n),
    "read": lambda vm, n: vm.read("counter", 8),
    "registers": lambda vm, n: vm.vcpus[n % 2].regs.all(),
    "disassemble": lambda vm, n: vm.vcpus[n % 2].disassemble(),
    "backtrace": lambda vm, n: vm.vcpus[n % 2].backtrace(),
    "repr": lambda vm, n: repr((vm, vm.vcpus)),
    "click on step": lambda vm, n: press(vm, "step"),
    "click on run": lambda vm, n: press(vm, "run"),
    "click on stop": lambda vm, n: press(vm, "stop"),
    "click on end": lambda vm, n: press(vm, "end"),
}
NR_VMS, NR_THREADS = 3, 8


@pytest.fixture
def vms(backend: str) -> Iterator[list[lk.Vm]]:
    made = [
        lk.Vm.create(program(), nr_vcpus=2, backend=backend, privilege="kernel")
        for _ in range(NR_VMS)
    ]
    yield made
    for vm in made:
        vm.close()


def test_that_a_crowd_may_call_everything(vms: list[lk.Vm]) -> None:
    end = time.monotonic() + SECONDS
    errors: list[BaseException] = []
    done: dict[str, int] = dict.fromkeys(CALLS, 0)

    def use(seed: int) -> None:
        draw = Random(seed)
        names = cycle(draw.sample(list(CALLS), len(CALLS)))
        while time.monotonic() < end and not errors:
            name = next(names)
            try:
                CALLS[name](draw.choice(vms), draw.randint(1, 2000))
                done[name] += 1
            except lk.LabError:
                continue  # busy, a budget, nothing to finish: whatever it says in words
            except BaseException as err:
                err.add_note(name)
                errors.append(err)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(NR_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert [name for name, count in done.items() if not count] == []
    for vm in vms:
        vm.stop()
        while vm.running is not None:
            time.sleep(0.01)
        vm.vcpus[0].set_breakpoints(set())
        vm.vcpus[0].set_entry("guest_code")
        assert isinstance(vm.vcpus[0].run(), lk.Ucall)
        assert vm.step == sum(vcpu.step_count for vcpu in vm.vcpus)
