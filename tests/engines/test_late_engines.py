"""A vCPU that never ran has no engine, and nobody can tell; a limit of memory is said in words."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest
from paths import GUESTS, REPO

import labkit as lk

TWO = GUESTS / "two_vcpus.elf"


def outcome(vm):
    vm.run_until_done()
    said = [(one.step, one.vcpu, one.cmd, one.args) for one in vm.log if one.kind == "ucall"]
    return said, [vcpu.cpu.get_regs() for vcpu in vm.vcpus]


def test_that_many_vcpus_are_made_at_once_and_cost_little():
    program = lk.Program.load(TWO)
    lk.Vm.create(program, nr_vcpus=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    vm = lk.Vm.create(program, nr_vcpus=512)
    assert time.process_time() - start < 0.6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert len(vm.machine.engine.made) == 1
    vm.vcpus[300].step()
    assert len(vm.machine.engine.made) == 2
    vm.close()


def test_that_looking_at_a_vcpu_before_it_runs_changes_nothing():
    program = lk.Program.load(TWO)
    plain = outcome(lk.Vm.create(program, nr_vcpus=3))
    vm = lk.Vm.create(program, nr_vcpus=3)
    for vcpu in vm.vcpus:
        vcpu.look()
    assert outcome(vm)[0] == plain[0]


def test_that_the_host_may_write_code_and_registers_before_it():
    vm = lk.Vm.create(lk.Program.load(TWO), nr_vcpus=3)
    vm.alloc(4096)
    twin = vm.fork()
    vm.vcpus[2].regs.rax = 77
    assert (vm.vcpus[2].regs.rax, vm.vcpus[2].step_count) == (77, 0)
    assert outcome(twin)[0] == outcome(vm)[0]


def test_that_a_closed_vm_makes_no_engine():
    vm = lk.Vm.create(lk.Program.load(TWO), nr_vcpus=2)
    vm.close()
    vm.close()
    with pytest.raises(lk.LabError, match="closed"):
        vm.vcpus[1].run()


def test_that_a_limit_of_address_space_is_an_error_in_words():
    code = f"""
import resource, labkit as lk
program = lk.Program.load({str(GUESTS / "hello.elf")!r})
vms = [lk.Vm.create(program)]
vms[0].run()
with open("/proc/self/statm") as statm: used = int(statm.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)
try:
    for _ in range(100):
        vms.append(lk.Vm.create(program))
        vms[-1].run()
except lk.NotAvailable as error:
    print("refused:", error)
print([one.cmd for one in vms[0].run_until_done()])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "ulimit -v allows" in done.stdout and "DONE" in done.stdout
