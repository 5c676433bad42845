"""SNP: the launch digest, the reverse map, and what each access to each page meets."""

from __future__ import annotations

import hashlib
import struct

import pytest
from sev_sample import PLAIN, SPA, make_psp, start, status_of

from labkit.errors import PspError
from labkit.sev.policy import Policy, SnpPolicy, Status
from labkit.sev.psp import Psp
from labkit.sev.rmp import (
    PAGE_NOT_VALIDATED,
    Rmp,
    RmpEntry,
    RmpFault,
    RmpStatus,
    guest_access,
    host_access,
)
from labkit.sev.snp import PageType, SnpGuest, SnpState, extend

S = Status
POLICY = SnpPolicy.SMT | SnpPolicy.RESERVED_ONE
RMP, WRITE, ENCRYPTED = 1 << 31, 2, 1 << 34
GPA = 0x9000


def launch(psp: Psp | None = None, policy: int = POLICY, asid: int = 2) -> SnpGuest:
    return SnpGuest(psp or make_psp(), Rmp(), policy, asid)


def give(guest: SnpGuest, spa: int = SPA, gpa: int = GPA, asid: int | None = None) -> None:
    assert (
        guest.rmp.update(
            spa, RmpEntry(True, guest.asid if asid is None else asid, gpa, immutable=True)
        )
        == RmpStatus.SUCCESS
    )


@pytest.mark.parametrize(
    ("policy", "asid", "status"),
    [
        (POLICY & ~SnpPolicy.RESERVED_ONE, 2, S.INVALID_PARAM),
        (POLICY | 1 << 21, 2, S.INVALID_PARAM),
        (POLICY | 0x0200, 2, S.POLICY_FAILURE),
        (POLICY & ~SnpPolicy.SMT, 2, S.POLICY_FAILURE),
        (POLICY, 0, S.INVALID_ASID),
        (POLICY, 8, S.INVALID_ASID),
        (POLICY, 1, S.ASID_OWNED),
        (POLICY | 0x0137, 7, S.SUCCESS),
    ],
)
def test_that_a_launch_starts_only_with_a_fitting_policy_and_asid(
    policy: int, asid: int, status: Status
) -> None:
    psp = make_psp()
    start(psp, asid=1)
    try:
        found = S.SUCCESS if launch(psp, policy, asid) else None
    except PspError as err:
        found = err.status  # type: ignore[assignment]
    assert found == status


def test_that_an_snp_asid_is_taken_until_it_is_flushed() -> None:
    psp = make_psp()
    guest = launch(psp)
    assert (
        status_of(
            psp, "ACTIVATE", handle=psp.command("LAUNCH_START", policy=Policy.ES), asid=guest.asid
        )
        == S.ASID_OWNED
    )
    for status in (S.ASID_OWNED, S.DFFLUSH_REQUIRED):
        with pytest.raises(PspError) as caught:
            launch(psp)
        assert caught.value.status == status
        guest.decommission()
    psp.command("DF_FLUSH")
    assert launch(psp).state is SnpState.LAUNCH


@pytest.mark.parametrize("kind", PageType)
def test_that_a_page_becomes_valid_encrypted_and_measured(kind: PageType) -> None:
    guest = launch()
    guest.psp.memory.write(SPA, bytes(4096) if kind is PageType.CPUID else PLAIN)
    give(guest)
    guest.update(SPA, kind)
    entry, inside = (
        guest.rmp.entry(SPA),
        guest.cipher.decrypt(SPA, guest.psp.memory.read(SPA, 4096)),
    )
    assert (entry.state, entry.vmsa) == ("GUEST_VALID", kind is PageType.VMSA)
    contents = (
        hashlib.sha384(PLAIN).digest() if kind in (PageType.NORMAL, PageType.VMSA) else bytes(48)
    )
    record = bytes(48) + contents + struct.pack("<HBBIQ", 0x70, kind, 0, 0, GPA)
    assert (
        guest.digest
        == hashlib.sha384(record).digest()
        == guest.measured[0].digest
        == extend(bytes(48), kind, GPA, PLAIN)
    )
    expected = {PageType.ZERO: bytes(4096), PageType.CPUID: bytes(4096)}.get(kind, PLAIN)
    assert inside == expected or (kind is PageType.SECRETS and inside[0x20:0xA0] == guest.vmpcks)


