"""What the buttons of a dashboard do, from the side of the VM: worker, schedule, card, log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from moments import until

import labkit as lk

SOURCE = """#include "labkit.h"
volatile uint64_t n;
__attribute__((noinline)) uint64_t leaf(uint64_t v) { n += v; GUEST_SYNC(v + 7); return n; }
void guest_code(uint64_t vcpu)
{
\tfor (int i = 0; i < 3; i++)
\t\tn += leaf(vcpu);
\tGUEST_PRINTF("vCPU %d\\n", (int)vcpu);
\tGUEST_DONE();
}
void guest_spins(uint64_t vcpu) { for (;;) n++; }
void guest_faults(uint64_t vcpu) { GUEST_SYNC(1); *(volatile int *)0xdead000 = 1; }
"""


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def vm() -> Iterator[lk.Vm]:
    with lk.Vm.create(program(), nr_vcpus=3, schedule="round_robin:30") as vm:
        yield vm


def press(widget: Any, act: str, **facts: object) -> float:
    """A click as it comes from a browser; returns for how long it kept the browser's thread."""
    begin = time.monotonic()
    widget._receive(widget, {"act": act, **facts}, [])
    return time.monotonic() - begin


def front(widget: Any) -> int:
    return int(widget._hub.shown.vcpu)


# --- what a button begins


def test_that_a_long_run_of_a_button_lets_the_next_click_be_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("labkit.hosts.buttons.RUN_LIMIT", 10**12)
    with lk.Vm.create(program(), "guest_spins") as vm:
        widget = vm.show()
        assert press(widget, "end") < 1
        assert until(lambda: 'data-act="stop"' in widget.pane_transport)
        assert press(widget, "stop") < 1
        assert until(lambda: vm.running is None and widget.pane_status.count("Stopped.") == 1)
        assert 'data-act="step"' in widget.pane_transport


def test_that_a_budget_that_ends_a_buttons_run_is_told() -> None:
    with lk.Vm.create(program(), "guest_spins") as vm:
        widget = vm.show()
        press(widget, "run")
        assert until(lambda: "in 20\N{THIN SPACE}000\N{THIN SPACE}000 instr" in widget.pane_status)
        assert vm.step == 20_000_000
        press(widget, "step")
        assert "run on?" not in widget.pane_status


def test_that_two_clicks_at_once_are_both_answered() -> None:
    with lk.Vm.create(program(), "guest_spins") as vm:
        widget = vm.show()
        clicks = [
            threading.Thread(target=press, args=(widget, act)) for act in ("run", "step", "step")
        ]
        for click in clicks:
            click.start()
        for click in clicks:
            click.join(10)
        assert widget.acks == 3
        vm.stop()
        assert until(lambda: vm.running is None)


def test_that_an_error_of_a_long_run_is_said_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.hosts.worker.SHORT", 0.0)
    with lk.Vm.create(program(), "guest_spins") as vm:
        widget = vm.show()
        press(widget, "finish")
        assert until(lambda: "returns to nobody" in widget.pane_status)
        assert widget.acks == 1


# --- several vCPUs


def test_that_a_turn_is_one_quantum_of_the_schedule(vm: lk.Vm) -> None:
    widget = vm.show()
    for index in (0, 1, 2, 0):
        before = vm.vcpus[index].step_count
        press(widget, "turn")
        assert vm.vcpus[index].step_count == before + 30
        assert front(widget) == index


def test_that_any_ucall_brings_its_vcpu_to_the_front(vm: lk.Vm) -> None:
    widget = vm.show()
    for _ in range(6):
        press(widget, "run_any")
        last = vm.events.iloc[-1]
        assert last.kind == "ucall"
        assert front(widget) == last.vcpu


def test_that_a_cell_that_moves_a_vcpu_brings_it_to_the_front(vm: lk.Vm) -> None:
    widget = vm.show()
    vm.vcpus[2].step()
    widget._hub.settle()
    assert front(widget) == 2
    press(widget, "vcpu", value=0)  # a click on its lane or its tab
    assert front(widget) == 0


def test_that_the_end_runs_all_to_their_done(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "end")
    assert until(lambda: all(vcpu.state == "done" for vcpu in vm.vcpus))
    assert until(lambda: "vCPU 2 done" in widget.pane_transport)
    assert 'data-act="step"' not in widget.pane_transport


