"""The secure processor: every command in every state, and the order of its checks.

Then policies, ASIDs, measurement and secrets.
"""

from __future__ import annotations

import hashlib
import hmac
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sev_sample import PLAIN, SPA, good_fields, in_state, make_psp, start, status_of

from labkit.errors import InvalidState, PspError
from labkit.sev import transport
from labkit.sev.commands import RULES, GuestState
from labkit.sev.policy import Policy, Status
from labkit.sev.psp import Psp

S = Status
# What comes out: a state's number when the command succeeds, - when it succeeds and changes no
# state, else ! and the status
MATRIX = """
                     UNINIT LAUNCH_UPDATE LAUNCH_SECRET RUNNING SEND_UPDATE RECEIVE_UPDATE SENT
LAUNCH_UPDATE_DATA   !10    -             !2            !2      !2          !2             !2
LAUNCH_UPDATE_VMSA   !10    -             !2            !2      !2          !2             !2
LAUNCH_MEASURE       !10    2             !2            !2      !2          !2             !2
LAUNCH_SECRET        !10    !2            -             !2      !2          !2             !2
LAUNCH_FINISH        !10    !2            3             !2      !2          !2             !2
GUEST_STATUS         -      -             -             -       -           -              -
DBG_DECRYPT          !10    -             -             -       -           -              -
DBG_ENCRYPT          !10    -             -             -       -           -              -
SEND_START           !10    !2            !2            4       !2          !2             !2
SEND_UPDATE_DATA     !10    !2            !2            !2      -           !2             !2
SEND_UPDATE_VMSA     !10    !2            !2            !2      -           !2             !2
SEND_FINISH          !10    !2            !2            !2      6           !2             !2
SEND_CANCEL          !10    !2            !2            !2      3           !2             !2
RECEIVE_UPDATE_DATA  !10    !2            !2            !2      !2          -              !2
RECEIVE_UPDATE_VMSA  !10    !2            !2            !2      !2          -              !2
RECEIVE_FINISH       !10    !2            !2            !2      !2          3              !2
ACTIVATE             !10    !12           !12           !12     !12         !12            !12
DEACTIVATE           !10    -             -             -       -           -              -
DECOMMISSION         !10    !12           !12           !12     !12         !12            !12
"""
_HEAD, *_ROWS = (line.split() for line in MATRIX.strip().splitlines())
CELLS = [
    (row[0], GuestState[state], cell)
    for row in _ROWS
    for state, cell in zip(_HEAD, row[1:], strict=True)
]


def test_that_the_matrix_is_complete() -> None:
    starts = {
        name for name, rule in RULES.items() if not rule.states or GuestState.UNINIT in rule.states
    }
    assert {row[0] for row in _ROWS} | starts == set(RULES)
    assert len(CELLS) == len(_ROWS) * len(GuestState)


@pytest.mark.parametrize(
    ("name", "state", "cell"), CELLS, ids=lambda value: getattr(value, "name", str(value))
)
def test_that_each_command_in_each_state_ends_as_the_table_says(
    name: str, state: GuestState, cell: str
) -> None:
    psp = make_psp()
    handle = in_state(psp, state)
    status = status_of(psp, name, **good_fields(psp, name, handle))
    assert status == (int(cell[1:], 16) if cell[0] == "!" else 0)
    if handle in psp.guests:
        assert psp.guests[handle].state == (int(cell) if cell.isdigit() else state)


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in ("INIT", "SHUTDOWN", "PLATFORM_STATUS")]
)
def test_that_nothing_works_before_init(name: str) -> None:
    psp = make_psp()
    psp.command("SHUTDOWN")
    assert status_of(psp, name, handle=0) == S.INVALID_PLATFORM_STATE