@pytest.mark.parametrize(
    ("spa", "kind", "asid", "state", "status"),
    [
        (SPA, 0, 2, SnpState.LAUNCH, S.INVALID_PARAM),
        (SPA, 7, 2, SnpState.LAUNCH, S.INVALID_PARAM),
        (SPA + 16, 1, 2, SnpState.LAUNCH, S.INVALID_ADDRESS),
        (1 << 30, 1, 2, SnpState.LAUNCH, S.INVALID_ADDRESS),
        (SPA + 4096, 1, 2, SnpState.LAUNCH, S.INVALID_PAGE_STATE),
        (SPA, 1, 3, SnpState.LAUNCH, S.INVALID_PAGE_OWNER),
        (SPA, 9, 3, SnpState.RUNNING, S.INVALID_GUEST_STATE),
    ],
)
def test_that_a_page_that_does_not_fit_is_refused(
    spa: int, kind: int, asid: int, state: SnpState, status: Status
) -> None:
    guest = launch()
    give(guest, asid=asid)
    if state is SnpState.RUNNING:
        guest.finish()
    with pytest.raises(PspError) as caught:
        guest.update(spa, kind)
    assert caught.value.status == status
    assert guest.psp.memory.read(SPA, 4096) == PLAIN
    assert not any(guest.digest)


def test_that_a_cpuid_page_has_at_most_64_entries() -> None:
    guest = launch()
    give(guest)
    guest.psp.memory.write(SPA, (65).to_bytes(4, "little"))
    with pytest.raises(PspError, match="65 entries"):
        guest.update(SPA, PageType.CPUID)


@pytest.mark.parametrize(
    ("times", "host_data", "status"),
    [(2, bytes(32), S.INVALID_GUEST_STATE), (1, bytes(31), S.INVALID_PARAM)],
)
def test_that_a_launch_finishes_once(times: int, host_data: bytes, status: Status) -> None:
    guest = launch()
    with pytest.raises(PspError) as caught:
        for _ in range(times):
            guest.finish(host_data)
    assert caught.value.status == status


@pytest.mark.parametrize("policy", [POLICY, POLICY | SnpPolicy.DEBUG])
def test_that_debugging_needs_the_policy(policy: int) -> None:
    guest = launch(policy=policy)
    give(guest)
    guest.update(SPA, PageType.NORMAL)
    if policy & SnpPolicy.DEBUG:
        assert guest.debug_decrypt(SPA) == PLAIN
    else:
        with pytest.raises(PspError, match="POLICY_FAILURE"):
            guest.debug_decrypt(SPA)


SHARED, MINE = RmpEntry(), RmpEntry(True, 2, GPA, validated=True)
INVALID, PRE, THEIRS = (
    RmpEntry(True, 2, GPA),
    RmpEntry(True, 2, GPA, immutable=True),
    RmpEntry(True, 3, GPA, validated=True),
)
ELSEWHERE, VMSA = (
    RmpEntry(True, 2, GPA + 4096, validated=True),
    RmpEntry(True, 2, GPA, validated=True, vmsa=True),
)
NPF = ENCRYPTED | RMP | 1 << 32 | 1


@pytest.mark.parametrize(
    ("entry", "private", "is_write", "fault"),
    [
        (MINE, True, False, None),
        (MINE, True, True, None),
        (MINE, False, False, None),
        (MINE, False, True, ("#NPF", (NPF | WRITE) & ~ENCRYPTED)),
        (SHARED, False, True, None),
        (SHARED, False, False, None),
        (SHARED, True, False, ("#NPF", NPF)),
        (SHARED, True, True, ("#NPF", NPF | WRITE)),
        (INVALID, True, False, ("#VC", PAGE_NOT_VALIDATED)),
        (INVALID, True, True, ("#VC", PAGE_NOT_VALIDATED)),
        (PRE, True, False, ("#NPF", NPF)),
        (THEIRS, True, False, ("#NPF", NPF)),
        (ELSEWHERE, True, False, ("#NPF", NPF)),
        (VMSA, True, True, ("#NPF", NPF | WRITE)),
        (VMSA, True, False, None),
    ],
)
def test_that_a_guest_reaches_its_own_valid_pages(
    entry: RmpEntry, private: bool, is_write: bool, fault: tuple[str, int] | None
) -> None:
    found = guest_access(entry, 2, GPA + 0x123, private, is_write)
    assert (found and (found.kind, found.error_code)) == fault


