"""One page through two eyes: the bytes that the host finds in DRAM beside the bytes that the guest reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.errors import InvalidState
from labkit.paging.entries import Bools
from labkit.shown import mimebundle

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
        """The bytes, one row a cipher block, shape (n, 16)."""
        return np.frombuffer(self.data, np.uint8).reshape(-1, BLOCK)

    @cached_property
    def changed(self) -> Bools:
        """Which bytes differ from before, shape (n, 16)."""
        before = np.frombuffer(
            self.data if self.previous is None else self.previous, np.uint8
        ).reshape(-1, BLOCK)
        differs: Bools = self.blocks != before
        return differs

    @cached_property
    def entropy(self) -> float:
        """Bits of information a byte (Shannon): 0 for equal bytes, just under 8 for noise."""
        counts = np.bincount(self.blocks.ravel(), minlength=256)
        share = counts[counts > 0] / max(self.blocks.size, 1)
        return float(abs((share * np.log2(share)).sum()))

    @cached_property
    def nr_different(self) -> int:
        """How many different blocks there are: the same plaintext at two addresses shares no ciphertext."""
        return len(np.unique(self.blocks, axis=0))


@dataclass(frozen=True, repr=False)
class PageEyes:
    """A page, or a 16-byte aligned part of one, as host and guest see it now and saw it before.

    private says what memory is; word how the guest looks ("C=1"); raises InvalidState for lengths that differ or are no whole blocks.
    """

    gpa: int
    host: bytes
    guest: bytes
    previous_host: bytes | None = None
    previous_guest: bytes | None = None
    private: bool = True
    word: str = ""
    what: str = ""  # its use: "stack of vCPU 0"
    gva: int | None = None
    step: int = 0
    since_step: int | None = None  # the step of the previous bytes
    names: tuple[str, str] = ("host's eye (DRAM)", "guest's eye")

    def __post_init__(self) -> None:
        sizes = [
            len(data)
            for data in (self.host, self.guest, self.previous_host, self.previous_guest)
            if data is not None
        ]
        if (
            len(set(sizes)) != 1
            or sizes[0] % BLOCK
            or not 0 < sizes[0] <= MAX_SIZE
            or self.gpa % BLOCK
        ):
            raise InvalidState(
                f"gpa {self.gpa:#x}: both eyes see the same whole 16-byte blocks, at most {MAX_SIZE:#x} bytes, not "
                f"{' and '.join(map(str, sizes))}",
                gpa=self.gpa,
                sizes=sizes,
            )

    @cached_property
    def eyes(self) -> tuple[Eye, Eye]:
        """The host's and the guest's."""
        return Eye(self.host, self.previous_host, self.names[0]), Eye(
            self.guest, self.previous_guest, self.names[1]
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
        head = f"Page {self.gpa & -4096:#x}{', ' if self.what else ''}{self.what}: "
        if not host.changed.any() and not guest.changed.any():
            same = (
                "both see the same bytes"
                if host.data == guest.data
                else "the host sees other bytes than the guest"
            )
            return f"{head}{same}; {host.entropy:.2f} bits a byte on the host's side, {guest.entropy:.2f} on the guest's."
        blocks = int((host.changed | guest.changed).any(axis=1).sum())
        return (
            f"{head}{_bytes(int(guest.changed.sum()))} changed for the guest, {_bytes(int(host.changed.sum()))} for the host, "
            f"in {blocks} block{'s' * (blocks != 1)} of 16 bytes."
        )

    def __repr__(self) -> str:
        return f"<PageEyes gpa {self.gpa:#x}: {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


def _bytes(number: int) -> str:
    return f"{number} byte{'s' * (number != 1)}"
