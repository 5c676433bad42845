"""What the owner of a SEV or SEV-ES guest does, who has its keys and trusts no host.

It knows what its measurement must be, and wraps secrets for the launch that was measured. Source:
SEV API (AMD 55766) 6.5 and 6.6.
"""

from __future__ import annotations

from labkit.errors import InvalidState
from labkit.sev.commands import Value
from labkit.sev.psp import Psp
from labkit.sev.psp_guest import Guest, measurement
from labkit.sev.transport import LAUNCH_SECRET, wrap

__all__ = ["expected_measurement", "wrapped_secret"]

_IV_SIZE = 16


def expected_measurement(psp: Psp, guest: Guest, policy: int, digest: bytes, blob: bytes) -> bytes:
    """What LAUNCH_MEASURE must give for this policy and launch digest.

    blob is what it gave: its nonce is the firmware's choice.
    """
    nonce = blob[32:]
    return measurement(guest.keys.tik, psp.api, psp.build, policy, digest, nonce)


def wrapped_secret(guest: Guest, secret: bytes, iv: bytes) -> dict[str, Value]:
    """The packet for LAUNCH_SECRET, as its fields `header` and `data`.

    Raises InvalidState for an iv that has not 16 bytes.
    """
    if len(iv) != _IV_SIZE:
        raise InvalidState(f"the iv of a packet has {_IV_SIZE} bytes, not {len(iv)}")
    header, data = wrap(guest.keys, LAUNCH_SECRET, secret, iv, guest.measure)
    return {"header": header, "data": data}
