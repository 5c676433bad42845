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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from labkit.engines.interrupt import shield
from labkit.errors import Busy

__all__ = ["Running", "Turn", "act", "look"]

PATIENCE = 0.02  # seconds after which who waits looks again whether the runner has come out
STILL = 0.001  # seconds after which a runner that stands still looks whether it may go on
LONG = 0.2  # seconds
STOPPING = 5.0  # seconds for which a run that does not end is asked to
TICK = 0.1  # seconds between two times that those who follow a long run are told of it


@dataclass(frozen=True)
class Running:
    """A run that is on: what was called, on which thread, since when (time.monotonic()).

    budget: the most instructions that it may take, None without end; start: the VM's clock then.
    """

    what: str
    thread: str
    since: float
    budget: int | None = None
    start: int = 0

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
        self._shield = shield()
        # Makes a guest that runs come out soon; from any thread, and too often if need be.
        self._ask = ask
        self._lock = threading.RLock()
        self._pause = threading.Condition(self._lock)  # to let go of the lock, however often held
        self._lookers: list[int] = []  # threads that wait for the runner to stand still
        # Of the threads for which it stands still now: in how many looks, one inside the other.
        self._invited: dict[int, int] = {}
        self._runner = 0  # the thread that runs the guest, and how deep it is in runs; 0: nobody
        self._depth = 0
        self._what = ""
        self._budget: int | None = None
        self._start = 0
        self.came_at = 0  # the VM's clock when a vCPU last came back
        self._since = 0.0
        self._next_tick = 0.0
        self._ticked = False  # the run that is on is so long that followers were told
        self._stop_asked = False
        self._followers: list[Callable[[], object]] = []
        self._ticks: threading.Thread | None = None
        self.looking: AbstractContextManager[None] = _Looking(self)

    @property
    def running(self) -> Running | None:
        """The run that is on, if one is. May be asked from any thread."""
        runner, what, since = self._runner, self._what, self._since
        if not runner:
            return None
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        who = names.get(runner, f"{runner:#x}")
        return Running(what, who, since, self._budget, self._start)

    @property
    def is_followed(self) -> bool:
        """Whether somebody is told of long runs."""
        return bool(self._followers)

    def follow(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Call back every 0.1 s while a guest runs, on its thread, and when a long run has ended.

        Returns a function that ends it.
        """
        self._followers.append(tell)
        if len(self._followers) == 1:
            self._ticks = _Ticks(self)
            self._ticks.start()

        def unfollow() -> None:
            if tell in self._followers:  # a closed VM has none any longer
                self._followers.remove(tell)

        return unfollow

    def ask_for_followers(self, ticks: threading.Thread) -> bool:
        """Have a guest that runs come out soon; False when nobody needs these ticks any longer."""
        if self._runner:
            self._ask()
        return ticks is self._ticks and bool(self._followers)

    def close(self) -> None:
        """The VM is closed: nobody follows it any longer."""
        self._followers.clear()

    # --- running

    def begin(self, what: str, budget: int | None = None, start: int | None = None) -> None:
        """The guest runs from here to `end`; a run inside a run of the same thread is part of it.

        budget and start are what Running says; without start it is `came_at`. Raises Busy while
        another thread runs the guest.
        """
        # Every step of a guest comes through here: no call that can be spared.
        self._shield.hold()
        if not self._lock.acquire(False):
            self._take_held(what)
        elif self._depth and self._runner != threading.get_ident():
            self._lock.release()
            self._take_held(what)
        if self._depth == 0:
            self._runner = threading.get_ident()
            self._what = what
            self._budget = budget
            self._start = self.came_at if start is None else start
            self._since = time.monotonic()
            self._stop_asked = False
        self._depth += 1
        if self._lookers:
            self._stand_still()

    def end(self) -> None:
        """The guest has stopped.

        Raises the KeyboardInterrupt that came meanwhile and that no run has raised.
        """
        try:
            self._ended()
        finally:
            self._shield.let_go()

    def _ended(self) -> None:
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
    def run(self, what: str, budget: int | None = None, start: int | None = None) -> Iterator[None]:
        """`begin` and `end` around runs that belong together."""
        self.begin(what, budget, start)
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
        """Let those look who wait for it now; who comes later waits for the next pause.

        Or one thread that looks all the time would keep the guest from going on.
        """
        for looker in list(self._lookers):
            self._invited[looker] = 0
        while self._invited:
            self._pause.wait(STILL)
            self._forget_who_left()

    def _forget_who_left(self) -> None:
        """Somebody who was invited may have been interrupted before he came."""
        for looker, depth in list(self._invited.items()):
            if depth == 0 and looker not in self._lookers:
                del self._invited[looker]

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
        """Have the run that is on end, its state intact; from any thread, and at once.

        Returns False when no run is on. It comes back when that run is over, at the latest after
        STOPPING seconds; on the runner's own thread, which is between two instructions, at once.
        """
        runner, since = self._runner, self._since
        if not runner:
            return False
        self._stop_asked = True
        if runner == threading.get_ident():
            return True

        # One word is not enough: the engine may be just about to begin, and not hear it.
        end = time.monotonic() + STOPPING
        while self._runner == runner and self._since == since and time.monotonic() < end:
            self._ask()
            time.sleep(STILL)
        return True

    # --- acts and looks

    def act(self, what: str) -> AbstractContextManager[None]:
        """Around what changes the VM and is over soon; raises Busy while another thread runs it."""
        return _Acting(self, what)

    def begin_act(self, what: str) -> None:
        """The VM is changed from here to `end_act`; Ctrl-C waits until then."""
        self._shield.hold()
        self._take_held(what)

    def end_act(self) -> None:
        """The act is over."""
        self._lock.release()
        self._shield.let_go()

    def _take_held(self, what: str) -> None:
        """`_take` under the shield, which is let go of when it fails."""
        try:
            self._take(what)
        except BaseException:
            self._shield.let_go()
            raise

    def _take(self, what: str) -> None:
        """Take the lock for an act: wait for what is over soon, but not for a guest that runs."""
        me = threading.get_ident()
        patience = 0.0
        while True:
            if self._lock.acquire(timeout=patience):
                if self._runner in (0, me):
                    return
                self._lock.release()  # the runner only stands still for those who look
            self._refuse_if_running(what, me)
            self._shield.check()
            patience = PATIENCE

    def _refuse_if_running(self, what: str, me: int) -> None:
        running = self.running
        if running is None or self._runner == me:
            return
        raise Busy(
            f"{self._name}: another thread runs it ({running}), so {what} must wait until that "
            "ends, or end it with vm.stop()",
            running=running,
        )

    def begin_look(self) -> None:
        """Stand between two instructions of the guest, whoever runs it, until `end_look`."""
        self._shield.hold()
        try:
            if not self._lock.acquire(blocking=False):
                self._wait_to_look()
            elif self._runner and not self._may_look():
                self._lock.release()
                self._wait_to_look()
        except BaseException:
            self._shield.let_go()
            raise

    def _may_look(self) -> bool:
        """Whether this thread, which has the lock, may look although a guest runs."""
        me = threading.get_ident()
        if self._runner in (0, me):
            return True
        if me not in self._invited:
            return False
        self._invited[me] += 1
        return True

    def _wait_to_look(self) -> None:
        """Take the lock in the next pause of the guest that runs."""
        me = threading.get_ident()
        self._lookers.append(me)
        try:
            while True:
                self._shield.check()
                self._ask()
                if not self._lock.acquire(timeout=PATIENCE):
                    continue
                if self._may_look():
                    return
                self._lock.release()  # it stands still for others
                time.sleep(STILL)
        finally:
            self._lookers.remove(me)

    def end_look(self) -> None:
        """The guest may go on, if it runs and nobody else looks."""
        if self._invited:
            self._one_less(threading.get_ident())
        self._lock.release()
        self._shield.let_go()

    def _one_less(self, me: int) -> None:
        depth = self._invited.get(me)
        if depth is None:
            return
        if depth > 1:
            self._invited[me] = depth - 1
            return
        del self._invited[me]
        self._pause.notify_all()


class _Ticks(threading.Thread):
    """Has a guest that runs come out now and then, as long as there is a VM that is followed."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(name="labkit-ticks", daemon=True)
        self._followed = weakref.ref(turn)

    def run(self) -> None:
        while True:
            time.sleep(TICK)
            turn = self._followed()
            if turn is None or not turn.ask_for_followers(self):
                return
            del turn


class _Looking:
    """`with turn.looking:` around what only looks; one object serves all, as it keeps nothing."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        self._turn.begin_look()

    def __exit__(self, *_: object) -> None:
        self._turn.end_look()


class _Acting:
    """`with turn.act(what):`; every write of memory comes through here."""

    __slots__ = ("_turn", "_what")

    def __init__(self, turn: Turn, what: str) -> None:
        self._turn = turn
        self._what = what

    def __enter__(self) -> None:
        self._turn.begin_act(self._what)

    def __exit__(self, *_: object) -> None:
        self._turn.end_act()


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
