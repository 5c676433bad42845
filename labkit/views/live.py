"""Between a running VM and the pages that show it: what changed, and how rarely it is painted."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from labkit.look.snapshots import VmSnapshot
from labkit.views.scene import Memo

__all__ = ["Controller", "Hub", "Publisher", "Unseen"]

# JupyterLab breaks a notebook off at 1000 messages a second; one per 33 ms is as good to the eye.
RATE = 30  # messages a second, all widgets of a VM together
SHARE = 8  # time for the guest per time for painting
MAX_PAUSE = 0.5  # seconds


class Controller(Protocol):
    """What the live views need of a VM."""

    @property
    def actions(self) -> frozenset[str]:
        """The names that act() takes now.

        A name not among them is never sent and has no button; time travel adds home, back,
        back_line, back_ucall and end.
        """

    def snapshot(self) -> VmSnapshot:
        """The state now."""

    def act(self, name: str, **facts: object) -> None:
        """Do what a person asked for; raises LabError for what cannot be done.

        run, step and step_line take no facts, vcpu takes index, toggle_breakpoint gva or line,
        select kind and value: slot (index), register (name), entry and byte (gva), page and block
        (gpa), symbol (name), none (None).
        """

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call callback after every change; the function returned ends that."""


class Unseen(Protocol):
    """A widget, which is of no use when its VM is closed and no page shows it."""

    def close_unseen(self) -> None:
        """Let go of everything, unless a page shows it."""


class Publisher:
    """Turns many changes into few paints: one per interval, and a last one after the last change.

    A paint that takes long makes the next ones rarer, so that a running guest keeps most of the
    time.
    """

    def __init__(
        self, publish: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.publish = publish  # paints, and returns how many messages it sent
        self.clock = clock
        self.dirty = False
        self._next = 0.0  # when painting may go on
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """Something changed; called as often as it likes."""
        self.dirty = True
        now = self.clock()
        if now >= self._next:
            self.flush()
        elif self._timer is None:
            # A notebook's event loop runs when the cell ends; without one the next poke paints.
            with suppress(RuntimeError):
                self._timer = asyncio.get_running_loop().call_later(self._next - now, self.flush)

    def is_early(self) -> bool:
        """Whether it is too early for another paint."""
        return self.clock() < self._next

    def flush(self) -> None:
        """Paint now what is not painted yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.dirty:
            return

        self.dirty = False
        start = self.clock()
        nr_sent = self.publish()
        end = self.clock()
        pause = max(nr_sent / RATE, min(SHARE * (end - start), MAX_PAUSE))
        self._next = end + pause


class Hub:
    """One VM and all its live views, which show one step: one snapshot a paint, drawn once.

    The hub alone remembers what its views showed last. Changes are marked by comparing two of its
    own snapshots, so what somebody else looks at in between changes no mark.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.shown = controller.snapshot()  # what was painted last
        self._settled = self.shown  # what stood there when the last cell or action ended
        self._before_settled: VmSnapshot | None = None  # and before the guest came there
        self.memo: Memo = {}  # parts that several widgets show are drawn once
        self.closed = False
        self.widgets: weakref.WeakSet[Unseen] = weakref.WeakSet()
        self.painters: list[Callable[[int], None]] = []  # of the widgets that somebody may see
        self.publisher = Publisher(self._publish)
        self._lock = threading.RLock()  # cells and the browser's messages are on two threads
        controller.observe(self._poke)
        self._settle_after_cells()

    def _settle_after_cells(self) -> None:
        """Have settle() called at the end of every cell, where this runs in a notebook."""
        if "IPython" not in sys.modules:
            return
        shell = sys.modules["IPython"].get_ipython()
        if shell is None:
            return
        events = shell.events
        hub = weakref.ref(self)  # the shell must not keep a VM that nobody else has

        def settle() -> None:
            alive = hub()
            if alive is not None:
                alive.settle()

        events.register("post_execute", settle)
        weakref.finalize(self, _unregister, events, settle)

    @property
    def before(self) -> VmSnapshot | None:
        """What changes are marked against: the last state somebody could look at, if any."""
        if _happened(self.shown, self._settled):
            return self._settled
        return self._before_settled

    def _poke(self) -> None:
        """Something changed: told by the thread that runs the guest, which must not wait here.

        Where another thread paints just now it may be waiting for the guest to stand still; what
        changed is painted by the next one.
        """
        # Every ucall comes through here, so what nobody sees yet is decided first.
        publisher = self.publisher
        if not self.painters or (publisher.dirty and publisher.is_early()):
            publisher.dirty = True
            return
        if not self._lock.acquire(blocking=False):
            publisher.dirty = True
            return
        try:
            publisher.poke()
        finally:
            self._lock.release()

    def settle(self) -> None:
        """A cell or an action ended: show the final state; later changes are marked against it."""
        with self._lock:
            self.publisher.flush()
            if _happened(self.shown, self._settled):
                self._before_settled = self._settled
            self._settled = self.shown

    def act(self, name: str, **facts: object) -> None:
        """Do what a person asked for, and show the result."""
        try:
            if name in self.controller.actions:
                self.controller.act(name, **facts)
        finally:
            self.publisher.dirty = True
            self.settle()

    def refresh(self) -> None:
        """Look at the VM again."""
        with self._lock:
            self.shown = self.controller.snapshot()

    def _publish(self) -> int:
        """Send one message a widget.

        Each says how many there are, and the browser paints them together when all have come.
        """
        with self._lock:
            painters = list(self.painters)
            if painters:
                self.refresh()
            for paint in painters:
                paint(len(painters))
            return len(painters)

    def close(self) -> None:
        """The VM is closed: what stands in a page stays until the page lets go of it."""
        self.settle()
        self.closed = True
        for widget in list(self.widgets):
            widget.close_unseen()

    def watch(self, paint: Callable[[int], None], watched: bool) -> None:
        """A browser shows the widget that paint belongs to, or none does any longer."""
        with self._lock:
            if not watched:
                self.painters = [other for other in self.painters if other != paint]
            elif paint not in self.painters:
                self.painters.append(paint)
                self.publisher.dirty = True
                self.publisher.flush()


def _unregister(events: Any, settle: Callable[[], None]) -> None:
    with suppress(ValueError):  # somebody has cleared the list of callbacks
        events.unregister("post_execute", settle)


def _happened(now: VmSnapshot, then: VmSnapshot) -> bool:
    """Whether more than the selection changed between two snapshots.

    The guest went on, or the host changed the page that both show.
    """
    if now.step != then.step:
        return True
    if now.eyes is None or then.eyes is None or now.eyes.gpa != then.eyes.gpa:
        return False
    return (now.eyes.host, now.eyes.guest) != (then.eyes.host, then.eyes.guest)
