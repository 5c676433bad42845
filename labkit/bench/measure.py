"""Timing, and the shape of a result."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Result", "best", "best_pair"]


@dataclass(frozen=True)
class Result:
    """One figure. `value` is what is judged: at least `target` when `at_least`, else at most."""

    name: str
    value: float
    unit: str
    target: float
    at_least: bool
    note: str  # both sides in words

    @property
    def ok(self) -> bool:
        """Whether the promise is kept in this run."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def best(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of the fastest of some runs: what others do on the machine meanwhile counts as little as possible."""
    seconds = []
    gc.collect()
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def best_pair(
    ours: Callable[[], object], peer: Callable[[], object], times: int = 5
) -> tuple[float, float]:
    """The same for two that are compared, taking turns, so that a noisy moment hits both."""
    pairs = [(best(ours, 1), best(peer, 1)) for _ in range(times)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)