# (command, policy, state, fields that differ from good ones, status); where several are wrong,
# the first check decides
ES, G = Policy.ES, GuestState
BAD: list[tuple[str, int, GuestState, dict[str, Any], Status]] = [
    (
        "LAUNCH_START",
        0,
        G.UNINIT,
        {"session": bytes(7), "handle": 9, "policy": 0xFF000004},
        S.INVALID_LEN,
    ),
    ("LAUNCH_START", 0, G.UNINIT, {"handle": 9, "policy": 0xFFFF0004}, S.INVALID_GUEST),
    ("LAUNCH_START", 0, G.UNINIT, {"handle": 0, "policy": 0x00020000}, S.POLICY_FAILURE),
    ("LAUNCH_START", 0, G.UNINIT, {"handle": 0, "policy": 0x38010000}, S.POLICY_FAILURE),
    (
        "LAUNCH_START",
        0,
        G.UNINIT,
        {"handle": 0, "session": bytes(128), "pdh": b"x"},
        S.INVALID_CERTIFICATE,
    ),
    ("RECEIVE_START", 0, G.UNINIT, {"handle": 0}, S.INVALID_LEN),
    ("RECEIVE_START", 0, G.UNINIT, {"handle": 0, "session": bytes(127)}, S.INVALID_LEN),
    ("LAUNCH_UPDATE_DATA", ES, G.LAUNCH_UPDATE, {"spa": SPA + 8, "size": 15}, S.INVALID_ADDRESS),
    ("LAUNCH_UPDATE_DATA", ES, G.LAUNCH_UPDATE, {"spa": 1 << 30, "size": 16}, S.INVALID_ADDRESS),
    (
        "LAUNCH_UPDATE_DATA",
        ES,
        G.LAUNCH_UPDATE,
        {"spa": (1 << 18) - 4096, "size": 8192},
        S.INVALID_ADDRESS,
    ),
    ("LAUNCH_UPDATE_DATA", ES, G.LAUNCH_UPDATE, {"size": 0}, S.INVALID_LEN),
    ("LAUNCH_UPDATE_DATA", ES, G.LAUNCH_UPDATE, {"size": 24}, S.INVALID_LEN),
    ("LAUNCH_UPDATE_VMSA", 0, G.LAUNCH_UPDATE, {"spa": 3, "size": 0}, S.UNSUPPORTED),
    *(
        ("LAUNCH_UPDATE_VMSA", ES, G.LAUNCH_UPDATE, {"size": size}, S.INVALID_LEN)
        for size in (0, 16, 4080, 4095, 8192)
    ),
    ("LAUNCH_MEASURE", ES, G.LAUNCH_UPDATE, {"size": 47}, S.INVALID_LEN),
    ("LAUNCH_SECRET", ES, G.LAUNCH_SECRET, {"spa": SPA + 1, "header": b""}, S.INVALID_ADDRESS),
    ("LAUNCH_SECRET", ES, G.RUNNING, {"spa": SPA + 1, "header": b""}, S.INVALID_ADDRESS),
    ("LAUNCH_SECRET", ES, G.RUNNING, {"header": b""}, S.INVALID_LEN),
    ("LAUNCH_SECRET", ES, G.LAUNCH_SECRET, {"data": bytes(17)}, S.INVALID_LEN),
    ("LAUNCH_SECRET", ES, G.LAUNCH_SECRET, {"header": bytes(51)}, S.INVALID_LEN),
    ("LAUNCH_SECRET", ES, G.LAUNCH_SECRET, {"header": bytes(52)}, S.BAD_MEASUREMENT),
    ("LAUNCH_SECRET", ES, G.LAUNCH_SECRET, {"data": bytes(64)}, S.BAD_MEASUREMENT),
    ("DBG_DECRYPT", Policy.NODBG, G.RUNNING, {"spa": 1, "size": 0, "handle": 9}, S.INVALID_ADDRESS),
    ("DBG_DECRYPT", Policy.NODBG, G.RUNNING, {"size": 0, "handle": 9}, S.INVALID_LEN),
    ("DBG_DECRYPT", Policy.NODBG, G.RUNNING, {"handle": 9}, S.INVALID_GUEST),
    ("DBG_DECRYPT", Policy.NODBG, G.RUNNING, {}, S.POLICY_FAILURE),
    ("DBG_ENCRYPT", Policy.NODBG | ES, G.LAUNCH_UPDATE, {}, S.POLICY_FAILURE),
    ("SEND_START", Policy.NOSEND, G.LAUNCH_UPDATE, {}, S.INVALID_GUEST_STATE),
    ("SEND_START", Policy.NOSEND, G.RUNNING, {}, S.POLICY_FAILURE),
    ("SEND_START", Policy.DOMAIN, G.RUNNING, {}, S.POLICY_FAILURE),
    ("SEND_START", 0, G.RUNNING, {"pdh": bytes(97)}, S.INVALID_CERTIFICATE),
    ("SEND_UPDATE_VMSA", 0, G.SEND_UPDATE, {}, S.UNSUPPORTED),
    ("RECEIVE_UPDATE_VMSA", 0, G.RECEIVE_UPDATE, {}, S.UNSUPPORTED),
    ("RECEIVE_UPDATE_DATA", ES, G.RECEIVE_UPDATE, {"header": bytes(52)}, S.BAD_MEASUREMENT),
    ("SEND_UPDATE_DATA", ES, G.SEND_UPDATE, {"size": 1, "spa": 1}, S.INVALID_LEN),
    ("SEND_UPDATE_DATA", ES, G.SEND_UPDATE, {"spa": 1}, S.INVALID_ADDRESS),
    ("INIT", ES, G.RUNNING, {}, S.INVALID_PLATFORM_STATE),
    ("REBOOT", ES, G.RUNNING, {}, S.INVALID_COMMAND),
]


