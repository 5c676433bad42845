"""Unmodified KVM selftests of Linux 6.12 with guests that work on memory, or several vCPUs."""

from __future__ import annotations

import struct
from itertools import islice

import numpy as np
import pytest
from kernel_host import BUDGET, run, synced, value_at

from labkit.engines.exits import BudgetExit

PAGE, MIB = 4096, 1 << 20
TEST_VALUE = 0x0123456789ABCDEF


def random_u32(seed):
    """guest_random_u32() of lib/test_util.c."""
    while True:
        seed = seed * 48271 % (2**31 - 1)
        yield seed


def first_words(vm, gva, nr_pages):
    """The first eight bytes of each page."""
    return np.frombuffer(vm.read(gva, nr_pages * PAGE), "<u8")[:: PAGE // 8]


def synced_all(vm):
    """Run under the schedule until every vCPU made its GUEST_SYNC."""
    seen = set()
    while len(seen) < len(vm.vcpus):
        uc = vm.run(BUDGET)
        assert uc.cmd == "SYNC", uc
        seen.add(uc.vcpu)


def test_that_data_and_code_are_fetched_from_the_same_pages(host):
    vm = host.ready("nx_huge_pages_test")
    gva = 4 << 30
    for stage in range(1, 7):
        synced(vm.vcpus[0], stage)
    df = vm.page_table().df
    touched = df.gva[df.accessed & (df.gva >= gva) & (df.gva < gva + 6 * MIB)]
    assert touched.tolist() == [gva, gva + 2 * MIB, gva + 4 * MIB]


def test_that_the_guest_dirties_the_pages_its_random_numbers_say(host):
    gva, nr_pages = 0xC0000000, 2048
    vm = host.ready("dirty_log_test")
    synced(vm.vcpus[0], 1)
    assert (first_words(vm, gva, nr_pages) == 1).all()
    vm.write_guest_global("iteration", 2)
    synced(vm.vcpus[0], 1)
    # Two a page; which of them is the low half is gcc's business.
    drawn = list(islice(random_u32(7), 2 * nr_pages))[nr_pages:]
    dirty = set(np.flatnonzero(first_words(vm, gva, nr_pages) == 2).tolist())
    assert dirty in ({n % nr_pages for n in drawn[::2]}, {n % nr_pages for n in drawn[1::2]})


def test_that_a_host_and_a_guest_hand_pages_over_by_a_locked_flag(host):
    base = 256 * MIB
    test = base + 16 * PAGE
    vm = host("memslot_perf_test", "guest_code_test_memslot_unmap")
    for gva in (base, test, test + 64 * MIB):
        assert vm.alloc(PAGE, gva) == gva
    vm.write(base, struct.pack("<I3?xQ", PAGE, True, False, False, 0))
    synced(vm.vcpus[0], 0)
    for _ in range(10):
        for gva, value in ((test, 0x1122334455667788), (test + 64 * MIB, 0x99AABBCCDDEEFF00)):
            assert isinstance(vm.vcpus[0].run(997), BudgetExit) and value_at(vm, gva, 8) == value
            vm.write(gva, bytes(8))
            vm.write(base + 6, b"\1")
    vm.write(base + 5, b"\1")
    assert run(vm.vcpus[0]).cmd == "DONE"


def test_that_a_move_is_seen_when_the_host_writes(host):
    gva = 0xC0000000
    vm = host("set_memory_region_test", "guest_code_move_memory_region")
    assert vm.alloc(PAGE, gva) == gva
    synced(vm.vcpus[0], 0)
    assert isinstance(vm.vcpus[0].run(10_007), BudgetExit)
    vm.write(gva, b"\1")
    for _ in range(4):
        synced(vm.vcpus[0], 0)
    assert run(vm.vcpus[0]).cmd == "DONE"


@pytest.mark.parametrize("schedule", ["round_robin:100", "random:5:33"])
def test_that_each_vcpu_fills_its_part_of_memory(host, schedule):
    gva, nr_pages = 1 << 32, 4 * 64
    filled = gva + PAGE * np.arange(nr_pages)  # each page begins with its own gva
    vm = host.ready("max_guest_memory_test", schedule=schedule)
    synced_all(vm)
    assert (first_words(vm, gva, nr_pages) == filled).all()
    for vcpu in vm.vcpus:
        synced(vcpu, 0)  # the schedule may have stopped it inside its second round
    vm.write(gva, bytes(nr_pages * PAGE))
    for vcpu in vm.vcpus:
        vcpu.regs.cr0 ^= 1 << 16
        synced(vcpu, 0)
    assert (first_words(vm, gva, nr_pages) == filled).all()


def test_that_vcpus_go_through_the_stages_of_kvm_page_table_test(host):
    gva, nr_pages = 0xC0000000, 1024
    vm = host("kvm_page_table_test", nr_vcpus=4, memory=16 * MIB, schedule="random:1:200")
    assert vm.alloc(nr_pages * PAGE, gva) == gva
    args = struct.pack("<8Q", 0, gva, PAGE, nr_pages, 2 * MIB, nr_pages // 512, 512, 0)
    vm.write(vm.gva_of("test_args"), args)
    for vcpu in vm.vcpus:
        vcpu.args_set(vcpu.index % 2 == 0)
    written = []
    for stage in range(4):
        vm.write_guest_global("guest_test_stage", stage)
        synced_all(vm)
        written.append(np.flatnonzero(first_words(vm, gva, nr_pages) == TEST_VALUE).tolist())
    assert written == [[], [0, 512], list(range(nr_pages)), list(range(nr_pages))]


@pytest.mark.parametrize("percent", [0, 30, 100])
@pytest.mark.parametrize("name", ["demand_paging_test", "dirty_log_perf_test"])
def test_that_memstress_writes_where_and_how_often_it_is_told(host, name, percent):
    base, nr_pages, seed = 0xC0000000, 128, 1234
    vm = host(name, "memstress_guest_code", nr_vcpus=3)
    assert vm.alloc(3 * nr_pages * PAGE, base) == base
    gva = vm.gva_of("memstress_args")
    parts = [base + i * nr_pages * PAGE for i in range(3)]
    head = struct.pack("<4Q2I3?", 0, base, 0, PAGE, seed, percent, False, True, False)
    rows = b"".join(struct.pack("<4Qi4x", 0, part, nr_pages, 0, i) for i, part in enumerate(parts))
    assert vm.program.symbol("memstress_args").size == 2096 + 512 * 40
    vm.write(gva, head)
    vm.write(gva + 2096, rows)
    vm.write_guest_global("guest_random_seed", seed)
    for vcpu, part in zip(vm.vcpus, parts, strict=True):
        synced(vcpu, 1)
        numbers = random_u32(seed + vcpu.index)
        drawn = [(next(numbers) % nr_pages, next(numbers) % 100) for _ in range(nr_pages)]
        wanted = {page for page, luck in drawn if luck < percent}
        assert set(np.flatnonzero(first_words(vm, part, nr_pages) == TEST_VALUE).tolist()) == wanted


def test_that_stolen_time_is_what_the_host_put_there(host):
    vm = host.ready("steal_time")
    for stage, (steal, cmd) in enumerate(((0, "SYNC"), (1000, "SYNC"), (5000, "DONE"))):
        for vcpu in vm.vcpus:
            stolen = 0
            if stage > 0:
                stolen = steal + vcpu.index
                vm.write((1 << 30) + 64 * vcpu.index, struct.pack("<QI", stolen, 2 * stage))
            assert run(vcpu).cmd == cmd
            assert value_at(vm, vm.gva_of("guest_stolen_time") + 8 * vcpu.index, 8) == stolen


@pytest.mark.parametrize("bsp", [0, 1])
def test_that_one_vcpu_is_the_bootstrap_processor(host, bsp):
    vm = host("set_boot_cpu_id", "guest_not_bsp_vcpu", nr_vcpus=2)
    vm.vcpus[bsp].set_entry("guest_bsp_vcpu")
    if bsp == 1:  # KVM_SET_BOOT_CPU_ID
        for vcpu in vm.vcpus:
            vcpu.regs["msr_0x1b"] ^= 1 << 8
    said = [(uc.vcpu, uc.cmd) for vcpu in vm.vcpus for uc in vcpu.run_until_done(BUDGET)]
    assert said == [(0, "SYNC"), (0, "DONE"), (1, "SYNC"), (1, "DONE")]


@pytest.mark.parametrize("offset, failures", [(0, False), (-3000, True)])
def test_that_no_vcpu_sees_another_ones_time_in_the_future(host, offset, failures):
    vm = host("tsc_scaling_sync", nr_vcpus=20, schedule="random:3:40")
    for vcpu in vm.vcpus:
        vcpu.regs["msr_0x10"] = 200_000_000
    vm.vcpus[7].regs["msr_0x10"] += offset
    came = vm.run(60_000)
    if failures:
        assert came.cmd == "SYNC" and came.args[2] < came.args[3]
    else:
        assert isinstance(came, BudgetExit)


def test_that_the_pool_is_empty_after_many_ucalls_of_many_vcpus(host):
    vm = host("rseq_test", nr_vcpus=8, schedule="random:11:37")
    came = [vm.run(BUDGET) for _ in range(400)]
    assert {uc.cmd for uc in came} == {"SYNC"} and {uc.vcpu for uc in came} == set(range(8))
    pool = vm.pool
    assert 0 < pool.in_use.sum() <= 8 and pool.uses.sum() >= 400


def test_that_busy_vcpus_can_be_left_at_any_time(host):
    vm = host("hardware_disable_test", nr_vcpus=4)
    assert isinstance(vm.run(40_000), BudgetExit) and vm.step == 40_000
