"""The hooks in machine code, run inside Unicorn itself: so those for other hosts are tried here too."""

from __future__ import annotations

import struct

import pytest
import unicorn
from unicorn import arm64_const as arm
from unicorn import x86_const as x86

from labkit.engines.unicorn.native.stubs import stub
from labkit.engines.unicorn.native.stubs_code import MACHINE_CODE

CODE, DATA, STOP, STACK, RETURN, READ, RCX, TABLE = (
    0x10000,
    0x20000,
    0x30000,
    0x48000,
    0x50000,
    0x60000,
    0x70000,
    0x100000,
)
SLOT = (0x401234 ^ 0x401234 >> 16) & 0xFFFF
# uc_reg_read(uc, reg, value), for register 38 only: *value = the word at RCX
REG_READ = {
    "x86_64": bytes.fromhex("83fe267508488b0425000007004889 02c3".replace(" ", "")),
    "aarch64": struct.pack(
        "<6I", 0x7100983F, 0x54000081, 0xD2A000E4, 0xF9400084, 0xF9000044, 0xD65F03C0
    ),
}
HOSTS = ["x86_64", "aarch64"]


def call(
    host: str, name: str, address: int, data: bytes, table: bytes = b"", rcx: int = 0
) -> tuple[bytes, bool]:
    """Call a hook as libunicorn does; what it left in its data, and whether it called uc_emu_stop."""
    uc = unicorn.Uc(
        *(
            (unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
            if host == "x86_64"
            else (unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        )
    )
    uc.mem_map(0, 0x300000)
    uc.mem_write(CODE, bytes.fromhex(MACHINE_CODE[name, host]))
    uc.mem_write(READ, REG_READ[host])
    uc.mem_write(DATA, data)
    uc.mem_write(TABLE, table)
    uc.mem_write(RCX, struct.pack("<Q", rcx))
    uc.mem_write(STACK, struct.pack("<Q", RETURN))
    regs = (
        {
            x86.UC_X86_REG_RDI: 1,
            x86.UC_X86_REG_RSI: address,
            x86.UC_X86_REG_RDX: 4,
            x86.UC_X86_REG_RCX: DATA,
            x86.UC_X86_REG_RSP: STACK,
        }
        if host == "x86_64"
        else {
            arm.UC_ARM64_REG_X0: 1,
            arm.UC_ARM64_REG_X1: address,
            arm.UC_ARM64_REG_X3: DATA,
            arm.UC_ARM64_REG_LR: RETURN,
            arm.UC_ARM64_REG_SP: STACK,
        }
    )
    for reg, value in regs.items():
        uc.reg_write(reg, value)
    ends: list[int] = []
    for end in (STOP, RETURN):
        uc.hook_add(
            unicorn.UC_HOOK_CODE,
            lambda uc, at, _size, _user: (ends.append(at), uc.emu_stop()),
            None,
            end,
            end,
        )
    uc.emu_start(CODE, 0, count=100)
    return bytes(uc.mem_read(DATA, len(data))), ends[0] == STOP


def tally(host: str, gva: int, limit: int, *slots: tuple[int, int]) -> tuple[int, int, int, bool]:
    """(total, block, stopped) after a block at gva began with 7 instructions counted, and whether the run was ended."""
    entries = b"".join(struct.pack("<2Q", gva + 1, count) for gva, count in slots)
    words = struct.pack("<6Q", 7, 0, TABLE, limit, 0, STOP)
    data, stopped = call(host, "tally", gva, words, bytes(16 * SLOT) + entries)
    total, block, _, _, flag, _ = struct.unpack("<6Q", data)
    return total, block, flag, stopped


@pytest.mark.parametrize("host", HOSTS)
def test_that_the_tally_adds_a_known_block(host: str) -> None:
    assert tally(host, 0x401234, 12, (0x401234, 5)) == (12, 0x401234, 0, False)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("gva", "limit"), [(0x401234, 11), (0x401234, 0), (0x501234, 99)])
def test_that_it_stops_before_a_block_over_the_limit_and_one_that_it_does_not_know(
    host: str, gva: int, limit: int
) -> None:
    assert tally(host, gva, limit, (0x401234, 5)) == (7, 0, 1, True)


@pytest.mark.parametrize("host", HOSTS)
def test_that_blocks_with_the_same_hash_lie_behind_each_other(host: str) -> None:
    other = 0x411235  # whose hash is that of 0x401234
    assert (other ^ other >> 16) & 0xFFFF == SLOT
    assert tally(host, 0x401234, 99, (other, 3), (0x401234, 5)) == (12, 0x401234, 0, False)
    assert tally(host, 0x401234, 99, (other, 3)) == (7, 0, 1, True)


@pytest.mark.parametrize("host", HOSTS)
def test_that_a_locked_instruction_is_remembered_with_its_count(host: str) -> None:
    data, stopped = call(host, "locked", 0x401111, struct.pack("<6Q", 0, DATA + 32, 0, 0, 41, 42))
    assert struct.unpack("<4Q", data[:32]) == (41, DATA + 32, 0x401111, 42) and not stopped


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("gva", "count", "rcx", "extra", "again"),
    [
        (0x401000, 8, 0, 1, 1),
        (0x401000, 8, 5, 0, 1),
        (0x401000, 9, 0, 0, 0),
        (0x401001, 8, 0, 0, 0),
    ],
)
def test_that_a_drained_rep_that_came_round_to_itself_is_no_step(
    host: str, gva: int, count: int, rcx: int, extra: int, again: int
) -> None:
    data, stopped = call(
        host,
        "rep",
        gva,
        struct.pack("<9Q", DATA + 64, 0x401000, 7, 0, 99, 9, READ, 38, count),
        rcx=rcx,
    )
    assert (
        struct.unpack("<6Q", data[:48]) == (DATA + 64, gva, count, extra, rcx, again)
        and not stopped
    )


def test_that_this_host_has_its_stubs() -> None:
    assert all(stub(name) for name in ("tally", "locked", "rep"))