@pytest.mark.parametrize(("name", "policy", "state", "wrong", "status"), BAD)
def test_that_bad_input_gives_the_first_status(
    name: str, policy: int, state: GuestState, wrong: dict[str, Any], status: Status
) -> None:
    psp = make_psp()
    handle = in_state(psp, state, policy)
    before, guests = psp.memory.read(0, 1 << 18), len(psp.guests)
    assert status_of(psp, name, **good_fields(psp, name, handle) | wrong) == status
    assert psp.memory.read(0, 1 << 18) == before and len(psp.guests) == guests
    assert handle not in psp.guests or psp.guests[handle].state == state


def test_that_a_refusal_says_who_what_and_why() -> None:
    psp = make_psp()
    with pytest.raises(
        PspError, match=r"INVALID_GUEST_STATE \(0x02\): .* found LAUNCH_UPDATE, not LAUNCH_SECRET"
    ) as caught:
        psp.command("LAUNCH_FINISH", handle=start(psp))
    assert (caught.value.command, caught.value.status) == ("LAUNCH_FINISH", S.INVALID_GUEST_STATE)


@pytest.mark.parametrize("field", ["policy", "handle", "asid", "spa", "size"])
@pytest.mark.parametrize("value", [-1, 1 << 60])
def test_that_what_no_command_buffer_can_hold_is_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidState, match=field):
        make_psp().command("LAUNCH_UPDATE_DATA", **{field: value})


@pytest.mark.parametrize(
    "name", [n for n, rule in RULES.items() if "active" in rule.checks and n != "DEACTIVATE"]
)
def test_that_a_guest_without_asid_is_inactive(name: str) -> None:
    psp = make_psp()
    handle = in_state(psp, min(RULES[name].states))
    psp.command("DEACTIVATE", handle=handle)
    assert status_of(psp, name, **good_fields(psp, name, handle)) == S.INACTIVE


def test_that_es_needs_a_platform_with_es() -> None:
    psp = make_psp()
    psp.command("SHUTDOWN")
    psp.command("INIT", es=False)
    assert status_of(psp, "LAUNCH_START", policy=Policy.ES) == S.UNSUPPORTED
    assert psp.command("LAUNCH_START", policy=0)


@pytest.mark.parametrize(
    ("policy", "asid", "status"),
    [
        (ES, 0, S.INVALID_ASID),
        (ES, 8, S.INVALID_ASID),
        (ES, 7, S.SUCCESS),
        (0, 7, S.INVALID_ASID),
        (0, 8, S.SUCCESS),
        (0, 15, S.SUCCESS),
        (0, 16, S.INVALID_ASID),
    ],
)
def test_that_asids_are_few_and_of_two_kinds(policy: int, asid: int, status: Status) -> None:
    psp = make_psp()
    handle = psp.command("LAUNCH_START", policy=policy)
    assert status_of(psp, "ACTIVATE", handle=handle, asid=asid) == status


