"""The secure processor (PSP) of SEV and SEV-ES: platform, guests, and every command as a row of a table.

Source: SEV API (AMD 55766) chapters 5 and 6; the order of checks as in commands.py. Where the model simplifies: certificates are not
checked (a Diffie-Hellman key is a bare point, so a DOMAIN policy cannot be proven and forbids SEND), there is no attestation report,
packets are never compressed, one DF_FLUSH does what hardware needs WBINVD on every core for, and everything random follows from a seed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from labkit.errors import MemoryFault, PspError
from labkit.sev import transport
from labkit.sev.cipher import BLOCK, CHUNK, PAGE, MemoryCipher
from labkit.sev.commands import RULES, GuestState, Request
from labkit.sev.policy import Policy, Status, policy_api, refusal
from labkit.sev.transport import TransportKeys

__all__ = ["MEASURE_SIZE", "Guest", "Measured", "Psp", "RawMemory", "measurement"]

MEASURE_SIZE = 48  # MAC 32, MNONCE 16
S = Status


class RawMemory(Protocol):
    """What DRAM holds, by system physical address: ciphertext where a page is encrypted; MemoryFault where nothing is."""

    def read(self, spa: int, size: int, /) -> bytes: ...
    def write(self, spa: int, data: bytes, /) -> None: ...


class Measured(NamedTuple):
    """One LAUNCH_UPDATE: what was added, and the launch digest after it."""

    command: str
    spa: int
    size: int  # bytes
    digest: bytes


@dataclass
class Guest:
    """What the firmware keeps of one guest (GCTX)."""

    handle: int
    policy: int
    cipher: MemoryCipher
    keys: TransportKeys
    state: GuestState = GuestState.UNINIT
    asid: int = 0  # 0: inactive
    measure: bytes = b""  # the MAC of LAUNCH_MEASURE, which a secret must be made for
    sending: TransportKeys | None = None
    measured: list[Measured] = field(default_factory=list)
    unwrapped: list[tuple[int, int]] = field(
        default_factory=list
    )  # (spa, bytes) of packets: encrypted, never measured
    content: Any = field(default_factory=hashlib.sha256, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guest:
        return replace(
            self,
            measured=list(self.measured),
            unwrapped=list(self.unwrapped),
            content=self.content.copy(),
        )

    @property
    def digest(self) -> bytes:
        """The launch digest so far: SHA-256 of all plaintext in the order of its updates."""
        return bytes(self.content.digest())


def measurement(
    tik: bytes, api: tuple[int, int], build: int, policy: int, digest: bytes, nonce: bytes
) -> bytes:
    """The 48 bytes of LAUNCH_MEASURE: HMAC-SHA256(TIK, 04 || API || BUILD || POLICY || LD || MNONCE) || MNONCE (SEV API 6.5)."""
    message = bytes((4, *api, build)) + policy.to_bytes(4, "little") + digest + nonce
    return hmac.digest(tik, message, "sha256") + nonce


class Psp:
    """One secure processor and the guests it knows; `command` is the only way in."""

    def __init__(
        self,
        memory: RawMemory,
        seed: int = 0,
        api: tuple[int, int] = (1, 55),
        build: int = 24,
        nr_asids: int = 15,
        min_sev_asid: int = 8,
    ) -> None:
        self.memory, self.seed, self.api, self.build = memory, seed, api, build
        self.nr_asids, self.min_sev_asid = (
            nr_asids,
            min_sev_asid,
        )  # CPUID 0x8000001F ECX, EDX: ASIDs below are for SEV-ES and SNP
        self.initialised = self.es = False
        self.guests: dict[int, Guest] = {}
        self.used_asids: set[int] = set()  # deactivated since the last DF_FLUSH
        self.snp_asids: set[int] = set()
        self.last_handle = self._drawn = 0
        self._pdh = transport.private_key(b"PDH" + seed.to_bytes(8, "little"))
        self.pdh = transport.public_bytes(self._pdh)  # the platform's Diffie-Hellman key

    def command(self, name: str, **fields: Any) -> Any:
        """Run one command with the fields of Request; raises PspError with the status of the first check that fails.

        Gives: LAUNCH_START, RECEIVE_START a handle; LAUNCH_MEASURE 48 bytes; GUEST_STATUS (policy, asid, state; UNINIT for one that
        is not there); DBG_DECRYPT plaintext; SEND_START a session; SEND_UPDATE_* (header, data); PLATFORM_STATUS (API, build,
        initialised, ES, guests); others None.
        """
        try:
            if name not in RULES:
                raise refusal(S.INVALID_COMMAND, repr(name))
            rule, request = RULES[name], Request.of(name, fields)
            for check in rule.checks:
                status, test = _CHECKS[check]
                if found := test(self, request):
                    raise refusal(status, found)
            result = _BODIES[name](self, request)
        except PspError as err:
            err.facts["command"] = name
            raise
        guest = self.guests.get(result if GuestState.UNINIT in rule.states else request.handle)
        if guest and rule.to is not None:
            guest.state = rule.to
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Psp:
        """For snapshots: guests and ASIDs are copied; memory and keys are shared."""
        twin = memo[id(self)] = copy(self)
        for name in ("guests", "used_asids", "snp_asids"):
            setattr(twin, name, deepcopy(getattr(self, name), memo))
        return twin

    def fresh(self, size: int) -> bytes:
        """Random-looking bytes that follow from the seed."""
        self._drawn += 1
        return hashlib.shake_256(b"PSP%d:%d" % (self.seed, self._drawn)).digest(size)

    def asids(self, es: bool) -> range:
        """The ASIDs that such a guest may have."""
        return range(1, self.min_sev_asid) if es else range(self.min_sev_asid, self.nr_asids + 1)

    def hole(self, spa: int, size: int) -> str:
        """What is wrong with a range of DRAM; "" when all of it is there."""
        try:
            for page in range(spa // PAGE * PAGE, spa + max(size, 1), PAGE):
                self.memory.read(max(page, spa), 1)
        except MemoryFault as err:
            return str(err)
        return ""

    def encrypt_guest(self, guest: Guest, spa: int, plain: bytes) -> None:
        """Write a guest's plaintext to DRAM, encrypted with its key."""
        self.memory.write(spa, guest.cipher.encrypt(spa, plain))

    def decrypt_guest(self, guest: Guest, spa: int, size: int) -> bytes:
        """What the guest would read there through C=1."""
        return guest.cipher.decrypt(spa, self.memory.read(spa, size))


