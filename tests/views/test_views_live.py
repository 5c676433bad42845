"""Live views without a browser: how often they paint, what they mark as changed, which actions get through."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import views_sample as sample

import labkit as lk
from labkit.errors import InvalidState
from labkit.look.snapshots import VmSnapshot
from labkit.views.live import Hub, Publisher


class Clock:
    """A clock that stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A VM that only counts steps."""

    actions = frozenset({"step", "run", "select", "vcpu", "toggle_breakpoint"})

    def __init__(self) -> None:
        self.vm, self.log, self.watchers = (
            sample.vm(),
            list[tuple[str, dict[str, object]]](),
            list[Callable[[], None]](),
        )
        self.snapshots = 0

    def snapshot(self) -> VmSnapshot:
        self.snapshots += 1
        return self.vm

    def act(self, name: str, **facts: object) -> None:
        self.log.append((name, facts))
        if facts.get("kind") == "symbol":
            raise InvalidState("no such symbol: <b>")
        if name in ("step", "run"):
            self.go()

    def go(self, steps: int = 1) -> None:
        self.vm = replace(self.vm, step=self.vm.step + steps)
        for tell in self.watchers:
            tell()

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)


def publisher(cost: float = 0.0, messages: int = 1) -> tuple[Publisher, Clock, list[float]]:
    """A publisher with a clock of its own and the times at which it painted."""
    clock, painted = Clock(), list[float]()

    def publish() -> int:
        painted.append(clock.now)
        clock.now += cost
        return messages

    return Publisher(publish, clock), clock, painted


# --- how often


@pytest.mark.parametrize("messages", [1, 5])
def test_that_at_most_thirty_messages_a_second_are_sent_and_the_last_change_is_painted(
    messages: int,
) -> None:
    made, clock, painted = publisher(messages=messages)
    for _ in range(20_000):
        clock.now += 0.0001
        made.poke()
    assert 2 * 30 / messages * 0.8 <= len(painted) <= 2 * 30 / messages + 1
    assert made.dirty
    made.flush()
    assert painted[-1] == clock.now and not made.dirty


def test_that_slow_painting_leaves_the_guest_most_of_the_time() -> None:
    made, clock, painted = publisher(cost=0.05)
    for _ in range(20_000):
        clock.now += 0.0001
        made.poke()
    assert len(painted) * 0.05 < 0.2 * clock.now


def test_that_a_flush_with_nothing_new_paints_nothing() -> None:
    made, _, painted = publisher()
    made.flush()
    made.poke()
    made.flush()
    assert len(painted) == 1


def test_that_the_event_loop_paints_what_is_left() -> None:
    painted: list[int] = []
    made = Publisher(lambda: painted.append(1) or 1)  # type: ignore[func-returns-value]

    async def cell() -> None:
        for _ in range(100):
            made.poke()
        assert len(painted) == 1
        await asyncio.sleep(0.1)

    asyncio.run(cell())
    assert len(painted) == 2


# --- what


def test_that_views_of_one_vm_share_one_snapshot_per_paint_and_say_how_many_messages_there_are() -> (
    None
):
    run, shown = Run(), list[str]()
    hub = Hub(run)

    def painter(name: str) -> Callable[[int], None]:
        return lambda messages: shown.append(f"{name} of {messages}")

    for name in "ab":
        hub.watch(painter(name), True)
    shown.clear()
    run.snapshots, hub.publisher._next = 0, 0
    run.go()
    assert shown == ["a of 2", "b of 2"] and run.snapshots == 1


def nothing(messages: int) -> None:
    """What paints nothing."""


def test_that_nobody_looking_costs_no_snapshot() -> None:
    run = Run()
    hub = Hub(run)
    hub.watch(nothing, True)
    hub.watch(nothing, False)
    run.snapshots = 0
    run.go()
    assert run.snapshots == 0


def test_that_changes_are_marked_against_the_last_settled_state() -> None:
    run = Run()
    hub = Hub(run)
    hub.watch(nothing, True)
    assert hub.before is None
    for _ in range(50):
        run.go()
    hub.settle()
    assert hub.shown.step == 1327 and hub.before is not None and hub.before.step == 1277
    hub.settle()
    assert hub.before.step == 1277  # looking again, or choosing something, forgets nothing
    hub.act("step")
    assert hub.before.step == 1327


# --- the widget


@pytest.fixture
def widget() -> Any:
    """A dashboard that a browser shows."""
    live = pytest.importorskip("labkit.views.widget", reason="anywidget is not installed")
    made = live.LabWidget(Hub(Run()))
    made._receive(made, {"act": "hello"}, [])
    yield made
    made.close()


def test_that_what_two_widgets_show_is_drawn_once(widget: Any) -> None:
    stepper = type(widget)(widget._hub, "stepper")
    assert stepper.view().panes["registers"] is widget.view().panes["registers"]
    stepper.close()


def log(widget: Any) -> list[tuple[str, dict[str, object]]]:
    """What reached the VM."""
    return list(widget._hub.controller.log)


def test_that_every_kind_of_widget_has_all_its_panes_as_state() -> None:
    live, dashboard = (
        pytest.importorskip("labkit.views.widget"),
        pytest.importorskip("labkit.views.dashboard"),
    )
    hub = Hub(Run())
    for kind in dashboard.VIEWS:
        made = live.LabWidget(hub, kind)
        state = made.get_state()
        wanted = [name.split('"')[0] for name in made.layout_html.split('data-pane="')[1:]]
        assert wanted and all(f"pane_{name}" in state for name in wanted) and state["pane_status"]
        made.close()
    assert hub.painters == []


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ({"act": "step"}, ("step", {})),
        ({"act": "run"}, ("run", {})),
        ({"act": "vcpu", "value": "2"}, ("vcpu", {"index": 2})),
        (
            {"act": "toggle_breakpoint", "kind": "line", "value": "34"},
            ("toggle_breakpoint", {"line": 34}),
        ),
        (
            {"act": "toggle_breakpoint", "kind": "gva", "value": "0x40126c"},
            ("toggle_breakpoint", {"gva": 0x40126C}),
        ),
        ({"act": "select", "kind": "slot", "value": 3}, ("select", {"kind": "slot", "value": 3})),
        (
            {"act": "select", "kind": "byte", "value": "0x41fee8"},
            ("select", {"kind": "byte", "value": 0x41FEE8}),
        ),
        (
            {"act": "select", "kind": "page", "value": 0x40},
            ("select", {"kind": "page", "value": 0x40000}),
        ),
        (
            {"act": "select", "kind": "entry", "value": 5, "arg": "3"},
            ("select", {"kind": "entry", "value": 0x9040605000}),
        ),
        (
            {"act": "select", "kind": "register", "value": "rdx"},
            ("select", {"kind": "register", "value": "rdx"}),
        ),
        (
            {"act": "select", "kind": "none", "value": None},
            ("select", {"kind": "none", "value": None}),
        ),
    ],
)
def test_that_a_message_becomes_an_action(
    widget: Any, message: dict[str, object], call: tuple[str, dict[str, object]]
) -> None:
    widget._receive(widget, message, [])
    assert log(widget) == [call] and widget.acks == 1


@pytest.mark.parametrize(
    "message",
    [
        None,
        5,
        {},
        {"act": "close"},
        {"act": "__init__"},
        {"act": "home"},
        {"act": "vcpu"},
        {"act": "select", "kind": "slot", "value": "x"},
        {"act": "select", "kind": "entry", "value": 1},
        {"act": "select", "kind": "byte", "value": -1},
        {"act": "toggle_breakpoint", "value": 1 << 70},
        {"act": "select", "kind": "slot", "value": 1.5},
        {"act": "select", "kind": "slot", "value": [1]},
    ],
)
def test_that_nonsense_from_a_browser_does_nothing(widget: Any, message: object) -> None:
    widget._receive(widget, message, [])
    assert log(widget) == []


def test_that_an_error_is_said_in_the_status_line_and_escaped(widget: Any) -> None:
    widget._receive(widget, {"act": "select", "kind": "symbol", "value": "nope"}, [])
    assert (
        "no such symbol: &lt;b&gt;" in widget.pane_status and 'role="status"' in widget.pane_status
    )
    widget._receive(widget, {"act": "step"}, [])
    assert "no such symbol" not in widget.pane_status


def test_that_a_step_sends_one_message_with_only_what_changed(widget: Any) -> None:
    sent: list[set[str]] = []
    widget.send_state = lambda key=None: sent.append(
        {key} if isinstance(key, str) else set(key or ())
    )
    widget._receive(widget, {"act": "step"}, [])
    first, *rest = sent
    assert (
        {"step", "pane_title"} <= first
        and not first & {"pane_memory", "pane_source", "layout_html"}
        and rest == [{"acks"}]
    )


def test_that_pinning_adds_a_ruler_and_takes_it_away() -> None:
    live = pytest.importorskip("labkit.views.widget")
    made = live.LabWidget(Hub(Run()), "pages")
    before = made.pane_ruler
    made._receive(made, {"act": "pin"}, [])
    assert "pinned" in made.pane_ruler
    made._receive(made, {"act": "pin"}, [])
    assert made.pane_ruler == before


def test_that_a_width_from_the_browser_redraws(widget: Any) -> None:
    before = widget.pane_pool
    widget.width = 600
    assert widget.pane_pool != before and 'width="574"' in widget.pane_pool
    widget.width = -5
    assert 'width="294"' in widget.pane_pool


def test_that_the_last_view_to_leave_stops_the_painting(widget: Any) -> None:
    widget._receive(widget, {"act": "hello"}, [])
    widget._receive(widget, {"act": "bye"}, [])
    assert widget._hub.painters
    widget._receive(widget, {"act": "bye"}, [])
    assert widget._hub.painters == []
    widget._hub.controller.go()
    widget._receive(widget, {"act": "hello"}, [])
    assert widget.step == 1278


def test_that_a_widget_carries_its_fallbacks(widget: Any) -> None:
    data, _ = widget._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/plain", "text/html"} <= set(data)
    assert data["text/plain"].startswith("alloc4, x86_64, unicorn, step") and repr(
        widget
    ).startswith("<LabWidget alloc4")


def test_that_drawing_loads_neither_widgets_nor_pandas() -> None:
    script = (
        "import sys, labkit.views.dashboard, labkit.views.live;"
        "print([m for m in ('anywidget', 'ipywidgets', 'pandas', 'IPython') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["vm", "stepper", "pool", "pages", "memory"])
def test_that_a_vm_without_vcpus_shows_itself(kind: str) -> None:
    with lk.Vm.create_barebones() as vm:
        widget = vm.show(kind)
        assert kind in ("pool", "pages", "memory") or "no vCPU" in widget.view().text
        widget._receive(widget, {"act": "select", "kind": "register", "value": "rip"}, [])
        assert (
            "barebones has no vCPU" in widget.pane_status
            and "page tables" in vm.look()._repr_mimebundle_()[0]["text/plain"]
        )
        widget.close()
