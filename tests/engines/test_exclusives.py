"""Load-exclusive and store-exclusive as hardware has them, on the two architectures that know them."""

from __future__ import annotations

import pytest

import labkit as lk

SOURCE = """
#include "labkit.h"
volatile uint64_t word = 5, failed = 99, seen;
volatile uint64_t mirror __attribute__((aligned(4096)));
#if defined(__aarch64__)
#define LOAD(v, p) __asm__ volatile("ldxr %0, [%1]" : "=r"(v) : "r"(p) : "memory")
#define STORE(f, v, p) __asm__ volatile("stxr %w0, %1, [%2]" : "=&r"(f) : "r"(v), "r"(p) : "memory")
#else
#define LOAD(v, p) __asm__ volatile("lr.d %0, (%1)" : "=r"(v) : "r"(p) : "memory")
#define STORE(f, v, p) __asm__ volatile("sc.d %0, %1, (%2)" : "=&r"(f) : "r"(v), "r"(p) : "memory")
#endif
noinline void store(void)
{
	uint64_t f = 0;

	STORE(f, 7UL, &word);
	failed = f;
	GUEST_DONE();
}
void guest_take(void)
{
	uint64_t v;

	LOAD(v, &word);
	seen = v;
	store();
}
void guest_write(uint64_t value) { word = value; GUEST_DONE(); }
void guest_elsewhere(uint64_t value) { mirror = value; GUEST_DONE(); }
void guest_unaligned(void) { uint64_t v; LOAD(v, (char *)&word + 1); GUEST_DONE(); }
void guest_increment(void)
{
	uint64_t v, f;

	do {
		LOAD(v, &word);
		STORE(f, v + 1, &word);
	} while (f);
	GUEST_SYNC(v);
	GUEST_DONE();
}
"""


@pytest.fixture(params=["arm64", "riscv64"], scope="module")
def program(request: pytest.FixtureRequest) -> lk.Program:
    return lk.Program.compile(SOURCE, arch=request.param)


def between(program: lk.Program) -> lk.Vm:
    """A VM whose first vCPU stands between its load-exclusive and its store-exclusive."""
    vm = lk.Vm.create(program, "guest_take")
    vm.vcpus[0].break_at("store")
    vm.vcpus[0].run(1000)
    assert vm.vcpus[0].pc == program.symbol("store").gva and vm.sync_global_from_guest("seen") == 5
    return vm


def outcome(vm: lk.Vm) -> int:
    vm.vcpus[0].set_breakpoints(set())
    assert vm.vcpus[0].run(1000).cmd == "DONE"
    return vm.sync_global_from_guest("failed")


def test_that_a_store_exclusive_succeeds_when_nobody_wrote(program):
    assert outcome(between(program)) == 0


@pytest.mark.parametrize("value", [5, 6])
def test_that_it_fails_after_another_vcpu_s_write_be_it_of_the_same_value(program, value):
    vm = between(program)
    vm.add_vcpu("guest_write").args_set(value)
    assert vm.vcpus[1].run(1000).cmd == "DONE"
    assert outcome(vm) == 1 and vm.sync_global_from_guest("word") == value


def test_that_a_write_elsewhere_does_not_matter(program):
    vm = between(program)
    vm.add_vcpu("guest_elsewhere").args_set(5)
    assert vm.vcpus[1].run(1000).cmd == "DONE" and outcome(vm) == 0


def test_that_there_and_back_again_is_seen_too(program):
    vm = between(program)
    for value in (9, 5):
        vm.add_vcpu("guest_write").args_set(value)
        assert vm.vcpus[-1].run(1000).cmd == "DONE"
    assert outcome(vm) == 1


def test_that_an_exclusive_write_of_another_vcpu_counts(program):
    vm = between(program)
    vm.add_vcpu("guest_increment")
    assert vm.vcpus[1].run(1000).cmd == "SYNC" and outcome(vm) == 1


def test_that_the_host_s_writes_count(program):
    vm = between(program)
    vm.write_guest_global("word", 5)
    assert outcome(vm) == 1


@pytest.mark.parametrize("who", ["vcpu", "host", "nobody"])
@pytest.mark.parametrize("ran", [0, 2])
@pytest.mark.parametrize("how", ["fork", "restore"])
def test_that_a_monitor_is_part_of_a_snapshot(program, how, ran, who):
    vm = between(program)
    writer = vm.add_vcpu("guest_write")
    writer.args_set(5)
    writer.run(ran)
    state, twin = vm.snapshot(), vm.fork()
    assert writer.run(1000).cmd == "DONE" and outcome(vm) == 1
    vm.restore(state)
    vm = twin if how == "fork" else vm
    if who == "host":
        vm.write_guest_global("word", 5)
    assert who != "vcpu" or vm.vcpus[1].run(1000).cmd == "DONE"
    assert outcome(vm) == (who != "nobody")


def test_that_a_loop_can_be_stepped_unless_the_monitor_is_cleared_between_steps(program):
    """Kernel commit b3d937722de0: a single-stepped LDXR/STXR loop never ends; its cure is not to step over it."""
    vcpu = lk.Vm.create(program, "guest_increment").vcpus[0]
    vcpu.monitor_survives = False
    came = [vcpu.step() for _ in range(300)]
    assert set(came) == {None} and vcpu.vm.sync_global_from_guest("word") == 5
    assert vcpu.run(1000).cmd == "SYNC" and vcpu.vm.sync_global_from_guest("word") == 6
    vcpu.set_entry("guest_increment")
    vcpu.monitor_survives = True
    assert next(uc for uc in iter(vcpu.step, 0) if uc is not None).cmd == "SYNC"


@pytest.mark.parametrize("schedule", ["round_robin:1", "round_robin:3", "random:7:5"])
def test_that_small_quanta_lose_no_update_and_end(program, schedule):
    vm = lk.Vm.create(program, "guest_increment", nr_vcpus=4, schedule=schedule)
    vm.run_until_done(100_000)
    assert vm.sync_global_from_guest("word") == 9


def test_that_an_unaligned_exclusive_is_the_guest_s_fault(program):
    vm = lk.Vm.create(program, "guest_unaligned")
    uc = vm.vcpus[0].run(10_000)
    assert uc.cmd == "UNHANDLED" and uc.args[3] == program.symbol("word").gva + 1
