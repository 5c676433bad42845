"""One VM, several threads: one runs it, the others look or are refused, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest

import labkit as lk
from labkit.session.turn import Turn

SOURCE = """#include "labkit.h"
volatile uint64_t counter;
void guest_code(uint64_t vcpu) { for (;;) counter++; }
void guest_talks(uint64_t vcpu) { for (;;) { counter++; GUEST_SYNC(vcpu); } }
void guest_thinks(uint64_t vcpu) { for (;;) asm volatile("" ::: "memory"); }
"""


@cache
def spin() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def vm(backend: str) -> Iterator[lk.Vm]:
    with lk.Vm.create(spin(), backend=backend, privilege="kernel") as vm:
        yield vm


@contextmanager
def running(vm: lk.Vm, run: Callable[[], Any] | None = None) -> Iterator[list[Any]]:
    """The VM while another thread runs it; what the run came back with is in the list."""
    came: list[Any] = []
    thread = threading.Thread(target=lambda: came.append((run or vm.run)()), name="runner")
    thread.start()
    while vm.running is None:
        time.sleep(0.001)
    time.sleep(0.02)
    try:
        yield came
    finally:
        vm.stop()
        thread.join(10)
        assert not thread.is_alive()


ACTS: dict[str, Callable[[lk.Vm], object]] = {
    "run": lambda vm: vm.run(),
    "vcpu.run": lambda vm: vm.vcpus[0].run(),
    "step": lambda vm: vm.vcpus[0].step(),
    "step_line": lambda vm: vm.vcpus[0].step_line(),
    "run_until_done": lambda vm: vm.run_until_done(),
    "write": lambda vm: vm.write(vm.gva_of("counter"), b"x"),
    "vcpu.write": lambda vm: vm.vcpus[0].write(vm.gva_of("counter"), b"x"),
    "memory.write": lambda vm: vm.memory.write(0x1000, b"x"),
    "register": lambda vm: setattr(vm.vcpus[0].regs, "rax", 1),
    "global": lambda vm: vm.write_guest_global("counter", 1),
    "alloc": lambda vm: vm.alloc(4096),
    "args_set": lambda vm: vm.vcpus[0].args_set(1),
    "set_entry": lambda vm: vm.vcpus[0].set_entry("guest_code"),
    "breakpoint": lambda vm: vm.vcpus[0].break_at("guest_code"),
    "complete": lambda vm: vm.vcpus[0].complete(1),
    "add_vcpu": lambda vm: vm.add_vcpu("guest_code"),
    "restore": lambda vm: vm.restore(vm.snapshot()),
    "close": lambda vm: vm.close(),
}


@pytest.mark.parametrize("name", ACTS)
def test_that_an_act_from_another_thread_is_refused_with_who_runs(name: str) -> None:
    with (
        lk.Vm.create(spin()) as vm,
        running(vm),
        pytest.raises(lk.Busy, match=r"another thread runs it \(run\(\) on thread runner, for"),
    ):
        ACTS[name](vm)


LOOKS: dict[str, Callable[[lk.Vm], object]] = {
    "pool": lambda vm: vm.pool,
    "look": lambda vm: vm.look(),
    "vcpu.look": lambda vm: vm.vcpus[0].look(),
    "registers": lambda vm: vm.vcpus[0].regs.all(),
    "rip": lambda vm: vm.vcpus[0].regs.rip,
    "pc": lambda vm: vm.vcpus[0].pc,
    "read": lambda vm: vm.read(vm.gva_of("counter"), 8),
    "memory.read": lambda vm: vm.memory.read(0, 64),
    "page_table": lambda vm: vm.page_table(),
    "disassemble": lambda vm: vm.vcpus[0].disassemble(),
    "backtrace": lambda vm: vm.vcpus[0].backtrace(),
    "events": lambda vm: vm.events,
    "snapshot": lambda vm: vm.snapshot(),
    "fork": lambda vm: vm.fork().close(),
    "show": lambda vm: vm.show(),
    "repr": repr,
}


@pytest.mark.parametrize("name", LOOKS)
def test_that_a_look_from_another_thread_is_soon_answered(name: str, vm: lk.Vm) -> None:
    with running(vm):
        LOOKS[name](vm)
        assert vm.running is not None


def test_that_a_look_sees_the_guest_go_on(vm: lk.Vm) -> None:
    with running(vm):
        first = vm.read(vm.gva_of("counter"), 8)
        time.sleep(0.1)
        assert vm.read(vm.gva_of("counter"), 8) != first


@pytest.mark.parametrize("entry", ["guest_code", "guest_thinks"])
def test_that_stop_ends_a_run_and_the_next_goes_on(entry: str, backend: str) -> None:
    with lk.Vm.create(spin(), entry, backend=backend, privilege="kernel") as vm:
        with running(vm) as came:
            begin = time.monotonic()
            assert vm.stop()
        assert time.monotonic() - begin < 5
        assert came == [lk.exits.StopExit()]
        assert isinstance(vm.vcpus[0].run(1000 if backend == "unicorn" else 10), lk.exits.Exit)


def test_that_every_one_of_many_threads_can_be_stopped(vm: lk.Vm) -> None:
    """The identifiers of threads that ended are given to new ones."""
    for _ in range(5):
        with running(vm) as came:
            vm.stop()
        assert came == [lk.exits.StopExit()]


def test_that_stopping_a_run_to_the_end_is_an_error_of_its_own() -> None:
    def run(vm: lk.Vm) -> str:
        with pytest.raises(lk.Stopped) as err:
            vm.run_until_done()
        return str(err.value)

    with lk.Vm.create(spin(), "guest_talks") as vm:
        with running(vm, lambda: run(vm)) as came:
            pass
        assert "run() goes on from here" in came[0]


def test_that_nobody_is_stopped_when_nobody_runs(vm: lk.Vm) -> None:
    assert not vm.stop()
    assert vm.running is None


def test_that_any_thread_may_use_a_vm_that_nobody_runs(vm: lk.Vm) -> None:
    came: list[object] = []
    thread = threading.Thread(target=lambda: came.append(vm.vcpus[0].step(3)))
    thread.start()
    thread.join()
    assert came == [None]
    assert vm.step == 3
    vm.vcpus[0].step(2)
    assert vm.step == 5


def test_that_looks_change_no_count_and_no_end() -> None:
    with lk.Vm.create(spin()) as alone, lk.Vm.create(spin()) as watched:
        alone.run(max_insns=20_000_000)
        with running(watched, lambda: watched.run(max_insns=20_000_000)) as came:
            while not came:
                watched.vcpus[0].look()
        assert watched.step == alone.step == 20_000_000
        assert watched.vcpus[0].regs.all() == alone.vcpus[0].regs.all()
        counter = alone.gva_of("counter")
        assert watched.read(counter, 8) == alone.read(counter, 8)


def count_run(vm: lk.Vm, turn: int) -> int:
    with vm.turn.run("run"):
        before = vm.step
        vm.vcpus[0].run(max_insns=turn * 37 % 5000)
        return vm.step - before


def count_step(vm: lk.Vm, turn: int) -> int:
    with vm.turn.run("run"):
        vm.vcpus[0].step()
        return 1


def look(vm: lk.Vm, turn: int) -> int:
    vm.look()
    vm.pool  # noqa: B018
    return 0


def write(vm: lk.Vm, turn: int) -> int:
    vm.write_guest_global("counter", turn)
    return 0


class Crowd:
    """Threads that each run, step, look at and write to VMs; who is refused tries something else."""

    def __init__(self, vms: list[lk.Vm]) -> None:
        self.vms = vms
        self.counted = [0] * len(vms)
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()

    def use(self, seed: int, end: float) -> None:
        turn = seed
        while time.monotonic() < end and not self.errors:
            turn += 1
            index = turn % len(self.vms)
            try:
                count = (count_run, count_step, look, write)[turn % 4](self.vms[index], turn)
            except lk.Busy:
                continue
            except BaseException as err:
                self.errors.append(err)
                return
            with self._lock:
                self.counted[index] += count


def test_that_eight_threads_on_three_vms_leave_exact_counts(backend: str) -> None:
    vms = [
        lk.Vm.create(spin(), "guest_talks", backend=backend, privilege="kernel") for _ in range(3)
    ]
    crowd = Crowd(vms)
    end = time.monotonic() + 3
    threads = [threading.Thread(target=crowd.use, args=(seed, end)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not crowd.errors
    assert [vm.step for vm in vms] == crowd.counted
    for vm in vms:
        vm.close()


# --- moments between two lines


def test_that_one_look_shows_one_moment(vm: lk.Vm) -> None:
    """Every part of a look is of the same pause, or it would show a state that never was."""
    with running(vm):
        for _ in range(20):
            seen = vm.look()
            assert seen.step == seen.front.step == seen.page_table.step == seen.memory.step


@pytest.fixture
def encrypted() -> Iterator[lk.Vm]:
    with lk.Vm.create(spin(), protect="sev") as vm:
        yield vm


@pytest.mark.parametrize("name", ["look", "eyes", "encryption_map", "launch_progress", "memory"])
def test_that_an_encrypted_guest_that_runs_can_be_looked_at(name: str, encrypted: lk.Vm) -> None:
    gva = encrypted.names.gva_of("counter")
    looks: dict[str, Callable[[], object]] = {
        "look": encrypted.look,
        "eyes": lambda: encrypted.eyes(gva=gva),
        "encryption_map": encrypted.encryption_map,
        "launch_progress": encrypted.launch_progress,
        "memory": lambda: encrypted.memory.read(0x3000, 4096),
    }
    with running(encrypted):
        for _ in range(5):
            looks[name]()


def test_that_an_act_has_its_turn_or_is_busy_whenever_it_comes() -> None:
    """While a runner comes and goes, and stands still for somebody who looks."""
    turn = Turn("it", lambda: None)
    end = time.monotonic() + 2
    errors: list[BaseException] = []

    def run() -> None:
        with turn.run("run"):
            turn.between()

    def look() -> None:
        with turn.looking:
            pass

    def act() -> None:
        with suppress(lk.Busy), turn.act("write"):
            assert turn.running is None

    def often(what: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end and not errors:
                what()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=often, args=(what,)) for what in (run, look, look, act, act)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_that_stop_asks_again_until_it_is_heard() -> None:
    asked: list[float] = []
    heard = threading.Event()

    def ask() -> None:
        asked.append(time.monotonic())
        if len(asked) > 2:  # the first two come just before the engine begins, and are lost
            heard.set()

    turn = Turn("it", ask)

    def run() -> None:
        turn.begin("run")
        heard.wait(5)
        turn.end()

    runner = threading.Thread(target=run)
    runner.start()
    while turn.running is None:
        time.sleep(0.001)
    assert turn.stop()
    runner.join(1)
    assert heard.is_set()
