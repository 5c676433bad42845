"""Snapshots, restores and forks are bit-exact: what follows is what followed before."""

from __future__ import annotations

from functools import cache

import pytest
from guests import CODE, DATA, bare
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.engines.exits import HaltExit, HypercallExit, MmioExit, PioExit

HOLE_GVA, HOLE = 0x7000_0000, 0xC000_0000
BUSY = """#include "labkit.h"
static volatile uint64_t nr_faults, sum;
static void skip(struct ex_regs *regs) { nr_faults++; regs->rip += 2; }
void guest_code(uint64_t vcpu)
{
	set_exception_handler(UD_VECTOR, skip);
	for (uint64_t i = 0; i < 6; i++) {
		uint32_t eax = 0, ebx, ecx = 0, edx;
		asm volatile("ud2; cpuid; rdtsc; rdrand %%rbx" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
		memset((void *)&sum, eax, sizeof(sum));
		GUEST_PRINTF("%lu %lx %lu\\n", i, sum + ebx, nr_faults);
		GUEST_SYNC_ARGS(i, vcpu, eax, ebx, edx);
	}
	GUEST_DONE();
}
"""


@cache
def busy() -> lk.Program:
    return lk.Program.compile(BUSY)


def everything(vm: lk.Vm) -> dict[str, object]:
    """All that a VM is, as far as anybody can see."""
    pool = vm.pool if vm.host_pool else None
    return {
        "step": vm.step,
        "regs": [dict(vcpu.regs.all()) for vcpu in vm.vcpus],
        "states": [vcpu.state for vcpu in vm.vcpus],
        "memory": [slot.data[:] for slot in vm.memory.slots],
        "events": [(e.step, e.vcpu, e.kind, e.what) for e in vm.log.entries],
        "pool": pool
        and [
            list(getattr(pool, name))
            for name in ("in_use", "owner", "held_since", "uses", "done", "leaked", "held")
        ],
        "schedule": vm.schedule.save(),
        "steps": [vcpu.step_count for vcpu in vm.vcpus],
    }


def go(vm: lk.Vm, insns: int) -> None:
    """Run that many instructions whatever comes back, as long as anybody can run."""
    end = vm.step + insns
    while vm.step < end and any(vcpu.state in ("not started", "running") for vcpu in vm.vcpus):
        vm.run(end - vm.step)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9000),
    st.integers(0, 9000),
    st.sampled_from(["round_robin:1", "round_robin:97", "random:3:50", "sequential"]),
)
def test_that_what_follows_a_restore_is_what_followed_the_snapshot(before, after, schedule):
    with lk.Vm.create(busy(), nr_vcpus=2, schedule=schedule) as vm:
        go(vm, before)
        there, state = everything(vm), vm.snapshot()
        go(vm, after)
        wanted = everything(vm)
        for _ in range(2):
            vm.restore(state)
            assert everything(vm) == there
            go(vm, after)
            assert everything(vm) == wanted


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 9000), after=st.integers(0, 9000))
def test_that_a_fork_goes_on_like_its_parent_and_neither_disturbs_the_other(before, after):
    with lk.Vm.create(busy(), nr_vcpus=2, schedule="round_robin:31") as vm:
        go(vm, before)
        twin, there = vm.fork(), everything(vm)
        go(twin, after)
        assert everything(vm) == there
        go(vm, after)
        assert everything(vm) == everything(twin)
        twin.write(twin.machine.stacks[0], b"other")
        assert vm.read(vm.machine.stacks[0], 5) != b"other"
        twin.close()


def pending(text: str, **regs: int) -> lk.Vm:
    """A guest that stands at an exit which waits for an answer."""
    vm = bare(text)
    vm.machine.space.map(HOLE_GVA, HOLE, 1)
    vm.vcpus[0].cpu.set_regs({"rbx": HOLE_GVA, "rdx": 0x99} | regs)
    vm.came = vm.vcpus[0].run(20)
    return vm


PENDING = [
    ("mov rax,[rbx]; hlt", MmioExit(HOLE, 8, False, 0)),
    ("add rax,[rbx]; hlt", MmioExit(HOLE, 8, False, 0)),
    ("xor eax,eax; in eax,dx; hlt", PioExit(0x99, 4, False, 0)),
    ("vmmcall; hlt", HypercallExit(0, (HOLE_GVA, 0, 0x99, DATA))),
]


