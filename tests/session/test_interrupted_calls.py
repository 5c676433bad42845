"""Ctrl-C at every call of every public operation: nothing is lost, nothing happens twice."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from functools import cache

import pytest
from interrupts import at_every_call
from paths import GUESTS, REPO

import labkit as lk

# `make torture` tries every call; a usual run tries some.
MOMENTS = None if os.environ.get("LABKIT_TORTURE") else 12

VMS = {
    "unicorn": {},
    "sev-es": {"protect": "sev-es"},
    "snp": {"protect": "snp"},
    "kvm": {"backend": "kvm"},
}


@cache
def hello():
    return lk.Program.load(GUESTS / "hello.elf")


@pytest.fixture(params=list(VMS))
def kind(request):
    """What a VM is made with, for every engine and protection that is here."""
    options = VMS[request.param]
    try:
        lk.Vm.create(hello(), **options).close()
    except lk.NotAvailable as error:
        pytest.skip(str(error))
    return options


def state(vm):
    """All that a VM is: registers, memory, counts, log, what the host knows of the pool."""
    memory = [zlib.crc32(vm.machine.plain(slot.gpa, slot.size)) for slot in vm.memory.slots]
    pool = vm.host_pool.state()
    return (
        [dict(vcpu.cpu.get_regs()) for vcpu in vm.vcpus],
        memory,
        [(vcpu.state, vcpu.breakpoints) for vcpu in vm.vcpus],
        [(event.step, event.kind, event.what) for event in vm.log],
        (pool.seen, pool.heard, pool.owner, pool.since, pool.uses, pool.done),
        (vm.schedule.turn, vm.schedule.left),
        [(use.gpa, use.nr_pages, use.kind) for use in vm.machine.space.uses],
    )


def begun(**options):
    """A VM behind its first ucall, and a snapshot from before it."""
    vm = lk.Vm.create(hello(), **options)
    before = vm.snapshot()
    vm.run()
    return vm, before


def finish(vm):
    """Run on to the end, whatever was tried before; the ucalls of the whole log."""
    if not all(vcpu.state == "done" for vcpu in vm.vcpus):
        vm.run_until_done(100_000 if vm.backend == "unicorn" else None)
    return [(one.cmd, one.text) for one in vm.log if one.kind == "ucall"]


def lost(made):
    vm, _ = made
    said = [cmd for cmd, _ in finish(vm)]
    vm.close()
    return "" if said == ["SYNC", "PRINTF", "DONE"] else f"the log has {said}"


RUNS = {
    "run": lambda made: made[0].run(),
    "run_until_done": lambda made: made[0].run_until_done(),
    "vcpu.run_until_done": lambda made: made[0].vcpus[0].run_until_done(),
    "stream": lambda made: list(made[0].stream()),
    "look": lambda made: made[0].look(),
    "page_table": lambda made: made[0].page_table(),
    "pool": lambda made: made[0].pool,
    "snapshot": lambda made: made[0].snapshot(),
    "fork": lambda made: made[0].fork().close(),
    "backtrace": lambda made: made[0].vcpus[0].backtrace(),
    "repr": lambda made: repr(made[0]),
    "events": lambda made: made[0].events,
    "alloc": lambda made: made[0].alloc(3 * 4096),
}
COUNTED = {
    "step": lambda made: made[0].vcpus[0].step(50),
    "step_line": lambda made: made[0].vcpus[0].step_line(),
}


@pytest.mark.parametrize("name", [*RUNS, *COUNTED])
def test_that_no_ucall_is_lost_or_comes_twice(kind, name):
    if name in COUNTED and kind.get("backend") == "kvm":
        pytest.skip("steps are not KVM's in every ring")
    if name in ("alloc", "backtrace") and "protect" in kind:
        pytest.skip("a host gives no memory to a launched guest, and has no encrypted registers")
    RUNS.get("events", len)(begun())  # what is imported once, is now
    operation = {**RUNS, **COUNTED}[name]
    tried = at_every_call(lambda: begun(**kind), operation, lost, MOMENTS)
    assert tried.moments > 0
    assert tried.wrong == {}


ACTS = {
    "restore": lambda made: made[0].restore(made[1]),
    "args_set": lambda made: made[0].vcpus[0].args_set(3, 4),
    "break_at": lambda made: made[0].vcpus[0].break_at("ucall_alloc"),
    "set_entry": lambda made: made[0].vcpus[0].set_entry("guest_code"),
    "write": lambda made: made[0].memory.write(0x7000, bytes(range(256)) * 32),
    "alloc": lambda made: made[0].alloc(3 * 4096),
    "global": lambda made: made[0].write_guest_global("ucall_pool", 7),
    "register": lambda made: setattr(made[0].vcpus[0].regs, "rax", 7),
}


@pytest.mark.parametrize("name", ACTS)
def test_that_an_act_is_done_or_not_begun(name):
    act = ACTS[name]
    vm, before = begun()
    there = vm.snapshot()
    untouched = state(vm)
    act((vm, before))
    done = state(vm)

    def fresh():
        vm.restore(there)
        vm.vcpus[0].set_breakpoints(frozenset())
        return vm, before

    def halfway(made):
        return "" if state(made[0]) in (untouched, done) else "half done"

    if name not in ("break_at", "args_set"):
        assert done != untouched
    fresh()
    assert state(vm) == untouched
    tried = at_every_call(fresh, act, halfway, MOMENTS)
    assert tried.moments > 0 and tried.heard == tried.moments
    assert tried.wrong == {}


@pytest.mark.parametrize("protect", ["sev", "sev-es", "snp", "tdx"])
def test_that_a_launch_is_whole(protect):
    def launched(vm):
        if not vm.guest.launched:
            vm.launch()
        said = finish(vm)
        vm.close()
        return "" if len(said) == 3 else f"the log has {said}"

    tried = at_every_call(
        lambda: lk.Vm.create(hello(), protect=protect, launch=False),
        lambda vm: vm.launch(),
        launched,
        MOMENTS,
    )
    assert tried.moments > 0 and tried.wrong == {}


@pytest.mark.parametrize("kind", [{}, {"backend": "kvm"}, {"protect": "snp"}], ids=str)
def test_that_making_and_closing_a_vm_leaves_nothing_half_made(kind):
    try:
        lk.Vm.create(hello(), **kind).close()
    except lk.NotAvailable as error:
        pytest.skip(str(error))

    def works(_):
        with lk.Vm.create(hello(), **kind) as vm:
            return "" if len(finish(vm)) == 3 else "it does not run"

    def create(_):
        lk.Vm.create(hello(), **kind).close()

    tried = at_every_call(lambda: None, create, works, MOMENTS)
    assert tried.moments > 0 and tried.wrong == {}


SCHEDULES = ["round_robin:100", "round_robin", "random:7:50", "sequential"]


def several(schedule):
    return lk.Vm.create(lk.Program.load(GUESTS / "two_vcpus.elf"), nr_vcpus=3, schedule=schedule)


def run_to_the_end(vm):
    while not all(vcpu.state == "done" for vcpu in vm.vcpus):
        try:
            vm.run_until_done()
        except KeyboardInterrupt:
            continue


def outcome(vm):
    said = [(one.step, one.vcpu, one.cmd, one.args[:3]) for one in vm.log]
    return said, [vcpu.step_count for vcpu in vm.vcpus]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_that_a_run_goes_on_as_if_it_had_not_been_interrupted(schedule):
    undisturbed = several(schedule)
    run_to_the_end(undisturbed)
    want = outcome(undisturbed)

    def differs(vm):
        run_to_the_end(vm)
        got = outcome(vm)
        vm.close()
        return "" if got == want else f"{got[1]}, not {want[1]}"

    tried = at_every_call(
        lambda: several(schedule), lambda vm: vm.run_until_done(), differs, MOMENTS
    )
    assert tried.moments > 0 and tried.heard == tried.moments
    assert tried.wrong == {}


def test_that_a_context_whose_making_was_interrupted_is_not_freed():
    code = """
import gc, signal, sys
from labkit.engines.unicorn.native.lib import Handle
from unicorn import unicorn_const as uc
class Cut(Exception): pass
for at in range(1, 60):
    n = 0
    def trace(frame, event, argument):
        global n
        n += 1
        if n == at: raise Cut
    sys.settrace(trace)
    try: handle = Handle(uc.UC_ARCH_X86, uc.UC_MODE_64)
    except Cut: pass
    finally: sys.settrace(None)
    gc.collect()
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert "AttributeError" not in done.stderr
