"""SNP guests on the engine: every access goes by the RMP, PVALIDATE, page-state changes, and a host that takes pages away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from sev_sample import ghcb_page as ghcb
from sev_sample import once

import labkit as lk
from labkit.engines.exits import InternalErrorExit, MemoryFaultExit, ShutdownExit, VmgexitExit
from labkit.errors import InvalidState
from labkit.explore.attacks import flip_c_bit
from labkit.sev.rmp import PAGE_NOT_VALIDATED, RmpEntry

SOURCE = r"""
#include "labkit.h"
#define VMGEXIT() __asm__ volatile("rep; vmmcall" : : : "memory")
static volatile uint64_t seen, where, times;
uint8_t page[2 * 4096] __aligned(4096);
static uint64_t pvalidate(void *gva, uint64_t large, uint64_t validate)
{
	uint64_t status = (uint64_t)gva;
	uint8_t same;

	__asm__ volatile(".byte 0xf2, 0x0f, 0x01, 0xff; setc %1" : "+a"(status), "=q"(same) : "c"(large), "d"(validate) : "memory", "cc");
	return (uint32_t)status | (uint64_t)same << 32;
}
static uint64_t page_state(uint64_t gpa, uint64_t op)
{
	wrmsr(MSR_AMD64_SEV_ES_GHCB, op << 52 | gpa | 0x14);
	VMGEXIT();
	return rdmsr(MSR_AMD64_SEV_ES_GHCB);
}
static void accept(struct ex_regs *regs)
{
	seen = regs->error_code, where = get_cr2(), times++;
	GUEST_ASSERT_EQ((uint32_t)pvalidate((void *)(where & PAGE_MASK), 0, 1), 0);
}
void guest_touch(uint64_t offset)
{
	set_exception_handler(VC_VECTOR, accept);
	page[offset] = 7;
	GUEST_SYNC(1);
	page[offset]++;
	GUEST_SYNC4(page[offset], seen, where - (uint64_t)page, times);
	GUEST_DONE();
}
void guest_validate(uint64_t offset, uint64_t large, uint64_t validate)
{
	GUEST_SYNC1(pvalidate(page + offset, large, validate));
	GUEST_SYNC1(pvalidate(page + offset, large, validate));
	GUEST_DONE();
}
void guest_give_up(void)
{
	set_exception_handler(VC_VECTOR, accept);
	page[0] = 1;
	pvalidate(page, 0, 0);
	page[0]++;
	GUEST_SYNC3(page[0], seen, times);
	GUEST_DONE();
}
void guest_change(uint64_t gpa)
{
	set_exception_handler(VC_VECTOR, accept);
	page[0] = 7;
	GUEST_SYNC1(page_state(gpa, 2));
	GUEST_SYNC1(page_state(gpa, 1));
	GUEST_SYNC2(page[0] == 7, seen);
	GUEST_SYNC1(page_state(gpa, 3));
	GUEST_SYNC1(page_state(1ul << 39, 1));
	GUEST_DONE();
}
void guest_read(void) { GUEST_SYNC1(*(volatile uint8_t *)page); GUEST_DONE(); }
void guest_fetch(void) { GUEST_SYNC(0); __asm__ volatile(".balign 4096; nop; .globl far_code; far_code: nop"); GUEST_DONE(); }
void guest_ghcb(uint64_t gpa) { for (;;) { wrmsr(MSR_AMD64_SEV_ES_GHCB, gpa); VMGEXIT(); } }
void guest_register(uint64_t gpa)
{
	wrmsr(MSR_AMD64_SEV_ES_GHCB, gpa | GHCB_MSR_REG_GPA_REQ);
	VMGEXIT();
	guest_ghcb(gpa);
}
void guest_fault(void) { GUEST_SYNC(0); __asm__ volatile("ud2"); }
void guest_code(void) { GUEST_SYNC(0); page[0] = 1; GUEST_SYNC(page[0]); GUEST_DONE(); }
"""
BUDGET = 100_000
Make = Callable[..., lk.Vm]


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes launched SNP VMs, with arguments for the entry function, and closes them."""
    made = []

    def vm(entry: str = "guest_code", *args: int, protect: str = "snp", **options: Any) -> lk.Vm:
        made.append(lk.Vm.create(program(), entry, protect=protect, launch=False, **options))
        made[-1].vcpus[0].args_set(*args or (0,))
        made[-1].gpa_of_page = made[-1].gva2gpa(program().symbol("page").gva)
        made[-1].launch()
        return made[-1]

    yield vm
    for each in made:
        each.close()


