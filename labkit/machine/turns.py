"""Whose turn it is to touch a machine, as its memory and its registers ask for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

__all__ = ["Alone", "Turns"]


class Turns(Protocol):
    """Looks wait for a pause of the guest that runs; acts are refused while it does."""

    @property
    def looking(self) -> AbstractContextManager[None]: ...
    def act(self, what: str) -> AbstractContextManager[None]: ...


class Alone:
    """The turns of a machine that only one thread knows: nobody waits."""

    looking: AbstractContextManager[None] = nullcontext()

    def act(self, what: str) -> AbstractContextManager[None]:
        """Nobody else could be at it."""
        return self.looking
