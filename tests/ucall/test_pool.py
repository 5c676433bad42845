"""The ucall pool from the host's side: what a guest hands over is looked up and never followed."""

from __future__ import annotations

from functools import cache

import pytest
from guests import go, lacks
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GUESTS

import labkit as lk
from labkit.engines.exits import BudgetExit
from labkit.ucall.abi import (
    BITMAP_BYTES,
    HEADER_SIZE,
    NR_SLOTS,
    OFFSET_BUFFER,
    OFFSET_HVA,
    UCALL_BUFFER_LEN,
    UCALL_SIZE,
    UcallCmd,
)
from labkit.ucall.calls import BadUcallExit, Ucall

MAGIC = (1 << 64) - 1
SOURCE = """#include "labkit.h"
extern struct ucall_header *ucall_pool;
void guest_code(uint64_t value) { ucall_arch_do_ucall(value); GUEST_DONE(); }
void guest_busy(uint64_t vcpu)
{
	for (uint64_t i = 0; i < 4; i++) {
		GUEST_SYNC_ARGS(i, vcpu, 0, 0, 0);
		GUEST_PRINTF("%lu of %lu", i, vcpu);
	}
	GUEST_DONE();
}
void guest_forgets(uint64_t vcpu)
{
	for (int i = 0; test_and_set_bit(i, ucall_pool->in_use); i++) ;
	GUEST_DONE();
}
void guest_waits(uint64_t vcpu) { for (;;) cpu_relax(); }
"""


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def vm(engine):
    with lk.Vm.create(program(), nr_vcpus=2, **engine) as vm:
        yield vm


def hand_over(vm: lk.Vm, value: int) -> Ucall | BadUcallExit:
    """Let vCPU 0 leave with this value as its ucall."""
    vm.vcpus[0].set_entry("guest_code")
    vm.vcpus[0].args_set(value)
    return go(vm.vcpus[0], 1000)


