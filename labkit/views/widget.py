"""The live views: thin widgets that carry drawn panes to the browser and clicks back."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import anywidget
import traitlets

from labkit.errors import LabError
from labkit.explore.inspect import VmSnapshot
from labkit.views import pages
from labkit.views.dashboard import PANES, Scene, layout, panes, render, walked
from labkit.views.draw import el
from labkit.views.live import Controller, Publisher, after_each_cell
from labkit.views.show import Bundle, View, mimebundle
from labkit.views.style import css

__all__ = ["LabWidget", "MemoryWidget", "PagesWidget", "PoolWidget", "StepperWidget", "VmWidget"]


class _Panes(anywidget.AnyWidget):  # type: ignore[misc]  # untyped package
    """The state that the browser sees: one trait per pane, so that only what changed is sent."""

    _esm = files("labkit.views").joinpath("js", "widget.js").read_text(encoding="utf-8")
    _css = css()
    layout_html = traitlets.Unicode().tag(sync=True)
    step = traitlets.Int().tag(sync=True)
    width = traitlets.Int(940).tag(sync=True)  # measured by the browser
    acks = traitlets.Int().tag(sync=True)  # actions done so far
    vars().update({f"pane_{name}": traitlets.Unicode().tag(sync=True) for name in PANES})


class LabWidget(_Panes):
    """A live view of a VM; kind picks the panes. Drawing is pure and elsewhere, the state is the controller's."""

    kind = "vm"

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._pinned: int | None = None
        self._base: VmSnapshot | None = None  # what changes are marked against
        self._shown = self._seen = controller.snapshot()  # painted last; painted when the last cell or action ended
        super().__init__(layout_html=layout(self.kind), step=self._shown.step, **self._drawn())
        self._nr_views = 0
        self._publisher = Publisher(self._publish)
        self.on_msg(self._receive)
        self.observe(self._resized, "width")
        self._ends = (controller.observe(self._publisher.poke), after_each_cell(self._settle))

    def view(self) -> View:
        """The same picture as a View, for a notebook without kernel and for a terminal."""
        return render(self._shown, self._base, width=940, kind=self.kind, pinned=self._pinned)

    def close(self) -> None:
        """Stop following the VM."""
        for end in self.__dict__.pop("_ends", ()):
            end()
        super().close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.view().title}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> Bundle:
        return mimebundle(self.view(), super()._repr_mimebundle_(**kwargs))

    def _drawn(self) -> dict[str, str]:
        compare = self._seen if self._shown.step != self._seen.step else self._base
        scene = Scene(self._shown, compare, max(self.width, 320) - 26, self.kind, self._controller.actions, self._pinned)
        return {f"pane_{name}": str(body) for name, body in panes(scene).items()}

    def _publish(self) -> None:
        self._shown = self._controller.snapshot()
        self._paint()

    def _paint(self) -> None:
        with self.hold_sync():
            self.step = self._shown.step
            for name, body in self._drawn().items():
                setattr(self, name, body)

    def _settle(self) -> None:
        """A cell or an action ended: show the final state; later changes are marked against it."""
        self._publisher.flush()
        if self._shown.step != self._seen.step:
            self._base = self._seen
        self._seen = self._shown

    def _resized(self, _change: object) -> None:
        self._paint()

    def _receive(self, _widget: object, content: Any, _buffers: object) -> None:
        """A message from the browser; anything that is not an action on offer is ignored."""
        name = content.get("act") if isinstance(content, dict) else None
        if name in ("hello", "bye"):
            self._nr_views = max(self._nr_views + (1 if name == "hello" else -1), 0)
            self._publisher.active = self._nr_views > 0
            self._publisher.flush()
            return
        problem = None
        try:
            self._do(str(name), content)
        except (LabError, ValueError, TypeError) as error:
            problem = str(error) or type(error).__name__
        self._publisher.dirty = True
        self._settle()
        with self.hold_sync():
            self.acks += 1
            if problem is not None and self.has_trait("pane_status"):
                self.pane_status = str(el("div", problem, cls="status top hole", role="status", aria_live="polite"))

    def _do(self, name: str, content: dict[str, Any]) -> None:
        if name == "pin":
            gva = walked(self._shown).gva
            self._pinned = None if self._pinned == gva else gva
        elif name in self._controller.actions:
            self._controller.act(name, **self._facts(name, content))

    def _facts(self, name: str, content: dict[str, Any]) -> dict[str, object]:
        """The arguments of an action, as the controller takes them."""
        kind, value = content.get("kind"), content.get("value")
        if name == "vcpu":
            return {"index": int(value)}
        if name == "toggle_breakpoint":
            return {"line" if kind == "line" else "gva": _number(value)}
        if name != "select":
            return {}
        if kind in ("none", "register", "symbol"):
            return {"kind": kind, "value": None if kind == "none" else str(value)[:200]}
        number = _number(value)
        if kind == "entry":
            number = pages.gva_of(self._shown.page_table, walked(self._shown).gva, _number(content.get("arg")), number)
        return {"kind": str(kind), "value": number * 4096 if kind == "page" else number}


def _number(value: object) -> int:
    number = value if isinstance(value, int) else int(str(value), 0)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{number} is no address and no index")
    return number


class VmWidget(LabWidget):
    """Every view of one VM, with one step and one selection."""


class StepperWidget(LabWidget):
    """Source, disassembly, registers, stack and memory accesses of the vCPU in front."""

    kind = "stepper"


class PoolWidget(LabWidget):
    """The ucall pool."""

    kind = "pool"


class PagesWidget(LabWidget):
    """The page walk, its entry bit by bit, the mapped ranges and what changed."""

    kind = "pages"


class MemoryWidget(LabWidget):
    """The strip of guest-physical memory."""

    kind = "memory"
