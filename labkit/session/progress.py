"""A line that says how far a long run is, in a terminal and in a notebook.

Runs themselves know nothing of it and pay nothing for it: one thread looks four times a second
whether a VM has been running for a second, and follows it from then on. The line is drawn by the
thread that runs the guest, while the guest stands still, and removed when the run ends.

In a notebook a VM that a dashboard follows has none: the dashboard says the same.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from labkit.session.turn import Running
from labkit.shown import is_notebook

if TYPE_CHECKING:
    from labkit.session.vm import Vm

__all__ = ["DISABLE", "LATE", "WATCH", "Line", "Watch", "is_shown", "quiet", "watch"]

LATE = 1.0  # seconds from which on a run is one that people want to be told of
INSNS = " insns"
POLL = 0.25  # seconds between two looks
DISABLE = "TQDM_DISABLE"  # of the environment: no lines at all, as for every user of tqdm


class Watch:
    """The VMs of this process, and the thread that looks at them: it is there while they are."""

    def __init__(self) -> None:
        self.lines: weakref.WeakKeyDictionary[Vm, _Line] = weakref.WeakKeyDictionary()
        self.quiet = 0  # `quiet` blocks that are open
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, vm: Vm) -> None:
        """Look at this VM from now on."""
        with self._lock:
            self.lines[vm] = _Line(vm)
            if self._thread is None or not self._thread.is_alive():  # a fork leaves it behind
                self._thread = threading.Thread(
                    target=self._look, name="labkit-progress", daemon=True
                )
                self._thread.start()

    def hush(self, by: int) -> None:
        """One `quiet` block more, or one less."""
        with self._lock:
            self.quiet += by

    def _look(self) -> None:
        """Begin to follow what has been running for long, as long as there are VMs at all."""
        while True:
            time.sleep(POLL)
            with self._lock:
                lines = list(self.lines.values())
                if not lines:
                    self._thread = None
                    return
            for line in lines:
                line.look()
            del lines


WATCH = Watch()


def is_shown() -> bool:
    """Whether somebody can see a line: stderr is a terminal, or this is a notebook."""
    if WATCH.quiet or os.environ.get(DISABLE):
        return False
    try:
        return is_notebook() or sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        return False


def watch(vm: Vm) -> None:
    """Show a line for each long run of a VM from now on, where somebody can see one."""
    if is_shown():
        WATCH.add(vm)


@contextmanager
def quiet() -> Iterator[None]:
    """No line for VMs that are made in this block: who makes them has a line of his own."""
    WATCH.hush(1)
    try:
        yield
    finally:
        WATCH.hush(-1)


class _Line:
    """The line of one VM, which is there during long runs only."""

    def __init__(self, vm: Vm) -> None:
        self._vm = weakref.ref(vm)
        self._unfollow: Callable[[], None] | None = None
        self._bar: Line | None = None

    def look(self) -> None:
        """Follow the VM if it has been running for long; called by the thread that watches."""
        vm = self._vm()
        if vm is None or self._unfollow is not None:
            return
        running = vm.running
        if running is None or not _is_wanted(running) or running.seconds < LATE - POLL:
            return
        if vm.turn.is_followed and is_notebook():
            return
        self._unfollow = vm.turn.follow(self.tick)

    def tick(self) -> None:
        """Draw the line, or remove it when the run is over; called between two instructions."""
        vm = self._vm()
        running = None if vm is None else vm.running
        try:
            if vm is None or running is None or not _is_wanted(running):
                self._end()
            elif running.seconds >= LATE:
                self._draw(vm, running)
        except (OSError, ValueError):  # stderr is gone: that is no reason to end a run
            self._bar = None

    def _draw(self, vm: Vm, running: Running) -> None:
        done = max(vm.step - running.start, 0)
        if self._bar is None:
            words = f"{vm.name[:40]}: {running.what}"
            self._bar = Line(words, INSNS, running.budget, running.seconds)
        self._bar.draw(done)

    def _end(self) -> None:
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def _is_wanted(running: Running) -> bool:
    """Whether the main thread runs the guest: what a button began is shown by its dashboard."""
    return running.thread == threading.main_thread().name


class Line:
    """A tqdm that is drawn by hand, for something that has been going on for some seconds."""

    def __init__(self, words: str, unit: str, total: int | None, seconds: float) -> None:
        """total is how many there will be, None where nobody knows."""
        from tqdm.auto import tqdm

        # tqdm's own thread would look after lines that are not drawn often enough: these are.
        kind = type("Line", (tqdm,), {"monitor_interval": 0})
        # The first drawing is ours too: one of tqdm's own would have no count yet.
        options: dict[str, Any] = {"display": False} if is_notebook() else {"delay": 1e-9}
        self._bar = kind(
            desc=words,
            unit=unit,
            total=total,
            unit_scale=unit == INSNS,
            leave=False,
            dynamic_ncols=True,
            **options,
        )
        self._bar.start_t -= seconds
        self._shown: Any = None
        if is_notebook():
            display = sys.modules["IPython"].display.display
            self._shown = display(self._bar.container, display_id=True)

    def draw(self, count: int) -> None:
        """So many are done."""
        self._bar.n = count
        self._bar.refresh()

    def clear(self) -> None:
        """Make room for what is printed until it is drawn again."""
        self._bar.clear()

    def close(self) -> None:
        """It is over: nothing is left, in a saved notebook neither."""
        self._bar.close()
        if self._shown is not None:
            self._shown.update({"text/plain": ""}, raw=True)
