"""What a button begins runs on a thread of its own, so that the next click is heard meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

from labkit.errors import LabError

__all__ = ["SHORT", "Worker"]

SHORT = 0.15  # seconds for which a click waits for what it began


class Worker:
    """Does one thing after the other for the buttons of one VM, each on a thread of its own.

    ipykernel delivers the clicks of a page one after the other, on one thread: a run on it would
    keep a click on "stop" waiting until there is nothing to stop any longer.
    """

    def __init__(self, done: Callable[[str], None]) -> None:
        """done(problem) is called on that thread after each thing that took longer than SHORT."""
        self._done = done
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def do(self, name: str, work: Callable[[], object]) -> bool:
        """Begin it, and wait a short time for its end; returns whether it ended by then.

        Raises the LabError that it ended with by then.
        """
        job = _Job(work, self._done)
        with self._lock:
            thread = threading.Thread(target=job.run, name=f"button {name}", daemon=True)
            self._thread = thread
            thread.start()
        job.ended.wait(SHORT)
        if not job.claim():
            return False
        if job.error is not None:
            raise job.error
        return True

    def join(self, seconds: float) -> bool:
        """Wait for what was begun last; returns whether it is over."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(seconds)
        return not thread.is_alive()


class _Job:
    """One thing to do; its end is told either to who waits, or to `done`."""

    def __init__(self, work: Callable[[], object], done: Callable[[str], None]) -> None:
        self._work = work
        self._done = done
        self._lock = threading.Lock()
        self._left_alone = False  # nobody waits any longer
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # told to who waits, whatever it is
            self.error = error
        with self._lock:
            self.ended.set()
            told_here = self._left_alone
        if told_here:
            self._done(_sentence(self.error))

    def claim(self) -> bool:
        """Who waited goes on: returns whether the end is his to tell."""
        with self._lock:
            self._left_alone = not self.ended.is_set()
            return not self._left_alone


def _sentence(error: BaseException | None) -> str:
    """What to tell of an error; "" when there was none."""
    if error is None:
        return ""
    if isinstance(error, LabError | ValueError):
        return str(error)
    return f"this is a bug of labkit: {type(error).__name__}: {error}"