# What a check found wrong, as words; "" when it passes.


def _address(psp: Psp, r: Request) -> str:
    return f"spa {r.spa:#x}, not a multiple of 16" if r.spa % BLOCK else psp.hole(r.spa, r.length)


def _state(psp: Psp, r: Request) -> str:
    state, states = psp.guests[r.handle].state, RULES[r.command].states
    return (
        ""
        if state in states
        else f"{state.name}, not {' or '.join(s.name for s in sorted(states))}"
    )


def _sharing(psp: Psp, r: Request) -> str:
    other = psp.guests.get(r.handle)
    if other is None or (not other.policy & Policy.NOKS and other.policy == r.policy):
        return ""
    return f"policy {r.policy:#x} beside guest {r.handle}'s {other.policy:#x}"


def _not_sendable(psp: Psp, r: Request) -> str:
    found = Policy(psp.guests[r.handle].policy & (Policy.NOSEND | Policy.DOMAIN))
    return str(found.name) if found else ""


def _owned(psp: Psp, r: Request) -> str:
    cipher = psp.guests[r.handle].cipher
    other = next(
        (g.handle for g in psp.guests.values() if g.asid == r.asid and g.cipher.key != cipher.key),
        0,
    )
    return f"ASID {r.asid} of another guest" if other or r.asid in psp.snp_asids else ""


def _if(wrong: Any, found: str) -> str:
    return found if wrong else ""