def set_state(vm: Any, gpa: int, state: str) -> None:
    """What a host, or another guest's owner, makes of a page."""
    asid = vm.guest.vm.asid
    vm.guest.host.rmp.set(
        gpa,
        {
            "taken": RmpEntry(),
            "invalid": RmpEntry(True, asid, gpa),
            "another's": RmpEntry(True, asid + 1, gpa, validated=True),
            "elsewhere": RmpEntry(True, asid, gpa + 4096, validated=True),
            "locked": RmpEntry(True, asid, gpa, immutable=True),
            "good": RmpEntry(True, asid, gpa, validated=True),
        }[state],
    )


def run(vm: lk.Vm) -> Any:
    """The next exit that is not an answered VMGEXIT."""
    came = once(vm.vcpus[0], BUDGET)
    while isinstance(came, VmgexitExit):
        came = once(vm.vcpus[0], BUDGET)
    return came


@pytest.mark.parametrize("offset", [0, 5, 4096])
def test_that_a_page_without_validation_is_vc_until_the_guest_accepts_it(
    make: Make, offset: int
) -> None:
    vm = make("guest_touch", offset)
    set_state(vm, vm.gpa_of_page + (offset & -4096), "invalid")
    assert run(vm).cmd == "SYNC"
    assert run(vm).args[:4] == (8, PAGE_NOT_VALIDATED, offset, 1) and run(vm).cmd == "DONE"


@pytest.mark.parametrize("state", ["taken", "another's", "elsewhere", "locked"])
def test_that_a_page_that_is_not_the_guests_leaves_for_the_host(make: Make, state: str) -> None:
    vm = make()
    run(vm)
    set_state(vm, vm.gpa_of_page, state)
    steps = vm.vcpus[0].step_count
    came = run(vm)
    assert isinstance(came, MemoryFaultExit) and (came.gpa, came.is_private, came.end) == (
        vm.gpa_of_page,
        True,
        "memory-fault",
    )
    assert came.error_code == 0x5_8000_0001 | 2 and "nested page fault" in vm.explain(came)
    again = once(vm.vcpus[0], BUDGET)
    assert again == came and vm.vcpus[0].step_count < steps + 500
    set_state(vm, vm.gpa_of_page, "good")
    assert run(vm).args[1] == 1 and run(vm).cmd == "DONE"


def test_that_a_shared_write_to_an_owned_page_is_refused_and_a_read_sees_ciphertext(
    make: Make,
) -> None:
    vm = make("guest_read")
    flip_c_bit(vm, program().symbol("page").gva)
    assert run(vm).args[0] == vm.memory.read(vm.gpa_of_page, 1)[0]
    vm = make()
    run(vm)
    flip_c_bit(vm, program().symbol("page").gva)
    came = run(vm)
    assert (
        isinstance(came, MemoryFaultExit)
        and (came.gpa, came.is_private) == (vm.gpa_of_page, False)
        and came.error_code == 0x1_8000_0003
    )


def test_that_a_page_that_was_shared_is_closed_to_shared_writes_once_it_is_owned(
    make: Make,
) -> None:
    vm = make("guest_touch")
    flip_c_bit(vm, program().symbol("page").gva)
    set_state(vm, vm.gpa_of_page, "taken")
    assert run(vm).cmd == "SYNC" and vm.memory.read(vm.gpa_of_page, 1) == b"\x07"
    set_state(vm, vm.gpa_of_page, "good")
    came = run(vm)  # it reads first, and what it then knows of the page must not let it write
    assert isinstance(came, MemoryFaultExit) and not came.is_private


@pytest.mark.parametrize(("state", "what"), [("taken", MemoryFaultExit), ("invalid", ShutdownExit)])
def test_that_page_tables_are_the_guests_own_too(make: Make, state: str, what: type) -> None:
    vm = make()
    run(vm)
    for step in vm.machine.space.walk(program().symbol("page").gva).steps[:1]:
        set_state(vm, step.entry_gpa, state)
    assert isinstance(run(vm), what)  # a #VC whose handler cannot be reached either


def test_that_code_is_fetched_from_the_guests_own_pages(make: Make) -> None:
    vm = make("guest_fetch")
    run(vm)
    gva = program().symbol("far_code").gva
    gpa = vm.machine.space.walk(gva).gpa
    assert gpa is not None
    set_state(vm, gpa & -4096, "taken")
    came = run(vm)
    assert (
        isinstance(came, MemoryFaultExit)
        and came.gpa == gpa & -4096
        and came.is_private
        and vm.vcpus[0].pc == gva - 1
    )
    set_state(vm, gpa & -4096, "good")
    assert run(vm).cmd == "DONE"


