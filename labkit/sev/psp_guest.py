"""What the secure processor keeps of one SEV or SEV-ES guest, and what it says about it.

Source: SEV API (AMD 55766) chapters 5 and 6.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from labkit.sev.cipher import MemoryCipher
from labkit.sev.commands import GuestState
from labkit.sev.transport import TransportKeys

__all__ = ["MEASURE_SIZE", "Guest", "GuestStatus", "Measured", "measurement"]

# Bytes: MAC 32, MNONCE 16
MEASURE_SIZE = 48


class _Sha256(Protocol):
    """A hash that goes on, as hashlib gives it."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...
    def copy(self) -> _Sha256: ...


class Measured(NamedTuple):
    """One LAUNCH_UPDATE: what was added, and the launch digest after it.

    command is "DATA" or "VMSA", size is in bytes.
    """

    command: str
    spa: int
    size: int
    digest: bytes


class GuestStatus(NamedTuple):
    """What GUEST_STATUS says; UNINIT for a guest that is not there."""

    policy: int
    asid: int
    state: GuestState


@dataclass
class Guest:
    """What the firmware keeps of one guest (GCTX).

    asid is 0 for an inactive one. measure is the MAC of LAUNCH_MEASURE, which a secret must be made
    for; sending has the keys of SEND_START. unwrapped are (spa, bytes) of packets: encrypted, never
    measured.
    """

    handle: int
    policy: int
    cipher: MemoryCipher
    keys: TransportKeys
    state: GuestState = GuestState.UNINIT
    asid: int = 0
    measure: bytes = b""
    sending: TransportKeys | None = None
    measured: list[Measured] = field(default_factory=list)
    unwrapped: list[tuple[int, int]] = field(default_factory=list)
    content: _Sha256 = field(default_factory=hashlib.sha256, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> Guest:
        """For snapshots: the key and what never changes is shared."""
        return replace(
            self,
            measured=list(self.measured),
            unwrapped=list(self.unwrapped),
            content=self.content.copy(),
        )

    @property
    def digest(self) -> bytes:
        """The launch digest so far: SHA-256 of all plaintext in the order of its updates."""
        return self.content.digest()


def measurement(
    tik: bytes, api: tuple[int, int], build: int, policy: int, digest: bytes, nonce: bytes
) -> bytes:
    """The 48 bytes of LAUNCH_MEASURE (SEV API 6.5).

    They are HMAC-SHA256(TIK, 04 || API || BUILD || POLICY || LD || MNONCE) || MNONCE.
    """
    message = bytes((4, *api, build)) + policy.to_bytes(4, "little") + digest + nonce
    return hmac.digest(tik, message, "sha256") + nonce
