"""What several threads do to VMs on /dev/kvm: vCPUs that run at once, a close from elsewhere, a process that forked."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from paths import GUESTS

import labkit as lk

pytestmark = pytest.mark.usefixtures("kvm")
SOURCE = """
#include "labkit.h"
void guest_code(uint64_t vcpu)
{
	for (uint64_t n = 0; n < 5; n++)
		GUEST_SYNC(vcpu * 100 + n);
	GUEST_DONE();
}
void guest_works(uint64_t vcpu)
{
	if (!vcpu)
		GUEST_SYNC(0);
	for (volatile uint64_t n = 0; n < 1000000000; n++)
		;
	GUEST_DONE();
}
"""


@pytest.fixture(scope="module")
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


def run(code: str, *arguments: str) -> str:
    """What a process of its own prints, with a watchdog."""
    head = "import faulthandler, sys, threading, time\nfaulthandler.dump_traceback_later(40, exit=True)\nimport labkit as lk\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=GUESTS.parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_that_a_vcpu_that_came_out_by_itself_while_others_were_paused_runs_for_long_again(
    program: lk.Program,
) -> None:
    with lk.Vm.create(
        program, "guest_works", backend="kvm", nr_vcpus=4, schedule="parallel", privilege="user"
    ) as vm:
        for _ in range(4):
            assert vm.run().cmd in ("SYNC", "DONE")  # type: ignore[union-attr]
            assert not any(vcpu.cpu.pausing for vcpu in vm.vcpus)  # type: ignore[attr-defined]


LATE = """
vm = lk.Vm.create(lk.Program.load(sys.argv[1]), backend="kvm", schedule="parallel", privilege="user")
lanes = vm.machine.engine.lanes
post = lanes._post
lanes._post = lambda *came: (post(*came), time.sleep(0.1))  # as if the thread lost its CPU just there
print(len(vm.run_until_done()))
"""


def test_that_a_lane_is_told_to_go_on_however_soon_its_exit_is_answered() -> None:
    assert int(run(LATE, str(GUESTS / "hello.elf"))) > 1


@pytest.mark.parametrize("privilege", ["kernel", "user"])
def test_that_an_exit_nobody_has_taken_yet_is_part_of_the_state_of_its_vcpu(
    program: lk.Program, privilege: str
) -> None:
    everything = sorted([vcpu * 100 + n for vcpu in range(4) for n in range(5)])
    with lk.Vm.create(
        program, backend="kvm", nr_vcpus=4, schedule="parallel", privilege=privilege
    ) as vm:
        start = vm.snapshot()
        for _ in range(10):
            vm.restore(start)
            said = [vm.run()]
            state = vm.snapshot()
            with vm.fork() as twin:
                for rest in (
                    vm.run_until_done(),
                    twin.run_until_done(),
                    (vm.restore(state), vm.run_until_done())[1],
                ):
                    assert (
                        sorted(uc.args[1] for uc in said + rest if uc.cmd == "SYNC") == everything
                    )  # type: ignore[union-attr]
            vm.restore(start)
            vm.run()
            vm.restore(start)
            assert (
                sorted(uc.args[1] for uc in vm.run_until_done() if uc.cmd == "SYNC") == everything
            )


def test_that_a_vcpu_with_such_an_exit_gives_it_to_whoever_runs_it(program: lk.Program) -> None:
    with lk.Vm.create(
        program, backend="kvm", nr_vcpus=2, schedule="parallel", privilege="user"
    ) as vm:
        for _ in range(10):
            vm.run()
        said = [uc for vcpu in vm.vcpus if vcpu.state != "done" for uc in vcpu.run_until_done()]
        numbers = [uc.args[1] for uc in vm.log.entries if getattr(uc, "cmd", "") == "SYNC"]  # type: ignore[union-attr]
        assert said and sorted(numbers) == [*range(5), *range(100, 105)]
        assert all(
            [n for n in numbers if n // 100 == vcpu] == [vcpu * 100 + n for n in range(5)]
            for vcpu in range(2)
        )


FORKED = """
import os, signal
with lk.Vm.create(lk.Program.load(sys.argv[1]), backend="kvm", privilege="kernel") as vm:
    vm.run()  # so that somebody ticks in this process
if not (child := os.fork()):
    signal.alarm(10)
    vm = lk.Vm.create(lk.Program.load(sys.argv[2]), backend="kvm", privilege="kernel")
    vm.machine.engine.deadline = 0.2
    os._exit(0 if vm.run().end == "deadline" else 1)
print(os.waitpid(child, 0)[1])
"""


def test_that_a_run_has_its_deadline_in_a_process_that_was_forked_from_one_with_runs() -> None:
    assert run(FORKED, *(str(GUESTS / name) for name in ("hello.elf", "bad.elf"))) == "0\n"


def test_that_a_vm_is_not_closed_under_a_run_on_another_thread(program: lk.Program) -> None:
    with lk.Vm.create(program, "guest_works", backend="kvm", privilege="kernel") as vm:
        vm.machine.engine.deadline, refused = 0.6, list[str]()  # type: ignore[attr-defined]

        def close() -> None:
            with pytest.raises(lk.InvalidState) as err:
                vm.close()
            refused.append(str(err.value))

        vm.run()
        threading.Timer(0.2, close).start()
        assert vm.run().end == "deadline" and "another thread" in refused[0]  # type: ignore[union-attr]


FULL = """
import os, resource
program = lk.Program.load(sys.argv[1])
lk.Vm.create(program, backend="kvm").close()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
for free in range(3):
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        for _ in range(free):
            os.close(taken.pop())
    try:
        lk.Vm.create(program, backend="kvm")
    except lk.NotAvailable as err:
        print(err)
"""


def test_that_a_process_without_file_descriptors_is_told_so() -> None:
    said = run(FULL, str(GUESTS / "hello.elf")).splitlines()
    assert (
        said
        and all("Too many open files" in line and "group" not in line for line in said)
        and "no vCPU" in said[-1]
    )
