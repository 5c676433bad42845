"""A trap that is one only at times: what the hook `check` of native/stubs.c looks at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """A trap only when the sum has one of the bits in mask.

    The sum is of a displacement and of up to three registers, libunicorn's numbers, 0 for none.
    """

    base: int
    index: int
    scale: int
    segment: int
    displacement: int
    mask: int