def test_that_an_asid_has_one_owner_and_is_flushed_before_the_next() -> None:
    psp = make_psp()
    first, second = start(psp, asid=3), psp.command("LAUNCH_START", policy=Policy.ES)
    assert status_of(psp, "ACTIVATE", handle=second, asid=3) == S.ASID_OWNED
    psp.command("DEACTIVATE", handle=first)
    psp.command("DECOMMISSION", handle=first)
    assert first not in psp.guests
    assert status_of(psp, "ACTIVATE", handle=second, asid=3) == S.DFFLUSH_REQUIRED
    psp.command("DF_FLUSH")
    assert status_of(psp, "ACTIVATE", handle=second, asid=3) == S.SUCCESS


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (ES, ES, S.SUCCESS),
        (ES, 0, S.POLICY_FAILURE),
        (ES | Policy.NOKS, ES | Policy.NOKS, S.POLICY_FAILURE),
    ],
)
def test_that_keys_are_shared_only_by_consent(first: int, second: int, status: Status) -> None:
    psp = make_psp()
    handle = start(psp, first)
    assert status_of(psp, "LAUNCH_START", policy=second, handle=handle) == status
    if not status:
        assert psp.guests[2].cipher.key == psp.guests[1].cipher.key
        assert status_of(psp, "ACTIVATE", handle=2, asid=1) == 0


def test_that_a_guest_that_was_sent_gets_no_asid() -> None:
    psp = make_psp()
    handle = in_state(psp, GuestState.SENT)
    psp.command("DEACTIVATE", handle=handle)
    psp.command("DF_FLUSH")
    assert status_of(psp, "ACTIVATE", handle=handle, asid=1) == S.INVALID_GUEST_STATE


def test_that_keys_are_derived_as_everybody_derives_them() -> None:
    # The test vector of the crate sev (virtee/sev)
    made = transport._kdf(bytes(16), b"sev-master-secret", bytes(16))
    assert made.hex() == "ab4d269fcc62bedb4511d56c386ce706"


def test_that_two_guests_have_two_keys() -> None:
    psp = make_psp()
    raw = []
    for asid in (1, 2):
        psp.memory.write(SPA, PLAIN)
        psp.command("LAUNCH_UPDATE_DATA", handle=start(psp, asid=asid), spa=SPA, size=4096)
        raw.append(psp.memory.read(SPA, 4096))
    assert len({PLAIN, *raw}) == 3
    first, second = ({page[i : i + 16] for i in range(0, 4096, 16)} for page in raw)
    assert not first & second


def test_that_the_measurement_covers_all_plaintext_in_order() -> None:
    psp = make_psp(3)
    handle = start(psp)
    guest = psp.guests[handle]
    for name, spa, size in (
        ("LAUNCH_UPDATE_DATA", 0x8000, 0x11000),
        ("LAUNCH_UPDATE_DATA", 0, 16),
        ("LAUNCH_UPDATE_VMSA", SPA, 4096),
    ):
        psp.command(name, handle=handle, spa=spa, size=size)
    digest = hashlib.sha256(PLAIN * 0x11 + PLAIN[:16] + PLAIN).digest()
    blob = psp.command("LAUNCH_MEASURE", handle=handle, size=48)
    message = b"\x04\x01\x37\x18" + guest.policy.to_bytes(4, "little") + digest + blob[32:]
    assert blob == hmac.new(guest.keys.tik, message, "sha256").digest() + blob[32:]
    assert len(blob) == 48
    assert [(m.command, m.size) for m in guest.measured] == [
        ("DATA", 0x11000),
        ("DATA", 16),
        ("VMSA", 4096),
    ]
    assert guest.measured[-1].digest == guest.digest == digest


def test_that_the_guest_reads_what_was_launched_and_the_host_does_not() -> None:
    psp = make_psp(size=1 << 20)
    handle = start(psp)
    psp.command("LAUNCH_UPDATE_DATA", handle=handle, spa=0x10, size=(1 << 20) - 0x20)
    raw = psp.memory.read(0, 1 << 20)
    assert raw[:16] == PLAIN[:16] and raw[-16:] == PLAIN[-16:] and PLAIN[16:32] not in raw[16:-16]
    assert (
        psp.command("DBG_DECRYPT", handle=handle, spa=0x10, size=(1 << 20) - 0x20)
        == (PLAIN * 256)[16:-16]
    )


