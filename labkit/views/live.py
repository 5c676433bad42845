"""Between a running VM and the pages that show it: what the VM offers, and how rarely it is painted."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from labkit.look.snapshots import VmSnapshot

__all__ = ["Controller", "Hub", "Publisher"]

RATE = 30  # messages a second, all widgets of a VM together
SHARE = 6  # time for the guest per time for painting


class Controller(Protocol):
    """What the live views need of a VM.

    act() takes run, step, step_line (no facts), vcpu(index), toggle_breakpoint(gva or line) and select(kind, value):
    slot (index), register (name), entry and byte (gva), page and block (gpa), symbol (name), none (None). A name not in actions
    is never sent and has no button; time travel adds home, back, back_line, back_ucall and end.
    """

    @property
    def actions(self) -> frozenset[str]:
        """The names that act() takes now."""

    def snapshot(self) -> VmSnapshot:
        """The state now."""

    def act(self, name: str, **facts: object) -> None:
        """Do what a person asked for; raises LabError for what cannot be done."""

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call callback after every change; the function returned ends that."""


class Publisher:
    """Turns many changes into few paints: one per interval at most, and a last one after the last change.

    A paint that takes long makes the next ones rarer, so that a running guest keeps most of the time.
    """

    def __init__(
        self, publish: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.publish, self.clock = publish, clock  # publish() returns how many messages it sent
        self.dirty = False
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """Something changed; called as often as it likes."""
        self.dirty = True
        now = self.clock()
        if now >= self._next:
            self.flush()
        elif self._timer is None:
            with suppress(
                RuntimeError
            ):  # without a loop the next poke or flush paints; a notebook's runs when the cell ends
                self._timer = asyncio.get_running_loop().call_later(self._next - now, self.flush)

    def flush(self) -> None:
        """Paint now what is not painted yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.dirty:
            self.dirty = False
            start = self.clock()
            sent = self.publish()
            end = self.clock()
            self._next = end + max(sent / RATE, min(SHARE * (end - start), 0.5))


class Hub:
    """One VM and all live views of it: one snapshot per paint, and one idea of what changed since somebody looked."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.shown = self._seen = (
            controller.snapshot()
        )  # painted last; painted when the last cell or action ended
        self._base: VmSnapshot | None = None
        self.memo: dict[str, Any] = {}  # parts that several widgets show are drawn once
        self.painters: list[Callable[[int], None]] = []  # of the widgets that somebody may see
        self.publisher = Publisher(self._publish)
        controller.observe(self.publisher.poke)
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if shell is not None:
            shell.events.register("post_execute", self.settle)

    @property
    def before(self) -> VmSnapshot | None:
        """What changes are marked against: the last state somebody could look at."""
        return self._seen if _happened(self.shown, self._seen) else self._base

    def settle(self) -> None:
        """A cell or an action ended: show the final state; later changes are marked against it."""
        self.publisher.flush()
        if _happened(self.shown, self._seen):
            self._base = self._seen
        self._seen = self.shown

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
        self.shown = self.controller.snapshot()

    def _publish(self) -> int:
        """One message a widget; each says how many there are, and the browser paints them together when all have come."""
        if self.painters:
            self.refresh()
        for paint in self.painters:
            paint(len(self.painters))
        return len(self.painters)

    def watch(self, paint: Callable[[int], None], watched: bool) -> None:
        """A browser shows the widget that paint belongs to, or none does any longer."""
        if watched and paint not in self.painters:
            self.painters.append(paint)
            self.publisher.dirty = True
            self.publisher.flush()
        self.painters = [other for other in self.painters if watched or other != paint]


def _happened(now: VmSnapshot, then: VmSnapshot) -> bool:
    """Whether the guest went on between two snapshots, or the host changed the page that both show: more than another selection."""
    eye, before = now.eyes, then.eyes
    same = (
        eye is None
        or before is None
        or eye.gpa != before.gpa
        or (eye.host, eye.guest) == (before.host, before.guest)
    )
    return now.step != then.step or not same