def take(
    vm: lk.Vm, index: int, cmd: int = UcallCmd.SYNC, args: tuple[int, ...] = (), buffer: bytes = b""
) -> int:
    """Fill and mark a slot as a guest would; returns its hva."""
    pool, at = vm.pool, BITMAP_BYTES + UCALL_SIZE * index
    bit = vm.memory.read(pool.gpa + index // 8, 1)[0] | 1 << index % 8
    vm.memory.write(pool.gpa + index // 8, bytes([bit]))
    vm.memory.write(pool.gpa + at, b"".join(word.to_bytes(8, "little") for word in (cmd, *args)))
    vm.memory.write(pool.gpa + at + OFFSET_BUFFER, buffer)
    return pool.hva + at


BAD = [  # a value made of the VM, what is wrong with it
    (lambda vm: vm.pool.hva + BITMAP_BYTES + UCALL_SIZE * 3, "stale"),
    (lambda vm: vm.pool.hva + BITMAP_BYTES + 8, "unaligned"),
    (lambda vm: take(vm, 5) + 1, "unaligned"),
    (lambda vm: vm.pool.hva, "foreign"),
    (lambda vm: vm.pool.hva + HEADER_SIZE, "foreign"),
    (lambda vm: vm.gpa2hva(0x2000), "foreign"),
    (lambda vm: vm.pool.gva + BITMAP_BYTES, "foreign"),
    (lambda vm: vm.pool.gpa, "foreign"),
    (lambda vm: lk.Vm.create(program()).pool.hva + BITMAP_BYTES, "foreign"),
    (lambda vm: id(vm), "foreign"),
    (lambda vm: 1, "foreign"),
    (lambda vm: 0x4141414141414141, "foreign"),
    (lambda vm: MAGIC - 1, "foreign"),
    (lambda vm: 1 << 63, "foreign"),
    (lambda vm: MAGIC, "exhausted"),
]


@pytest.mark.parametrize("value, kind", BAD)
def test_that_a_value_that_is_no_slot_in_use_becomes_an_event(vm, value, kind):
    value = value(vm)
    came = hand_over(vm, value)
    assert isinstance(came, BadUcallExit) and (came.value, came.kind, came.vcpu) == (value, kind, 0)
    event = vm.events.iloc[-1]
    assert event.kind == "bad-ucall"
    assert f"vCPU 0: {kind} ucall" in event.what and "at ucall_arch_do_ucall" in event.what
    assert go(vm.vcpus[0], 1000).cmd == "DONE", "and the guest can go on"


@settings(max_examples=60, deadline=None)
@given(value=st.integers(1, MAGIC))
def test_that_no_value_at_all_is_followed(value):
    with lk.Vm.create(program()) as vm:
        assert isinstance(hand_over(vm, value), BadUcallExit)


def test_that_nothing_is_handed_over_with_zero_and_without_a_pool(engine):
    with lk.Vm.create(program(), ucall=None, **engine) as vm:
        assert hand_over(vm, 0) == Ucall("NONE", (0,) * 7, None, 0, None, vm.step)
        assert hand_over(vm, 5).kind == "no pool"
        with pytest.raises(lk.InvalidState, match="without a ucall pool"):
            _ = vm.pool


@pytest.mark.parametrize("arch", ["arm64", "riscv64", "s390x"])
def test_that_a_guest_without_a_pool_reaches_its_host_by_every_architectures_exit(arch):
    program = lk.Program.load(GUESTS / arch / "hello.elf")
    with lk.Vm.create(program, ucall=None) as vm:
        assert vm.run(5000).kind == "no pool"


@pytest.mark.parametrize("index", [0, 1, 63, 64, 511])
def test_that_any_slot_is_found_by_its_address_and_read_by_position(vm, index):
    hva = take(vm, index, UcallCmd.SYNC, (1, 2, 3, 4, 5, 6, MAGIC))
    came = hand_over(vm, hva)
    assert (came.cmd, came.slot, came.text) == ("SYNC", index, None)
    assert came.args == (1, 2, 3, 4, 5, 6, MAGIC)
    pool = vm.pool
    assert [slot.index for slot in pool.held] == [index]
    assert pool.held[0].hva == hva and pool.in_use.sum() == 1


TEXTS = [
    (b"hello\0rest", "hello"),
    (b"", ""),
    (b"x" * UCALL_BUFFER_LEN, "x" * UCALL_BUFFER_LEN),
    (b"\xfe\xffok\0", "\ufffd\ufffdok"),
    (b"\xe2\x82", "\ufffd"),
    ("grüße\0".encode(), "grüße"),
]


@pytest.mark.parametrize("cmd", [UcallCmd.PRINTF, UcallCmd.UNHANDLED, UcallCmd.ABORT])
@pytest.mark.parametrize("raw, text", TEXTS)
def test_that_a_text_without_end_ends_with_its_buffer(vm, cmd, raw, text):
    came = hand_over(vm, take(vm, 7, cmd, (MAGIC, 0x1234, 99), raw))
    assert (came.cmd, came.text) == (cmd.name, text)
    if cmd == UcallCmd.ABORT:
        assert (came.file, came.line, came.expr) == (None, 99, None), (
            "strings come from the program, not from where a guest points"
        )


def test_that_a_number_that_is_no_command_is_shown_as_such(vm):
    came = hand_over(vm, take(vm, 0, 0x17, (1,), b"old text\0"))
    assert (came.cmd, came.text) == ("0x17?", None) and vm.pool.held[0].cmd == "0x17?"


def test_that_an_overwritten_hva_is_reported_and_not_used(vm):
    hva = take(vm, 2)
    vm.memory.write(vm.pool.gpa + BITMAP_BYTES + 2 * UCALL_SIZE + OFFSET_HVA, b"A" * 8)
    slot = vm.pool.held[0]
    assert not slot.hva_ok and slot.hva == 0x4141414141414141
    assert hand_over(vm, hva).slot == 2 and hand_over(vm, 0x4141414141414141).kind == "foreign"


def test_that_an_overwritten_pool_can_still_be_looked_at(vm):
    vm.memory.write(vm.pool.gpa, b"\xff" * HEADER_SIZE)
    pool = vm.pool
    assert pool.in_use.all() and len(pool.held) == len(pool.slots) == NR_SLOTS
    assert not any(slot.hva_ok for slot in pool.held)
    assert hand_over(vm, pool.hva + BITMAP_BYTES).cmd == f"{MAGIC:#x}?"


def by_steps(vm: lk.Vm):
    """Every slot taken, as single steps meet it: (slot, vCPU, since, step)."""
    before = vm.pool.in_use
    while any(vcpu.state != "done" for vcpu in vm.vcpus):
        vm.run(1)
        now = vm.host_pool.bits()
        for slot in (now & ~before).nonzero()[0].tolist():
            yield slot, vm.host_pool.owner[slot], vm.host_pool.since[slot], vm.step
        before = now


@pytest.mark.parametrize(
    "schedule", ["round_robin:1", "round_robin:5", "round_robin:1000", "random:2:40", "sequential"]
)
def test_that_since_and_owner_of_a_run_are_those_of_single_steps(backend, schedule):
    taken = {}
    with lk.Vm.create(
        program(), "guest_busy", nr_vcpus=3, schedule=schedule, backend=backend
    ) as vm:
        for slot, owner, since, step in by_steps(vm):
            assert since == step
            taken[since] = (slot, owner)
    with lk.Vm.create(
        program(), "guest_busy", nr_vcpus=3, schedule=schedule, backend=backend
    ) as vm:
        while any(vcpu.state != "done" for vcpu in vm.vcpus):
            came = vm.run(100_000 if lacks(vm, "pool_history") else None)
            held = next(slot for slot in vm.pool.held if slot.index == came.slot)
            assert taken[held.since] == (held.index, held.vcpu) == (came.slot, came.vcpu)
            assert held.since < came.step


def test_that_uses_are_counted_and_states_told_apart(vm):
    vm.vcpus[0].set_entry("guest_busy")
    vm.vcpus[1].set_entry("guest_forgets")
    vm.run_until_done()
    pool = vm.pool
    if not lacks(vm, "pool_history"):
        assert pool.uses.sum() == 8 + 1 + 2
    assert pool.leaked.sum() == 1
    assert sorted(slot.state for slot in pool.held) == ["done", "done", "leaked"]


def test_that_changes_are_marked_against_another_look(vm):
    first = vm.pool
    take(vm, 9)
    second = vm.pool
    assert second.since(first).changed.nonzero()[0].tolist() == [9]
    assert not vm.pool.since(second).changed.any()
    assert second.held[0].vcpu is None, "the host wrote it"


def test_that_512_dones_fill_the_pool_for_ever(engine):
    with lk.Vm.create(lk.Program.load(GUESTS / "leak.elf"), **engine) as vm:
        for index in range(NR_SLOTS):
            came = vm.vcpus[0].run()
            assert (came.cmd, came.slot) == ("DONE", index)
            vm.vcpus[0].set_entry("guest_code")
        came = vm.vcpus[0].run()
        assert came.kind == "exhausted" and "512 of 512" in str(came) and vm.pool.done.all()
        counts = vm.privilege != "user" or not lacks(vm, "step_user")
        with pytest.raises(lk.GuestCrashed, match="exhausted"):
            vm.vcpus[0].set_entry("guest_code")
            vm.vcpus[0].run_until_done(10_000 if counts else None)


def test_that_a_forked_vm_knows_its_parent_s_addresses(vm):
    hva = take(vm, 3)
    twin = vm.fork()
    assert hand_over(twin, hva).slot == 3
    its_own = twin.gpa2hva(twin.pool.gpa) + BITMAP_BYTES
    assert hand_over(twin, its_own).kind == "foreign"


@settings(max_examples=40, deadline=None)
@given(data=st.binary(min_size=UCALL_SIZE, max_size=UCALL_SIZE), index=st.integers(0, NR_SLOTS - 1))
def test_that_any_bytes_in_a_slot_decode_to_something(data, index):
    with lk.Vm.create(program()) as vm:
        hva = take(vm, index)
        vm.memory.write(vm.pool.gpa + BITMAP_BYTES + UCALL_SIZE * index, data)
        came = hand_over(vm, hva)
        assert isinstance(came, Ucall) and came.slot == index
        assert repr(came) and vm.events.what.iloc[-1]
        assert len(vm.pool.held) == 1


def test_that_a_guest_which_never_speaks_is_stopped_by_its_budget(vm):
    vm.vcpus[1].set_entry("guest_waits")
    if vm.privilege == "user" and lacks(vm, "step_user"):
        with pytest.raises(lk.NotAvailable, match="no step_user"):
            vm.vcpus[1].run(5000)
        return
    assert vm.vcpus[1].run(5000) == BudgetExit(5000) and not vm.pool.in_use.any()
