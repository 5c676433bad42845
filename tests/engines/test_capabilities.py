"""What engines say they can do: one vocabulary, a reason each, and what it says is so."""

from __future__ import annotations

import pytest

import labkit as lk
from labkit.hosts.selftests import HOSTED
from labkit.session.running import can

SHARED = {
    "step",
    "breakpoints",
    "snapshot",
    "deterministic",
    "exceptions",
    "triple_fault_vectors",
    "hypercalls",
    "cpuid",
    "msr_table",
    "parallel_vcpus",
    "native_speed",
    "protect",
}
SOURCE = """
#include "labkit.h"
void guest_code(uint64_t vcpu)
{
	uint32_t a, b, c, d;
	cpuid(7, &a, &b, &c, &d);
	GUEST_SYNC_ARGS(1, b, 0, 0, 0);
	GUEST_DONE();
}
"""


@pytest.fixture(scope="module")
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


def test_that_every_engine_declares_what_others_ask_for(backend: str) -> None:
    with lk.Vm.create_barebones(backend=backend) as vm:
        named = [capability.name for capability in vm.capabilities]
        assert len(set(named)) == len(named) and all(
            capability.why for capability in vm.capabilities
        )
        assert SHARED.union(*(hosted.needs for hosted in HOSTED)) <= set(named)


def test_that_a_guest_sees_the_vm_s_cpuid_where_the_engine_says_so(
    backend: str, program: lk.Program
) -> None:
    seen = []
    for privilege in ("kernel", "user"):
        with lk.Vm.create(program, backend=backend, privilege=privilege) as vm:
            seen.append(vm.run().args[2] == vm.cpu.leaf(7, 0)[1])  # type: ignore[union-attr]
            says = can(vm, "cpuid")
    assert all(seen) == says