_CHECKS: dict[str, tuple[Status, Callable[[Psp, Request], str]]] = {
    "platform": (
        S.INVALID_PLATFORM_STATE,
        lambda psp, r: _if(not psp.initialised, "a platform without INIT"),
    ),
    "uninitialised": (
        S.INVALID_PLATFORM_STATE,
        lambda psp, r: _if(psp.initialised, "an initialised platform"),
    ),
    "state": (S.INVALID_GUEST_STATE, _state),
    "guest": (
        S.INVALID_GUEST,
        lambda psp, r: _if(r.handle not in psp.guests, f"handle {r.handle}"),
    ),
    "sharer": (
        S.INVALID_GUEST,
        lambda psp, r: _if(
            r.handle and r.handle not in psp.guests, f"handle {r.handle} to share a key with"
        ),
    ),
    "sharing": (S.POLICY_FAILURE, _sharing),
    "version": (
        S.POLICY_FAILURE,
        lambda psp, r: _if(
            policy_api(r.policy) > psp.api, f"API {policy_api(r.policy)}, this is {psp.api}"
        ),
    ),
    "es_platform": (
        S.UNSUPPORTED,
        lambda psp, r: _if(
            r.policy & Policy.ES and not psp.es, "an ES policy, and INIT without ES"
        ),
    ),
    "es_guest": (
        S.UNSUPPORTED,
        lambda psp, r: _if(
            not psp.guests[r.handle].policy & Policy.ES, "a guest without the ES policy"
        ),
    ),
    "session": (
        S.INVALID_LEN,
        lambda psp, r: _if(
            len(r.session) not in (0, transport.SESSION_SIZE), f"{len(r.session)} bytes of session"
        ),
    ),
    "session_given": (S.INVALID_LEN, lambda psp, r: _if(not r.session, "no session")),
    "header": (
        S.INVALID_LEN,
        lambda psp, r: _if(
            len(r.header) != transport.HEADER_SIZE, f"{len(r.header)} bytes of header"
        ),
    ),
    "blocks": (
        S.INVALID_LEN,
        lambda psp, r: _if(r.length <= 0 or r.length % BLOCK, f"{r.length:#x} bytes"),
    ),
    "page": (
        S.INVALID_LEN,
        lambda psp, r: _if(r.length != PAGE, f"{r.length:#x} bytes, and a VMSA is one page"),
    ),
    "room": (
        S.INVALID_LEN,
        lambda psp, r: _if(r.size < MEASURE_SIZE, f"{r.size} bytes of room, {MEASURE_SIZE} needed"),
    ),
    "address": (S.INVALID_ADDRESS, _address),
    "active": (S.INACTIVE, lambda psp, r: _if(not psp.guests[r.handle].asid, "ASID 0")),
    "inactive": (
        S.ACTIVE,
        lambda psp, r: _if(psp.guests[r.handle].asid, f"ASID {psp.guests[r.handle].asid}"),
    ),
    "asid": (
        S.INVALID_ASID,
        lambda psp, r: _if(r.asid not in psp.asids(_is_es(psp, r)), f"ASID {r.asid}"),
    ),
    "owned": (S.ASID_OWNED, _owned),
    "flushed": (S.DFFLUSH_REQUIRED, lambda psp, r: _if(r.asid in psp.used_asids, f"ASID {r.asid}")),
    "debug": (
        S.POLICY_FAILURE,
        lambda psp, r: _if(psp.guests[r.handle].policy & Policy.NODBG, "NODBG"),
    ),
    "send": (S.POLICY_FAILURE, _not_sendable),
}


def _is_es(psp: Psp, r: Request) -> bool:
    return bool(psp.guests[r.handle].policy & Policy.ES)


# What a command does once its checks have passed.


def _init(psp: Psp, r: Request) -> None:
    psp.initialised, psp.es = True, r.es


def _shutdown(psp: Psp, r: Request) -> None:
    psp.initialised = psp.es = False
    psp.guests.clear()
    psp.used_asids.clear()
    psp.snp_asids.clear()


def _start(psp: Psp, r: Request) -> int:
    if r.session:
        keys = transport.open_session(psp._pdh, r.pdh, r.policy, r.session)
    else:
        keys = TransportKeys(psp.fresh(16), psp.fresh(16))
    cipher = psp.guests[r.handle].cipher if r.handle else MemoryCipher(psp.fresh(16))
    psp.last_handle += 1
    psp.guests[psp.last_handle] = Guest(psp.last_handle, r.policy, cipher, keys)
    return psp.last_handle


def _update(command: str) -> Callable[[Psp, Request], None]:
    def body(psp: Psp, r: Request) -> None:
        guest = psp.guests[r.handle]
        for spa in range(r.spa, r.spa + r.size, CHUNK):
            plain = psp.memory.read(spa, min(CHUNK, r.spa + r.size - spa))
            guest.content.update(plain)
            psp.encrypt_guest(guest, spa, plain)
        guest.measured.append(Measured(command, r.spa, r.size, guest.digest))

    return body


