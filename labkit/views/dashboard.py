"""vm.show(): every view of one VM, with one step and one selection."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from labkit.explore.comparison import Comparison
from labkit.look.encryption import EncryptionMap
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress
from labkit.look.snapshots import MemoryMap, VcpuSnapshot, VmSnapshot
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk
from labkit.ucall.pool import PoolSnapshot
from labkit.views import compare, encryption, eyes, launch, memory, pages, pool, stepper, timeline
from labkit.views.draw import Html, cat, el, label, num, plain
from labkit.views.show import Bundle, View, columns, header, mimebundle, pane, status_line

__all__ = ["PANES", "SECRETS", "VIEWS", "Scene", "bundle", "front", "render", "transport", "walked"]

PANES = (
    "title",
    "transport",
    "timeline",
    "status",
    "source",
    "disassembly",
    "registers",
    "stack",
    "touches",
    "pool",
    "card",
    "poolkey",
    "held",
    "rail",
    "memory",
    "walk",
    "ruler",
    "ranges",
    "changes",
    "problems",
    "dump",
    "blocks",
    "words",
    "states",
    "pages",
    "steps",
    "owner",
)  # of all kinds of widget
CODE = (
    columns("two", pane("source"), pane("disassembly")),
    el("div", pane("registers"), pane("touches"), cls="side"),
)
HEAD = cat(
    [
        pane("title"),
        pane("transport"),
        pane("timeline"),
        pane("status"),
        columns("c2 dash", *CODE),
        pane("pool"),
        pane("poolkey"),
        pane("rail"),
        pane("memory"),
    ]
)
LAYOUT = HEAD + pane("walk")
SECRET_LAYOUT = HEAD + cat(
    [pane("problems"), eyes.SIDES, *map(pane, ("walk", "states", "owner"))]
)  # of a protected VM
# action -> (what it does, its key, key cap, words on the button, icon); three groups: back, forth, run
BUTTONS = (
    {
        "home": ("Run to start", "Home", "Home", "", "M2 2h2v12H2zM14 2v12L5 8z"),
        "back_ucall": (
            "Back to the last ucall",
            "Shift+U",
            "⇧U",
            "",
            "M14 2l-7 6 7 6zM5.5 3H2v10h3.5z",
        ),
        "back_line": (
            "Step back one line",
            "Shift+ArrowLeft",
            "⇧←",
            "",
            "M2 8l6-5v10zM8.5 8l6-5v10z",
        ),
        "back": ("Step back", "ArrowLeft", "←", "", "M3 8l9-6v12z"),
    },
    {
        "step": ("Step one instruction", "ArrowRight", "→", "step", "M13 8L4 2v12z"),
        "step_line": (
            "Step one line",
            "Shift+ArrowRight",
            "⇧→",
            "line",
            "M8 8L2 3v10zM14.5 8l-6-5v10z",
        ),
    },
    {
        "run": ("Run to the next ucall", "U", "U", "ucall", "M2 2l7 6-7 6zM10.5 3h3.5v10h-3.5z"),
        "end": ("Run to the end", "End", "End", "", "M14 2h-2v12h2zM2 2v12l9-6z"),
    },
)


@dataclass(frozen=True)
class Scene:
    """What is drawn, and how; memo keeps parts for the next view that shows the same, and the next time."""

    vm: VmSnapshot
    previous: VmSnapshot | None
    width: float
    actions: Collection[str]
    pinned: int | None  # gva of the second ruler
    memo: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, draw: Callable[[], View], *inputs: object) -> View:
        if name not in self.memo or self.memo[name][0] != inputs:
            self.memo[name] = (inputs, draw())
        view: View = self.memo[name][1]
        return view

    def stepper(self) -> View:
        """The vCPU in front, with the buttons."""
        if not self.vm.vcpus:
            return _none("vCPU", "This VM has no vCPU.")
        vcpu, previous = front(self.vm), () if self.previous is None else self.previous.vcpus
        before = next((old for old in previous if old.index == vcpu.index), None)
        draw = partial(stepper.render, vcpu, before, width=self.width, selection=self.vm.selection)
        view = self._once("stepper", draw, vcpu, before, self.width, self.vm.selection)
        return replace(view, panes={**view.panes, "transport": transport(self.vm, self.actions)})

    def pool(self, fold: bool = False) -> View:
        """The ucall pool, or that there is none."""
        if self.vm.pool is None:
            return _none("ucall pool", "This VM has no ucall pool.")
        before = None if self.previous is None else self.previous.pool
        return pool.render(
            self.vm.pool,
            before,
            width=self.width,
            selection=self.vm.selection,
            taker=self.vm.vcpu,
            fold=fold,
        )

    def memory(self) -> View:
        """The strip of guest-physical memory."""
        now, chosen, width = self.vm.memory, self.vm.selection, self.width
        draw = partial(memory.render, now, width=width, selection=chosen)
        return self._once("memory", draw, now.slots, now.ranges, chosen, width)

    def pages(self) -> View:
        """The walk as `walked` says."""
        now, chosen = self.vm.page_table, self.vm.selection
        before = (
            None
            if self.previous is None or self.previous.page_table.tables == now.tables
            else self.previous.page_table
        )
        walk = walked(self.vm)
        objects = pages.pool_objects(self.vm.pool, walk, None if chosen is None else chosen.slot)
        facts: dict[str, Any] = {
            "width": self.width,
            "objects": objects,
            "pinned": self.pinned,
            "selection": chosen,
        }
        old = None if before is None else (before.tables, before.step)
        view = self._once(
            "pages",
            partial(pages.render_walk, walk, now, before, **facts),
            walk,
            now.tables,
            old,
            facts,
        )
        return replace(view, panes={**view.panes, "title": pages.title(walk, now)})

    def encryption(self) -> View:
        """Page tables against memory, or that nothing is encrypted."""
        now, chosen, width = self.vm.encryption, self.vm.selection, self.width
        if now is None:
            return _none("encryption", "This VM is not protected: nothing in it is encrypted.")
        draw = partial(encryption.render, now, width=width, selection=chosen)
        return replace(
            self._once("encryption", draw, now.ranges, now.protection, chosen, width),
            title=encryption.title(now),
        )

    def eyes(self) -> View:
        """The page of the selection through both eyes."""
        now, before = self.vm.eyes, self.previous
        if now is None:
            return _none("eyes", "This VM is not protected: host and guest see the same.")
        return eyes.render(
            now,
            None if before is None else before.eyes,
            width=self.width,
            selection=self.vm.selection,
        )

    def launch(self) -> View:
        """The launch so far."""
        now = self.vm.launch
        if now is None:
            return _none("launch", "This VM is not protected: it has no launch.")
        return self._once("launch", partial(launch.render, now, width=self.width), now, self.width)

    def dash(self) -> View:
        """All of it."""
        vm, secret = (
            self.vm,
            [self.encryption(), self.eyes(), self.launch()]
            if self.vm.encryption is not None
            else [],
        )
        parts = (self.stepper(), self.pool(fold=True), *(secret or [self.memory()]), self.pages())
        layout = SECRET_LAYOUT if secret else LAYOUT
        facts = [
            vm.arch,
            vm.engine,
            vm.protection,
            f"{len(vm.vcpus)} vCPU" + "s" * (len(vm.vcpus) != 1),
            vm.schedule,
            vm.state,
        ]
        said = plain(vm.status, 400) if vm.status else parts[0].status
        of = (
            "the selection"
            if vm.selection is not None and vm.selection.gva is not None
            else "the page above"
            if vm.vcpus and front(vm).sealed
            else "the next instruction"
            if vm.vcpus
            else "gva 0"
        )
        drawn = {
            name: body
            for part in parts
            for name, body in part.panes.items()
            if f'data-pane="{name}"' in layout
        } | {
            "title": header(plain(vm.name), [plain(fact, 60) for fact in facts if fact], vm.step),
            "timeline": timeline.draw(vm, self.width - 26),
            "status": status_line(said, "status top"),
            "rail": parts[-1].panes["rail"],
            "walk": label("Page walk", f"of {of}: {parts[-1].status}") + parts[-1].panes["walk"],
        }
        if secret:
            drawn["states"] = label("Launch", secret[-1].status) + drawn["states"]
        title = f"{plain(vm.name)}, {plain(vm.arch)}, {plain(vm.engine)}, step {num(vm.step)}"
        return View(
            title,
            said,
            drawn,
            layout,
            lambda: [line for part in parts for line in ("", part.status, *part.lines())],
        )


SECRETS = ("encryption", "eyes", "launch")  # views that only a protected VM has
VIEWS: dict[str, Callable[[Scene], View]] = {
    "vm": Scene.dash,
    "stepper": Scene.stepper,
    "pool": Scene.pool,
    "pages": Scene.pages,
    "memory": Scene.memory,
    "encryption": Scene.encryption,
    "eyes": Scene.eyes,
    "launch": Scene.launch,
}


def _none(title: str, words: str) -> View:
    """There is no such thing."""
    return View(title, words, {"status": status_line(words)}, pane("status"), list)


def render(
    vm: VmSnapshot,
    previous: VmSnapshot | None = None,
    *,
    width: float = 940,
    kind: str = "vm",
    actions: Collection[str] = (),
    pinned: int | None = None,
    memo: dict[str, Any] | None = None,
) -> View:
    """A whole VM as a view, or with kind one part of it (one of VIEWS); changes are marked against previous."""
    return VIEWS[kind](Scene(vm, previous, width, actions, pinned, {} if memo is None else memo))


def bundle(snapshot: Any) -> Bundle:
    """What a snapshot of any kind shows of itself: pictures in a notebook, text in a terminal."""
    match snapshot:
        case VmSnapshot():
            return mimebundle(render(snapshot))
        case VcpuSnapshot():
            return mimebundle(stepper.render(snapshot))
        case PoolSnapshot():
            return mimebundle(pool.render(snapshot))
        case MemoryMap():
            return mimebundle(memory.render(snapshot))
        case Comparison():
            return mimebundle(compare.render(snapshot))
        case PageTable():
            return mimebundle(pages.render(snapshot))
        case EncryptionMap():
            return mimebundle(encryption.render(snapshot))
        case PageEyes():
            return mimebundle(eyes.render(snapshot))
        case LaunchProgress():
            return mimebundle(launch.render(snapshot))
        case Walk():
            return mimebundle(pages.render_walk(snapshot, getattr(snapshot, "page_table", None)))
    raise TypeError(f"{type(snapshot).__name__} is no snapshot")


def front(vm: VmSnapshot) -> VcpuSnapshot:
    """The vCPU in front."""
    return next((vcpu for vcpu in vm.vcpus if vcpu.index == vm.vcpu), vm.vcpus[0])


def walked(vm: VmSnapshot) -> Walk:
    """The walk that the views show: of the selection, else of the next instruction; where that is sealed, of the page that is shown."""
    chosen, shown = (
        None if vm.selection is None else vm.selection.gva,
        None if vm.eyes is None else vm.eyes.gva,
    )
    return vm.page_table.walk(
        chosen
        if chosen is not None
        else shown or 0
        if not vm.vcpus or front(vm).sealed
        else front(vm).pc
    )


def transport(vm: VmSnapshot, actions: Collection[str]) -> Html:
    """The buttons on offer, grouped back, forth, run; and a tab per vCPU."""
    groups = [
        el("div", *(_button(name, *group[name]) for name in group if name in actions), cls="grp")
        for group in BUTTONS
    ]
    tabs = el(
        "div",
        *(_tab(vcpu, vcpu.index == vm.vcpu) for vcpu in vm.vcpus),
        cls="tabs",
        role="tablist",
        aria_label="vCPU",
    )
    return el("div", *groups, tabs, cls="tp", role="toolbar", aria_label="Run")


def _tab(vcpu: VcpuSnapshot, here: bool) -> Html:
    state = "" if vcpu.state in ("running", "not started") else f" {vcpu.state}"
    return el(
        "span",
        f"vCPU {vcpu.index}{state}",
        role="tab",
        tabindex=0 if here else -1,
        data_act="vcpu",
        data_value=vcpu.index,
        aria_selected="true" if here else "false",
    )


def _button(name: str, words: str, keys: str, cap: str, face: str, icon: str) -> Html:
    picture = el(
        "svg", el("path", d=icon), viewBox="0 0 16 16", width=14, height=14, aria_hidden="true"
    )
    return el(
        "button",
        picture,
        face,
        el("kbd", cap),
        type="button",
        cls="pri" if name == "run" else None,
        aria_label=words,
        title=words,
        aria_keyshortcuts=keys,
        data_act=name,
    )
