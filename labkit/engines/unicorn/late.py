"""A vCPU's engine is made when it is first needed: a vCPU that never runs costs nothing.

An engine of libunicorn takes 3 MiB and 3 ms. A VM of 512 vCPUs, of which most wait for a turn that
does not come, would take 1.3 GB and as many seconds. Every method that needs an engine makes sure
of it; a class with __getattr__ would be shorter, but Python reads all its attributes more slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

__all__ = ["HasEngine", "needs_engine"]


class HasEngine(Protocol):
    """What has an engine, or will have."""

    is_made: bool

    def make(self) -> None:
        """Make it."""


S = TypeVar("S", bound=HasEngine)
P = ParamSpec("P")
R = TypeVar("R")


def needs_engine(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of a vCPU that makes its engine if it has none; for those that are not hot."""

    @wraps(method)
    def made(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.is_made:
            self.make()
        return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[S, P], R], made)
