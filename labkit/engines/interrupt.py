"""Ctrl-C while native code runs: the engine stops first, its state is settled, and only then KeyboardInterrupt is raised.

A KeyboardInterrupt in the middle of an engine's bookkeeping would lose an exit. So while a run is on, SIGINT only sets a flag
and asks the engine to stop. Python runs a signal handler between bytecodes only, so a watchdog thread makes long native calls
return now and then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["Shield"]

TICK = 0.05  # seconds between two returns from native code


class Shield:
    """Guards one run at a time per process; runs on other threads than the main one get no SIGINT and need no guard."""

    def __init__(self) -> None:
        self.running = False
        self.interrupted = False
        self._before: object = signal.default_int_handler
        self._stop: Callable[[], object] = lambda: None
        self._armed = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler = self._handle  # one object, so that `is` finds it again

    def enter(self, stop: Callable[[], object]) -> None:
        """Begin a run that `stop()` can end from any thread."""
        self._stop = stop
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not self._handler:
            self._before = signal.signal(signal.SIGINT, self._handler)
        self.running = True

    def leave(self) -> None:
        """End the run; `check` says whether Ctrl-C came in meanwhile."""
        self.running = False
        self._armed.clear()

    def check(self) -> None:
        """Raise the KeyboardInterrupt that a run held back; called when its exit has been recorded."""
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def watch(self) -> None:
        """Make the native call that follows return every 50 ms, until `leave`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._tick, name="labkit-watchdog", daemon=True)
            self._thread.start()
        self._armed.set()

    def _tick(self) -> None:
        pause = threading.Event()
        while True:
            self._armed.wait()
            pause.wait(TICK)
            if self._armed.is_set():
                self._stop()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.running:
            self.interrupted = True
            self._stop()
        elif callable(self._before):
            self._before(signum, frame)
