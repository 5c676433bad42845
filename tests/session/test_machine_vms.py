"""Several VMs and several vCPUs: side by side, under named schedules, the same every time, and gone when they are closed."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from guests import CODE, DATA
from paths import GUESTS

import labkit as lk
from labkit.engines.exits import BudgetExit, HaltExit
from labkit.errors import InvalidState

SCHEDULES = [
    "round_robin:1",
    "round_robin:2",
    "round_robin:17",
    "round_robin",
    "random:7:30",
    "random:8",
    "sequential",
]
COUNTER = """#include "labkit.h"
static atomic_t locked;
static volatile uint64_t loose;
void guest_code(uint64_t vcpu)
{
	for (int i = 0; i < 50; i++) {
		atomic_inc(&locked);
		uint64_t before = loose;
		cpu_relax();
		loose = before + 1;
	}
	GUEST_SYNC_ARGS(1, vcpu, atomic_read(&locked), loose, 0);
	GUEST_DONE();
}
"""


@pytest.fixture(scope="module")
def counter() -> lk.Program:
    return lk.Program.compile(COUNTER)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_that_a_schedule_gives_the_same_run_every_time(counter, schedule):
    runs = []
    for _ in range(2):
        with lk.Vm.create(counter, nr_vcpus=3, schedule=schedule) as vm:
            runs.append(
                (vm.run_until_done(1_000_000), vm.step, [vcpu.step_count for vcpu in vm.vcpus])
            )
    assert runs[0] == runs[1] and max(uc.args[3] for uc in runs[0][0] if uc.cmd == "SYNC") == 150


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda vm: vm.run(-1), "vCPU 0: cannot run -1 instructions"),
        (lambda vm: vm.vcpus[1].run(-5), "vCPU 1: cannot run -5 instructions"),
        (lambda vm: vm.vcpus[1].step(0), "vCPU 1: cannot step 0 instructions"),
        (
            lambda vm: vm.vcpus[0].disassemble("guest_code", 0),
            "vCPU 0: cannot disassemble 0 instructions",
        ),
        (
            lambda vm: vm.vcpus[0].args_set(1 << 64),
            "args_set: 0x10000000000000000 does not fit into the 64 bits of an argument",
        ),
        (
            lambda vm: vm.vcpus[0].args_set(-(1 << 63) - 1),
            "args_set: -0x8000000000000001 does not fit",
        ),
    ],
)
def test_that_a_number_that_makes_no_sense_is_refused(counter, act, said):
    with lk.Vm.create(counter, nr_vcpus=2) as vm, pytest.raises(InvalidState, match=said):
        act(vm)


def test_that_a_listing_of_nothing_says_where_nothing_was_found(counter):
    with lk.Vm.create(counter) as vm:
        assert (
            repr(vm.vcpus[0].disassemble(0xDEAD0000)) == "0xdead0000: no instruction at 0xdead0000"
        )


def test_that_schedules_differ_where_guests_race(counter):
    loose = {}
    for schedule in SCHEDULES:
        with lk.Vm.create(counter, nr_vcpus=3, schedule=schedule) as vm:
            loose[schedule] = max(uc.args[4] for uc in vm.run_until_done() if uc.cmd == "SYNC")
    assert loose["sequential"] == 150 > loose["round_robin:1"] and len(set(loose.values())) > 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_that_a_run_may_be_cut_anywhere(guest, schedule):
    def state(*budgets: int) -> list[dict[str, int]]:
        vm = guest("1: lock xadd [rsi],rax; inc r8; add rax,r8; jmp 1b", nr_vcpus=2)
        vm.schedule = type(vm.schedule).named(schedule)
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.cpu.set_regs({"rax": index + 1, "rsi": DATA})
        for budget in budgets:
            assert vm.run(budget) == BudgetExit(budget)
        return [dict(vcpu.regs.all()) for vcpu in vm.vcpus]

    assert state(1000) == state(1, 1, 1, 500, 497) == state(*[250] * 4)


def test_that_vms_run_side_by_side_as_each_would_alone():
    program = lk.Program.load(GUESTS / "two_vms.elf")
    alone = lk.Vm.create(program).run_until_done()
    vms = [lk.Vm.create(program) for _ in range(5)]
    vms[3].write_guest_global("secret", 100)
    together = [[] for _ in vms]
    while any(vcpu.state != "done" for vm in vms for vcpu in vm.vcpus):
        for vm, ucalls in zip(vms, together, strict=True):
            if vm.vcpus[0].state != "done" and not isinstance(came := vm.run(11), BudgetExit):
                ucalls.append(came)
    assert (
        together[0] == together[1] == together[4] == alone and "secret 200" in together[3][1].text
    )


def test_that_a_vcpu_s_page_tables_and_data_written_by_another_are_seen_at_its_next_turn(guest):
    vm = guest("1: mov rax,[rsi]; jmp 1b", nr_vcpus=2)
    writer, reader = vm.vcpus
    vm.write(CODE + 0x100, b"\x48\xff\x06\xf4")  # inc qword ptr [rsi]; hlt
    writer.cpu.set_regs({"rip": CODE + 0x100})
    for count in range(1, 4):
        writer.regs.rip = CODE + 0x100
        assert writer.run(9) == HaltExit()
        reader.run(4)
        assert reader.regs.rax == count


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="this machine has no /proc to count descriptors in"
)
def test_that_vms_that_were_closed_leave_nothing_behind():
    program = lk.Program.load(GUESTS / "hello.elf")

    def use(count: int, close: bool = True) -> None:
        for _ in range(count):
            vm = lk.Vm.create(program, nr_vcpus=1)
            vm.run_until_done(100_000)
            vm.snapshot()
            if close:
                vm.close()
        gc.collect()

    use(20)
    use(20, close=False)
    before = (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        rss(),
        len(os.listdir("/proc/self/map_files")),
    )
    use(100)
    use(100, close=False)
    after = (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        rss(),
        len(os.listdir("/proc/self/map_files")),
    )
    assert after[:2] == before[:2] and after[2] - before[2] < 40 << 20 and after[3] - before[3] < 20


CLOSED = [
    lambda vm: vm.vcpus[0].run(5),
    lambda vm: vm.vcpus[0].regs.rip,
    lambda vm: vm.vcpus[0].regs.all(),
    lambda vm: vm.snapshot(),
    lambda vm: vm.vcpus[0].step(),
    lambda vm: vm.vcpus[0].disassemble(),
    lambda vm: setattr(vm.vcpus[0].regs, "rax", 1),
    lambda vm: vm.vcpus[0].break_at(CODE),
    lambda vm: vm.add_vcpu(CODE),
    lambda vm: vm.vcpus[0].set_entry(CODE),
    lambda vm: vm.fork(),
]


@pytest.mark.parametrize("use", CLOSED)
def test_that_a_closed_vm_says_so(guest, use):
    vm = guest("nop")
    vm.close()
    vm.close()
    with pytest.raises(lk.InvalidState, match="closed"):
        use(vm)
    assert vm.read(CODE, 1) == b"\x90" and "barebones" in repr(vm)


def test_that_python_ends_quietly_with_vms_open_and_closed():
    code = (
        f"import labkit as lk; vms = [lk.Vm.create(lk.Program.load({str(GUESTS / 'hello.elf')!r})) for _ in range(3)];"
        "vms[0].close(); vms[1].run_until_done(); keep = vms[1].vcpus[0]; print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("nr_vcpus", [-1, 0, 513, 10**6, 10**9])
def test_that_a_number_of_vcpus_is_refused_before_anything_is_made(
    counter: lk.Program, nr_vcpus: int
) -> None:
    with pytest.raises(InvalidState, match=f"at most 512, not {nr_vcpus}"):
        lk.Vm.create(counter, nr_vcpus=nr_vcpus)


def test_that_a_vm_has_at_most_512_vcpus(guest):
    vm = guest("nop", memory=32 << 20)
    vm.machine.vcpus.extend(vm.machine.vcpus[:1] * 511)
    with pytest.raises(lk.InvalidState, match="at most 512"):
        vm.add_vcpu(CODE)


@pytest.mark.parametrize("arch", ["arm64", "riscv64", "s390x"])
def test_that_a_ring_which_an_architecture_does_not_have_here_is_refused(arch: str) -> None:
    program = lk.Program.load(GUESTS / arch / "hello.elf")
    with pytest.raises(lk.NotAvailable, match=f'privilege "user": {arch}'):
        lk.Vm.create(program, privilege="user")


@pytest.mark.parametrize("gva", [-1, 1 << 64])
def test_that_a_handler_at_no_address_is_refused(counter: lk.Program, gva: int) -> None:
    with (
        lk.Vm.create(counter) as vm,
        pytest.raises(InvalidState, match=f"{gva} does not fit: a handler's address"),
    ):
        vm.install_exception_handler(6, gva)


@pytest.mark.parametrize("index", [-1, 2])
def test_that_a_vcpu_which_is_not_there_cannot_be_looked_at(
    counter: lk.Program, index: int
) -> None:
    with (
        lk.Vm.create(counter, nr_vcpus=2) as vm,
        pytest.raises(InvalidState, match=f"no vCPU {index}"),
    ):
        vm.look(index)


def test_that_a_vcpu_of_a_closed_vm_still_has_a_line(counter):
    with lk.Vm.create(counter) as vm:
        assert "step 0" in repr(vm.vcpus[0])
    assert repr(vm.vcpus[0]) == "<Vcpu 0 not started: this VM is closed>"


@pytest.mark.parametrize("gva", [-1, 1 << 64])
def test_that_a_breakpoint_is_at_an_address(counter, gva):
    with lk.Vm.create(counter) as vm, pytest.raises(InvalidState, match="which is no address"):
        vm.vcpus[0].break_at(gva)
