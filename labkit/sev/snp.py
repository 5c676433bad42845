"""The SNP half of the secure processor: launch digest, launch commands, policy.

Source: SNP ABI (AMD 56860) sections 8.16 to 8.18, its table 67 (PAGE_INFO) as sev-snp-measure reads it. Where the model simplifies: no ID
block and no attestation report, no VMPL permissions, no migration; the CPUID page is checked for its count only, not against the CPU.
"""

from __future__ import annotations

import hashlib
from copy import copy, deepcopy
from enum import Enum, IntEnum
from struct import Struct
from typing import Any, NamedTuple

from labkit.sev.cipher import PAGE, MemoryCipher
from labkit.sev.policy import SnpPolicy, Status, refusal, refuse_first, snp_policy_api
from labkit.sev.psp import Psp
from labkit.sev.rmp import Rmp, RmpEntry

__all__ = ["DIGEST_SIZE", "PageType", "SnpGuest", "SnpMeasured", "SnpState", "extend"]

DIGEST_SIZE = 48  # SHA-384
_PAGE_INFO = Struct(
    "<48s48sHBBBBBxQ"
)  # digest, contents, length, type, IMI, VMPL3..1 permissions, GPA
assert _PAGE_INFO.size == 0x70
_MAX_CPUID = 64  # entries of the CPUID page
_SECRETS_VERSION, _VMPCK_OFFSET, _VMPCK_SIZE = (
    3,
    0x20,
    4 * 32,
)  # SNP ABI 8.17.2.5, PAGE_TYPE_SECRETS


class PageType(IntEnum):
    """What a page of the launch is."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class SnpState(Enum):
    """Where an SNP guest's life is."""

    LAUNCH = "launch"
    RUNNING = "running"


class SnpMeasured(NamedTuple):
    """One page of the launch, and the launch digest after it."""

    kind: PageType
    spa: int
    gpa: int
    digest: bytes


def extend(digest: bytes, kind: int, gpa: int, page: bytes = b"") -> bytes:
    """The launch digest after one more page: SHA-384 of PAGE_INFO; only NORMAL and VMSA pages bring their contents."""
    contents = (
        hashlib.sha384(page).digest()
        if kind in (PageType.NORMAL, PageType.VMSA)
        else bytes(DIGEST_SIZE)
    )
    return hashlib.sha384(
        _PAGE_INFO.pack(digest, contents, _PAGE_INFO.size, kind, 0, 0, 0, 0, gpa)
    ).digest()


