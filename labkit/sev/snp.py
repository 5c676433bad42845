"""The SNP half of the secure processor: launch digest, launch commands, policy.

Source: SNP ABI (AMD 56860) sections 8.16 to 8.18, its table 67 (PAGE_INFO) as sev-snp-measure reads
it. Where the model simplifies: no ID block and no attestation report, no VMPL permissions, no
migration; the CPUID page is checked for its count only, not against the CPU.
"""

from __future__ import annotations

import hashlib
from copy import copy, deepcopy
from enum import Enum, IntEnum
from struct import Struct
from typing import NamedTuple

from labkit.machine.memory import PAGE
from labkit.sev.cipher import MemoryCipher
from labkit.sev.policy import SnpPolicy, Status, refusal, refuse_first, snp_policy_api
from labkit.sev.psp import Psp
from labkit.sev.rmp import Rmp, RmpEntry

__all__ = ["DIGEST_SIZE", "PageType", "SnpGuest", "SnpMeasured", "SnpState", "extend"]

# Bytes of a SHA-384
DIGEST_SIZE = 48

_HOST_DATA_SIZE = 32

# Digest, contents, length, type, IMI, VMPL3..1 permissions, GPA
_PAGE_INFO = Struct("<48s48sHBBBBBxQ")
assert _PAGE_INFO.size == 0x70

# Entries of the CPUID page
_MAX_CPUID = 64

# SNP ABI 8.17.2.5, PAGE_TYPE_SECRETS: the version, and where the four VM platform keys are
_SECRETS_VERSION = 3
_VMPCK_OFFSET = 0x20
_VMPCK_SIZE = 4 * 32


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
    """The launch digest after one more page: SHA-384 of PAGE_INFO.

    kind is a PageType; only NORMAL and VMSA pages bring their contents.
    """
    contents = bytes(DIGEST_SIZE)
    if kind in (PageType.NORMAL, PageType.VMSA):
        contents = hashlib.sha384(page).digest()
    info = _PAGE_INFO.pack(digest, contents, _PAGE_INFO.size, kind, 0, 0, 0, 0, gpa)
    return hashlib.sha384(info).digest()


