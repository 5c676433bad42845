"""Ctrl-C while native code runs: engine first, then its state, and only then KeyboardInterrupt.

A KeyboardInterrupt in the middle of somebody's bookkeeping would lose an exit or do a thing twice,
so while a run or another change of a VM is on, SIGINT only sets a flag and asks the engine to stop;
it is raised when the outermost of them has closed its books, or where a run says that it may be.
Python runs its own signal handlers between bytecodes only; for a native call that does not return,
a thread reads what the C-level handler writes to the wakeup descriptor, and asks in its stead.
"""

from __future__ import annotations

# signal.getsignal makes an enum of what it returns, which takes as long as a whole ucall.
import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import FrameType
from typing import ParamSpec, TypeVar

__all__ = ["Shield", "shield", "undivided"]

P = ParamSpec("P")
R = TypeVar("R")

_SIGINT = int(signal.SIGINT)
AGAIN = 0.02  # seconds until a stop that was not followed is asked for once more
NO_CALL = 0


def _nothing() -> None:
    """What stops where nothing runs."""


class Shield:
    """Holds Ctrl-C back on the main thread, for all VMs together, as long as anybody holds it.

    Other threads get no SIGINT, and nothing that they do here has an effect.
    """

    def __init__(self) -> None:
        self.depth = 0  # how many hold it, one inside the other
        self.interrupted = False
        self._main = threading.main_thread().ident
        os.register_at_fork(after_in_child=self._follow_fork)
        self._before: object = signal.default_int_handler
        self._stop: Callable[[], object] = _nothing
        self._handler = self._handle  # one object, so that `is` finds it again
        self._held = _Held(self)
        self._pipe: tuple[int, int] | None = None
        self._old_fd = -1
        self._lock = threading.Lock()
        self._call = NO_CALL  # the number of the native call that is on
        self._calls = 0  # how many there were

    def _follow_fork(self) -> None:
        """In a forked process the thread that forked is the main one."""
        self._main = threading.main_thread().ident

    # --- around what must not be left half done

    def hold(self) -> None:
        """Hold Ctrl-C back from here to `let_go`."""
        if threading.get_ident() != self._main:
            return
        if self.depth == 0 and _signal.getsignal(_SIGINT) is not self._handler:
            self._before = signal.signal(signal.SIGINT, self._handler)
        self.depth += 1

    def let_go(self) -> None:
        """The books are closed; raises the KeyboardInterrupt if nobody else holds it."""
        if threading.get_ident() != self._main:
            return
        self.depth -= 1
        if self.depth == 0 and self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def held(self) -> contextlib.AbstractContextManager[None]:
        """`hold` and `let_go` around a block."""
        return self._held

    # --- around an engine's run

    def enter(self, stop: Callable[[], object]) -> None:
        """Begin a run; `stop()` is called from any thread to end it, more than once if need be."""
        if threading.get_ident() != self._main:
            return
        self.hold()
        self._stop = stop

    def leave(self) -> None:
        """End the run; `check` says whether Ctrl-C came in meanwhile."""
        if threading.get_ident() == self._main:
            self._stop = _nothing  # or the last VM that ran would be kept
            self.depth -= 1

    def is_due(self) -> bool:
        """Whether Ctrl-C came in, and this is the main thread, which has to know."""
        return self.interrupted and threading.get_ident() == self._main

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back; called where books are in order."""
        if self.is_due():
            self.interrupted = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def native(self) -> Iterator[None]:
        """Around a native call that may never return by itself."""
        if threading.get_ident() != self._main:
            yield
            return
        if self._pipe is None:
            self._pipe = self._start_listening()

        self._old_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._calls += 1
        with self._lock:
            self._call = self._calls
        if self.interrupted:  # it came before anybody listened
            self._stop()
        try:
            yield
        finally:
            with self._lock:  # a stop that is under way is over before anything else happens
                self._call = NO_CALL
            signal.set_wakeup_fd(self._old_fd, warn_on_full_buffer=False)

    def _start_listening(self) -> tuple[int, int]:
        """A pipe whose reading end has a thread of its own."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(
            target=self._listen, args=(reading,), name="labkit-sigint", daemon=True
        ).start()
        return reading, writing

    def _listen(self, fd: int) -> None:
        while True:
            signals = os.read(fd, 64)
            call = self._call
            if self._old_fd >= 0:  # an event loop wants to hear of them too
                with contextlib.suppress(OSError):
                    os.write(self._old_fd, signals)
            if signal.SIGINT not in signals or call == NO_CALL:
                continue
            while self._stopped_again(call):
                time.sleep(AGAIN)

    def _stopped_again(self, call: int) -> bool:
        """Ask that native call, and no later one, to stop; False when it is over."""
        with self._lock:
            if self._call != call:
                return False
            self._stop()
            return True

    def later(self) -> None:
        """Let Ctrl-C come again soon, where Python would swallow it now.

        To the main thread, which may be asleep by then.
        """
        main = threading.main_thread().ident
        threading.Timer(AGAIN, signal.pthread_kill, (main, signal.SIGINT)).start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.depth:
            self.interrupted = True
            return
        self.interrupted = False
        if _in_finalizer(frame):
            self.later()
        elif callable(self._before):
            self._before(signum, frame)


class _Held:
    """`with shield.held():`; one object serves all, as it keeps nothing."""

    def __init__(self, shield: Shield) -> None:
        self._shield = shield

    def __enter__(self) -> None:
        self._shield.hold()

    def __exit__(self, *_: object) -> None:
        self._shield.let_go()


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether this is inside a __del__, where Python swallows every exception."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@cache
def shield() -> Shield:
    """The process's one guard against Ctrl-C inside native code, for all engines.

    Two would hand SIGINT to each other for ever.
    """
    return Shield()


def undivided(function: Callable[P, R]) -> Callable[P, R]:
    """A function that is not left half done: Ctrl-C is raised behind it."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with shield().held():
            return function(*args, **kwargs)

    return held
