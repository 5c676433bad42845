"""Whose turn it is: a VM belongs to one caller at a time, whatever threads there are.

A notebook's buttons, a second window and scripts reach a VM from several threads. What changes it
(an *act*: run, step, write, restore) takes its turn alone. Two short acts wait for each other;
while a guest runs, an act from elsewhere is refused in words, since nobody knows how long that
takes. What only looks is never refused: the runner is asked to come out of the guest, stands still
between two instructions while the others look, and goes on as if nothing had been.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from labkit.errors import Busy

__all__ = ["Running", "Turn", "act", "look"]

PATIENCE = 0.02  # seconds after which who waits looks again whether the runner has come out
STILL = 0.001  # seconds after which a runner that stands still looks whether it may go on
LONG = 0.2  # seconds
TICK = 0.1  # seconds between two times that those who follow a long run are told of it


@dataclass(frozen=True)
class Running:
    """A run that is on: what was called, on which thread, since when (time.monotonic())."""

    what: str
    thread: str
    since: float

    @property
    def seconds(self) -> float:
        """For how long it has been on."""
        return time.monotonic() - self.since

    @property
    def is_long(self) -> bool:
        """Whether a person would want to be told of it."""
        return self.seconds > LONG

    def __str__(self) -> str:
        return f"{self.what}() on thread {self.thread}, for {self.seconds:.1f} s"


class Turn:
    """The turn of one VM."""

    def __init__(self, name: str, ask: Callable[[], object]) -> None:
        self._name = name
        self._ask = (
            ask  # makes a guest that runs come out soon; from any thread, too often if need be
        )
        self._lock = threading.RLock()
        self._pause = threading.Condition(self._lock)  # to let go of the lock, however often held
        self._lookers: list[int] = []  # threads that wait for the runner to stand still
        self._runner = 0  # the thread that runs the guest, and how deep it is in runs; 0: nobody
        self._depth = 0
        self._what = ""
        self._since = 0.0
        self._next_tick = 0.0
        self._ticked = False  # the run that is on is so long that followers were told
        self._stop_asked = False
        self._followers: list[Callable[[], object]] = []
        self.looking = _Looking(self._lock, self.wait_to_look)

    @property
    def running(self) -> Running | None:
        """The run that is on, if one is. May be asked from any thread."""
        runner, what, since = self._runner, self._what, self._since
        if not runner:
            return None
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return Running(what, names.get(runner, f"{runner:#x}"), since)

    def follow(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Call back every 0.1 s while a guest runs, on its thread, and when a long run has ended.

        Returns a function that ends it.
        """
        self._followers.append(tell)
        if len(self._followers) == 1:
            ticks = threading.Thread(
                target=_ask_often, args=(weakref.ref(self),), name="labkit-ticks", daemon=True
            )
            ticks.start()
        return lambda: self._followers.remove(tell)

    def ask_for_followers(self) -> bool:
        """Have a guest that runs come out soon; False when nobody follows any longer."""
        if self._runner:
            self._ask()
        return bool(self._followers)

    def close(self) -> None:
        """The VM is closed: nobody follows it any longer."""
        self._followers.clear()

    # --- running

    def begin(self, what: str) -> None:
        """The guest runs from here to `end`; a run inside a run of the same thread is part of it.

        Raises Busy while another thread runs the guest.
        """
        # Every step of a guest comes through here: no call that can be spared.
        if not self._lock.acquire(False):
            self._take(what)
        elif self._depth and self._runner != threading.get_ident():
            self._lock.release()
            self._take(what)
        if self._depth == 0:
            self._runner = threading.get_ident()
            self._what = what
            self._since = time.monotonic()
            self._stop_asked = False
        self._depth += 1
        if self._lookers:
            self._stand_still()

    def end(self) -> None:
        """The guest has stopped."""
        self._depth -= 1
        if self._depth:
            self._lock.release()
            return
        self._runner = 0
        was_followed = self._ticked
        self._ticked = False
        self._lock.release()
        if was_followed:
            self._tell()

    @contextmanager
    def run(self, what: str) -> Iterator[None]:
        """`begin` and `end` around runs that belong together."""
        self.begin(what)
        try:
            yield
        finally:
            self.end()

    def between(self) -> bool:
        """The runner is between two native parts of a run; returns whether the run shall end.

        Those who look have their turn, and those who follow are told.
        """
        if self._lookers:
            self._stand_still()
        if self._followers:
            self._tick()
        return self._stop_asked

    def _stand_still(self) -> None:
        while self._lookers:
            self._pause.wait(STILL)

    def _tick(self) -> None:
        if time.monotonic() < max(self._next_tick, self._since + TICK):
            return
        self._ticked = True
        self._tell()
        self._next_tick = time.monotonic() + TICK

    def _tell(self) -> None:
        for tell in list(self._followers):
            tell()

    def stop(self) -> bool:
        """Have the run that is on end soon, its state intact; from any thread.

        Returns False when no run is on.
        """
        if not self._runner:
            return False
        self._stop_asked = True
        self._ask()
        return True

    @property
    def stop_asked(self) -> bool:
        """Whether somebody wants the run that is on to end."""
        return self._stop_asked

    # --- acts and looks

    @contextmanager
    def act(self, what: str) -> Iterator[None]:
        """Around what changes the VM and is over soon; raises Busy while another thread runs it."""
        self._take(what)
        try:
            yield
        finally:
            self._lock.release()

    def _take(self, what: str) -> None:
        """Take the lock: wait for what is over soon, but not for a guest that runs."""
        me = threading.get_ident()
        while not self._lock.acquire(blocking=False):
            self._refuse_if_running(what, me)
            if self._lock.acquire(timeout=PATIENCE):
                break
        if self._runner and self._runner != me:  # it only stands still for those who look
            self._lock.release()
            self._refuse_if_running(what, me)

    def _refuse_if_running(self, what: str, me: int) -> None:
        running = self.running
        if running is None or self._runner == me:
            return
        raise Busy(
            f"{self._name}: another thread runs it ({running}), so {what} must wait until that "
            "ends, or end it with vm.stop()",
            running=running,
        )

    def check(self, what: str) -> None:
        """Raise Busy where another thread runs the guest, and does not stand still for this one."""
        runner = self._runner
        if runner == 0 or runner == threading.get_ident():
            return
        if self._lock.acquire(blocking=False):  # it is this thread's already, for a look
            self._lock.release()
            return
        self._refuse_if_running(what, threading.get_ident())

    def wait_to_look(self) -> None:
        """Take the lock in the next pause of the guest that runs."""
        me = threading.get_ident()
        self._lookers.append(me)
        try:
            while True:
                self._ask()
                if self._lock.acquire(timeout=PATIENCE):
                    return
        finally:
            self._lookers.remove(me)


def _ask_often(turn: weakref.ref[Turn]) -> None:
    """Have a guest that runs come out now and then, as long as there is a VM that is followed."""
    while True:
        time.sleep(TICK)
        followed = turn()
        if followed is None or not followed.ask_for_followers():
            return
        del followed


class _Looking:
    """`with turn.looking:` around what only looks; one object serves all, as it keeps nothing."""

    def __init__(self, lock: threading.RLock, wait: Callable[[], None]) -> None:
        self._acquire = lock.acquire
        self._release = lock.release
        self._wait = wait

    def __enter__(self) -> None:
        if not self._acquire(blocking=False):
            self._wait()

    def __exit__(self, *_: object) -> None:
        self._release()


class _HasTurn(Protocol):
    @property
    def turn(self) -> Turn: ...


S = TypeVar("S", bound=_HasTurn)
P = ParamSpec("P")
R = TypeVar("R")


def act(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that changes its VM: in its turn, raising Busy while another thread runs it."""

    @wraps(method)
    def in_turn(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.turn.act(method.__name__):
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[S, P], R], in_turn)


def look(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that only looks: from any thread, in a pause of the guest if it runs."""

    @wraps(method)
    def in_turn(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.turn.looking:
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[S, P], R], in_turn)
