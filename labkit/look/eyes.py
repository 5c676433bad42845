"""One page through two eyes: the bytes in DRAM, which the host finds, and those the guest reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.checked import checked
from labkit.errors import InvalidState
from labkit.machine.memory import PAGE
from labkit.paging.entries import Bools
from labkit.shown import mimebundle, save

__all__ = ["BLOCK", "Eye", "PageEyes"]

BLOCK = 16  # bytes that AES encrypts together: a row of the dump
MAX_SIZE = 1 << 16  # bytes: more is not looked at byte by byte


@dataclass(frozen=True)
class Eye:
    """What one of the two sees now, and what it saw before (None: it did not look)."""

    data: bytes
    previous: bytes | None
    name: str  # "host's eye (DRAM)"

    @cached_property
    def blocks(self) -> NDArray[np.uint8]:
        """The bytes, one row a cipher block: uint8 of shape (n, 16)."""
        return _in_blocks(self.data)

    @cached_property
    def changed(self) -> Bools:
        """Which bytes differ from before, shape (n, 16)."""
        if self.previous is None:
            return np.zeros(self.blocks.shape, np.bool_)
        differs: Bools = self.blocks != _in_blocks(self.previous)
        return differs

    @cached_property
    def entropy(self) -> float:
        """Bits of information a byte (Shannon).

        It is 0 for bytes that are all equal, and just under 8 for noise.
        """
        counts = np.bincount(self.blocks.ravel(), minlength=256)
        share = counts[counts > 0] / max(self.blocks.size, 1)
        return float(abs((share * np.log2(share)).sum()))

    @cached_property
    def nr_different(self) -> int:
        """How many different blocks there are.

        The same plaintext at two addresses shares no ciphertext.
        """
        return len(np.unique(self.blocks, axis=0))


@checked
@dataclass(frozen=True, repr=False)
class PageEyes:
    """A page, or a 16-byte aligned part of one, as host and guest see it now and saw it before.

    Raises InvalidState for lengths that differ, or are no whole blocks.
    """

    gpa: int
    host: bytes
    guest: bytes
    previous_host: bytes | None = None
    previous_guest: bytes | None = None
    private: bool = True  # what memory is
    word: str = ""  # how the guest looks: "C=1"
    what: str = ""  # its use: "stack of vCPU 0"
    gva: int | None = None
    step: int = 0
    since_step: int | None = None  # the step of the previous bytes
    names: tuple[str, str] = ("host's eye (DRAM)", "guest's eye")

    def __post_init__(self) -> None:
        seen = (self.host, self.guest, self.previous_host, self.previous_guest)
        sizes = [len(data) for data in seen if data is not None]
        is_whole = sizes[0] % BLOCK == 0 and 0 < sizes[0] <= MAX_SIZE
        is_equal = len(set(sizes)) == 1
        if not (is_whole and is_equal and self.gpa % BLOCK == 0):
            raise InvalidState(
                f"gpa {self.gpa:#x}: both eyes see the same whole 16-byte blocks, at most "
                f"{MAX_SIZE:#x} bytes, not {' and '.join(map(str, sizes))}",
                gpa=self.gpa,
                sizes=sizes,
            )

    @cached_property
    def eyes(self) -> tuple[Eye, Eye]:
        """The host's and the guest's."""
        host_name, guest_name = self.names
        return (
            Eye(self.host, self.previous_host, host_name),
            Eye(self.guest, self.previous_guest, guest_name),
        )

    def since(self, other: PageEyes) -> PageEyes:
        """The same, with the bytes marked that are not what they were in another look at the page.

        Raises InvalidState for a look at another page, or at a part of another size.
        """
        if (self.gpa, len(self.host)) != (other.gpa, len(other.host)):
            raise InvalidState(
                f"the eyes look at gpa {self.gpa:#x} ({len(self.host)} bytes), and those before "
                f"looked at gpa {other.gpa:#x} ({len(other.host)} bytes)",
                gpa=self.gpa,
            )
        return replace(
            self, previous_host=other.host, previous_guest=other.guest, since_step=other.step
        )

    @property
    def status(self) -> str:
        """What either saw change; without a change, what the page looks like."""
        host, guest = self.eyes
        page = f"Page {self.gpa & -PAGE:#x}"
        if self.what:
            page += f", {self.what}"
        changed = host.changed | guest.changed
        if not changed.any():
            same = "the host sees other bytes than the guest"
            if host.data == guest.data:
                same = "both see the same bytes"
            return (
                f"{page}: {same}; {host.entropy:.2f} bits a byte on the host's side, "
                f"{guest.entropy:.2f} on the guest's."
            )
        nr_blocks = int(changed.any(axis=1).sum())
        return (
            f"{page}: {_count(guest.changed.sum(), 'byte')} changed for the guest, "
            f"{_count(host.changed.sum(), 'byte')} for the host, "
            f"in {_count(nr_blocks, 'block')} of 16 bytes."
        )

    def __repr__(self) -> str:
        return f"<PageEyes gpa {self.gpa:#x}: {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


def _in_blocks(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(-1, BLOCK)


def _count(number: int, noun: str) -> str:
    """ "1 byte", "2 bytes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
