"""Steps that people think in, on every architecture: over calls, out of functions, up to places."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import labkit as lk

SOURCE = """#include "labkit.h"
volatile uint64_t sum;
__attribute__((noinline)) uint64_t leaf(uint64_t n)
{
\tfor (uint64_t i = 0; i < 100; i++)
\t\tsum += n;
\treturn sum;
}
__attribute__((noinline)) uint64_t rec(uint64_t n)
{
\tuint64_t below = 0;
\tif (n)
\t\tbelow = rec(n - 1);
\treturn below + leaf(n);
}
void guest_code(uint64_t vcpu)
{
\tsum = 1;
\tsum = rec(3);
\tsum = rec(1) + 1;
\tGUEST_SYNC(sum);
\tsum = 7;
\tGUEST_DONE();
}
"""
ARCHES = ("x86_64", "arm64", "riscv64", "s390x")


@pytest.fixture(scope="module", params=ARCHES)
def program(request: pytest.FixtureRequest) -> lk.Program:
    return lk.Program.compile(SOURCE, arch=request.param)


@pytest.fixture
def vcpu(program: lk.Program) -> Iterator[lk.Vcpu]:
    with lk.Vm.create(program) as vm:
        yield vm.vcpus[0]


def lines(vcpu: lk.Vcpu) -> list[int | None]:
    return [frame.line for frame in vcpu.backtrace()]


def test_that_next_line_stays_in_the_function(vcpu: lk.Vcpu) -> None:
    seen = []
    while len(lines(vcpu)) == 1 and lines(vcpu)[0] != 21:
        seen.append(lines(vcpu)[0])
        assert vcpu.next_line() is None
    assert 19 in seen
    assert 20 in seen
    assert vcpu.vm.read(vcpu.vm.gva_of("sum"), 8) != bytes(8)


def test_that_next_line_stops_behind_a_call_of_the_same_depth(vcpu: lk.Vcpu) -> None:
    """A function that calls itself comes by the same instruction, with a deeper stack."""
    vcpu.run_to("rec")
    depth = len(vcpu.backtrace())
    while lines(vcpu)[0] != 13:
        vcpu.next_line()
    vcpu.next_line()
    assert len(vcpu.backtrace()) == depth


def test_that_a_ucall_ends_a_next(vcpu: lk.Vcpu) -> None:
    came = None
    while came is None:
        came = vcpu.next_line()
    assert isinstance(came, lk.Ucall)
    assert came.cmd == "SYNC"


def test_that_finish_goes_to_the_caller_of_each_depth(vcpu: lk.Vcpu) -> None:
    vcpu.run_to("leaf")
    depth = len(vcpu.backtrace())
    assert depth == 6  # guest_code, rec(3) to rec(0), leaf
    while depth > 1:
        callers = [frame.pc for frame in vcpu.backtrace()][1:]
        assert vcpu.finish() is None
        assert [frame.pc for frame in vcpu.backtrace()] == callers
        depth -= 1


def test_that_finishing_the_entry_function_is_refused(vcpu: lk.Vcpu) -> None:
    with pytest.raises(lk.InvalidState, match="returns to nobody"):
        vcpu.finish()


def test_that_stops_on_the_way_are_no_events(vcpu: lk.Vcpu) -> None:
    vcpu.run_to("leaf")
    vcpu.finish()
    assert len(vcpu.vm.events) == 0
    assert vcpu.breakpoints == frozenset()
    assert isinstance(vcpu.vm.run(), lk.Ucall)


def test_that_a_breakpoint_on_the_way_holds(vcpu: lk.Vcpu) -> None:
    vcpu.run_to("rec")
    vcpu.break_at("leaf")
    assert isinstance(vcpu.finish(), lk.exits.DebugExit)
    assert vcpu.where().startswith("leaf (")
    assert vcpu.breakpoints == {vcpu.pc}


def test_that_a_budget_ends_them(vcpu: lk.Vcpu) -> None:
    vcpu.run_to("leaf")
    with pytest.raises(lk.BudgetExceeded, match="5 instructions and not there yet"):
        vcpu.finish(max_insns=5)
    assert vcpu.finish() is None


def test_that_run_to_takes_a_line(vcpu: lk.Vcpu) -> None:
    line = vcpu.source_line()
    assert line is not None
    assert vcpu.run_to(f"{line.file}:14") is None
    assert lines(vcpu)[0] == 14


def test_that_finish_works_on_each_engine(backend: str) -> None:
    program = lk.Program.compile(SOURCE)
    with lk.Vm.create(program, backend=backend, privilege="kernel") as vm:
        vcpu = vm.vcpus[0]
        assert vcpu.run_to("leaf") is None
        assert vcpu.finish() is None
        assert vcpu.where().startswith("rec")
