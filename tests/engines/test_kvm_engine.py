"""The engine on /dev/kvm: what it says it can do, guests that never end or break, threads, snapshots, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import CODE, DATA, bare
from paths import GUESTS

import labkit as lk
from labkit.engines.exits import (
    DeadlineExit,
    DebugExit,
    HaltExit,
    InternalErrorExit,
    PioExit,
    ShutdownExit,
)

pytestmark = pytest.mark.usefixtures("kvm")
SOURCE = """
#include "labkit.h"
static volatile uint64_t pages[2048] __attribute__((aligned(4096)));
static uint64_t counter;
void guest_code(uint64_t vcpu)
{
	for (uint64_t n = 0; n < 100; n++)
		GUEST_SYNC_ARGS(vcpu, n, 0, 0, 0);
	__atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
	GUEST_DONE();
}
void guest_writes(void)
{
	for (uint64_t n = 1;; n++) {
		pages[0] = pages[512] = n;
		GUEST_SYNC(n);
	}
}
void guest_meets(uint64_t vcpu)
{
	__atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&counter, __ATOMIC_SEQ_CST) < 2)
		cpu_relax();
	GUEST_DONE();
}
"""


@pytest.fixture(scope="module")
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def vms() -> Iterator[list[lk.Vm]]:
    """VMs put in here are closed."""
    kept: list[lk.Vm] = []
    yield kept
    for vm in kept:
        vm.close()


def can(vm: lk.Vm, name: str) -> bool:
    return next(c.have for c in vm.capabilities if c.name == name)


@pytest.mark.parametrize("privilege", ["kernel", "user"])
@pytest.mark.parametrize("name", ["hello", "secret", "two_vms", "leak"])
def test_that_a_guest_says_the_same_in_both_rings_as_on_the_default_engine(
    name: str, privilege: str
) -> None:
    program = lk.Program.load(GUESTS / f"{name}.elf")
    said = []
    for backend in ("unicorn", "kvm"):
        with lk.Vm.create(program, backend=backend, privilege=privilege) as vm:
            said.append([uc._replace(step=0) for uc in vm.run_until_done()])
            assert vm.vcpus[0].regs.cs & 3 == (3 if privilege == "user" else 0)
    assert said[0] == said[1]


@pytest.mark.parametrize("privilege", ["kernel", "user"])
def test_that_an_exception_reaches_the_guest_s_handlers_from_both_rings(privilege: str) -> None:
    error = 6 if privilege == "user" else 2
    with (
        lk.Vm.create(
            lk.Program.load(GUESTS / "fault.elf"), backend="kvm", privilege=privilege
        ) as vm,
        pytest.raises(
            lk.GuestCrashed, match=f"#PF \\(error code {error:#x}\\).*fault address 0xdead0000"
        ),
    ):
        vm.run_until_done()


def test_that_every_capability_has_a_reason_and_the_default_ring_follows_from_them(
    program: lk.Program, vms: list[lk.Vm]
) -> None:
    vms.append(lk.Vm.create(program, backend="kvm"))
    assert (
        all(c.why for c in vms[0].capabilities) and can(vms[0], "step") and can(vms[0], "dirty_log")
    )
    assert vms[0].privilege == ("user" if can(vms[0], "user_by_default") else "kernel")


def test_that_steps_are_refused_with_what_to_do_where_they_would_be_wrong(
    program: lk.Program, vms: list[lk.Vm]
) -> None:
    vms.append(lk.Vm.create(program, backend="kvm", privilege="user"))
    if can(vms[0], "step_user"):
        assert vms[0].vcpus[0].step(3) is None and vms[0].step == 3
    else:
        for refused in (vms[0].vcpus[0].step, lambda: vms[0].vcpus[0].break_at("guest_code")):
            with pytest.raises(lk.NotAvailable, match='privilege="kernel"'):
                refused()
        assert vms[0].run().cmd == "SYNC"  # type: ignore[union-attr]


def test_that_a_stepped_guest_takes_as_many_steps_as_on_the_default_engine() -> None:
    program, steps = lk.Program.load(GUESTS / "hello.elf"), []
    for backend in ("unicorn", "kvm"):
        with lk.Vm.create(program, backend=backend) as vm:
            came = vm.run_until_done(max_insns=5000)
            steps.append([uc.step for uc in came] + [vm.step])
            assert vm.vcpus[0].exact
    assert steps[0] == steps[1]


def test_that_a_free_run_is_said_not_to_be_counted(program: lk.Program, vms: list[lk.Vm]) -> None:
    vms.append(lk.Vm.create(program, backend="kvm"))
    assert [vms[0].run().step for _ in range(3)] == [1, 2, 3] and not vms[0].vcpus[0].exact  # type: ignore[union-attr]


ENDS = [
    ("1: jmp 1b", DeadlineExit),
    ("1: pause; jmp 1b", DeadlineExit),
    ("hlt", HaltExit),
    ("lidt [rsi]; ud2", ShutdownExit),
    ("mov rax,0x7000000; mov cr3,rax; nop", ShutdownExit),
    ("mov eax,0x7000000; jmp rax", InternalErrorExit),
]


@pytest.mark.parametrize(("text", "kind"), ENDS)
def test_that_a_guest_that_goes_nowhere_ends_in_a_typed_exit(
    vms: list[lk.Vm], text: str, kind: type
) -> None:
    vms.append(vm := bare(text, backend="kvm"))
    vm.machine.engine.deadline = 0.3  # type: ignore[attr-defined]
    vm.machine.space.map(0x7000000, 0xC000_0000)
    came = vm.vcpus[0].run()
    assert isinstance(came, kind) and getattr(came, "pc", vm.vcpus[0].pc) == vm.vcpus[0].pc
    assert vm.vcpus[0].regs.rsi == DATA and str(came)


def test_that_code_in_a_hole_is_named_with_its_gpa(vms: list[lk.Vm]) -> None:
    vms.append(vm := bare("mov eax,0x7000000; jmp rax", backend="kvm"))
    vm.machine.space.map(0x7000000, 0xC000_0000)
    assert vm.vcpus[0].run() == InternalErrorExit(
        "instruction fetch from gpa 0xc0000000, where no memslot is", 0x7000000
    )


GARBAGE = [
    {"cr0": 0x1},
    {"cr4": 1 << 63},
    {"efer": 1 << 40},
    {"cr3": (1 << 64) - 1},
    {"rip": 1 << 64},
    {"nonsense": 1},
    {"xcr0": 0},
]


@pytest.mark.parametrize("regs", GARBAGE, ids=str)
def test_that_garbage_state_is_refused_and_the_old_one_stays(
    vms: list[lk.Vm], regs: dict[str, int]
) -> None:
    vms.append(vm := bare("nop; hlt", backend="kvm"))
    before = dict(vm.vcpus[0].regs.all())
    try:
        vm.vcpus[0].cpu.set_regs(regs)
        came = vm.vcpus[0].run()
        assert isinstance(came, ShutdownExit | InternalErrorExit | HaltExit)
    except lk.InvalidState:
        after = dict(vm.vcpus[0].regs.all())
        assert {
            k: (before[k], after[k]) for k in before if before[k] != after[k]
        } == {} and vm.vcpus[0].run() == HaltExit()


def test_that_another_thread_may_use_it_while_nobody_runs_it(
    program: lk.Program, vms: list[lk.Vm]
) -> None:
    vms.append(vm := lk.Vm.create(program, backend="kvm"))
    seen: list[object] = []

    def use() -> None:
        seen.extend([vm.run().cmd, vm.vcpus[0].regs.all(), vm.snapshot(), vm.vcpus[0].pc])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen[0] == "SYNC"
    assert vm.vcpus[0].regs.all() == seen[1]
    assert vm.run().cmd == "SYNC"


def test_that_a_closed_vm_says_so(program: lk.Program) -> None:
    vm = lk.Vm.create(program, backend="kvm")
    vm.close()
    vm.close()
    with pytest.raises(lk.InvalidState, match="closed"):
        vm.run()


def test_that_breakpoints_beyond_the_four_of_the_cpu_work_too(vms: list[lk.Vm]) -> None:
    vms.append(vm := bare("1: nop; nop; nop; nop; nop; nop; in al,dx; jmp 1b", backend="kvm"))
    vm.vcpus[0].set_breakpoints({CODE + i for i in range(1, 6)})
    assert [vm.vcpus[0].run() for _ in range(5)] == [DebugExit(CODE + i) for i in range(1, 6)]
    vm.vcpus[0].set_breakpoints({CODE + 2})
    assert isinstance(vm.vcpus[0].run(), PioExit) and vm.vcpus[0].run() == DebugExit(CODE + 2)


@pytest.mark.parametrize("privilege", ["kernel", "user"])
@pytest.mark.parametrize("nr_vcpus", [2, 24])
def test_that_vcpus_run_at_once_on_one_pool(
    program: lk.Program, privilege: str, nr_vcpus: int
) -> None:
    with lk.Vm.create(
        program, backend="kvm", nr_vcpus=nr_vcpus, schedule="parallel", privilege=privilege
    ) as vm:
        said = vm.run_until_done()
        for i in range(nr_vcpus):
            assert [uc.args[2] for uc in said if uc.vcpu == i and uc.cmd == "SYNC"] == list(
                range(100)
            )
        assert vm.sync_global_from_guest("counter") == nr_vcpus
        assert sorted(vm.pool.owner[vm.pool.in_use].tolist()) == list(range(nr_vcpus))
        assert not [t for t in threading.enumerate() if t.name.startswith("labkit-vcpu")]


def test_that_vcpus_that_wait_for_each_other_meet_only_when_they_run_at_once(
    program: lk.Program,
) -> None:
    with lk.Vm.create(program, "guest_meets", backend="kvm", nr_vcpus=2, schedule="parallel") as vm:
        assert {uc.vcpu for uc in vm.run_until_done()} == {0, 1}


def test_that_between_runs_everything_stands_still_and_can_be_touched(program: lk.Program) -> None:
    with lk.Vm.create(program, backend="kvm", nr_vcpus=4, schedule="parallel") as vm:
        for _ in range(10):
            vm.run()
        state, pcs = vm.snapshot(), [vcpu.pc for vcpu in vm.vcpus]
        vm.run_until_done()
        vm.restore(state)
        assert [vcpu.pc for vcpu in vm.vcpus] == pcs
    with pytest.raises(lk.NotAvailable, match="not counted"):
        lk.Vm.create(program, backend="kvm", schedule="parallel").run(10)


@pytest.mark.parametrize("privilege", ["kernel", "user"])
def test_that_a_restore_is_bit_for_bit_whoever_wrote(
    program: lk.Program, vms: list[lk.Vm], privilege: str
) -> None:
    vms.append(vm := lk.Vm.create(program, "guest_writes", backend="kvm", privilege=privilege))
    vm.run()
    before = [bytes(slot.data) for slot in vm.memory.slots], dict(vm.vcpus[0].regs.all())
    state = vm.snapshot()
    for _ in range(3):
        assert (
            vm.run().args[1] == 2 and int.from_bytes(vm.read(vm.gva_of("pages"), 8), "little") == 2
        )  # type: ignore[union-attr]
        vm.write(vm.gva_of("pages") + 8192, b"written by the host")
        vm.restore(state)
        assert (
            [bytes(slot.data) for slot in vm.memory.slots],
            dict(vm.vcpus[0].regs.all()),
        ) == before


def test_that_accessed_and_dirty_bits_are_the_guest_s(
    program: lk.Program, vms: list[lk.Vm]
) -> None:
    vms.append(vm := lk.Vm.create(program, "guest_writes", backend="kvm"))
    first, second = (vm.gva_of("pages") + 4096 * i for i in (0, 2))
    bits = [vm.machine.space.walk(gva) for gva in (first, second)]
    assert not any(walk.steps[-1].entry & 0x60 for walk in bits)  # accessed, dirty
    vm.run()
    bits = [vm.machine.space.walk(gva) for gva in (first, second)]
    assert [walk.steps[-1].entry & 0x60 for walk in bits] == [0x60, 0]


WATCHED = """
import faulthandler, json, os, signal, sys, threading, time
faulthandler.dump_traceback_later(40, exit=True)
import labkit as lk
program = lk.Program.load(sys.argv[1])
vm = lk.Vm.create(program, sys.argv[2], backend="kvm", privilege=sys.argv[3], nr_vcpus=int(sys.argv[5]), schedule=sys.argv[4])
threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    vm.run()
except KeyboardInterrupt:
    print(json.dumps([time.monotonic() - begin, vm.vcpus[0].where(), len(vm.page_table())]))
