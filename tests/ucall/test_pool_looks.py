"""Looking at the pool: a snapshot is what was there, and changes nothing of what is said later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from paths import GUESTS

import labkit as lk
from labkit.ucall.abi import BITMAP_BYTES, UCALL_SIZE, UcallCmd
from labkit.ucall.snapshot import PoolSnapshot

HOST_SLOT = 9


@pytest.fixture
def vm() -> lk.Vm:
    """A vCPU that holds slot 0 for its first SYNC."""
    vm = lk.Vm.create(lk.Program.load(GUESTS / "hello.elf"))
    vm.run()
    return vm


def set_bits(vm: lk.Vm, *slots: int) -> None:
    """Let the host say which slots are taken."""
    bits = sum(1 << slot for slot in slots)
    vm.memory.write(vm.host_pool.gpa, bits.to_bytes(BITMAP_BYTES, "little"))


def facts(pool: PoolSnapshot) -> list[object]:
    """All that a snapshot says, but for what it is marked against."""
    arrays = (pool.in_use, pool.owner, pool.held_since, pool.uses, pool.done, pool.leaked)
    return [pool.step, *(array.tolist() for array in arrays), list(pool.held)]


def test_that_changes_are_marked_against_the_snapshot_that_is_named(vm: lk.Vm) -> None:
    first = vm.pool
    set_bits(vm, 0, HOST_SLOT)
    second = vm.pool
    marked = second.since(first)
    assert marked.changed.nonzero()[0].tolist() == [HOST_SLOT]
    assert marked.changed_since == first.step and facts(marked) == facts(second)
    assert not second.since(second).changed.any()
    assert np.array_equal(first.since(second).changed, marked.changed)


def test_that_a_look_of_the_pool_marks_nothing_by_itself(vm: lk.Vm) -> None:
    vm.host_pool.snapshot(vm.step, frozenset())
    set_bits(vm, HOST_SLOT)
    now = vm.host_pool.snapshot(vm.step, frozenset())
    assert not now.changed.any() and now.changed_since is None


def test_that_pools_of_two_sizes_are_not_compared(vm: lk.Vm) -> None:
    with pytest.raises(lk.InvalidState, match="512 slots cannot be compared with one of 1024"):
        vm.pool.since(replace(vm.pool, nr_slots=1024))


def test_that_two_looks_say_the_same(vm: lk.Vm) -> None:
    set_bits(vm, 0, HOST_SLOT)
    assert facts(vm.pool) == facts(vm.pool)


@pytest.mark.parametrize("looks", [False, True])
def test_that_who_took_a_slot_does_not_depend_on_whether_somebody_looked(
    vm: lk.Vm, looks: bool
) -> None:
    written = vm.step
    set_bits(vm, 0, HOST_SLOT)
    if looks:
        assert vm.pool.held_since[HOST_SLOT] == written
    vm.run()
    slot = vm.pool.held[1]
    assert (slot.index, slot.vcpu, slot.since) == (HOST_SLOT, None, written), "the host took it"


@pytest.mark.parametrize("looks", [False, True])
def test_that_uses_are_those_of_the_writes_and_not_of_the_looks(vm: lk.Vm, looks: bool) -> None:
    for taken in ((0, HOST_SLOT), (0,)) * 3:
        set_bits(vm, *taken)
        if looks:
            _ = vm.pool
    assert vm.pool.uses[HOST_SLOT] == 3 and vm.pool.held[1].state == "free"


@pytest.mark.parametrize("looks", [False, True])
def test_that_a_look_in_the_middle_of_a_run_does_not_own_what_a_vcpu_took(looks: bool) -> None:
    vm = lk.Vm.create(lk.Program.load(GUESTS / "hello.elf"))
    pool, vcpu = vm.host_pool, vm.vcpus[0]
    while not pool.bits()[0]:
        vcpu.cpu.run(1)  # the host is told of nothing, as while vCPUs run on other threads
    if looks:
        seen = pool.snapshot(vm.step, frozenset())
        assert (seen.owner[0], seen.held_since[0], seen.uses[0]) == (-1, vm.step, 1)
    vm.run()
    assert (pool.owner[0], pool.uses[0], pool.since[0]) == (0, 1, vm.step)


def test_that_a_snapshot_keeps_what_the_slots_held(vm: lk.Vm) -> None:
    pool = vm.pool
    at = pool.gpa + BITMAP_BYTES
    before = vm.memory.read(at, UCALL_SIZE)
    vm.memory.write(at, bytes(UCALL_SIZE))
    slot = pool.held[0]
    assert slot.cmd == "SYNC" and slot.hva_ok and before[0] == UcallCmd.SYNC


def test_that_used_slots_are_a_sequence(vm: lk.Vm) -> None:
    set_bits(vm, 0, HOST_SLOT)
    held = vm.pool.held
    assert len(held) == 2 and held[:1] == (held[0],) and held == (held[0], held[1])
    assert held == vm.pool.held and held != [] and repr(held) == repr(tuple(held))
    with pytest.raises(IndexError):
        _ = held[2]
