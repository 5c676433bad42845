"""Timing, and the shape of a result."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Pair", "Result", "at_least", "at_most", "best", "best_pair", "fastest"]

# CPU seconds of ours and of the peer's
Pair = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """One figure, and the promise that it is judged by; `at_least` and `at_most` make one."""

    name: str
    value: float
    unit: str
    target: float
    at_least: bool  # whether the value may not be below the target, or not above it
    note: str  # both sides in words: ours and the peer's

    @property
    def ok(self) -> bool:
        """Whether the promise is kept in this run."""
        if self.at_least:
            return self.value >= self.target
        return self.value <= self.target

    def __str__(self) -> str:
        """A line of the table: whether it is kept, the figure, the promise, the peer."""
        kept = "ok " if self.ok else "NOT"
        figure = f"{self.name:<42} {self.value:8.2f} {self.unit:<26}"
        sign = ">=" if self.at_least else "<="
        return f"{kept} {figure} (promised {sign} {self.target:g}; {self.note})"


def at_least(target: float, name: str, value: float, unit: str, note: str) -> Result:
    """A figure that is good when it is large."""
    return Result(name, value, unit, target, at_least=True, note=note)


def at_most(target: float, name: str, value: float, unit: str, note: str) -> Result:
    """A figure that is good when it is small."""
    return Result(name, value, unit, target, at_least=False, note=note)


def best(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of the fastest of some runs.

    What others do on the machine meanwhile counts as little as possible.
    """
    seconds = []
    gc.collect()
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def best_pair(ours: Callable[[], object], peer: Callable[[], object], times: int = 5) -> Pair:
    """The same for two that are compared, taking turns, so that a noisy moment hits both."""
    return fastest((best(ours, 1), best(peer, 1)) for _ in range(times))


def fastest(rounds: Iterable[Pair]) -> Pair:
    """The fastest of ours and the fastest of the peer's, each of whatever round it was."""
    pairs = list(rounds)
    ours = min(pair[0] for pair in pairs)
    peer = min(pair[1] for pair in pairs)
    return ours, peer
