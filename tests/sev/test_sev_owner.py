"""A guest's owner: the measurement that it expects, and secrets for what was measured."""

from __future__ import annotations

import pytest
from sev_sample import PLAIN, SPA, in_state, make_psp, start

from labkit.errors import InvalidState
from labkit.sev.commands import GuestState
from labkit.sev.guest_owner import expected_measurement, wrapped_secret

SECRET = b"the disk's key: "


def test_that_the_owner_expects_what_the_firmware_measured() -> None:
    psp = make_psp()
    handle = start(psp)
    psp.command("LAUNCH_UPDATE_DATA", handle=handle, spa=SPA, size=4096)
    blob = psp.command("LAUNCH_MEASURE", handle=handle, size=48)
    guest = psp.guests[handle]
    assert isinstance(blob, bytes)
    assert expected_measurement(psp, guest, guest.policy, guest.digest, blob) == blob
    assert expected_measurement(psp, guest, guest.policy ^ 1, guest.digest, blob) != blob
    assert expected_measurement(psp, guest, guest.policy, bytes(32), blob) != blob


def test_that_a_wrapped_secret_reaches_the_guest_and_nobody_else() -> None:
    psp = make_psp()
    handle = in_state(psp, GuestState.LAUNCH_SECRET)
    packet = wrapped_secret(psp.guests[handle], SECRET, bytes(16))
    psp.command("LAUNCH_SECRET", handle=handle, spa=SPA, **packet)
    assert psp.decrypt_guest(psp.guests[handle], SPA, 16) == SECRET
    assert SECRET not in (packet["data"], psp.memory.read(SPA, 16), PLAIN[:16])


@pytest.mark.parametrize("size", [0, 15, 17])
def test_that_an_iv_has_16_bytes(size: int) -> None:
    psp = make_psp()
    guest = psp.guests[in_state(psp, GuestState.LAUNCH_SECRET)]
    with pytest.raises(InvalidState, match=f"16 bytes, not {size}"):
        wrapped_secret(guest, SECRET, bytes(size))
