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
        "Step one line, into calls",
        "Shift+ArrowRight",
        "⇧→",
        "M8 8L2 3v10zM14.5 8l-6-5v10z",
        "line",
    ),
    Button(
        "next_line",
        "Step one line, over calls",
        "N",
        "N",
        "M2 12V6a4 4 0 0 1 8 0h3l-4.5 5L4 6h3a1.5 1.5 0 0 0-3 0v6z",
        "next",
    ),
    Button(
        "finish",
        "Finish this function",
        "F",
        "F",
        "M3 14V8h5V4l5 5-5 5v-4H5v4z",
        "finish",
    ),
)
RUN = (
    Button("stop", "Stop the run", "S", "S", "M3 3h10v10H3z", "stop"),
    Button("run", "Run to the next ucall", "U", "U", "M2 2l7 6-7 6zM10.5 3h3.5v10h-3.5z", "ucall"),
    Button("run_to", "Run to the selection", "G", "G", "M2 7h7V3l5 5-5 5V9H2z", "here"),
    Button("end", "Run to the end", "End", "End", "M14 2h-2v12h2zM2 2v12l9-6z", "end"),
    Button("restart", "Set the entry again", "R", "R", "M3 3h2v4.2L12 3v10L5 8.8V13H3z", "restart"),
)
ALL = (  # of several vCPUs
    Button("turn", "Run one turn of the schedule", "T", "T", "M3 2h3v12H3zM8 8l6-5v10z", "turn"),
    Button(
        "run_any",
        "Run all vCPUs to the next ucall of any",
        "A",
        "A",
        "M1 3l5 5-5 5zM6 3l5 5-5 5zM12 3h2.5v10H12z",
        "any ucall",
    ),
)
BUTTONS = (BACK, FORTH, RUN, ALL)
PRIMARY = "run"  # the one that people press most is the filled one


def transport(vm: VmSnapshot, actions: Collection[str]) -> Html:
    """The buttons on offer, grouped back, forth, run; and a tab per vCPU."""
    groups = []
    for group in BUTTONS:
        offered = [
            _button(button, _is_idle(button, vm)) for button in group if button.action in actions
        ]
        groups.append(el("div", *offered, cls="grp"))
    tabs = [_tab(vcpu, vcpu.index == vm.vcpu) for vcpu in vm.vcpus]
    row = el("div", *tabs, cls="tabs", role="tablist", aria_label="vCPU")
    return el("div", *groups, row, cls="tp", role="toolbar", aria_label="Run")


def _is_idle(button: Button, vm: VmSnapshot) -> bool:
    """Whether a button that is on offer has nothing to do just now; it keeps its place."""
    if button.action == "run_to":
        return vm.selection is None or vm.selection.gva is None
    if button.action == "finish":
        return vm.front is None or len(vm.front.frames) < 2
    return False


def _button(button: Button, is_idle: bool) -> Html:
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
        disabled="disabled" if is_idle else None,
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
