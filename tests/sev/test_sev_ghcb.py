"""The GHCB: what a guest may ask through the MSR and the page.

The host that answers believes nothing.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.sev.ghcb import (
    EVENTS,
    GHCB,
    GhcbReason,
    Port,
    answer_ghcb,
    decode_io,
    parse_ghcb,
    scratch_offset,
)
from labkit.sev.ghcb_msr import MsrHost, answer_msr, parse_msr, term_text

HOST = MsrHost(
    51,
    lambda leaf, _: (leaf, leaf + 1, leaf + 2, leaf + 3),
    snp=True,
    features=3,
    page_state=lambda gfn, op: 0x10 * (op == 2),
)
PLAIN = MsrHost(47, HOST.cpuid)
NEEDED = "sw_exit_code sw_exit_info_1 sw_exit_info_2"


@pytest.mark.parametrize(
    ("host", "value", "answer"),
    [
        (HOST, 0x002, 0x0002_0001_3300_0001),
        (PLAIN, 0x002, 0x0002_0001_2F00_0001),
        (HOST, 0x8000001F_00000004, 0x8000001F_00000005),
        (HOST, 0x8000001F_C0000004, 0x80000022_C0000005),
        (HOST, 0x006, 0x007),
        (HOST, 0x010, 0xFFFF_FFFF_FFFF_F011),
        (HOST, 0x1234012, 0x1234013),
        (PLAIN, 0x010, None),
        (PLAIN, 0x1234012, None),
        (HOST, 0x0010_0000_1234_5014, 0x015),
        (HOST, 0x0020_0000_1234_5014, 0x10_0000_0015),
        (PLAIN, 0x0010_0000_1234_5014, None),
        (HOST, 0x080, 0x3081),
        (HOST, 0x100, None),
        (PLAIN, 0x1_2100, None),
        (HOST, 0x3, 0x3),
        (HOST, 0xABC_DEF0_0FFF, 0xABC_DEF0_0FFF),
    ],
)
def test_that_an_msr_request_is_answered_as_kvm_does(
    host: MsrHost, value: int, answer: int | None
) -> None:
    assert answer_msr(value, host) == answer


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1))
def test_that_any_msr_value_is_understood(value: int) -> None:
    answer = answer_msr(value, HOST)
    assert answer is None or 0 <= answer < 1 << 64
    assert (parse_msr(value).name == "GHCB") == (value % 4096 == 0)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0x100, "set 0, reason 0 (general"), (0x2_0100, "SNP features"), (0x5_1100, "1, reason 5")],
)
def test_that_a_termination_is_told_in_words(value: int, words: str) -> None:
    assert words in term_text(value)


def page(code: int, valid: str = "", **fields: int) -> bytearray:
    made = bytearray(4096)
    bitmap = 0
    for name in f"{NEEDED} {valid}".split():
        bitmap |= 1 << GHCB.fields[name][0] // 8
    for name, value in {"sw_exit_code": code, "valid_bitmap": bitmap, **fields}.items():
        GHCB.put(made, name, value)
    return made


OUT, IN, OUTS = 0x1000_0040, 0x1000_0041, 0x1000_0044


@pytest.mark.parametrize(
    ("code", "valid", "fields", "refused"),
    [
        (0x7B, "rax", {"sw_exit_info_1": OUT}, None),
        (0x7B, "", {"sw_exit_info_1": OUT}, "MISSING_INPUT"),
        (0x7B, "", {"sw_exit_info_1": IN}, None),
        (0x7B, "rax", {"sw_exit_info_1": OUTS}, "MISSING_INPUT"),
        (0x7B, "sw_scratch", {"sw_exit_info_1": OUTS}, None),
        (0x7C, "rcx", {}, None),
        (0x7C, "rcx", {"sw_exit_info_1": 1}, "MISSING_INPUT"),
        (0x7C, "rcx rax rdx", {"sw_exit_info_1": 1}, None),
        (0x72, "rax rcx", {"rax": 1}, None),
        (0x72, "rax rcx", {"rax": 0xD}, "MISSING_INPUT"),
        (0x72, "rcx", {}, "MISSING_INPUT"),
        (0x72, "rax rcx xcr0", {"rax": 0xD}, None),
        (0x81, "rax", {}, "MISSING_INPUT"),
        (0x81, "rax cpl", {}, None),
        (0x80000001, "", {}, "MISSING_INPUT"),
        (0x80000010, "sw_scratch", {}, "MISSING_INPUT"),
        (0x12345, "", {}, "INVALID_EVENT"),
        (0x7B, "rax", {"sw_exit_info_1": OUT, "ghcb_usage": 1}, "INVALID_USAGE"),
        (0x6E, "", {"valid_bitmap": 0}, "MISSING_INPUT"),
        (0x12345, "", {"valid_bitmap": 0}, "MISSING_INPUT"),
    ],
)
def test_that_a_page_brings_what_its_event_needs(
    code: int, valid: str, fields: dict[str, int], refused: str | None
) -> None:
    found = parse_ghcb(page(code, valid, **fields)).refused
    assert (found.name if found else None) == refused


def test_that_a_page_state_change_is_for_snp() -> None:
    assert parse_ghcb(page(0x80000010, "sw_scratch"), snp=True).refused is None


def test_that_only_valid_registers_are_taken() -> None:
    request = parse_ghcb(page(0x81, "rax cpl", rax=5, rcx=6))
    assert request.regs["rax"] == 5 and "rcx" not in request.regs and request.name == "VMMCALL"


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_that_any_page_is_understood(seed: int, snp: bool) -> None:
    request = parse_ghcb(random.Random(seed).randbytes(4096), snp)
    assert request.refused or request.code in EVENTS


@settings(deadline=None)
@given(
    st.sampled_from(sorted(EVENTS)),
    st.integers(0, (1 << 128) - 1),
    st.binary(min_size=8, max_size=8),
)
def test_that_any_bitmap_is_understood(code: int, bitmap: int, info: bytes) -> None:
    request = parse_ghcb(
        page(code, valid_bitmap=bitmap, sw_exit_info_1=int.from_bytes(info, "little")), True
    )
    assert request.refused in (None, GhcbReason.MISSING_INPUT)


@pytest.mark.parametrize(
    ("info", "port"),
    [
        (OUT, Port(0x1000, 4, True, False)),
        (IN, Port(0x1000, 4, False, False)),
        (0x3F8_0010, Port(0x3F8, 1, True, False)),
        (OUTS, Port(0x1000, 4, True, True)),
        (0x1000_0000, Port(0x1000, 0, True, False)),
        (0x1000_0070, Port(0x1000, 0, True, False)),
    ],
)
def test_that_a_port_access_is_decoded(info: int, port: Port) -> None:
    assert decode_io(info) == port


@pytest.mark.parametrize(
    ("scratch", "size", "offset"),
    [
        (0x5800, 8, 0x800),
        (0x57FF, 8, None),
        (0x5FF0, 1, None),
        (0x5FEF, 1, 0xFEF),
        (0x5800, 2032, 0x800),
        (0x5800, 2033, None),
        (0x5800, -1, None),
        (0, 8, None),
        ((1 << 64) - 8, 16, None),
    ],
)
def test_that_scratch_memory_lies_in_the_shared_buffer(
    scratch: int, size: int, offset: int | None
) -> None:
    assert scratch_offset(0x5000, scratch, size) == offset


def test_that_an_answer_is_marked_valid() -> None:
    made = page(0x7B, "", sw_exit_info_1=IN)
    answer_ghcb(made, {"rax": 0x42})
    request = parse_ghcb(made)
    assert (request.regs["rax"], request.info_1, request.info_2) == (0x42, 0, 0)


def test_that_a_refusal_tells_the_guest_why() -> None:
    made = page(0x12345)
    answer_ghcb(made, refused=parse_ghcb(made).refused)
    assert (GHCB.get(made, "sw_exit_info_1"), GHCB.get(made, "sw_exit_info_2")) == (
        2,
        GhcbReason.INVALID_EVENT,
    )
