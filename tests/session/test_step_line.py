"""Stepping by line in a long loop ends with its budget, and with Ctrl-C at once."""

from __future__ import annotations

import signal
import threading
import time

import pytest

import labkit as lk

LOOP = """#include "labkit.h"
void guest_code(void)
{
    volatile uint64_t i = 0;
    for (;;) i++;
}
"""


@pytest.fixture
def vcpu():
    vm = lk.Vm.create(lk.Program.compile(LOOP))
    vm.vcpus[0].run(200)
    return vm.vcpus[0]


def test_that_a_loop_on_one_line_ends_with_the_budget(vcpu):
    before = vcpu.step_count
    with pytest.raises(lk.BudgetExceeded, match="3000 instructions and still no other"):
        vcpu.step_line(3000)
    assert vcpu.step_count == before + 3000


def test_that_ctrl_c_ends_it_at_once(vcpu):
    main = threading.main_thread().ident
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        vcpu.step_line(100_000_000)
    assert time.monotonic() - start < 2.0
    assert vcpu.step() is None