@pytest.mark.parametrize(
    ("entry", "is_write", "faults"),
    [
        (SHARED, True, False),
        (SHARED, False, False),
        (MINE, False, False),
        (MINE, True, True),
        (PRE, True, True),
        (INVALID, True, True),
    ],
)
def test_that_a_host_reads_all_and_writes_its_own(
    entry: RmpEntry, is_write: bool, faults: bool
) -> None:
    fault = host_access(entry, is_write)
    assert (fault and (fault.kind, fault.error_code)) == (("#PF", RMP | 3) if faults else None)


@pytest.mark.parametrize(
    ("old", "spa", "new", "status"),
    [
        (SHARED, SPA, INVALID, RmpStatus.SUCCESS),
        (MINE, SPA, None, RmpStatus.SUCCESS),
        (MINE, SPA, THEIRS, RmpStatus.FAIL_INPUT),
        (SHARED, SPA + 1, INVALID, RmpStatus.FAIL_INPUT),
        (PRE, SPA, None, RmpStatus.FAIL_PERMISSION),
        (SHARED, SPA, RmpEntry(False, 2), RmpStatus.FAIL_INPUT),
        (SHARED, SPA, RmpEntry(True, 2, 5), RmpStatus.FAIL_INPUT),
    ],
)
def test_that_rmpupdate_gives_and_takes_pages(
    old: RmpEntry, spa: int, new: RmpEntry | None, status: RmpStatus
) -> None:
    rmp = Rmp()
    rmp.set(SPA, old)
    assert rmp.update(spa, new) == status
    assert rmp.entry(SPA) == ((new or SHARED) if status == RmpStatus.SUCCESS else old)


def test_that_a_page_taken_and_given_back_must_be_validated_again() -> None:
    rmp = Rmp()
    rmp.set(SPA, MINE)
    rmp.update(SPA, None)
    rmp.update(SPA, INVALID)
    fault = guest_access(rmp.entry(SPA), 2, GPA, True, False)
    assert fault and fault.kind == "#VC"
    assert rmp.pvalidate(SPA, 2, GPA, True) == (RmpStatus.SUCCESS, False)
    assert guest_access(rmp.entry(SPA), 2, GPA, True, True) is None
    assert rmp.pvalidate(SPA, 2, GPA, True) == (
        RmpStatus.SUCCESS,
        True,
    )  # CF: a guest that sees it has been remapped


@pytest.mark.parametrize(
    ("asid", "gpa", "size", "answer"),
    [
        (2, GPA + 8, 4096, (RmpStatus.FAIL_INPUT, False)),
        (2, GPA, 1 << 21, (RmpStatus.FAIL_SIZEMISMATCH, False)),
        (3, GPA, 4096, "#NPF"),
        (2, GPA + 4096, 4096, "#NPF"),
    ],
)
def test_that_pvalidate_fits_the_page(asid: int, gpa: int, size: int, answer: object) -> None:
    rmp = Rmp()
    rmp.set(SPA, INVALID)
    found = rmp.pvalidate(SPA, asid, gpa, True, size)
    assert (found.kind if isinstance(found, RmpFault) else found) == answer
    assert rmp.entry(SPA) == INVALID


@pytest.mark.parametrize(
    ("old", "op", "error", "new"),
    [
        (SHARED, 1, 0, INVALID),
        (MINE, 1, 0, MINE),
        (MINE, 2, 0, SHARED),
        (SHARED, 2, 0, SHARED),
        (THEIRS, 1, 1, THEIRS),
        (THEIRS, 2, 1, THEIRS),
        (ELSEWHERE, 1, 1, ELSEWHERE),
        (SHARED, 3, 1, SHARED),
        (PRE, 2, RmpStatus.FAIL_PERMISSION, PRE),
    ],
)
def test_that_a_page_state_change_is_answered(
    old: RmpEntry, op: int, error: int, new: RmpEntry
) -> None:
    rmp = Rmp()
    rmp.set(SPA, old)
    assert rmp.page_state_change(SPA, 2, GPA, op) == error and rmp.entry(SPA) == new