def test_that_a_debugger_writes_what_the_guest_reads() -> None:
    psp = make_psp()
    handle = in_state(psp, GuestState.RUNNING)
    psp.command("DBG_ENCRYPT", handle=handle, spa=SPA + 32, data=b"breakpoint here!")
    assert (
        psp.decrypt_guest(psp.guests[handle], SPA, 4096)
        == PLAIN[:32] + b"breakpoint here!" + PLAIN[48:]
    )


def owner_session(psp: Psp, policy: int) -> tuple[transport.TransportKeys, dict[str, Any]]:
    owner, keys = transport.private_key(b"owner"), transport.TransportKeys(b"E" * 16, b"I" * 16)
    session = transport.make_session(owner, psp.pdh, keys, policy, bytes(range(32)))
    return keys, {"policy": policy, "pdh": transport.public_bytes(owner), "session": session}


def test_that_an_owner_brings_the_keys_and_sends_a_secret() -> None:
    psp = make_psp()
    keys, fields = owner_session(psp, Policy.NODBG)
    handle = psp.command("LAUNCH_START", **fields)
    psp.command("ACTIVATE", handle=handle, asid=9)
    measure = psp.command("LAUNCH_MEASURE", handle=handle, size=48)
    assert psp.guests[handle].keys == keys
    header, data = transport.wrap(
        keys, transport.LAUNCH_SECRET, b"the disk's key: " * 2, bytes(16), measure[:32]
    )
    psp.command("LAUNCH_SECRET", handle=handle, spa=SPA, header=header, data=data)
    assert psp.decrypt_guest(psp.guests[handle], SPA, 32) == b"the disk's key: " * 2
    assert data != b"the disk's key: " * 2 != psp.memory.read(SPA, 32)


@pytest.mark.parametrize("byte", [0, 16, 48, 64, 96])
def test_that_a_damaged_session_is_noticed(byte: int) -> None:
    psp = make_psp()
    _, fields = owner_session(psp, 0)
    session = bytearray(fields["session"])
    session[byte] ^= 1
    fields["session"] = bytes(session)
    assert status_of(psp, "LAUNCH_START", **fields) == S.BAD_MEASUREMENT and not psp.guests


@pytest.mark.parametrize(
    "change",
    [{"policy": Policy.NODBG}, {"pdh": transport.public_bytes(transport.private_key(b"other"))}],
)
def test_that_a_session_is_for_one_policy_and_one_owner(change: dict[str, Any]) -> None:
    psp = make_psp()
    _, fields = owner_session(psp, 0)
    assert status_of(psp, "LAUNCH_START", **fields | change) == S.BAD_MEASUREMENT


def test_that_a_session_is_for_one_platform() -> None:
    _, fields = owner_session(make_psp(1), 0)
    assert status_of(make_psp(2), "LAUNCH_START", **fields) == S.BAD_MEASUREMENT


def test_that_a_secret_of_another_launch_is_refused() -> None:
    psp = make_psp()
    handle = in_state(psp, GuestState.LAUNCH_SECRET)
    header, data = transport.wrap(
        psp.guests[handle].keys, transport.LAUNCH_SECRET, bytes(16), bytes(16), bytes(32)
    )
    assert (
        status_of(psp, "LAUNCH_SECRET", handle=handle, spa=SPA, header=header, data=data)
        == S.BAD_MEASUREMENT
    )