def test_that_lanes_are_thick_where_a_vcpu_ran(vm: lk.Vm) -> None:
    for _ in range(3):
        vm.run()
    shown = vm.look().shifts
    assert shown is not None
    assert shown[0].tolist() == [0, 0, 30]
    assert shown[1].tolist() == [1, 30, 60]
    assert int((shown[:, 2] - shown[:, 1]).sum()) == vm.step
    for index, vcpu in enumerate(vm.vcpus):
        mine = shown[shown[:, 0] == index]
        assert int((mine[:, 2] - mine[:, 1]).sum()) == vcpu.step_count


def test_that_a_snapshot_keeps_who_ran_when(vm: lk.Vm) -> None:
    vm.run()
    state, before = vm.snapshot(), vm.look().shifts
    vm.run()
    vm.restore(state)
    after = vm.look().shifts
    assert before is not None
    assert after is not None
    assert after.tolist() == before.tolist()


# --- what the guest said


def test_that_a_ucall_stands_on_the_card_and_in_the_status(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "run")
    assert "vCPU 0 said SYNC(" in widget.pane_status
    assert ", 0x7" in widget.pane_status or "(0x7" in widget.pane_status
    assert "SYNC" in widget.pane_said
    assert "just now" in widget.pane_said
    press(widget, "step")
    assert "at step" in widget.pane_said


def test_that_a_fault_says_what_the_command_line_says_and_can_begin_again() -> None:
    with lk.Vm.create(program(), "guest_faults") as vm:
        widget = vm.show()
        press(widget, "run")
        press(widget, "run")
        assert "#PF (error code 0x2) and no handler, at guest_faults" in widget.pane_status
        assert "fault address 0xdead000" in widget.pane_status
        assert 'data-act="restart"' in widget.pane_transport
        press(widget, "restart")
        assert vm.vcpus[0].state == "not started"
        press(widget, "run")
        assert "SYNC" in widget.pane_said


def test_that_the_log_lists_all_and_can_be_filtered(vm: lk.Vm) -> None:
    widget = vm.show()
    for _ in range(6):
        press(widget, "run_any")
    assert widget.pane_log.count("<tr") == 6
    press(widget, "log_of", value=1)
    assert 0 < widget.pane_log.count("<tr") < 6
    press(widget, "log_of", value="all")
    assert widget.pane_log.count("<tr") == 6
    press(widget, "select", kind="slot", value=0)
    assert 'class="sel"' in widget.pane_log


def test_that_the_backtrace_shows_the_source_of_the_caller(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "run")
    names = [frame.where.partition("+")[0] for frame in vm.vcpus[0].backtrace()]
    press(widget, "frame", value=names.index("leaf"))
    assert "GUEST_SYNC(v + 7)" in widget.pane_source
    press(widget, "step")
    assert "GUEST_SYNC(v + 7)" not in widget.pane_source


def test_that_next_finish_and_here_stand_beside_step(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "select", kind="symbol", value="leaf")
    press(widget, "run_to")
    assert vm.vcpus[0].where().startswith("leaf")
    press(widget, "finish")
    assert vm.vcpus[0].where().startswith(("guest_code", "ucall"))  # or the ucall on the way
    press(widget, "next_line")
    assert widget.acks == 4


def test_that_nothing_is_run_to_without_a_selection(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "run_to")
    assert "no address is selected" in widget.pane_status
    assert vm.step == 0


def test_that_the_view_of_a_closed_vm_says_so(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "run")
    vm.close()
    assert "guest is closed" in widget.pane_status
    assert "SYNC" in widget.pane_said
    assert "data-act" not in widget.pane_transport.partition('role="tablist"')[0]
    for act in ("step", "select", "vcpu"):
        press(widget, act, kind="slot", value=0)
    assert "guest is closed" in widget.pane_status
    assert vm.show("pool").pane_status


def test_that_slots_have_rows_over_time(vm: lk.Vm) -> None:
    widget = vm.show()
    press(widget, "end")
    assert until(lambda: all(vcpu.state == "done" for vcpu in vm.vcpus))
    seen = vm.look()
    history = vm.pool_history
    assert len(seen.holds) == (history.event == "taken").sum()
    held = [hold for hold in seen.holds if hold.end is None]
    assert sorted(hold.slot for hold in held) == sorted(
        slot.index for slot in vm.pool.held if slot.state != "free"
    )
    assert all(hold.end is None or hold.start <= hold.end <= vm.step for hold in seen.holds)
    assert until(lambda: "Slot 0: held" in widget.pane_timeline)