"""


@pytest.mark.parametrize(
    ("privilege", "schedule", "nr_vcpus"),
    [
        ("kernel", "sequential", 1),
        ("user", "sequential", 1),
        ("kernel", "round_robin:100000000", 2),
        ("kernel", "parallel", 2),
    ],
)
def test_that_ctrl_c_stops_a_spinning_guest_at_once(
    privilege: str, schedule: str, nr_vcpus: int
) -> None:
    arguments = [str(GUESTS / "bad.elf"), "guest_code", privilege, schedule, str(nr_vcpus)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, where, leaves = json.loads(done.stdout)
    assert seconds < 2 and where.startswith("guest_code") and leaves


IN_TIME = """
import json, os, signal, threading, time
import labkit as lk
from labkit.engines.kvm.lanes import LOOK_UP
vm = lk.Vm.create(lk.Program.load("data/guests/bad.elf"), backend="kvm", privilege="kernel", nr_vcpus=2, schedule="parallel")
slowest = 0.0
for i in range(40):
    begin = time.monotonic()
    thread = threading.Timer(2 * LOOK_UP + (i - 8) * 5e-5, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        thread.start()
        vm.run()
        thread.join()
    except KeyboardInterrupt:
        slowest = max(slowest, time.monotonic() - begin)
print(json.dumps(slowest))
"""


def test_that_ctrl_c_is_not_lost_just_as_the_wait_for_an_exit_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_TIME],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=GUESTS.parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < json.loads(done.stdout) < 10  # it took until the guest's deadline of 20 s


def usage() -> tuple[int, int, int]:
    """(file descriptors, threads, resident KiB)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = [t for t in threading.enumerate() if t.name != "labkit-kvm-ticker"]
    return len(os.listdir("/proc/self/fd")), len(threads), pages * os.sysconf("SC_PAGE_SIZE") >> 10


def test_that_a_thousand_vms_leave_nothing_behind(program: lk.Program) -> None:
    def round(count: int) -> None:
        for i in range(count):
            schedule = "parallel" if i % 10 == 0 else "sequential"
            with lk.Vm.create(program, backend="kvm", nr_vcpus=2, schedule=schedule) as vm:
                vm.run()
        gc.collect()

    round(50)
    before = usage()
    round(1000)
    after = usage()
    assert after[:2] == before[:2] and after[2] - before[2] < 8 << 10


def test_that_vms_that_nobody_closed_go_with_their_last_reference(program: lk.Program) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        lk.Vm.create(program, backend="kvm").run()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # Ctrl-C remembers the last vCPU that ran


LACKING = [("/nowhere/kvm", "load kvm_intel"), ("/dev/null", "is no KVM")]


@pytest.mark.parametrize(("device", "says"), LACKING)
def test_that_a_machine_without_kvm_is_told_what_to_do(
    device: str, says: str, program: lk.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from labkit.engines.kvm import vm as engine

    monkeypatch.setattr(engine, "DEVICE", device)
    with pytest.raises(lk.NotAvailable, match=says):
        lk.Vm.create(program, backend="kvm")


def test_that_a_device_without_permission_says_which_group(program: lk.Program) -> None:
    if os.getuid():
        pytest.skip("only root can become somebody who may not open /dev/kvm")
    os.seteuid(65534)
    try:
        with pytest.raises(lk.NotAvailable, match="group kvm"):
            lk.Vm.create(program, backend="kvm")
    finally:
        os.seteuid(0)
