"""Between a running VM and a page that shows it: what the VM offers, and how rarely it is painted."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Protocol

from labkit.explore.inspect import VmSnapshot

__all__ = ["Controller", "Publisher", "after_each_cell"]


class Controller(Protocol):
    """What a widget needs of a VM.

    act(name, ...) takes run, step, step_line (no facts), vcpu(index), toggle_breakpoint(gva or line) and
    select(kind, value): slot (index), register (name), entry and byte (gva), page (gpa), symbol (name), none (None).
    Names not in actions are never sent and their buttons are not shown; time travel adds home, back, back_line,
    back_ucall and end. It raises LabError for what cannot be done.
    """

    @property
    def actions(self) -> frozenset[str]:
        """The names that act() takes now."""

    def snapshot(self) -> VmSnapshot:
        """The state now."""

    def act(self, name: str, **facts: object) -> None:
        """Do what a person asked for."""

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call callback after every change; the function returned ends that."""


class Publisher:
    """Turns many changes into few paints: one per interval at most, and a last one after the last change.

    A paint that takes long makes the next ones rarer, so that a running guest keeps most of the time.
    """

    def __init__(self, publish: Callable[[], None], interval: float = 1 / 30, share: float = 6, clock: Callable[[], float] = time.monotonic) -> None:
        self.publish, self.interval, self.share, self.clock = publish, interval, share, clock
        self.active = True  # somebody looks
        self.dirty = False
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """Something changed; called as often as it likes."""
        self.dirty = True
        if self.active:
            if self.clock() >= self._next:
                self.flush()
            elif self._timer is None:
                self._later()

    def flush(self) -> None:
        """Paint now what is not painted yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.dirty and self.active:
            self.dirty = False
            start = self.clock()
            self.publish()
            end = self.clock()
            self._next = end + max(self.interval, min(self.share * (end - start), 0.5))

    def _later(self) -> None:
        """In a notebook the loop runs when the cell ends or awaits; without a loop the next poke or flush paints."""
        try:
            self._timer = asyncio.get_running_loop().call_later(self._next - self.clock(), self.flush)
        except RuntimeError:
            self._timer = None


def after_each_cell(callback: Callable[[], None]) -> Callable[[], None]:
    """Call callback when a notebook cell ends, where there is a notebook; the function returned ends that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return lambda: None
    shell.events.register("post_execute", callback)
    return lambda: shell.events.unregister("post_execute", callback)