@pytest.mark.parametrize("how", ["restore", "fork"])
@pytest.mark.parametrize("text, came", PENDING)
def test_that_an_answer_can_be_given_anew_after_going_back(text, came, how):
    vm = pending(text)
    assert vm.came == came
    state, answers = vm.snapshot(), []
    for answer in (7, 9, None):
        twin = vm.fork() if how == "fork" else vm
        if twin is vm:
            vm.restore(state)
        if answer is not None:
            twin.vcpus[0].complete(answer)
        assert twin.vcpus[0].run(20) == HaltExit()
        answers.append(twin.vcpus[0].regs.rax)
    assert answers == [7, 9, (1 << 64) - 1000 if "vm" in text else 0]


def test_that_an_answer_given_before_the_snapshot_is_part_of_it():
    vm = pending("movups xmm0,[rbx]; hlt")
    vm.vcpus[0].complete(5)
    state = vm.snapshot()
    for _ in range(2):
        assert vm.vcpus[0].run(9) == MmioExit(HOLE + 8, 8, False, 0)
        vm.vcpus[0].complete(6)
        assert vm.vcpus[0].run(9) == HaltExit() and vm.vcpus[0].regs.xmm0 == 6 << 64 | 5
        vm.restore(state)


def test_that_stores_which_nobody_has_seen_yet_are_part_of_it():
    vm = pending("movups [rbx],xmm0; hlt", xmm0=6 << 64 | 5)
    assert vm.came == MmioExit(HOLE, 8, True, 5)
    state = vm.snapshot()
    for _ in range(2):
        assert (
            vm.vcpus[0].run(9) == MmioExit(HOLE + 8, 8, True, 6)
            and vm.vcpus[0].run(9) == HaltExit()
        )
        vm.restore(state)


def test_that_ins_is_answered_where_it_stood():
    vm = pending("mov rcx,2; rep insb; hlt")
    state = vm.snapshot()
    for answer in (3, 4):
        vm.vcpus[0].complete(answer)
        assert vm.read(DATA + 0x100, 1) == bytes([answer])
        vm.restore(state)
    assert vm.vcpus[0].run(9) == PioExit(0x99, 1, False, 0) and vm.vcpus[0].run(9) == HaltExit()


def test_that_code_and_tables_written_since_are_undone():
    vm = bare("1: inc r8; nop; nop; jmp 1b")
    state = vm.snapshot()
    vm.write(CODE + 3, b"\xf4")
    assert vm.vcpus[0].run(9) == HaltExit()
    vm.machine.space.builder.unmap(DATA, 1)
    vm.restore(state)
    assert vm.vcpus[0].step(20) is None and vm.vcpus[0].regs.r8 == 5 and vm.read(DATA, 1) == b"\0"


def test_that_a_long_run_is_counted_to_its_end_and_can_be_left_by_restore():
    vm = bare("mov ecx,10000000; 1: dec ecx; jnz 1b; hlt")
    state = vm.snapshot()
    assert vm.vcpus[0].run() == HaltExit() and vm.step == 2 + 2 * 10_000_000
    vm.restore(state)
    assert vm.vcpus[0].step(3) is None and vm.step == 3


def test_that_a_snapshot_of_another_shape_is_refused():
    one, two = bare("nop"), bare("nop", nr_vcpus=2)
    with pytest.raises(lk.InvalidState, match="2 vCPUs"):
        one.restore(two.snapshot())
    with pytest.raises(lk.InvalidState, match="not a CPU state"):
        one.vcpus[0].cpu.restore(b"LKU0" + bytes(99))
    with pytest.raises(lk.LabError):
        one.vcpus[0].cpu.restore(two.vcpus[0].cpu.save()[:-8])


def test_that_allocations_after_a_restore_are_those_from_before():
    vm = bare("nop")
    state, first = vm.snapshot(), [vm.alloc(5000), vm.alloc(1)]
    vm.restore(state)
    assert [vm.alloc(5000), vm.alloc(1)] == first