def _measure(psp: Psp, r: Request) -> bytes:
    guest = psp.guests[r.handle]
    blob = measurement(
        guest.keys.tik, psp.api, psp.build, guest.policy, guest.digest, psp.fresh(16)
    )
    guest.measure = blob[:32]
    return blob


def _secret(psp: Psp, r: Request) -> None:
    guest = psp.guests[r.handle]
    psp.encrypt_guest(
        guest,
        r.spa,
        transport.unwrap(guest.keys, transport.LAUNCH_SECRET, r.header, r.data, guest.measure),
    )
    guest.unwrapped.append((r.spa, len(r.data)))


def _status(psp: Psp, r: Request) -> tuple[int, int, GuestState]:
    guest = psp.guests.get(r.handle)
    return (guest.policy, guest.asid, guest.state) if guest else (0, 0, GuestState.UNINIT)


def _activate(psp: Psp, r: Request) -> None:
    psp.guests[r.handle].asid = r.asid


def _deactivate(psp: Psp, r: Request) -> None:
    psp.used_asids.add(psp.guests[r.handle].asid)
    psp.guests[r.handle].asid = 0


def _decommission(psp: Psp, r: Request) -> None:
    del psp.guests[r.handle]


def _send_start(psp: Psp, r: Request) -> bytes:
    guest, keys = psp.guests[r.handle], TransportKeys(psp.fresh(16), psp.fresh(16))
    session = transport.make_session(psp._pdh, r.pdh, keys, guest.policy, psp.fresh(32))
    guest.sending = keys
    return session


def _send(kind: int) -> Callable[[Psp, Request], tuple[bytes, bytes]]:
    def body(psp: Psp, r: Request) -> tuple[bytes, bytes]:
        guest = psp.guests[r.handle]
        assert guest.sending  # SEND_START made the keys
        return transport.wrap(
            guest.sending, kind, psp.decrypt_guest(guest, r.spa, r.size), psp.fresh(16)
        )

    return body


def _receive(kind: int) -> Callable[[Psp, Request], None]:
    def body(psp: Psp, r: Request) -> None:
        guest = psp.guests[r.handle]
        psp.encrypt_guest(guest, r.spa, transport.unwrap(guest.keys, kind, r.header, r.data))
        guest.unwrapped.append((r.spa, len(r.data)))

    return body


def _nothing(psp: Psp, r: Request) -> None:
    """The new state is all there is to it."""


_BODIES: dict[str, Callable[[Psp, Request], Any]] = {
    "INIT": _init,
    "SHUTDOWN": _shutdown,
    "DF_FLUSH": lambda psp, r: psp.used_asids.clear(),
    "PLATFORM_STATUS": lambda psp, r: (
        psp.api,
        psp.build,
        psp.initialised,
        psp.es,
        len(psp.guests),
    ),
    "LAUNCH_START": _start,
    "LAUNCH_UPDATE_DATA": _update("DATA"),
    "LAUNCH_UPDATE_VMSA": _update("VMSA"),
    "LAUNCH_MEASURE": _measure,
    "LAUNCH_SECRET": _secret,
    "LAUNCH_FINISH": _nothing,
    "GUEST_STATUS": _status,
    "ACTIVATE": _activate,
    "DEACTIVATE": _deactivate,
    "DECOMMISSION": _decommission,
    "DBG_DECRYPT": lambda psp, r: psp.decrypt_guest(psp.guests[r.handle], r.spa, r.size),
    "DBG_ENCRYPT": lambda psp, r: psp.encrypt_guest(psp.guests[r.handle], r.spa, r.data),
    "SEND_START": _send_start,
    "SEND_UPDATE_DATA": _send(transport.SEND_DATA),
    "SEND_UPDATE_VMSA": _send(transport.SEND_VMSA),
    "SEND_FINISH": _nothing,
    "SEND_CANCEL": _nothing,
    "RECEIVE_START": _start,
    "RECEIVE_UPDATE_DATA": _receive(transport.SEND_DATA),
    "RECEIVE_UPDATE_VMSA": _receive(transport.SEND_VMSA),
    "RECEIVE_FINISH": _nothing,
}
