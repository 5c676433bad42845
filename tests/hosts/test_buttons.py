"""A dashboard over a guest that runs for long: it follows, it has a stop button, nothing breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from moments import until

import labkit as lk

SOURCE = """#include "labkit.h"
volatile uint64_t counter;
void guest_code(uint64_t vcpu) { for (;;) counter++; }
"""


@cache
def spin() -> lk.Program:
    return lk.Program.compile(SOURCE)


@pytest.fixture
def vm(backend: str) -> Iterator[lk.Vm]:
    with lk.Vm.create(spin(), backend=backend, privilege="kernel") as vm:
        yield vm


@pytest.fixture
def running(vm: lk.Vm) -> Iterator[tuple[Any, list[object]]]:
    """The VM's dashboard while a thread runs it as a cell does; and what the run ended with."""
    widget = vm.show()
    came: list[object] = []
    cell = threading.Thread(target=lambda: came.append(vm.run()), name="cell")
    cell.start()
    assert until(lambda: "Running: run() on thread cell" in widget.pane_status)
    yield widget, came
    vm.stop()
    cell.join(10)
    assert not cell.is_alive()


def press(widget: Any, act: str, **facts: object) -> None:
    """A click, as it comes from a browser on a thread of its own."""
    message = {"act": act, **facts}
    click = threading.Thread(target=lambda: widget._receive(widget, message, []))
    click.start()
    click.join(10)
    assert not click.is_alive()


def test_that_the_dashboard_follows_a_run(vm: lk.Vm, running: Any) -> None:
    widget, _ = running
    seen = widget.pane_status
    assert until(lambda: widget.pane_status != seen)
    assert 'data-act="stop"' in widget.pane_transport


def test_that_stop_ends_the_run_of_a_cell(vm: lk.Vm, running: Any) -> None:
    widget, came = running
    press(widget, "stop")
    assert until(lambda: came == [lk.exits.StopExit()] and vm.running is None)
    widget._hub.settle()  # as when the cell ends
    assert "Running" not in widget.pane_status
    assert 'data-act="step"' in widget.pane_transport
    assert 'data-act="stop"' not in widget.pane_transport


@pytest.mark.parametrize("act", ["step", "step_line", "run", "toggle_breakpoint", "end"])
def test_that_a_click_at_the_wrong_moment_does_nothing(act: str, vm: lk.Vm, running: Any) -> None:
    widget, came = running
    press(widget, act, value="0x400000", kind="gva")
    assert came == []
    assert vm.running is not None


def test_that_a_selection_is_shown_while_it_runs(vm: lk.Vm, running: Any) -> None:
    widget, came = running
    press(widget, "select", kind="symbol", value="counter")
    assert until(lambda: "counter" in widget.pane_rail)
    assert came == []


def test_that_a_new_view_opens_while_it_runs(vm: lk.Vm, running: Any) -> None:
    _, came = running
    assert vm.show("pool").pane_status
    assert came == []


def test_that_nobody_follows_a_closed_vm() -> None:
    before = set(threading.enumerate())
    with lk.Vm.create(spin()) as vm:
        vm.show()
    assert until(lambda: not [t for t in set(threading.enumerate()) - before if "ticks" in t.name])
