"""What the secure processor checks before it runs a command, each check by its name in the table.

A check says what it found wrong, in words, and "" when it passes. Those that look at a guest come
behind "guest", which says that it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from labkit.machine.memory import PAGE
from labkit.sev.cipher import BLOCK
from labkit.sev.commands import RULES, Request
from labkit.sev.policy import Policy, Status, policy_api
from labkit.sev.psp_guest import MEASURE_SIZE
from labkit.sev.transport import HEADER_SIZE, SESSION_SIZE

if TYPE_CHECKING:
    from labkit.sev.psp import Psp

__all__ = ["CHECKS", "Check"]


class Check(NamedTuple):
    """One check: the status that a command ends with, and what finds out."""

    status: Status
    finds: Callable[[Psp, Request], str]


# --- the platform


def _platform(psp: Psp, request: Request) -> str:
    return "" if psp.initialised else "a platform without INIT"


def _uninitialised(psp: Psp, request: Request) -> str:
    return "an initialised platform" if psp.initialised else ""


def _es_platform(psp: Psp, request: Request) -> str:
    wants_es = request.policy & Policy.ES
    return "an ES policy, and INIT without ES" if wants_es and not psp.es else ""


def _version(psp: Psp, request: Request) -> str:
    wanted = policy_api(request.policy)
    return f"API {wanted}, this is {psp.api}" if wanted > psp.api else ""


# --- the guest


def _guest(psp: Psp, request: Request) -> str:
    return "" if request.handle in psp.guests else f"handle {request.handle}"


def _state(psp: Psp, request: Request) -> str:
    state = psp.guests[request.handle].state
    allowed = RULES[request.command].states
    if state in allowed:
        return ""
    return f"{state.name}, not {' or '.join(one.name for one in sorted(allowed))}"


def _es_guest(psp: Psp, request: Request) -> str:
    is_es = psp.guests[request.handle].policy & Policy.ES
    return "" if is_es else "a guest without the ES policy"


def _debug(psp: Psp, request: Request) -> str:
    return "NODBG" if psp.guests[request.handle].policy & Policy.NODBG else ""


def _send(psp: Psp, request: Request) -> str:
    found = Policy(psp.guests[request.handle].policy & (Policy.NOSEND | Policy.DOMAIN))
    return str(found.name) if found else ""


# --- another guest to share a key with: `handle` of LAUNCH_START and RECEIVE_START


def _sharer(psp: Psp, request: Request) -> str:
    is_there = not request.handle or request.handle in psp.guests
    return "" if is_there else f"handle {request.handle} to share a key with"


def _sharing(psp: Psp, request: Request) -> str:
    other = psp.guests.get(request.handle)
    if other is None:
        return ""
    if not other.policy & Policy.NOKS and other.policy == request.policy:
        return ""
    return f"policy {request.policy:#x} beside guest {request.handle}'s {other.policy:#x}"


# --- ASIDs


def _active(psp: Psp, request: Request) -> str:
    return "" if psp.guests[request.handle].asid else "ASID 0"


def _inactive(psp: Psp, request: Request) -> str:
    asid = psp.guests[request.handle].asid
    return f"ASID {asid}" if asid else ""


def _asid(psp: Psp, request: Request) -> str:
    is_es = bool(psp.guests[request.handle].policy & Policy.ES)
    return "" if request.asid in psp.asids(is_es) else f"ASID {request.asid}"


def _owned(psp: Psp, request: Request) -> str:
    """Guests that share a key may share an ASID."""
    key = psp.guests[request.handle].cipher.key
    others = [
        guest
        for guest in psp.guests.values()
        if guest.asid == request.asid and guest.cipher.key != key
    ]
    if others or request.asid in psp.snp_asids:
        return f"ASID {request.asid} of another guest"
    return ""


def _flushed(psp: Psp, request: Request) -> str:
    return f"ASID {request.asid}" if request.asid in psp.used_asids else ""


# --- addresses and lengths


def _address(psp: Psp, request: Request) -> str:
    if request.spa % BLOCK:
        return f"spa {request.spa:#x}, not a multiple of 16"
    return psp.hole(request.spa, request.length)


def _blocks(psp: Psp, request: Request) -> str:
    are_whole = request.length > 0 and not request.length % BLOCK
    return "" if are_whole else f"{request.length:#x} bytes"


def _page(psp: Psp, request: Request) -> str:
    is_page = request.length == PAGE
    return "" if is_page else f"{request.length:#x} bytes, and a VMSA is one page"


def _room(psp: Psp, request: Request) -> str:
    if request.size >= MEASURE_SIZE:
        return ""
    return f"{request.size} bytes of room, {MEASURE_SIZE} needed"


def _session(psp: Psp, request: Request) -> str:
    size = len(request.session)
    return "" if size in (0, SESSION_SIZE) else f"{size} bytes of session"


def _session_given(psp: Psp, request: Request) -> str:
    return "" if request.session else "no session"


def _header(psp: Psp, request: Request) -> str:
    size = len(request.header)
    return "" if size == HEADER_SIZE else f"{size} bytes of header"


CHECKS = {
    "platform": Check(Status.INVALID_PLATFORM_STATE, _platform),
    "uninitialised": Check(Status.INVALID_PLATFORM_STATE, _uninitialised),
    "es_platform": Check(Status.UNSUPPORTED, _es_platform),
    "version": Check(Status.POLICY_FAILURE, _version),
    "guest": Check(Status.INVALID_GUEST, _guest),
    "state": Check(Status.INVALID_GUEST_STATE, _state),
    "es_guest": Check(Status.UNSUPPORTED, _es_guest),
    "debug": Check(Status.POLICY_FAILURE, _debug),
    "send": Check(Status.POLICY_FAILURE, _send),
    "sharer": Check(Status.INVALID_GUEST, _sharer),
    "sharing": Check(Status.POLICY_FAILURE, _sharing),
    "active": Check(Status.INACTIVE, _active),
    "inactive": Check(Status.ACTIVE, _inactive),
    "asid": Check(Status.INVALID_ASID, _asid),
    "owned": Check(Status.ASID_OWNED, _owned),
    "flushed": Check(Status.DFFLUSH_REQUIRED, _flushed),
    "address": Check(Status.INVALID_ADDRESS, _address),
    "blocks": Check(Status.INVALID_LEN, _blocks),
    "page": Check(Status.INVALID_LEN, _page),
    "room": Check(Status.INVALID_LEN, _room),
    "session": Check(Status.INVALID_LEN, _session),
    "session_given": Check(Status.INVALID_LEN, _session_given),
    "header": Check(Status.INVALID_LEN, _header),
}
