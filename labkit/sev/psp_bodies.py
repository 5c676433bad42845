"""What a command of the secure processor does once its checks have passed.

The change of state is in the table of commands.py; a command that does nothing else has no row in
BODIES.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from labkit.sev import transport
from labkit.sev.cipher import CHUNK, MemoryCipher
from labkit.sev.commands import GuestState, Request
from labkit.sev.psp_guest import Guest, GuestStatus, Measured, measurement
from labkit.sev.transport import TransportKeys

if TYPE_CHECKING:
    from labkit.sev.psp import Psp

__all__ = ["BODIES", "PlatformStatus", "Result"]


class PlatformStatus(NamedTuple):
    """What PLATFORM_STATUS says of the secure processor."""

    api: tuple[int, int]
    build: int
    initialised: bool
    es: bool
    nr_guests: int


# What commands give
Result = int | bytes | tuple[bytes, bytes] | GuestStatus | PlatformStatus | None


# --- the platform


def _init(psp: Psp, request: Request) -> None:
    psp.initialised = True
    psp.es = request.es


def _shutdown(psp: Psp, request: Request) -> None:
    psp.initialised = False
    psp.es = False
    psp.guests.clear()
    psp.used_asids.clear()
    psp.snp_asids.clear()


def _platform_status(psp: Psp, request: Request) -> PlatformStatus:
    return PlatformStatus(psp.api, psp.build, psp.initialised, psp.es, len(psp.guests))


def _df_flush(psp: Psp, request: Request) -> None:
    psp.used_asids.clear()


# --- launch, and what begins as one does


def _start(psp: Psp, request: Request) -> int:
    """LAUNCH_START and RECEIVE_START give the new guest's handle."""
    if request.session:
        keys = psp.open_session(request.pdh, request.policy, request.session)
    else:
        keys = TransportKeys(psp.fresh(16), psp.fresh(16))

    if request.handle:
        cipher = psp.guests[request.handle].cipher
    else:
        cipher = MemoryCipher(psp.fresh(16))

    psp.last_handle += 1
    psp.guests[psp.last_handle] = Guest(psp.last_handle, request.policy, cipher, keys)
    return psp.last_handle


def _update(command: str, psp: Psp, request: Request) -> None:
    guest = psp.guests[request.handle]
    end = request.spa + request.size
    for spa in range(request.spa, end, CHUNK):
        plain = psp.memory.read(spa, min(CHUNK, end - spa))
        guest.content.update(plain)
        psp.encrypt_guest(guest, spa, plain)
    guest.measured.append(Measured(command, request.spa, request.size, guest.digest))


def _measure(psp: Psp, request: Request) -> bytes:
    guest = psp.guests[request.handle]
    nonce = psp.fresh(16)
    blob = measurement(guest.keys.tik, psp.api, psp.build, guest.policy, guest.digest, nonce)
    guest.measure = blob[:32]
    return blob


def _secret(psp: Psp, request: Request) -> None:
    guest = psp.guests[request.handle]
    secret = transport.unwrap(
        guest.keys, transport.LAUNCH_SECRET, request.header, request.data, guest.measure
    )
    psp.encrypt_guest(guest, request.spa, secret)
    guest.unwrapped.append((request.spa, len(request.data)))


# --- a guest's life


def _guest_status(psp: Psp, request: Request) -> GuestStatus:
    guest = psp.guests.get(request.handle)
    if guest is None:
        return GuestStatus(0, 0, GuestState.UNINIT)
    return GuestStatus(guest.policy, guest.asid, guest.state)


def _activate(psp: Psp, request: Request) -> None:
    psp.guests[request.handle].asid = request.asid


def _deactivate(psp: Psp, request: Request) -> None:
    guest = psp.guests[request.handle]
    psp.used_asids.add(guest.asid)
    guest.asid = 0


def _decommission(psp: Psp, request: Request) -> None:
    del psp.guests[request.handle]


def _debug_decrypt(psp: Psp, request: Request) -> bytes:
    return psp.decrypt_guest(psp.guests[request.handle], request.spa, request.size)


def _debug_encrypt(psp: Psp, request: Request) -> None:
    psp.encrypt_guest(psp.guests[request.handle], request.spa, request.data)


# --- from one platform to another


def _send_start(psp: Psp, request: Request) -> bytes:
    guest = psp.guests[request.handle]
    keys = TransportKeys(psp.fresh(16), psp.fresh(16))
    session = psp.make_session(request.pdh, keys, guest.policy)
    guest.sending = keys
    return session


def _send(kind: int, psp: Psp, request: Request) -> tuple[bytes, bytes]:
    guest = psp.guests[request.handle]
    # SEND_START made the keys
    assert guest.sending
    plain = psp.decrypt_guest(guest, request.spa, request.size)
    return transport.wrap(guest.sending, kind, plain, psp.fresh(16))


def _receive(kind: int, psp: Psp, request: Request) -> None:
    guest = psp.guests[request.handle]
    plain = transport.unwrap(guest.keys, kind, request.header, request.data)
    psp.encrypt_guest(guest, request.spa, plain)
    guest.unwrapped.append((request.spa, len(request.data)))


BODIES: dict[str, Callable[[Psp, Request], Result]] = {
    "INIT": _init,
    "SHUTDOWN": _shutdown,
    "DF_FLUSH": _df_flush,
    "PLATFORM_STATUS": _platform_status,
    "LAUNCH_START": _start,
    "LAUNCH_UPDATE_DATA": partial(_update, "DATA"),
    "LAUNCH_UPDATE_VMSA": partial(_update, "VMSA"),
    "LAUNCH_MEASURE": _measure,
    "LAUNCH_SECRET": _secret,
    "GUEST_STATUS": _guest_status,
    "ACTIVATE": _activate,
    "DEACTIVATE": _deactivate,
    "DECOMMISSION": _decommission,
    "DBG_DECRYPT": _debug_decrypt,
    "DBG_ENCRYPT": _debug_encrypt,
    "SEND_START": _send_start,
    "SEND_UPDATE_DATA": partial(_send, transport.SEND_DATA),
    "SEND_UPDATE_VMSA": partial(_send, transport.SEND_VMSA),
    "RECEIVE_START": _start,
    "RECEIVE_UPDATE_DATA": partial(_receive, transport.SEND_DATA),
    "RECEIVE_UPDATE_VMSA": partial(_receive, transport.SEND_VMSA),
}