def test_that_an_exception_waits_for_its_stack(make: Make) -> None:
    vm = make("guest_fault")
    run(vm)
    stack = vm.machine.space.walk(vm.machine.vcpus[0].read_reg("rsp") - 64).gpa
    assert stack is not None
    set_state(vm, stack & -4096, "taken")
    came = run(vm)
    assert isinstance(came, MemoryFaultExit) and came.gpa == stack & -4096
    set_state(vm, stack & -4096, "good")
    came = run(vm)
    assert came.cmd == "UNHANDLED" and came.args[0] == 6


@pytest.mark.parametrize(
    ("args", "first", "second"),
    [
        ((0, 0, 1), 1 << 32, 1 << 32),
        ((0, 0, 0), 0, 1 << 32),
        ((0, 1, 1), 6, 6),
    ],
)
def test_that_pvalidate_says_how_it_went(
    make: Make, args: tuple[int, int, int], first: int, second: int
) -> None:
    vm = make("guest_validate", *args)
    assert [run(vm).args[0] for _ in range(2)] == [first, second]
    assert vm.guest.host.rmp.entry(vm.gpa_of_page).validated == bool(args[2])


def test_that_a_page_that_the_guest_gave_up_is_gone_at_once(make: Make) -> None:
    assert run(make("guest_give_up")).args[:3] == (2, PAGE_NOT_VALIDATED, 1)


def test_that_there_is_no_pvalidate_without_snp(make: Make) -> None:
    came = run(make("guest_validate", 0, 0, 1, protect="sev-es"))
    assert came.cmd == "UNHANDLED" and came.args[0] == 6


def test_that_pvalidate_of_nothing_faults(make: Make) -> None:
    came = run(make("guest_validate", 1 << 30, 0, 1))
    assert came.cmd == "UNHANDLED" and came.args[0] == 14


def test_that_a_page_changes_hands_and_must_be_validated_anew(make: Make) -> None:
    vm = make("guest_change", launch_arguments(program()))
    gpa = vm.gpa_of_page
    assert run(vm).args[0] == 0x15 and not vm.guest.host.rmp.entry(gpa).assigned
    vm.memory.write(gpa, b"the host may write here now")
    assert run(vm).args[0] == 0x15 and vm.guest.host.rmp.entry(gpa).state == "GUEST_INVALID"
    with pytest.raises(InvalidState, match="host write"):
        vm.memory.write(gpa, b"x")
    assert run(vm).args[:2] == (0, PAGE_NOT_VALIDATED)
    assert [run(vm).args[0] for _ in range(2)] == [0x8000_0000_0000_0015] * 2 and run(
        vm
    ).cmd == "DONE"


def launch_arguments(prog: lk.Program) -> int:
    """Where the page will lie: a VM of the same program tells."""
    with lk.Vm.create(prog, "guest_change", protect="snp", launch=False) as vm:
        return vm.gva2gpa(prog.symbol("page").gva)


def test_that_a_ghcb_must_be_registered_first(make: Make) -> None:
    for entry, what in (("guest_ghcb", InternalErrorExit), ("guest_register", VmgexitExit)):
        vm = lk.Vm.create(program(), entry, protect="snp", launch=False)
        gpa = vm.gva2gpa(vm.alloc_shared(4096))
        vm.vcpus[0].args_set(gpa)
        vm.launch()
        vm.memory.write(gpa, ghcb(0x89))
        came = (
            once(vm.vcpus[0], BUDGET)
            if entry == "guest_ghcb"
            else [once(vm.vcpus[0], BUDGET) for _ in range(2)][1]
        )
        assert isinstance(came, what) and ("never registered" in str(came) or "WBINVD" in str(came))
        vm.close()