def test_that_a_guest_migrates_to_another_processor() -> None:
    source, target = make_psp(1), make_psp(2)
    handle = in_state(source, GuestState.RUNNING, ES)
    guest = source.guests[handle]
    session = source.command("SEND_START", handle=handle, pdh=target.pdh)
    there = target.command("RECEIVE_START", policy=ES, pdh=source.pdh, session=session)
    target.command("ACTIVATE", handle=there, asid=5)
    header, data = source.command("SEND_UPDATE_DATA", handle=handle, spa=SPA, size=4096)
    target.command("RECEIVE_UPDATE_DATA", handle=there, spa=SPA + 0x2000, header=header, data=data)
    source.command("SEND_FINISH", handle=handle)
    target.command("RECEIVE_FINISH", handle=there)
    assert target.decrypt_guest(target.guests[there], SPA + 0x2000, 4096) == PLAIN != data
    assert (guest.state, target.guests[there].state) == (GuestState.SENT, GuestState.RUNNING)
    assert target.guests[there].cipher.key != guest.cipher.key


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SEND_UPDATE_DATA", "RECEIVE_UPDATE_VMSA"), ("SEND_UPDATE_VMSA", "RECEIVE_UPDATE_DATA")],
)
def test_that_a_page_of_registers_is_no_page_of_data(sent: str, received: str) -> None:
    source, target = make_psp(1), make_psp(2)
    handle = in_state(source, GuestState.RUNNING, ES)
    session = source.command("SEND_START", handle=handle, pdh=target.pdh)
    there = target.command("RECEIVE_START", policy=ES, pdh=source.pdh, session=session)
    target.command("ACTIVATE", handle=there, asid=5)
    header, data = source.command(sent, handle=handle, spa=SPA, size=4096)
    assert (
        status_of(target, received, handle=there, spa=SPA, header=header, data=data)
        == S.BAD_MEASUREMENT
    )


def test_that_a_cancelled_send_leaves_the_guest_running() -> None:
    psp = make_psp()
    handle = in_state(psp, GuestState.SEND_UPDATE)
    psp.command("SEND_CANCEL", handle=handle)
    assert psp.command("GUEST_STATUS", handle=handle) == (ES, 1, GuestState.RUNNING)


def test_that_the_same_seed_gives_the_same_launch() -> None:
    blobs = set()
    for seed in (1, 1, 2):
        psp = make_psp(seed)
        handle = start(psp)
        psp.command("LAUNCH_UPDATE_DATA", handle=handle, spa=SPA, size=4096)
        blobs.add(
            (psp.command("LAUNCH_MEASURE", handle=handle, size=48), psp.memory.read(SPA, 4096))
        )
    assert len(blobs) == 2


def test_that_a_copy_goes_its_own_way() -> None:
    psp = make_psp()
    handle = start(psp)
    twin = deepcopy(psp)
    digest = psp.guests[handle].digest
    twin.command("LAUNCH_UPDATE_DATA", handle=handle, spa=SPA, size=16)
    twin.command("LAUNCH_MEASURE", handle=handle, size=48)
    twin.command("DEACTIVATE", handle=handle)
    assert psp.guests[handle].digest == digest != twin.guests[handle].digest
    assert not psp.guests[handle].measured
    assert psp.command("GUEST_STATUS", handle=handle)[1:] == (1, GuestState.LAUNCH_UPDATE)
    assert not psp.used_asids


fields = st.fixed_dictionaries(
    {},
    optional={
        "handle": st.integers(0, 3),
        "policy": st.integers(0, 63),
        "asid": st.sampled_from([0, 1, 2, 8, 9, 99]),
        "spa": st.sampled_from([0, SPA, SPA + 1, 1 << 40]),
        "size": st.sampled_from([0, 15, 16, 48, 4096]),
        "header": st.just(bytes(52)),
        "data": st.just(bytes(16)),
        "session": st.sampled_from([b"", bytes(128)]),
        "pdh": st.just(make_psp().pdh),
    },
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(RULES)), fields), max_size=25))
def test_that_any_sequence_of_commands_is_answered(
    sequence: list[tuple[str, dict[str, Any]]],
) -> None:
    psp = make_psp()
    for name, some in sequence:
        before = {handle: guest.state for handle, guest in psp.guests.items()}
        status = status_of(psp, name, **some)
        assert not status or {handle: guest.state for handle, guest in psp.guests.items()} == before
    for guest in psp.guests.values():
        assert guest.state
        assert not guest.asid or guest.asid in psp.asids(bool(guest.policy & Policy.ES))
        assert all(
            other.cipher.key == guest.cipher.key
            for other in psp.guests.values()
            if guest.asid and other.asid == guest.asid
        )


def test_that_a_field_no_command_has_is_refused() -> None:
    with pytest.raises(InvalidState, match="LAUNCH_START has no such field"):
        make_psp().command("LAUNCH_START", colour=3)


def test_that_every_status_has_a_sentence() -> None:
    assert all(status.sentence and status is Status(int(status)) for status in Status)
    assert Status(4).sentence == S.INVALID_LEN.sentence
