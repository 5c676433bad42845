"""The live views: a thin widget that carries drawn panes to the browser and clicks back."""

from __future__ import annotations

import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from labkit.checked import checked
from labkit.errors import InvalidState, LabError
from labkit.look.eyes import BLOCK
from labkit.machine.memory import PAGE
from labkit.views import dashboard, pages
from labkit.views.drawing.style import css
from labkit.views.live import Hub
from labkit.views.scene import walked
from labkit.views.show import Bundle, View, mimebundle, status_line

__all__ = ["LabWidget"]

WIDTH = 940  # until the browser has measured its own
AWAITED = 10.0  # seconds that a page may take to show what it was sent
MIN_WIDTH, MAX_WIDTH = 320, 4000


class _Panes(anywidget.AnyWidget):
    """The state that the browser sees: one trait per pane, so that only what changed is sent."""

    _esm = files("labkit.views").joinpath("js", "widget.js").read_text(encoding="utf-8")
    _css = css()
    layout_html = traitlets.Unicode().tag(sync=True)
    step = traitlets.Int().tag(sync=True)
    width = traitlets.Int(WIDTH).tag(sync=True)  # measured by the browser
    # The number of a paint, and how many messages it has: the browser paints them together.
    batch = traitlets.List(traitlets.Int(), [0, 1]).tag(sync=True)
    acks = traitlets.Int().tag(sync=True)  # actions done so far
    heard = traitlets.Int().tag(sync=True)  # the number of the last question "is anybody there?"
    # Traits are found in the namespace of the class body.
    vars().update({f"pane_{name}": traitlets.Unicode().tag(sync=True) for name in dashboard.PANES})


