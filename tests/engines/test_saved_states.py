"""A saved CPU state is checked before it is believed: wrong bytes are an error, never a crash."""

from __future__ import annotations

import json
import os
import random

import pytest
from paths import GUESTS

import labkit as lk
from labkit.engines.unicorn.native.contexts import CONTEXT_HEAD, pack_state, unpack_state
from labkit.errors import InvalidState, LabError
from labkit.guest.program import Program

MANY = 20_000 if os.environ.get("LABKIT_TORTURE") else 300
ARCHES = ["x86_64", "arm64", "riscv64", "s390x"]
SOURCE = """#include "labkit.h"
void guest_code(void) { for (uint64_t i = 0;; i++) GUEST_SYNC(i); }
"""


@pytest.fixture(scope="module", params=ARCHES)
def vm(request):
    vm = lk.Vm.create(Program.compile(SOURCE, arch=request.param))
    vm.run()
    return vm


def outlives(work):
    """Whether a process that does this is still there afterwards."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_that_every_changed_byte_is_seen(vm):
    cpu = vm.vcpus[0].cpu
    state = cpu.save()
    chosen = random.Random(1)
    for at in [*range(32), *(chosen.randrange(len(state)) for _ in range(300))]:
        bad = bytearray(state)
        bad[at] ^= 1 << chosen.randrange(8)
        with pytest.raises(InvalidState):
            cpu.restore(bytes(bad))
    for size in (0, 3, 20, len(state) - 1):
        with pytest.raises(InvalidState):
            cpu.restore(state[:size])
    assert cpu.save() == state


def test_that_forged_states_end_no_process(vm):
    if vm.arch.name in ("riscv64", "s390x"):
        pytest.skip("QEMU asserts on words of these: SECURITY.md says so")
    cpu = vm.vcpus[0].cpu
    facts, context = unpack_state(cpu.save())
    chosen = random.Random(7)

    def try_many():
        for _ in range(MANY):
            bad = bytearray(context)
            for _ in range(chosen.choice((1, 2, 30))):
                bad[chosen.randrange(len(bad))] = chosen.randrange(256)
            try:
                cpu.restore(pack_state(facts, bytes(bad)))
                vm.vcpus[0].run(50)
                cpu.get_regs()
            except LabError:
                continue

    assert outlives(try_many)


def test_that_the_pointers_in_a_state_are_never_believed(vm):
    cpu = vm.vcpus[0].cpu
    state = cpu.save()
    facts, context = unpack_state(state)
    cpu.restore(pack_state(facts, b"\xff" * CONTEXT_HEAD + context[CONTEXT_HEAD:]))
    assert unpack_state(cpu.save())[1][CONTEXT_HEAD:] == context[CONTEXT_HEAD:]


@pytest.mark.parametrize(
    "change",
    [
        {"insns": None},
        {"mmio": [[1]]},
        {"mmio": 7},
        {"extra": {}},
        {"extra": None},
        {"arch": "vax"},
    ],
    ids=str,
)
def test_that_facts_that_do_not_fit_change_nothing(vm, change):
    cpu = vm.vcpus[0].cpu
    state = cpu.save()
    facts, context = unpack_state(state)
    bad = pack_state(json.dumps(json.loads(facts) | change).encode(), context)
    with pytest.raises(InvalidState):
        cpu.restore(bad)
    assert cpu.save() == state


def test_that_no_state_is_one_of_another_architecture():
    ours = lk.Vm.create(Program.load(GUESTS / "hello.elf")).vcpus[0].cpu
    other = lk.Vm.create(Program.compile(SOURCE, arch="arm64")).vcpus[0].cpu
    with pytest.raises(InvalidState):
        ours.restore(other.save())
