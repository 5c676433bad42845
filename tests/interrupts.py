"""Ctrl-C at every call of ours inside an operation, one after the other."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Tried", "at_every_call"]

MANY = 1_000_000


@dataclass
class Tried:
    """How many moments were tried, how often the signal was heard, and where what was wrong."""

    moments: int = 0
    heard: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


class _Trigger:
    """Raises the signal at the call of labkit's code with that number."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.where = ""

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        code = frame.f_code
        if self.where or "/labkit/" not in code.co_filename:
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{code.co_filename.split('/labkit/')[-1]}:{code.co_name}"
            signal.raise_signal(signal.SIGINT)


def _nr_calls(make: Callable[[], Any], operation: Callable[[Any], object]) -> int:
    """How many calls of labkit's code an operation makes."""
    thing = make()
    trigger = _Trigger(MANY)
    sys.settrace(trigger)  # type: ignore[arg-type]
    try:
        operation(thing)
    finally:
        sys.settrace(None)
    return MANY - trigger.left


def at_every_call(
    make: Callable[[], Any],
    operation: Callable[[Any], object],
    check: Callable[[Any], str],
    moments: int | None = None,
) -> Tried:
    """Make a thing, and interrupt an operation on it at every call of labkit's.

    With `moments` at some so many of them, evenly spread. Each time it is a fresh thing;
    `check(thing)` says what is wrong with it afterwards, "" when it is as it should be.
    """
    tried = Tried()
    stride = 1 if moments is None else max(1, _nr_calls(make, operation) // moments)
    for number in range(1 + stride // 2, MANY, stride):
        thing = make()
        trigger = _Trigger(number)
        sys.settrace(trigger)  # type: ignore[arg-type]
        try:
            operation(thing)
        except KeyboardInterrupt:
            tried.heard += 1
        finally:
            sys.settrace(None)
        if not trigger.where:
            break
        tried.moments += 1
        try:
            wrong = check(thing)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            tried.wrong[trigger.where] = wrong
    return tried
