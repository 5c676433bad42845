"""The widget without a browser: which messages become actions, what is sent, its fallbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from views_run import Run

import labkit as lk
from labkit.views import dashboard
from labkit.views.live import Hub


@pytest.fixture
def widget() -> Iterator[Any]:
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
    live = pytest.importorskip("labkit.views.widget")
    hub = Hub(Run())
    for kind in dashboard.VIEWS:
        made = live.LabWidget(hub, kind)
        state = made.get_state()
        wanted = [name.split('"')[0] for name in made.layout_html.split('data-pane="')[1:]]
        assert wanted
        assert all(f"pane_{name}" in state for name in wanted)
        assert state["pane_status"]
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
    assert log(widget) == [call]
    assert widget.acks == 1


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
    assert "no such symbol: &lt;b&gt;" in widget.pane_status
    assert 'role="status"' in widget.pane_status
    widget._receive(widget, {"act": "step"}, [])
    assert "no such symbol" not in widget.pane_status


def test_that_a_step_sends_one_message_with_only_what_changed(widget: Any) -> None:
    sent: list[set[str]] = []
    widget.send_state = lambda key=None: sent.append(
        {key} if isinstance(key, str) else set(key or ())
    )
    widget._receive(widget, {"act": "step"}, [])
    first, *rest = sent
    assert {"step", "pane_title"} <= first
    assert not first & {"pane_memory", "pane_source", "layout_html"}
    assert rest == [{"acks"}]


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
    assert widget.pane_pool != before
    assert 'width="574"' in widget.pane_pool
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
    assert data["text/plain"].startswith("alloc4, x86_64, unicorn, step")
    assert repr(widget).startswith("<LabWidget alloc4")


@pytest.mark.parametrize("kind", ["vm", "stepper", "pool", "pages", "memory"])
def test_that_a_vm_without_vcpus_shows_itself(kind: str) -> None:
    with lk.Vm.create_barebones() as vm:
        widget = vm.show(kind)
        assert kind in ("pool", "pages", "memory") or "no vCPU" in widget.view().text
        widget._receive(widget, {"act": "select", "kind": "register", "value": "rip"}, [])
        assert "barebones has no vCPU" in widget.pane_status
        assert "page tables" in vm.look()._repr_mimebundle_()[0]["text/plain"]
        widget.close()