class SnpGuest:
    """One SNP guest from SNP_LAUNCH_START on; its pages are those that the RMP gives to its ASID."""

    def __init__(self, psp: Psp, rmp: Rmp, policy: int, asid: int) -> None:
        """SNP_LAUNCH_START and SNP_ACTIVATE; raises PspError for a platform, policy or ASID that does not fit."""
        refuse_first(
            (not psp.initialised, Status.INVALID_PLATFORM_STATE, "a platform without INIT"),
            (
                not policy & SnpPolicy.RESERVED_ONE or policy >> 21,
                Status.INVALID_PARAM,
                f"policy {policy:#x}",
            ),
            (
                snp_policy_api(policy) > psp.api,
                Status.POLICY_FAILURE,
                f"ABI {snp_policy_api(policy)}, this is {psp.api}",
            ),
            (
                not policy & SnpPolicy.SMT,
                Status.POLICY_FAILURE,
                "a policy without SMT on a platform with SMT",
            ),
            (asid not in psp.asids(True), Status.INVALID_ASID, f"ASID {asid}"),
            (
                asid in psp.snp_asids or any(guest.asid == asid for guest in psp.guests.values()),
                Status.ASID_OWNED,
                f"ASID {asid}",
            ),
            (asid in psp.used_asids, Status.DFFLUSH_REQUIRED, f"ASID {asid}"),
        )
        self.psp, self.rmp, self.policy, self.asid = psp, rmp, policy, asid
        self.cipher, self.state, self.digest = (
            MemoryCipher(psp.fresh(16)),
            SnpState.LAUNCH,
            bytes(DIGEST_SIZE),
        )
        self.vmpcks, self.host_data = psp.fresh(_VMPCK_SIZE), bytes(32)
        self.measured: list[SnpMeasured] = []
        psp.snp_asids.add(asid)

    def __deepcopy__(self, memo: dict[int, Any]) -> SnpGuest:
        twin = memo[id(self)] = copy(self)
        twin.psp, twin.rmp, twin.measured = (
            deepcopy(self.psp, memo),
            deepcopy(self.rmp, memo),
            list(self.measured),
        )
        return twin

    def update(self, spa: int, kind: int) -> None:
        """SNP_LAUNCH_UPDATE of one page that RMPUPDATE made immutable and this guest's; it is encrypted in place and becomes valid."""
        entry = self.rmp.entry(spa)
        refuse_first(
            (self.state is not SnpState.LAUNCH, Status.INVALID_GUEST_STATE, self.state.name),
            (kind not in PageType.__members__.values(), Status.INVALID_PARAM, f"page type {kind}"),
            (
                spa % PAGE or self.psp.hole(spa, PAGE),
                Status.INVALID_ADDRESS,
                f"spa {spa:#x}, misaligned or not memory",
            ),
            (
                entry.state != "PRE_GUEST",
                Status.INVALID_PAGE_STATE,
                f"spa {spa:#x} in state {entry.state}",
            ),
            (
                entry.asid != self.asid,
                Status.INVALID_PAGE_OWNER,
                f"spa {spa:#x} of ASID {entry.asid}",
            ),
        )
        plain = self._contents(PageType(kind), self.psp.memory.read(spa, PAGE))
        self.psp.memory.write(spa, self.cipher.encrypt(spa, plain))
        self.rmp.set(
            spa, RmpEntry(True, self.asid, entry.gpa, validated=True, vmsa=kind == PageType.VMSA)
        )
        self.digest = extend(self.digest, kind, entry.gpa, plain)
        self.measured.append(SnpMeasured(PageType(kind), spa, entry.gpa, self.digest))

    def finish(self, host_data: bytes = bytes(32)) -> None:
        """SNP_LAUNCH_FINISH: the digest stands, the guest may run."""
        if self.state is not SnpState.LAUNCH:
            raise refusal(Status.INVALID_GUEST_STATE, self.state.name)
        if len(host_data) != 32:
            raise refusal(Status.INVALID_PARAM, f"{len(host_data)} bytes of host data, not 32")
        self.state, self.host_data = SnpState.RUNNING, host_data

    def debug_decrypt(self, spa: int, size: int = PAGE) -> bytes:
        """SNP_DBG_DECRYPT; raises PspError POLICY_FAILURE without the DEBUG policy."""
        if not self.policy & SnpPolicy.DEBUG:
            raise refusal(Status.POLICY_FAILURE, "no DEBUG")
        return self.cipher.decrypt(spa, self.psp.memory.read(spa, size))

    def decommission(self) -> None:
        """SNP_DECOMMISSION: the key is gone and the ASID free after DF_FLUSH; the host takes its pages back with RMPUPDATE."""
        self.psp.snp_asids.discard(self.asid)
        self.psp.used_asids.add(self.asid)

    def _contents(self, kind: PageType, page: bytes) -> bytes:
        """What the page will hold: the firmware clears, fills or checks it."""
        if kind is PageType.ZERO:
            return bytes(PAGE)
        if kind is PageType.SECRETS:
            return (
                _SECRETS_VERSION.to_bytes(4, "little").ljust(_VMPCK_OFFSET, b"\0") + self.vmpcks
            ).ljust(PAGE, b"\0")
        if kind is PageType.CPUID and int.from_bytes(page[:4], "little") > _MAX_CPUID:
            raise refusal(
                Status.INVALID_PARAM,
                f"{int.from_bytes(page[:4], 'little')} entries in the CPUID page",
            )
        return page
