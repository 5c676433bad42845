"""What a button begins runs on a thread of its own, so that the next click is heard meanwhile.

ipykernel delivers the clicks of a page one after the other, on one thread: a run on it would keep a
click on "stop" waiting until there is nothing to stop any longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from labkit.errors import LabError

__all__ = ["SHORT", "begin"]

SHORT = 0.15  # seconds for which a click waits for what it began


def begin(name: str, work: Callable[[], object], late: Callable[[str], None]) -> None:
    """Begin it on a thread of its own, and wait a short time for its end.

    Raises what it ended with by then. If it takes longer, late(problem) is called on its thread
    when it is over; the problem is "" when there was none.
    """
    job = _Job(work, late)
    threading.Thread(target=job.run, name=f"button {name}", daemon=True).start()
    job.ended.wait(SHORT)
    if job.claim() and job.error is not None:
        raise job.error


class _Job:
    """One thing to do; its end is told either to who waits, or to `late`."""

    def __init__(self, work: Callable[[], object], late: Callable[[str], None]) -> None:
        self._work = work
        self._late = late
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
            is_late = self._left_alone
        if is_late:
            self._late(_sentence(self.error))

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
