"""The buttons that move a VM in time, and a tab per vCPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from labkit.look.snapshots import VcpuBrief, VmSnapshot
from labkit.views.drawing.markup import Html, el

__all__ = ["BUTTONS", "Button", "transport"]

QUIET_STATES = ("running", "not started")  # not said on a tab


@dataclass(frozen=True)
class Button:
    """One button: the action that it asks for, its key, and its looks."""

    action: str
    words: str  # what it does
    key: str  # as aria-keyshortcuts names it: the script presses the button on it
    cap: str  # the key as it is shown
    icon: str  # path data, 16 x 16
    face: str = ""  # the word on it


BACK = (
    Button("home", "Run to start", "Home", "Home", "M2 2h2v12H2zM14 2v12L5 8z"),
    Button(
        "back_ucall", "Back to the last ucall", "Shift+U", "⇧U", "M14 2l-7 6 7 6zM5.5 3H2v10h3.5z"
    ),
    Button(
        "back_line", "Step back one line", "Shift+ArrowLeft", "⇧←", "M2 8l6-5v10zM8.5 8l6-5v10z"
    ),
    Button("back", "Step back", "ArrowLeft", "←", "M3 8l9-6v12z"),
)
FORTH = (
    Button("step", "Step one instruction", "ArrowRight", "→", "M13 8L4 2v12z", "step"),
    Button(
        "step_line",
        "Step one line",
        "Shift+ArrowRight",
        "⇧→",
        "M8 8L2 3v10zM14.5 8l-6-5v10z",
        "line",
    ),
)
RUN = (
    Button("stop", "Stop the run", "S", "S", "M3 3h10v10H3z", "stop"),
    Button("run", "Run to the next ucall", "U", "U", "M2 2l7 6-7 6zM10.5 3h3.5v10h-3.5z", "ucall"),
    Button("end", "Run to the end", "End", "End", "M14 2h-2v12h2zM2 2v12l9-6z"),
)
BUTTONS = (BACK, FORTH, RUN)
PRIMARY = "run"  # the one that people press most is the filled one


def transport(vm: VmSnapshot, actions: Collection[str]) -> Html:
    """The buttons on offer, grouped back, forth, run; and a tab per vCPU."""
    groups = []
    for group in BUTTONS:
        offered = [_button(button) for button in group if button.action in actions]
        groups.append(el("div", *offered, cls="grp"))
    tabs = [_tab(vcpu, vcpu.index == vm.vcpu) for vcpu in vm.vcpus]
    row = el("div", *tabs, cls="tabs", role="tablist", aria_label="vCPU")
    return el("div", *groups, row, cls="tp", role="toolbar", aria_label="Run")


def _button(button: Button) -> Html:
    icon = el(
        "svg",
        el("path", d=button.icon),
        viewBox="0 0 16 16",
        width=14,
        height=14,
        aria_hidden="true",
    )
    return el(
        "button",
        icon,
        button.face,
        el("kbd", button.cap),
        type="button",
        cls="pri" if button.action == PRIMARY else None,
        aria_label=button.words,
        title=button.words,
        aria_keyshortcuts=button.key,
        data_act=button.action,
    )


def _tab(vcpu: VcpuBrief, in_front: bool) -> Html:
    words = f"vCPU {vcpu.index}"
    if vcpu.state not in QUIET_STATES:
        words += f" {vcpu.state}"
    return el(
        "span",
        words,
        role="tab",
        tabindex=0 if in_front else -1,
        data_act="vcpu",
        data_value=vcpu.index,
        aria_selected="true" if in_front else "false",
    )
