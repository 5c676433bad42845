"""Which code may be stopped behind a memory access and begun anew, and where loops must look at the flag instead."""

from __future__ import annotations

import pytest

from labkit.engines.unicorn.blocks import can_begin_anew, hops, jump

NOP = {"x86_64": "90", "arm64": "1f2003d5", "riscv64": "13000000", "s390x": "0700"}


@pytest.mark.parametrize(
    ("arch", "code", "what", "anew"),
    [
        ("x86_64", "488b00", "mov rax, [rax]", True),
        ("x86_64", "488908", "mov [rax], rcx", True),
        ("x86_64", "480308", "add rcx, [rax]", True),
        ("x86_64", "480108", "add [rax], rcx", False),
        ("x86_64", "50", "push rax", False),
        ("x86_64", "f348a5", "rep movsq", False),
        ("x86_64", "f0480fab08", "lock bts [rax], rcx", False),
        ("x86_64", "488d4001", "lea rax, [rax+1]", True),
        ("arm64", "210040f9", "ldr x1, [x1]", True),
        ("arm64", "410440f8", "ldr x1, [x2], #0", True),
        ("arm64", "410000f9", "str x1, [x2]", True),
        ("arm64", "fd7bbfa9", "stp x29, x30, [sp, #-16]!", True),
        ("arm64", "417c5fc8", "ldxr x1, [x2]", False),
        ("arm64", "410023f8", "ldadd x3, x1, [x2]", False),
        ("riscv64", "03350500", "ld a0, 0(a0)", True),
        ("riscv64", "23b0a500", "sd a0, 0(a1)", True),
        ("riscv64", "2fb5b500", "amoadd.d", False),
        ("s390x", "e31020000004", "lg %r1, 0(%r2)", False),
        ("s390x", "41101001", "la %r1, 1(%r1)", True),
    ],
)
def test_that_what_begins_anew_is_told_from_what_does_not(
    arch: str, code: str, what: str, anew: bool
) -> None:
    assert can_begin_anew(arch, 0x1000, bytes.fromhex(NOP[arch] + code)) == anew, what


def test_that_an_arm64_load_over_its_own_address_cannot_be_where_a_loop_begins() -> None:
    """There a stop before it and one behind it would look the same."""
    assert not can_begin_anew("arm64", 0x1000, bytes.fromhex("210040f9"))


@pytest.mark.parametrize(
    ("arch", "code", "target", "hop"),
    [
        ("x86_64", "ebfe", 0x1000, False),
        ("x86_64", "ffe0", None, True),
        ("x86_64", "c3", None, False),
        ("x86_64", "f348ab", 0x1000, False),
        ("arm64", "ffffff17", 0x0FFC, False),
        ("arm64", "20001fd6", None, True),
        ("arm64", "c0035fd6", None, False),
        ("riscv64", "8287", None, True),
        ("riscv64", "8280", None, False),
        ("s390x", "07f1", None, True),
        ("s390x", "07fe", None, False),
    ],
)
def test_that_jumps_and_hops_are_told_apart(
    arch: str, code: str, target: int | None, hop: bool
) -> None:
    assert (jump(arch, 0x1000, bytes.fromhex(code)), hops(arch, 0x1000, bytes.fromhex(code))) == (
        target,
        hop,
    )
