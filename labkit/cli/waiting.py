"""A line on stderr that says how far a command with many results is, from one second on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from labkit.session.progress import LATE, Line, is_shown, quiet

__all__ = ["told"]

T = TypeVar("T")
TICK = 0.5  # seconds between two drawings


def told(results: Iterable[T], what: str) -> Iterator[T]:
    """The same results; while the next one is awaited, a line says how many there are so far.

    It is gone while a result is handled, so that what is printed then stands alone. VMs that the
    results come from show no lines of their own.
    """
    if not is_shown():
        yield from results
        return
    with quiet(), _Waiting(what) as waiting:
        for result in results:
            waiting.came()
            yield result
            waiting.goes_on()


class _Waiting:
    """The line, and the thread that draws it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._count = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._is_awaited = True
        self._over = threading.Event()
        self._bar: Line | None = None
        self._thread = threading.Thread(target=self._draw_now_and_then, daemon=True)

    def __enter__(self) -> _Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def came(self) -> None:
        """A result came: the line makes room."""
        with self._lock:
            self._count += 1
            self._is_awaited = False
            if self._bar is not None:
                self._bar.clear()

    def goes_on(self) -> None:
        """The result is handled."""
        with self._lock:
            self._is_awaited = True

    def _draw_now_and_then(self) -> None:
        while not self._over.wait(TICK):
            with self._lock:
                if self._is_awaited and time.monotonic() - self._start >= LATE:
                    self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            seconds = time.monotonic() - self._start
            self._bar = Line(self._what, " done", None, seconds)
        self._bar.draw(self._count)
