"""vm.show(): every view of one VM, with one step and one selection."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from labkit.explore.inspect import Selection, VcpuSnapshot, VmSnapshot
from labkit.paging.scan import PageTable
from labkit.paging.walk import Walk
from labkit.ucall.pool import PoolSnapshot
from labkit.views import memory, pages, pool, stepper, timeline
from labkit.views.draw import Html, cat, el, hx, label, num, plain, swatch
from labkit.views.show import View, columns, header, pane, status_line

__all__ = ["KINDS", "PANES", "Scene", "front", "layout", "panes", "rail", "render", "transport", "walked"]

ICONS = {
    "home": "M2 2h2v12H2zM14 2v12L5 8z", "back_ucall": "M14 2l-7 6 7 6zM5.5 3H2v10h3.5z", "back_line": "M2 8l6-5v10zM8.5 8l6-5v10z",
    "back": "M3 8l9-6v12z", "step": "M13 8L4 2v12z", "step_line": "M8 8L2 3v10zM14.5 8l-6-5v10z", "run": "M2 2l7 6-7 6zM10.5 3h3.5v10h-3.5z",
    "end": "M14 2h-2v12h2zM2 2v12l9-6z",
}
# action -> (what it does, its key, key cap, words on the button); three groups: back, forth, run
BUTTONS = (
    {"home": ("Run to start", "Home", "Home", ""), "back_ucall": ("Back to the last ucall", "Shift+U", "⇧U", ""),
     "back_line": ("Step back one line", "Shift+ArrowLeft", "⇧←", ""), "back": ("Step back", "ArrowLeft", "←", "")},
    {"step": ("Step one instruction", "ArrowRight", "→", "step"), "step_line": ("Step one line", "Shift+ArrowRight", "⇧→", "line")},
    {"run": ("Run to the next ucall", "U", "U", "ucall"), "end": ("Run to the end", "End", "End", "")},
)


@dataclass(frozen=True)
class Scene:
    """What the panes are drawn from: a snapshot, the one to compare with, and how."""

    vm: VmSnapshot
    previous: VmSnapshot | None
    width: float  # inside the padding
    kind: str
    actions: frozenset[str]
    pinned: int | None  # gva of the second ruler

    @cached_property
    def vcpu(self) -> VcpuSnapshot:
        """The vCPU in front."""
        return front(self.vm)

    @cached_property
    def pool(self) -> PoolSnapshot | None:
        """The pool, with its changes since the previous snapshot."""
        before = self.previous.pool if self.previous is not None else None
        return None if self.vm.pool is None else pool.compare(self.vm.pool, before)

    @cached_property
    def slot(self) -> int | None:
        """The selected slot."""
        return None if self.vm.selection is None else self.vm.selection.slot

    @cached_property
    def before(self) -> PageTable | None:
        """The page tables to compare with."""
        return None if self.previous is None else self.previous.page_table

    @cached_property
    def walk(self) -> dict[str, Html]:
        """The panes of the page walk."""
        walk = walked(self.vm)
        name = "of the selection" if self.vm.selection is not None and self.vm.selection.gva is not None else "of the next instruction"
        drawn = pages.walk_panes(walk, self.vm.page_table, self.before, self.width, pages.pool_objects(self.vm.pool, walk, self.slot), self.pinned)
        head = Html() if self.kind == "pages" else label("Page walk", f"{name}: {walk.status}")
        return {**drawn, "walk": head + drawn["walk"]}


def _title(scene: Scene) -> Html:
    vm = scene.vm
    facts = [vm.arch, vm.engine, vm.protection, f"{len(vm.vcpus)} vCPU" + "s" * (len(vm.vcpus) != 1), vm.schedule, vm.state]
    return header(plain(vm.name), [plain(fact, 60) for fact in facts if fact], Html("step ") + el("b", num(vm.step)))


def _pool(scene: Scene) -> Html:
    slots = scene.pool
    if slots is None:
        return label("Pool", "this VM has none") if scene.kind == "pool" else Html()
    picture = pool.draw(slots, scene.width, chosen=scene.slot, taker=scene.vm.vcpu, fold=scene.kind == "vm",
                        leader=scene.kind == "pool" and scene.slot is not None)
    return label("Pool", pool.counts(slots)) + picture


def _memory(scene: Scene) -> Html:
    chosen = scene.vm.selection
    return label("Memory", memory.counts(scene.vm.memory)) + memory.draw(scene.vm.memory, scene.width, chosen) + memory.memory_key(scene.vm.memory, chosen)


PANES: dict[str, Callable[[Scene], Html]] = {
    "title": _title,
    "transport": lambda scene: transport(scene.vm, scene.actions),
    "timeline": lambda scene: timeline.draw(scene.vm, scene.width),
    "status": lambda scene: status_line(_status(scene.vm, scene.kind), top=scene.kind == "vm"),
    "source": lambda scene: stepper.source(scene.vcpu),
    "disassembly": lambda scene: stepper.disassembly(scene.vcpu),
    "registers": lambda scene: stepper.registers(scene.vcpu, scene.vm.selection),
    "stack": lambda scene: stepper.stack(scene.vcpu),
    "touches": lambda scene: stepper.touches(scene.vcpu),
    "pool": _pool,
    "poolkey": lambda scene: Html() if scene.pool is None else pool.pool_key(scene.pool, scene.slot),
    "card": lambda scene: Html() if scene.pool is None or scene.slot is None else pool.card(scene.pool, scene.slot),
    "rail": lambda scene: rail(scene.vm.selection, scene.vm.page_table),
    "memory": _memory,
    "walk": lambda scene: scene.walk["walk"],
    "ruler": lambda scene: scene.walk["ruler"],
    "ranges": lambda scene: pages.ranges(scene.vm.page_table, walked(scene.vm)),
    "changes": lambda scene: pages.changes(scene.vm.page_table, scene.before),
}
KINDS: dict[str, Html] = {
    "vm": cat([pane("title"), pane("transport"), pane("timeline"), pane("status"),
               columns("c2 dash", columns("two", pane("source"), pane("disassembly")), el("div", pane("registers"), pane("touches"), cls="side")),
               pane("pool"), pane("poolkey"), pane("rail"), pane("memory"), pane("walk")]),
    "stepper": cat([pane("title"), pane("transport"), columns(
        "c2e w4", pane("source"), pane("disassembly"), pane("registers"), el("div", pane("stack"), pane("touches"), cls="stk")), pane("status")]),
    "pool": cat([pane("title"), pane("pool"), pane("card"), pane("poolkey"), pane("rail"), pane("status")]),
    "pages": cat([pane("title"), pane("walk"), pane("ruler"), columns("r2", pane("ranges"), pane("changes")), pane("rail"), pane("status")]),
    "memory": cat([pane("title"), pane("memory"), pane("rail"), pane("status")]),
}


def layout(kind: str) -> Html:
    """The places of the panes of one kind of widget."""
    return KINDS[kind]


def panes(scene: Scene) -> dict[str, Html]:
    """The panes that a widget of this kind shows, drawn."""
    return {name: PANES[name](scene) for name in re.findall(r'data-pane="(\w+)"', KINDS[scene.kind])}


def render(vm: VmSnapshot, previous: VmSnapshot | None = None, *, width: int = 940, kind: str = "vm", actions: Collection[str] = (),
           pinned: int | None = None) -> View:
    """A whole VM as a view; kind picks what is shown, one of KINDS."""
    scene = Scene(vm, previous, width - 26, kind, frozenset(actions), pinned)
    title = f"{plain(vm.name)}, {plain(vm.arch)}, {plain(vm.engine)}, step {num(vm.step)}"
    return View(title, _status(vm, kind), panes(scene), layout(kind), lambda: _lines(scene))


def front(vm: VmSnapshot) -> VcpuSnapshot:
    """The vCPU in front."""
    return next((vcpu for vcpu in vm.vcpus if vcpu.index == vm.vcpu), vm.vcpus[0])


def walked(vm: VmSnapshot) -> Walk:
    """The walk that the views show: of the selection, else of the next instruction."""
    chosen = None if vm.selection is None else vm.selection.gva
    return vm.page_table.walk(front(vm).pc if chosen is None else chosen)


def _status(vm: VmSnapshot, kind: str = "vm") -> str:
    if kind == "pool" and vm.pool is not None:
        return pool.status(vm.pool, None if vm.selection is None else vm.selection.slot)
    if kind == "pages":
        return walked(vm).status
    if kind == "memory":
        return memory.status(vm.memory, vm.selection)
    return plain(vm.status, 400) if vm.status and kind == "vm" else stepper.status(front(vm))


def transport(vm: VmSnapshot, actions: Collection[str]) -> Html:
    """The buttons that the controller offers, grouped back, forth, run; and a tab per vCPU."""
    groups = [el("div", *(_button(name, *words) for name, words in group.items() if name in actions), cls="grp")
              for group in BUTTONS if any(name in actions for name in group)]
    tabs = [el("span", f"vCPU {vcpu.index}" + ("" if vcpu.state in ("running", "not started") else f" {plain(vcpu.state, 20)}"), role="tab",
               tabindex=0 if vcpu.index == vm.vcpu else -1, aria_selected="true" if vcpu.index == vm.vcpu else "false", data_act="vcpu",
               data_value=vcpu.index) for vcpu in vm.vcpus]
    return el("div", *groups, el("div", *tabs, cls="tabs", role="tablist", aria_label="vCPU"), cls="tp", role="toolbar", aria_label="Run control")


def _button(name: str, words: str, keys: str, cap: str, face: str) -> Html:
    icon = el("svg", el("path", d=ICONS[name]), viewBox="0 0 16 16", width=14, height=14, aria_hidden="true")
    return el("button", icon, face, el("kbd", cap), type="button", cls="pri" if name == "run" else None, aria_label=words, title=words,
              aria_keyshortcuts=keys, data_act=name)


def rail(chosen: Selection | None, found: PageTable | None = None) -> Html:
    """The selection spelled out as a path: what, gva, indices, gpa, hva."""
    if chosen is None:
        return Html()
    head, comma, tail = plain(chosen.label, 80).partition(", ")
    parts = [el("span", el("b", head), f" {tail}" if comma else "")]
    mono = [f"gva {hx(chosen.gva)}" if chosen.gva is not None else "", " ".join(plain(part, 40) for part in chosen.path)]
    parts += [el("span", part, cls="mono") for part in mono if part]
    if chosen.gpa is not None:
        parts.append(el("span", f"gpa {hx(chosen.gpa)}", _secret(chosen, found), cls="mono"))
    if chosen.hva is not None:
        parts.append(el("span", f"hva {hx(chosen.hva)}", cls="mono"))
    arrow = Html('<span class="d"> → </span>')
    return el("div", *(part if not i else arrow + part for i, part in enumerate(parts)), cls="rail", role="group", aria_label="selection")


def _secret(chosen: Selection, found: PageTable | None) -> Html:
    if found is None or found.mode.c_bit is None or chosen.gva is None:
        return Html()
    flags = found.walk(chosen.gva).flags
    return Html(" ") + swatch("encrypted" if flags["c"] else "shared") if "c" in flags else Html()


def _lines(scene: Scene) -> list[str]:
    """The terminal's table: the same panes in the same order."""
    vm = scene.vm
    parts: dict[str, Callable[[], list[str]]] = {
        "source": lambda: stepper.render(scene.vcpu).lines(), "pool": lambda: [] if scene.pool is None else pool.render(scene.pool).lines(),
        "rail": lambda: _rail_lines(vm.selection), "memory": lambda: memory.render(vm.memory).lines(),
        "walk": lambda: walked(vm).text.splitlines(), "ranges": lambda: pages.render(vm.page_table).lines(),
    }
    wanted = [name for name in re.findall(r'data-pane="(\w+)"', KINDS[scene.kind]) if name in parts]
    return [line for name in wanted for line in ["", *parts[name]()]]


def _rail_lines(chosen: Selection | None) -> list[str]:
    if chosen is None:
        return []
    spots = [f"{name} {hx(value)}" for name, value in (("gva", chosen.gva), ("gpa", chosen.gpa), ("hva", chosen.hva)) if value is not None]
    return [" -> ".join([plain(chosen.label), *spots[:1], " ".join(map(plain, chosen.path)), *spots[1:]])]
