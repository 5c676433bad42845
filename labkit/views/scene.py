"""One VM to be drawn: what each kind of view takes from its snapshot."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial

from labkit.look.snapshots import VcpuSnapshot, VmSnapshot
from labkit.paging.walk import Walk
from labkit.views import encryption, eyes, launch, memory, pages, pool, stepper
from labkit.views.show import View, pane, status_line
from labkit.views.transport import transport

__all__ = ["Memo", "Scene", "walked"]

Memo = dict[str, tuple[tuple[object, ...], View]]  # kind of view -> what it was drawn from, and it


@dataclass(frozen=True)
class Scene:
    """What is drawn, and how.

    memo keeps parts for the next view that shows the same, and for the next time.
    """

    vm: VmSnapshot
    previous: VmSnapshot | None  # what changes are marked against
    width: float
    actions: Collection[str]  # that have a button
    pinned: int | None  # gva of the second ruler
    memo: Memo = field(default_factory=dict)

    def _once(self, kind: str, draw: Callable[[], View], *inputs: object) -> View:
        """The view from the memo, drawn anew where it was drawn from other inputs."""
        if kind not in self.memo or self.memo[kind][0] != inputs:
            self.memo[kind] = (inputs, draw())
        return self.memo[kind][1]

    def stepper(self) -> View:
        """The vCPU in front, with the buttons."""
        vcpu, chosen = self.vm.front, self.vm.selection
        if vcpu is None:
            return _none("vCPU", "This VM has no vCPU.")
        before = self._vcpu_before(vcpu.index)
        draw = partial(stepper.render, vcpu, before, width=self.width, selection=chosen)
        view = self._once("stepper", draw, vcpu, before, self.width, chosen)

        buttons = transport(self.vm, self.actions)
        return replace(view, panes={**view.panes, "transport": buttons})

    def _vcpu_before(self, index: int) -> VcpuSnapshot | None:
        """The vCPU of this index in the previous snapshot, if it was in front there too."""
        before = None if self.previous is None else self.previous.front
        return before if before is not None and before.index == index else None

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
        now, chosen = self.vm.memory, self.vm.selection
        draw = partial(memory.render, now, width=self.width, selection=chosen)
        return self._once("memory", draw, now.slots, now.ranges, chosen, self.width)

    def pages(self) -> View:
        """The walk that walked() finds."""
        now, chosen = self.vm.page_table, self.vm.selection
        before = None
        if self.previous is not None and self.previous.page_table.tables != now.tables:
            before = self.previous.page_table
        walk = walked(self.vm)
        slot = None if chosen is None else chosen.slot
        objects = pages.pool_objects(self.vm.pool, walk, slot)
        draw = partial(
            pages.render_walk,
            walk,
            now,
            before,
            width=self.width,
            objects=objects,
            pinned=self.pinned,
            selection=chosen,
        )
        # Not the snapshots: the title alone says the step, so it is drawn each time.
        old = None if before is None else (before.tables, before.step)
        looks = (self.width, objects, self.pinned, chosen)
        view = self._once("pages", draw, walk, now.tables, old, looks)
        return replace(view, panes={**view.panes, "title": pages.title(walk, now)})

    def encryption(self) -> View:
        """Page tables against memory, or that nothing is encrypted."""
        now, chosen = self.vm.encryption, self.vm.selection
        if now is None:
            return _none("encryption", "This VM is not protected: nothing in it is encrypted.")
        draw = partial(encryption.render, now, width=self.width, selection=chosen)
        view = self._once("encryption", draw, now.ranges, now.protection, chosen, self.width)
        return replace(view, title=encryption.title(now))

    def eyes(self) -> View:
        """The page of the selection through both eyes."""
        now = self.vm.eyes
        if now is None:
            return _none("eyes", "This VM is not protected: host and guest see the same.")
        before = None if self.previous is None else self.previous.eyes
        return eyes.render(now, before, width=self.width, selection=self.vm.selection)

    def launch(self) -> View:
        """The launch so far."""
        now = self.vm.launch
        if now is None:
            return _none("launch", "This VM is not protected: it has no launch.")
        return self._once("launch", partial(launch.render, now, width=self.width), now, self.width)


def _none(title: str, words: str) -> View:
    """There is no such thing."""
    return View(title, words, {"status": status_line(words)}, pane("status"), list)


def walked(vm: VmSnapshot) -> Walk:
    """The walk that the views show: of the selection, else of the next instruction.

    Where that is sealed, of the page that is shown through both eyes.
    """
    if vm.selection is not None and vm.selection.gva is not None:
        return vm.page_table.walk(vm.selection.gva)
    if vm.front is not None and not vm.front.sealed:
        return vm.page_table.walk(vm.front.pc)
    shown = None if vm.eyes is None else vm.eyes.gva
    return vm.page_table.walk(shown or 0)