class SnpGuest:
    """One SNP guest from SNP_LAUNCH_START on; its pages are those that the RMP gives to its ASID.

    digest is the launch digest so far, vmpcks are the keys of its secrets page.
    """

    def __init__(self, psp: Psp, rmp: Rmp, policy: int, asid: int) -> None:
        """SNP_LAUNCH_START and SNP_ACTIVATE.

        Raises PspError for a platform, policy or ASID that does not fit.
        """
        _check_start(psp, policy, asid)
        self.psp = psp
        self.rmp = rmp
        self.policy = policy
        self.asid = asid
        self.cipher = MemoryCipher(psp.fresh(16))
        self.state = SnpState.LAUNCH
        self.digest = bytes(DIGEST_SIZE)
        self.vmpcks = psp.fresh(_VMPCK_SIZE)
        self.host_data = bytes(_HOST_DATA_SIZE)
        self.measured: list[SnpMeasured] = []
        psp.snp_asids.add(asid)

    def __deepcopy__(self, memo: dict[int, object]) -> SnpGuest:
        """For snapshots: the key is shared."""
        twin = copy(self)
        memo[id(self)] = twin
        twin.psp = deepcopy(self.psp, memo)
        twin.rmp = deepcopy(self.rmp, memo)
        twin.measured = list(self.measured)
        return twin

    def update(self, spa: int, kind: int) -> None:
        """SNP_LAUNCH_UPDATE of one page that RMPUPDATE made immutable and this guest's.

        It is encrypted in place and becomes valid. kind is a PageType. Raises PspError for a page
        that does not fit.
        """
        self._check_update(spa, kind)
        gpa = self.rmp.entry(spa).gpa
        page_type = PageType(kind)

        plain = self._contents(page_type, self.psp.memory.read(spa, PAGE))
        self.psp.memory.write(spa, self.cipher.encrypt(spa, plain))
        is_vmsa = page_type is PageType.VMSA
        self.rmp.set(spa, RmpEntry(True, self.asid, gpa, validated=True, vmsa=is_vmsa))

        self.digest = extend(self.digest, kind, gpa, plain)
        self.measured.append(SnpMeasured(page_type, spa, gpa, self.digest))

    def _check_update(self, spa: int, kind: int) -> None:
        entry = self.rmp.entry(spa)
        is_launching = self.state is SnpState.LAUNCH
        is_type = kind in PageType.__members__.values()
        is_bad_place = spa % PAGE != 0 or self.psp.hole(spa, PAGE) != ""
        bad_place = f"spa {spa:#x}, misaligned or not memory"
        state = f"spa {spa:#x} in state {entry.state}"
        owner = f"spa {spa:#x} of ASID {entry.asid}"
        refuse_first(
            (not is_launching, Status.INVALID_GUEST_STATE, self.state.name),
            (not is_type, Status.INVALID_PARAM, f"page type {kind}"),
            (is_bad_place, Status.INVALID_ADDRESS, bad_place),
            (entry.state != "PRE_GUEST", Status.INVALID_PAGE_STATE, state),
            (entry.asid != self.asid, Status.INVALID_PAGE_OWNER, owner),
        )

    def finish(self, host_data: bytes = bytes(_HOST_DATA_SIZE)) -> None:
        """SNP_LAUNCH_FINISH: the digest stands, the guest may run.

        host_data has 32 bytes. Raises PspError when it has not, or the guest runs already.
        """
        if self.state is not SnpState.LAUNCH:
            raise refusal(Status.INVALID_GUEST_STATE, self.state.name)
        if len(host_data) != _HOST_DATA_SIZE:
            raise refusal(Status.INVALID_PARAM, f"{len(host_data)} bytes of host data, not 32")
        self.state = SnpState.RUNNING
        self.host_data = host_data

    def debug_decrypt(self, spa: int, size: int = PAGE) -> bytes:
        """SNP_DBG_DECRYPT; raises PspError POLICY_FAILURE without the DEBUG policy."""
        if not self.policy & SnpPolicy.DEBUG:
            raise refusal(Status.POLICY_FAILURE, "no DEBUG")
        return self.cipher.decrypt(spa, self.psp.memory.read(spa, size))

    def decommission(self) -> None:
        """SNP_DECOMMISSION: the key is gone and the ASID free after DF_FLUSH.

        The host takes the guest's pages back with RMPUPDATE.
        """
        self.psp.snp_asids.discard(self.asid)
        self.psp.used_asids.add(self.asid)

    def _contents(self, kind: PageType, page: bytes) -> bytes:
        """What the page will hold: the firmware clears, fills or checks it."""
        if kind is PageType.ZERO:
            return bytes(PAGE)
        if kind is PageType.SECRETS:
            head = _SECRETS_VERSION.to_bytes(4, "little").ljust(_VMPCK_OFFSET, b"\0")
            return (head + self.vmpcks).ljust(PAGE, b"\0")
        if kind is PageType.CPUID:
            nr_entries = int.from_bytes(page[:4], "little")
            if nr_entries > _MAX_CPUID:
                raise refusal(Status.INVALID_PARAM, f"{nr_entries} entries in the CPUID page")
        return page


def _check_start(psp: Psp, policy: int, asid: int) -> None:
    is_policy = policy & SnpPolicy.RESERVED_ONE and not policy >> 21
    wanted = snp_policy_api(policy)
    too_old = f"ABI {wanted}, this is {psp.api}"
    no_smt = "a policy without SMT on a platform with SMT"
    is_owned = asid in psp.snp_asids or any(guest.asid == asid for guest in psp.guests.values())
    refuse_first(
        (not psp.initialised, Status.INVALID_PLATFORM_STATE, "a platform without INIT"),
        (not is_policy, Status.INVALID_PARAM, f"policy {policy:#x}"),
        (wanted > psp.api, Status.POLICY_FAILURE, too_old),
        (not policy & SnpPolicy.SMT, Status.POLICY_FAILURE, no_smt),
        (asid not in psp.asids(True), Status.INVALID_ASID, f"ASID {asid}"),
        (is_owned, Status.ASID_OWNED, f"ASID {asid}"),
        (asid in psp.used_asids, Status.DFFLUSH_REQUIRED, f"ASID {asid}"),
    )
