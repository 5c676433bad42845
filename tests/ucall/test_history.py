"""The history of a pool: every slot that was taken, handed over, given back."""

from __future__ import annotations

import pandas as pd
import pytest
from paths import GUESTS

import labkit as lk


@pytest.fixture
def vm(backend):
    with lk.Vm.create(GUESTS / "two_vcpus.elf", nr_vcpus=2, backend=backend) as vm:
        yield vm


def test_that_every_ucall_stands_between_a_taking_and_a_giving_back(vm):
    ucalls = vm.run_until_done()
    history = vm.pool_history
    said = history[history.event == "ucall"]
    assert said.cmd.tolist() == [ucall.cmd for ucall in ucalls]
    assert said.text.tolist() == [ucall.text for ucall in ucalls]
    for slot, events in history.groupby("slot"):
        words = events.event.tolist()
        if not sees_every_taking(vm):
            # What was given back and taken again between two exits is not seen.
            words = [
                word for word, before in zip(words, ["", *words], strict=False) if word != before
            ]
        assert words == (["taken", "ucall", "given back"] * len(words))[: len(words)], slot


def sees_every_taking(vm):
    """Whether the engine tells the step of a vCPU's last locked instruction."""
    return vm.backend == "unicorn"


def test_that_it_says_what_the_pool_says(vm):
    vm.run_until_done()
    taken = vm.pool_history.query("event == 'taken'")
    counts = taken.groupby("slot").size()
    uses = vm.pool.slots.uses
    assert counts.to_dict() == uses[uses > 0].to_dict()
    assert list(vm.pool_history.columns) == ["step", "vcpu", "slot", "event", "cmd", "args", "text"]


def test_that_the_host_has_no_number():
    with lk.Vm.create(GUESTS / "two_vcpus.elf") as vm:
        vm.write("in_use[0]", (1 << 5).to_bytes(8, "little"))
        (row,) = vm.pool_history.itertuples()
        assert (row.slot, row.event) == (5, "taken")
        assert pd.isna(row.vcpu)


def test_that_a_snapshot_brings_the_history_back():
    with lk.Vm.create(GUESTS / "two_vcpus.elf") as vm:
        vm.run()
        before, state = vm.pool_history, vm.snapshot()
        vm.run()
        assert len(vm.pool_history) > len(before)
        vm.restore(state)
        assert vm.pool_history.equals(before)
        assert vm.fork().pool_history.equals(before)


def test_that_a_vm_without_a_pool_says_so():
    refused = pytest.raises(lk.InvalidState, match="without a ucall pool")
    with lk.Vm.create(GUESTS / "hello.elf", ucall=None) as vm, refused:
        _ = vm.pool_history