@pytest.mark.parametrize(
    ("first", "last", "entry", "error"),
    [
        (0, 0, 2 << 52, 0),
        (0, 0, 2 << 52 | 2, 1 << 32 | 2),
        (0, 0, 1 << 56 | 2 << 52, 1 << 32 | 2),
        (0, 300, 0, 1 << 32 | 1),
        (0, 253, 0, 1 << 32 | 1),
        (0, 0, 2 << 52 | 1 << 51, 0x100 << 32),
    ],
)
def test_that_a_list_of_page_states_is_carried_out_or_refused(
    make: Make, first: int, last: int, entry: int, error: int
) -> None:
    vm = lk.Vm.create(program(), "guest_register", protect="snp", launch=False)
    gpa, page = vm.gva2gpa(vm.alloc_shared(4096)), vm.gva2gpa(program().symbol("page").gva)
    vm.vcpus[0].args_set(gpa)
    vm.launch()
    block = bytearray(ghcb(0x8000_0010, sw_scratch=gpa + 0x800))
    block[0x800:0x810] = (
        first.to_bytes(2, "little")
        + last.to_bytes(6, "little")
        + (entry | page).to_bytes(8, "little")
    )
    vm.memory.write(gpa, bytes(block))
    once(vm.vcpus[0], BUDGET)
    assert isinstance(once(vm.vcpus[0], BUDGET), VmgexitExit)
    assert int.from_bytes(vm.memory.read(gpa + 0x3A0, 8), "little") == error
    assert vm.guest.host.rmp.entry(page).assigned == bool(error)
    assert vm.memory.read(gpa + 0x800, 2)[0] == (not error), "the header says which entry is next"
    vm.close()


def test_that_a_guest_sees_how_far_its_list_of_page_states_has_come(make: Make) -> None:
    vm = lk.Vm.create(program(), "guest_register", protect="snp", launch=False)
    gpa, page = vm.gva2gpa(vm.alloc_shared(4096)), vm.gva2gpa(program().symbol("page").gva)
    vm.vcpus[0].args_set(gpa)
    vm.launch()
    block, entries = (
        bytearray(ghcb(0x8000_0010, sw_scratch=gpa + 0x800)),
        (2 << 52 | page, 3 << 52 | page, 2 << 52 | 1 << 51),
    )
    block[0x800:0x808] = (2 << 16).to_bytes(8, "little")  # entries 0 to 2
    for i, entry in enumerate(entries):
        block[0x808 + 8 * i : 0x810 + 8 * i] = entry.to_bytes(8, "little")
    vm.memory.write(gpa, bytes(block))
    for _ in range(2):
        once(vm.vcpus[0], BUDGET)
    after = vm.memory.read(gpa + 0x800, 32)
    assert after[0] == 2 and [after[8 + 8 * i] for i in range(3)] == [1, 1, 0], (
        "the last one is of no memory"
    )
    vm.close()


def test_that_a_private_page_is_no_ghcb(make: Make) -> None:
    vm = make("guest_register", launch_arguments(program()))
    assert [once(vm.vcpus[0], BUDGET) for _ in range(2)][1].answer.startswith("no answer")


def test_that_owners_come_back_with_a_snapshot(make: Make) -> None:
    vm = make()
    run(vm)
    state = vm.snapshot()
    set_state(vm, vm.gpa_of_page, "taken")
    with vm.fork() as twin:
        assert isinstance(run(twin), MemoryFaultExit)
    vm.restore(state)
    assert run(vm).args[1] == 1
    set_state(vm, vm.gpa_of_page, "taken")
    assert vm.guest.host.rmp.on_change is not None


def test_that_plain_sev_knows_no_owners(make: Make) -> None:
    vm = make(protect="sev-es")
    vm.guest.host.rmp.set(vm.gpa_of_page, RmpEntry(True, 99))
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ["SYNC", "SYNC", "DONE"]


def test_that_the_encryption_map_says_of_a_page_what_the_rmp_says(make: Make) -> None:
    vm = make("guest_change", launch_arguments(program()))
    gpa, states = vm.gpa_of_page, list[tuple[str, str]]()
    for _ in range(3):
        states.append((vm.guest.host.rmp.entry(gpa).state, vm.encryption_map().at(gpa).memory.name))
        run(vm)
    set_state(vm, gpa, "taken")
    assert states == [
        ("GUEST_VALID", "PRIVATE"),
        ("HYPERVISOR", "SHARED"),
        ("GUEST_INVALID", "UNVALIDATED"),
    ]
    assert "The RMP assigns it to no guest" in vm.encryption_map().at(gpa).why, (
        "it was launched, and the host took it back"
    )


def test_that_page_state_changes_are_no_part_of_the_launch(make: Make) -> None:
    vm = make("guest_change", launch_arguments(program()))
    before, state = vm.launch_progress(), vm.snapshot()
    run(vm)
    assert vm.launch_progress() == before
    vm.restore(state)
    assert vm.launch_progress() == before
