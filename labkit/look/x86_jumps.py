"""Whether a conditional jump of x86 will be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Flags", "will_jump"]


class Flags(NamedTuple):
    """The status flags that conditional jumps ask (SDM vol. 1, 3.4.3.1)."""

    carry: bool
    parity: bool
    zero: bool
    sign: bool
    overflow: bool

    @classmethod
    def of(cls, rflags: int) -> Flags:
        """As they stand in RFLAGS."""
        return cls(
            carry=bool(rflags >> 0 & 1),
            parity=bool(rflags >> 2 & 1),
            zero=bool(rflags >> 6 & 1),
            sign=bool(rflags >> 7 & 1),
            overflow=bool(rflags >> 11 & 1),
        )


# By the letters behind the j: when it is taken (SDM vol. 2A, Jcc). The second table has those that
# are taken when another is not.
_CONDITIONS: dict[str, Callable[[Flags], bool]] = {
    "o": lambda flags: flags.overflow,
    "b": lambda flags: flags.carry,
    "e": lambda flags: flags.zero,
    "be": lambda flags: flags.carry or flags.zero,
    "s": lambda flags: flags.sign,
    "p": lambda flags: flags.parity,
    "l": lambda flags: flags.sign != flags.overflow,
    "le": lambda flags: flags.zero or flags.sign != flags.overflow,
}
_OPPOSITES = {
    "no": "o",
    "ae": "b",
    "ne": "e",
    "a": "be",
    "ns": "s",
    "np": "p",
    "ge": "l",
    "g": "le",
}


def will_jump(mnemonic: str, rflags: int) -> bool | None:
    """Whether a jump on flags is taken; None for any other instruction, JRCXZ among them."""
    if not mnemonic.startswith("j"):
        return None
    condition = mnemonic[1:]
    if condition in _CONDITIONS:
        return _CONDITIONS[condition](Flags.of(rflags))
    if condition in _OPPOSITES:
        return not _CONDITIONS[_OPPOSITES[condition]](Flags.of(rflags))
    return None
