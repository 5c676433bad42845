"""Who called whom, at every instruction of a guest, on every architecture."""

from __future__ import annotations

import pytest

import labkit as lk

SOURCE = """#include "labkit.h"
static int depth;
__attribute__((noinline)) int leaf(int x) { depth += x; return depth; }
__attribute__((noinline)) int mid(int x) { int a = leaf(x) + 1; GUEST_SYNC(a); return a * 2; }
__attribute__((noinline)) int rec(int x) { return x ? rec(x - 1) + mid(x) : mid(3); }
void guest_code(uint64_t vcpu) { GUEST_SYNC(rec(2)); GUEST_DONE(); }
"""
ARCHES = ("x86_64", "arm64", "riscv64", "s390x")


@pytest.fixture(scope="module", params=ARCHES)
def program(request: pytest.FixtureRequest) -> lk.Program:
    return lk.Program.compile(SOURCE, arch=request.param)


def functions(vcpu: lk.Vcpu) -> list[str]:
    return [frame.where.partition("+")[0] for frame in vcpu.backtrace()]


def test_that_a_ucall_is_followed_back_to_the_entry(program: lk.Program) -> None:
    with lk.Vm.create(program) as vm:
        vm.run()
        names = functions(vm.vcpus[0])
        assert names[-4:] == ["mid", "rec", "rec", "guest_code"]  # rec(0) ends in a jump to mid
        assert "ucall" in names


def test_that_callers_have_the_lines_of_their_calls(program: lk.Program) -> None:
    with lk.Vm.create(program) as vm:
        vm.run()
        lines = [frame.line for frame in vm.vcpus[0].backtrace()]
        assert lines[-4:] == [4, 5, 5, 6]


def test_that_it_reaches_the_entry_from_every_instruction(program: lk.Program) -> None:
    """Calls and returns change the depth by one, so a wrong frame would show."""
    with lk.Vm.create(program) as vm:
        vcpu = vm.vcpus[0]
        depth = 1
        while vcpu.state != "done":
            trace = vcpu.backtrace()
            assert not trace.why, (vcpu.where(), trace)
            assert functions(vcpu)[-1] in ("guest_code", "ucall")  # its last call is a jump
            assert abs(len(trace) - depth) <= 1
            depth = len(trace)
            vcpu.step()


def test_that_a_stack_that_leads_nowhere_is_said(program: lk.Program) -> None:
    with lk.Vm.create(program) as vm:
        vcpu = vm.vcpus[0]
        vcpu.break_at("leaf")
        vcpu.run()
        vcpu.set_breakpoints(set())
        vcpu.regs[vm.arch.sp] = 0x10
        trace = vcpu.backtrace()
        assert trace[0].where == "leaf"
        assert len(trace) < 130


def test_that_code_without_information_ends_it_with_the_reason() -> None:
    with lk.Vm.create(lk.Program.compile(SOURCE)) as vm:
        vm.vcpus[0].regs.rip = 0x123456
        assert vm.vcpus[0].backtrace().why == "no call frame information at 0x123456"
