"""Snapshots, forks and schedules: the same state gives the same run, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from guests import DATA, bare
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GUESTS

import labkit as lk


@cache
def program() -> lk.Program:
    return lk.Program.load(GUESTS / "two_vcpus.elf")


def everything(vm: lk.Vm) -> tuple[Any, ...]:
    """All that a guest could tell two VMs apart by, and the history that the host keeps; addresses of the host left out."""
    memory = [bytes(slot.data) for slot in vm.memory.slots]
    return (
        memory,
        [dict(v.regs.all()) for v in vm.vcpus],
        [v.step_count for v in vm.vcpus],
        vm.step,
        vm.pool.held_since.tolist(),
        [(e.step, e.vcpu, e.kind, e.what) for e in vm.log.entries],
    )


def run(vm: lk.Vm, insns: int) -> None:
    if insns and any(v.state in ("not started", "running") for v in vm.vcpus):
        end = vm.step + insns
        while vm.step < end and any(v.state in ("not started", "running") for v in vm.vcpus):
            vm.run(end - vm.step)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3000),
    st.integers(1, 3000),
    st.sampled_from(["round_robin:7", "round_robin:100", "random:3:40", "sequential"]),
)
def test_that_a_restored_vm_runs_as_it_ran_before(first: int, second: int, schedule: str) -> None:
    with lk.Vm.create(program(), nr_vcpus=2, schedule=schedule) as vm:
        run(vm, first)
        state = vm.snapshot()
        run(vm, second)
        once = everything(vm)
        vm.restore(state)
        run(vm, second)
        assert everything(vm) == once


def test_that_a_fork_goes_its_own_way_and_knows_its_slots(backend: str) -> None:
    vm = lk.Vm.create(program(), backend=backend)
    vm.run()
    twin = vm.fork()
    assert everything(twin) == everything(vm)
    here = everything(vm)
    twin.run_until_done()
    assert everything(vm) == here and twin.pool.held[0].hva_ok
    vm.run_until_done()
    assert everything(vm) == everything(twin)


def test_that_a_snapshot_of_another_shape_is_refused(backend: str) -> None:
    state = lk.Vm.create(program(), backend=backend).snapshot()
    with pytest.raises(lk.InvalidState, match="a machine with 1 vCPUs"):
        lk.Vm.create(program(), nr_vcpus=2, backend=backend).restore(state)


@pytest.mark.parametrize("designs", [("pool", None), (None, "pool")])
def test_that_a_snapshot_without_the_pool_of_a_vm_is_refused(
    designs: tuple[str | None, ...],
) -> None:
    one, two = (lk.Vm.create(program(), ucall=design) for design in designs)
    with pytest.raises(lk.InvalidState, match="ucall pool, and the snapshot is of one with"):
        one.restore(two.snapshot())


@pytest.mark.parametrize("arch", ["riscv64", "s390x"])
def test_that_a_snapshot_with_other_page_tables_is_refused(arch: str) -> None:
    one = lk.Vm.create(lk.Program.load(GUESTS / "riscv64" / "hello.elf"), paging="riscv/SV39_4K")
    two = lk.Vm.create(lk.Program.load(GUESTS / arch / "hello.elf"))
    with pytest.raises(
        lk.InvalidState,
        match="riscv/SV39_4K and protect=None, a ucall pool, and the snapshot is of one with",
    ):
        one.restore(two.snapshot())


def test_that_a_pending_mmio_read_survives_a_snapshot(backend: str) -> None:
    source = '#include "labkit.h"\nvoid guest_code(void) { GUEST_SYNC(*(volatile uint32_t *)0x10000000); GUEST_DONE(); }'
    program = lk.Program.compile(source)
    vm = lk.Vm.create(program, backend=backend)
    vm.machine.space.map(0x10000000, 0x10000000)
    assert vm.run().end == "mmio"  # type: ignore[union-attr]
    state = vm.snapshot()
    for value in (0x1234, 0x5678):
        vm.restore(state)
        vm.vcpus[0].complete(value)
        assert vm.run().args[1] == value  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "schedule", ["round_robin:1", "round_robin:13", "random:1:30", "random:2:30", "sequential"]
)
def test_that_a_named_schedule_repeats_and_every_vcpu_is_done(schedule: str, backend: str) -> None:
    logs = []
    for _ in range(2):
        with lk.Vm.create(program(), nr_vcpus=3, schedule=schedule, backend=backend) as vm:
            logs.append([tuple(uc) for uc in vm.run_until_done()])
            assert {v.state for v in vm.vcpus} == {"done"}
    assert logs[0] == logs[1]


def test_that_two_vms_keep_their_own_copy_of_a_global(backend: str) -> None:
    program = lk.Program.load(GUESTS / "two_vms.elf")
    one, two = lk.Vm.create(program, backend=backend), lk.Vm.create(program, backend=backend)
    two.write_guest_global("secret", 20)
    assert [vm.run().args[1] for vm in (one, two)] == [1, 20]  # type: ignore[union-attr]
    one.run_until_done()
    assert (one.sync_global_from_guest("secret"), two.sync_global_from_guest("secret")) == (2, 20)
    two.host_globals["secret"] = 7
    two.sync_global_to_guest("secret")
    assert two.sync_global_from_guest("secret") == 7


def test_that_a_fork_has_a_door_of_its_own() -> None:
    with (
        lk.Vm.create(
            lk.Program.compile('#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }')
        ) as vm,
        vm.fork() as twin,
    ):
        twin.door.number += 1
        assert twin.vcpus[0].run().end == "pio" and vm.vcpus[0].run().cmd == "DONE"


def test_that_what_an_in_returns_can_still_be_said_after_a_restore(guest: Any) -> None:
    vm = guest(f"in al, 0x80; mov rdi, {DATA}; mov dx, 0x80; insb; hlt")
    for _ in range(2):
        vm.vcpus[0].run()
        state = vm.snapshot()
        for value in (7, 9):
            vm.restore(state)
            vm.vcpus[0].complete(value)
    vm.vcpus[0].run()
    assert vm.vcpus[0].regs.rax & 255 == 9 and vm.read(DATA, 1) == b"\x09"


def test_that_a_read_from_a_hole_in_a_later_iteration_is_asked_for_once_when_a_snapshot_comes_between(
    guest: Any,
) -> None:
    hole, at = 0x7_0000_0000, 0x6000_0000
    vm = guest(f"mov rsi, {at}; mov rdi, {DATA}; mov ecx, 4; rep movsb; hlt")
    vm.machine.space.map(at, hole)
    for i in range(4):
        assert vm.vcpus[0].run().gpa == hole + i
        vm.vcpus[0].complete(i + 1)
        if i == 2:
            vm.restore(vm.snapshot())
    assert vm.vcpus[0].run().end == "halted" and vm.read(DATA, 4) == bytes([1, 2, 3, 4])


def test_that_the_rest_of_an_access_in_parts_comes_behind_a_restore_too(kvm: Path) -> None:
    vm = bare("mov rdi, 0x60000ffc; mov qword ptr [rdi], 1; hlt", backend="kvm")
    vm.machine.space.map(0x6000_0000, 0x7_0000_0000, 2)
    assert vm.vcpus[0].run().gpa == 0x7_0000_0FFC
    vm.restore(vm.snapshot())
    assert vm.vcpus[0].run().gpa == 0x7_0000_1000 and vm.vcpus[0].run().end == "halted"
    vm.close()
