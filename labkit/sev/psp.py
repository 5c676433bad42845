"""The secure processor (PSP) of SEV and SEV-ES: one platform and its guests.

Source: SEV API (AMD 55766) chapters 5 and 6; the order of checks as in commands.py. Where the model
simplifies: certificates are not checked (a Diffie-Hellman key is a bare point, so a DOMAIN policy
cannot be proven and forbids SEND), there is no attestation report, packets are never compressed,
one DF_FLUSH does what hardware needs WBINVD on every core for, and everything random follows from a
seed.
"""

from __future__ import annotations

import hashlib
from copy import copy, deepcopy
from typing import Protocol

from labkit.errors import MemoryFault, PspError
from labkit.machine.memory import PAGE
from labkit.sev import transport
from labkit.sev.commands import RULES, GuestState, Request, Rule, Value
from labkit.sev.policy import Status, refusal
from labkit.sev.psp_bodies import BODIES, Result
from labkit.sev.psp_checks import CHECKS
from labkit.sev.psp_guest import Guest
from labkit.sev.transport import TransportKeys

__all__ = ["Psp", "RawMemory"]


class RawMemory(Protocol):
    """What DRAM holds, by system physical address: ciphertext where a page is encrypted.

    Both raise MemoryFault where nothing is.
    """

    def read(self, spa: int, size: int, /) -> bytes: ...
    def write(self, spa: int, data: bytes, /) -> None: ...


class Psp:
    """One secure processor and the guests it knows; `command` is the only way in.

    guests are by handle; used_asids are those deactivated since the last DF_FLUSH. pdh is the
    platform's Diffie-Hellman key, its public half.
    """

    def __init__(
        self,
        memory: RawMemory,
        seed: int = 0,
        api: tuple[int, int] = (1, 55),
        build: int = 24,
        nr_asids: int = 15,
        min_sev_asid: int = 8,
    ) -> None:
        """api is (major, minor); ASIDs below min_sev_asid are for SEV-ES and SNP.

        Both limits are what CPUID 0x8000001F says in ECX and EDX.
        """
        self.memory = memory
        self.seed = seed
        self.api = api
        self.build = build
        self.nr_asids = nr_asids
        self.min_sev_asid = min_sev_asid

        self.initialised = False
        self.es = False
        self.guests: dict[int, Guest] = {}
        self.used_asids: set[int] = set()
        self.snp_asids: set[int] = set()
        self.last_handle = 0

        self._nr_drawn = 0
        self._private_key = transport.private_key(b"PDH" + seed.to_bytes(8, "little"))
        self.pdh = transport.public_bytes(self._private_key)

    def command(self, name: str, **fields: Value) -> Result:
        """Run one command with the fields of Request.

        Gives: LAUNCH_START, RECEIVE_START a handle; LAUNCH_MEASURE 48 bytes; GUEST_STATUS a
        GuestStatus; DBG_DECRYPT plaintext; SEND_START a session; SEND_UPDATE_* (header, data);
        PLATFORM_STATUS a PlatformStatus; others None.

        Raises PspError with the status of the first check that fails, and InvalidState for fields
        that no command buffer can hold.
        """
        try:
            return self._command(name, fields)
        except PspError as err:
            err.facts["command"] = name
            raise

    def _command(self, name: str, fields: dict[str, Value]) -> Result:
        if name not in RULES:
            raise refusal(Status.INVALID_COMMAND, repr(name))
        rule = RULES[name]
        request = Request.of(name, fields)
        for check in rule.checks:
            status, finds = CHECKS[check]
            found = finds(self, request)
            if found:
                raise refusal(status, found)

        body = BODIES.get(name)
        result = None if body is None else body(self, request)
        self._enter(rule, request, result)
        return result

    def _enter(self, rule: Rule, request: Request, result: Result) -> None:
        """Bring the guest into the state behind the command; a new one has its handle only now."""
        if rule.to is None:
            return
        handle = request.handle
        if GuestState.UNINIT in rule.states:
            assert isinstance(result, int)
            handle = result
        if handle in self.guests:
            self.guests[handle].state = rule.to

    def __deepcopy__(self, memo: dict[int, object]) -> Psp:
        """For snapshots: guests and ASIDs are copied; memory and keys are shared."""
        twin = copy(self)
        memo[id(self)] = twin
        twin.guests = deepcopy(self.guests, memo)
        twin.used_asids = set(self.used_asids)
        twin.snp_asids = set(self.snp_asids)
        return twin

    def fresh(self, size: int) -> bytes:
        """Random-looking bytes that follow from the seed."""
        self._nr_drawn += 1
        return hashlib.shake_256(b"PSP%d:%d" % (self.seed, self._nr_drawn)).digest(size)

    def asids(self, es: bool) -> range:
        """The ASIDs that a guest with or without encrypted registers may have."""
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

    def make_session(self, peer: bytes, keys: TransportKeys, policy: int) -> bytes:
        """A session for the owner of the public key `peer`; raises PspError as transport's does."""
        return transport.make_session(self._private_key, peer, keys, policy, self.fresh(32))

    def open_session(self, peer: bytes, policy: int, session: bytes) -> TransportKeys:
        """The keys in a session made for this platform; raises PspError as transport's does."""
        return transport.open_session(self._private_key, peer, policy, session)
