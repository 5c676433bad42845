"""The live views: a thin widget that carries drawn panes to the browser and clicks back."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import anywidget
import traitlets

from labkit.errors import InvalidState, LabError
from labkit.look.eyes import BLOCK
from labkit.views import dashboard, pages
from labkit.views.live import Hub
from labkit.views.show import Bundle, View, mimebundle, status_line
from labkit.views.style import css

__all__ = ["LabWidget"]


class _Panes(anywidget.AnyWidget):
    """The state that the browser sees: one trait per pane, so that only what changed is sent."""

    _esm = files("labkit.views").joinpath("js", "widget.js").read_text(encoding="utf-8")
    _css = css()
    layout_html = traitlets.Unicode().tag(sync=True)
    step = traitlets.Int().tag(sync=True)
    width = traitlets.Int(940).tag(sync=True)  # measured by the browser
    batch = traitlets.List(traitlets.Int(), [0, 1]).tag(
        sync=True
    )  # its number, and how many messages it has: painted together
    acks = traitlets.Int().tag(sync=True)  # actions done so far
    vars().update({f"pane_{name}": traitlets.Unicode().tag(sync=True) for name in dashboard.PANES})


class LabWidget(_Panes):
    """A live view of a VM: all of it, or one of dashboard.VIEWS. Drawing is pure and elsewhere, the state is the VM's."""

    def __init__(self, hub: Hub, kind: str = "vm") -> None:
        if kind not in dashboard.VIEWS:
            raise InvalidState(
                f"there is no view {kind!r}, only {', '.join(dashboard.VIEWS)}", kind=kind
            )
        self._hub, self._kind, self._nr_views = hub, kind, 0
        self._pinned: int | None = None
        hub.refresh()
        super().__init__(
            layout_html=str(self.view().layout), step=hub.shown.step, **self._drawn(940)
        )
        hub.watch(self.paint, True)  # until the last browser that showed it says bye
        self.on_msg(self._receive)
        self.observe(lambda _change: self.paint(), "width")

    def view(self, width: int = 940) -> View:
        """The same picture as a View, for a notebook without kernel and for a terminal."""
        hub = self._hub
        return dashboard.render(
            hub.shown,
            hub.before,
            width=width,
            kind=self._kind,
            actions=hub.controller.actions,
            pinned=self._pinned,
            memo=hub.memo,
        )

    def paint(self, messages: int = 1) -> None:
        """Draw the hub's snapshot and send the panes that changed, as one message of so many that the browser paints together."""
        drawn = self._drawn(min(max(self.width, 320), 4000))
        with self.hold_sync():
            self.step, self.batch = self._hub.shown.step, [self.batch[0] + 1, messages]
            for name, body in drawn.items():
                setattr(self, name, body)

    def close(self) -> None:
        """Stop following the VM."""
        if "_hub" in vars(self):  # else there is no such view, and nothing was made
            self._hub.watch(self.paint, False)
            super().close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.view().title}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> Bundle:
        return mimebundle(self.view(), super()._repr_mimebundle_(**kwargs))

    def _drawn(self, width: int) -> dict[str, str]:
        return {f"pane_{name}": str(body) for name, body in self.view(width).panes.items()}

    def _receive(self, _widget: object, content: Any, _buffers: object) -> None:
        """A message from the browser; what is no action on offer is ignored, what fails is said in the status line."""
        if not isinstance(content, dict):
            return
        name = str(content.get("act"))
        if name in ("hello", "bye"):
            self._nr_views = max(self._nr_views + (1 if name == "hello" else -1), 0)
            self._hub.watch(self.paint, self._nr_views > 0)
            return
        problem = ""
        try:
            if name == "pin":
                gva = dashboard.walked(self._hub.shown).gva
                self._pinned = None if self._pinned == gva else gva
            self._hub.act(name, **self._facts(name, content))
        except (LabError, ValueError) as error:
            problem = str(error)
        with self.hold_sync():
            self.acks += 1
            if problem:
                self.pane_status = str(status_line(problem, "status top hole"))

    def _facts(self, name: str, content: dict[str, Any]) -> dict[str, object]:
        """The arguments of an action, as the controller takes them."""
        kind, value = str(content.get("kind")), content.get("value")
        if name == "vcpu":
            return {"index": _number(value)}
        if name == "toggle_breakpoint":
            return {"line" if kind == "line" else "gva": _number(value)}
        if name != "select":
            return {}
        if kind in ("none", "register", "symbol"):
            return {"kind": kind, "value": None if kind == "none" else str(value)[:200]}
        number, shown = _number(value), self._hub.shown
        if kind == "entry":
            number = pages.gva_of(
                shown.page_table, dashboard.walked(shown).gva, _number(content.get("arg")), number
            )
        if kind == "block":
            number = 0 if shown.eyes is None else shown.eyes.gpa + BLOCK * number
        return {"kind": kind, "value": number * 4096 if kind == "page" else number}


def _number(value: object) -> int:
    number = value if isinstance(value, int) else int(str(value), 0)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{number} is no address and no index")
    return number