class LabWidget(_Panes):
    """A live view of a VM: all of it, or one of dashboard.VIEWS.

    Drawing is pure and elsewhere, the state is the VM's. Raises InvalidState for another kind.
    """

    def __init__(self, hub: Hub, kind: str = "vm") -> None:
        if kind not in dashboard.VIEWS:
            kinds = ", ".join(dashboard.VIEWS)
            raise InvalidState(f"there is no view {kind!r}, only {kinds}", kind=kind)

        self._hub = hub
        self._kind = kind
        self._nr_views = 0  # pages that show it
        self._is_awaited = False  # sent to a page that has not come yet
        self._pinned: int | None = None  # gva of the second ruler
        hub.refresh()
        layout = str(self.view().layout)
        super().__init__(layout_html=layout, step=hub.shown.step, **self._drawn(WIDTH))
        hub.widgets.add(self)
        hub.watch(self.paint, True)  # until the last browser that showed it says bye
        self.on_msg(self._receive)
        self.observe(lambda _change: self.paint(), "width")

    def view(self, width: int = WIDTH) -> View:
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

    def paint(self, nr_messages: int = 1, problem: str = "") -> None:
        """Draw the hub's snapshot and send the panes that changed, as one message.

        It is one of nr_messages that the browser paints together. A problem stands in the status
        line until the next paint.
        """
        drawn = self._drawn(min(max(self.width, MIN_WIDTH), MAX_WIDTH))
        with self.hold_sync():
            self.step = self._hub.shown.step
            self.batch = [self.batch[0] + 1, nr_messages]
            for name, body in drawn.items():
                setattr(self, name, body)
            if problem:
                self.pane_status = str(status_line(problem, "status top hole"))
        self._hear_while_a_cell_runs()

    def _hear_while_a_cell_runs(self) -> None:
        """Have clicks taken by the browser's own subshell, whoever painted last.

        ipykernel (7.4, BaseComm.publish_msg) sends what comes back for a comm to the shell that
        used it last. After a paint by a running cell that is the main shell, where a click on stop
        would wait until the cell has ended. Without a note of that each message goes where it was
        sent.
        """
        if self.comm is not None:
            self.comm.__dict__.pop("_reply_subshell_id", None)

    def close(self) -> None:
        """Stop following the VM."""
        if "_hub" in vars(self):  # else there is no such view, and nothing was made
            self._hub.watch(self.paint, False)
            super().close()

    def close_unseen(self) -> None:
        """Let go of everything, unless a page shows it; ipywidgets keeps what is not closed.

        A page that was sent it just now has some time to come: a cell may show a VM and close it.
        """
        if self._nr_views:
            return
        if self._is_awaited:
            self._is_awaited = False
            later = threading.Timer(AWAITED, self.close_unseen)
            later.daemon = True
            later.start()
            return
        self.close()

    @checked
    def save(self, path: str | Path, theme: str = "light") -> None:
        """Save what it shows now as a file that ends in .svg, .png or .pdf.

        theme: "light" or "dark". Raises InvalidState for another ending or theme, NotAvailable for
        a file that cannot be written.
        """
        self.view().save(path, theme)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.view().title}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> Bundle:
        self._is_awaited = True
        return mimebundle(self.view(), super()._repr_mimebundle_(**kwargs))

    def _drawn(self, width: int) -> dict[str, str]:
        """The panes as values of their traits."""
        return {f"pane_{name}": str(body) for name, body in self.view(width).panes.items()}

    # --- what comes from a browser

    def _receive(self, _widget: object, content: object, _buffers: object) -> None:
        """A message from the browser: a page comes or goes, or a person asks for something."""
        if not isinstance(content, dict):
            return
        name = str(content.get("act"))
        if name == "hello":
            self._answer(content.get("value"))
            self._shown_by(self._nr_views + 1)
        elif name == "ping":
            self._answer(content.get("value"))
        elif name == "bye":
            self._shown_by(max(self._nr_views - 1, 0))
        else:
            self._act(name, content)

    def _answer(self, question: object) -> None:
        """Somebody is here: a page asked, with a number of its own."""
        if isinstance(question, int) and 0 < question < 1 << 31:
            self.heard = question

    def _shown_by(self, nr_views: int) -> None:
        self._nr_views = nr_views
        self._is_awaited = False
        self._hub.watch(self.paint, nr_views > 0)
        if self._hub.closed:
            self.close_unseen()

    def _act(self, name: str, content: dict[str, object]) -> None:
        """What is no action on offer is ignored, what fails is said in the status line."""
        problem = ""
        try:
            if name == "pin":
                self._pin()
            self._hub.act(name, **self._facts(name, content))
        except (LabError, ValueError) as error:
            problem = str(error)
        with self.hold_sync():
            self.acks += 1
            if problem:
                self.pane_status = str(status_line(problem, "status top hole"))

    def _pin(self) -> None:
        """Keep the walked address as a second ruler, or let go of it."""
        gva = walked(self._hub.shown).gva
        self._pinned = None if self._pinned == gva else gva

    def _facts(self, name: str, content: dict[str, object]) -> dict[str, object]:
        """The arguments of an action, as the controller takes them; ValueError for nonsense."""
        kind, value = str(content.get("kind")), content.get("value")
        if name in ("vcpu", "frame"):
            return {"index": _number(value)}
        if name == "log_of":
            return {"index": None if value == "all" else _number(value)}
        if name == "run_to" and value is None:
            return {}  # to the selection
        if name in ("toggle_breakpoint", "run_to"):
            return {"line" if kind == "line" else "gva": _number(value)}
        if name == "select":
            return {"kind": kind, "value": self._selected(kind, value, content.get("arg"))}
        return {}

    def _selected(self, kind: str, value: object, arg: object) -> str | int | None:
        """What was clicked on: a name, or a number as the controller counts."""
        if kind == "none":
            return None
        if kind in ("register", "symbol"):
            return str(value)[:200]

        number, shown = _number(value), self._hub.shown
        if kind == "entry":  # of a table on the walk, by its depth and index
            return pages.gva_of(shown.page_table, walked(shown).gva, _number(arg), number)
        if kind == "block":  # of the page that is shown through both eyes
            return 0 if shown.eyes is None else shown.eyes.gpa + BLOCK * number
        return number * PAGE if kind == "page" else number


def _number(value: object) -> int:
    """A number from a browser; ValueError for what is none or no 64 bits."""
    number = value if isinstance(value, int) else int(str(value), 0)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{number} is no address and no index")
    return number
