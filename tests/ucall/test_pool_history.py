"""What the host knows of the pool: owners, steps, leaks, and values that are no slot."""

from __future__ import annotations

import pytest
from paths import GUESTS

import labkit as lk
from labkit.ucall.calls import BadUcallExit

FORGETS = """#include "labkit.h"
struct ucall *ucall_alloc(void);
void guest_code(void) { ucall_alloc(); GUEST_SYNC(1); GUEST_DONE(); }
"""
HANDS_OVER = """#include "labkit.h"
void guest_code(uint64_t value) { ucall_arch_do_ucall(value); GUEST_DONE(); }
"""
COLUMNS = ["state", "vcpu", "since", "uses", "cmd", "args", "text", "gva", "gpa", "hva", "hva_ok"]


def vm_of(name: str, entry: str = "guest_code", **more: int) -> lk.Vm:
    return lk.Vm.create(lk.Program.load(GUESTS / f"{name}.elf"), entry, **more)  # type: ignore[arg-type]


def test_that_since_is_the_step_at_which_the_bit_was_set() -> None:
    ran, stepped = vm_of("hello"), vm_of("hello")
    for _ in range(3):
        ran.run()
        vcpu = stepped.vcpus[0]
        taken = -1
        while vcpu.step() is None:
            is_taken = stepped.read(stepped.pool.gva, 1)[0] != 0
            if not is_taken:
                taken = -1
            elif taken < 0:
                taken = stepped.step
        assert ran.step == stepped.step
        assert ran.pool.held_since[0] == stepped.pool.held_since[0] == taken


def test_that_done_is_held_and_what_a_done_vcpu_forgot_is_leaked() -> None:
    vm = lk.Vm.create(lk.Program.compile(FORGETS))
    vm.run()
    assert [slot.state for slot in vm.pool.held] == ["held", "held"]
    vm.run()
    assert [slot.state for slot in vm.pool.held] == ["leaked", "done"]
    assert vm.pool.uses[:2].tolist() == [1, 2]


def test_that_512_dones_fill_the_pool_for_ever() -> None:
    vm = vm_of("leak")
    vcpu = vm.vcpus[0]
    for slot in range(512):
        vcpu.set_entry("guest_code")
        assert vcpu.run().slot == slot  # type: ignore[union-attr]
    vcpu.set_entry("guest_code")
    came = vcpu.run()
    assert isinstance(came, BadUcallExit) and came.kind == "exhausted" and "512 of 512" in str(came)
    assert vm.pool.in_use.all() and vm.pool.done.all() and not vm.pool.leaked.any()


FORGED = {
    "foreign": lambda vm, other: 0x4141414141414141,
    "another": lambda vm, other: other.pool.hva + 64,
    "unaligned": lambda vm, other: vm.pool.hva + 65,
    "behind": lambda vm, other: vm.pool.hva + 64 + 512 * 1096,
    "bitmap": lambda vm, other: vm.pool.hva,
    "stale": lambda vm, other: vm.pool.hva + 64 + 1096 * 9,
    "exhausted": lambda vm, other: 2**64 - 1,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("foreign", "foreign"),
        ("another", "foreign"),
        ("unaligned", "unaligned"),
        ("behind", "foreign"),
        ("bitmap", "foreign"),
        ("stale", "stale"),
        ("exhausted", "exhausted"),
    ],
)
def test_that_a_value_that_is_no_slot_in_use_is_an_event_and_nothing_is_read(
    name: str, kind: str
) -> None:
    program = lk.Program.compile(HANDS_OVER)
    vm, other = lk.Vm.create(program), lk.Vm.create(program)
    vm.vcpus[0].args_set(FORGED[name](vm, other))
    came = vm.run()
    assert isinstance(came, BadUcallExit) and came.kind == kind
    event = vm.events.iloc[-1]
    assert event["kind"] == "bad-ucall" and f"{kind} ucall" in event["what"]
    assert vm.run().cmd == "DONE"  # type: ignore[union-attr]


def test_that_slots_is_a_table_of_all_512() -> None:
    vm = vm_of("hello")
    vm.run()
    frame = vm.pool.slots
    assert len(frame) == 512 and list(frame) == COLUMNS
    assert frame.loc[0, "state"] == "held" and frame.loc[0, "cmd"] == "SYNC"
    assert frame.loc[511, "state"] == "free"
    assert frame.loc[511, "hva"] == vm.pool.hva + 64 + 511 * 1096


def test_that_a_text_without_end_is_cut_and_a_command_without_name_keeps_its_number() -> None:
    uc = vm_of("bad", "guest_endless_text").run()
    assert len(uc.text) == 1024  # type: ignore[union-attr, arg-type]
    assert vm_of("bad", "guest_unknown_command").run().cmd == "0x17?"  # type: ignore[union-attr]


def test_that_a_run_s_changes_are_marked_against_the_snapshot_before_it() -> None:
    vm = vm_of("hello")
    before = vm.pool
    vm.run()
    now = vm.pool.since(before)
    assert now.changed.nonzero()[0].tolist() == [0] and now.changed_since == before.step == 0


def test_that_a_vm_without_pool_says_so() -> None:
    vm = lk.Vm.create(lk.Program.load(GUESTS / "hello.elf"), ucall=None)
    with pytest.raises(lk.InvalidState, match="without a ucall pool"):
        _ = vm.pool
