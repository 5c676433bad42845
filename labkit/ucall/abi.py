"""The ucall ABI of the Linux 6.12 KVM selftests: struct ucall, the pool before it, its commands.

Source: tools/testing/selftests/kvm/include/ucall_common.h and lib/ucall_common.c; x86's exit is
include/x86_64/ucall.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

__all__ = [
    "BITMAP_BYTES",
    "CMDS_WITH_TEXT",
    "CMD_NAMES",
    "GUEST_ERROR_STRING",
    "GUEST_FILE",
    "GUEST_LINE",
    "GUEST_UCALL_FAILED",
    "HEADER",
    "HEADER_SIZE",
    "NR_SLOTS",
    "OFFSET_ARGS",
    "OFFSET_BUFFER",
    "OFFSET_HVA",
    "UCALL",
    "UCALL_BUFFER_LEN",
    "UCALL_MAX_ARGS",
    "UCALL_PIO_PORT",
    "UCALL_SIZE",
    "UcallCmd",
    "cmd_name",
    "decode_text",
    "has_text",
]

UCALL_MAX_ARGS = 7
UCALL_BUFFER_LEN = 1024
UCALL_PIO_PORT = 0x1000

# KVM_MAX_VCPUS
NR_SLOTS = 512

# (u64)-1 in place of an hva: the guest found no free slot
GUEST_UCALL_FAILED = 2**64 - 1

# Which argument of an ABORT is which: two gvas of strings, and a number
GUEST_ERROR_STRING, GUEST_FILE, GUEST_LINE = range(3)

# struct ucall and struct ucall_header, little-endian
UCALL = np.dtype(
    [
        ("cmd", "<u8"),
        ("args", "<u8", UCALL_MAX_ARGS),
        ("buffer", "V", UCALL_BUFFER_LEN),
        ("hva", "<u8"),
    ]
)
HEADER = np.dtype([("in_use", "u1", NR_SLOTS // 8), ("ucalls", UCALL, NR_SLOTS)])

# Bytes; the offsets are from the start of a struct ucall
UCALL_SIZE = UCALL.itemsize
HEADER_SIZE = HEADER.itemsize
BITMAP_BYTES = NR_SLOTS // 8
OFFSET_ARGS, OFFSET_BUFFER, OFFSET_HVA = 8, 64, 1088
assert (UCALL_SIZE, HEADER_SIZE) == (1096, 561216)


class UcallCmd(IntEnum):
    """What a ucall says."""

    NONE = 0
    SYNC = 1
    ABORT = 2
    PRINTF = 3
    DONE = 4
    UNHANDLED = 5


# The same as plain tables: looking a command up in the enumeration takes ten times as long
CMD_NAMES: Mapping[int, str] = {cmd.value: cmd.name for cmd in UcallCmd}
CMDS_WITH_TEXT = frozenset(
    cmd.value for cmd in (UcallCmd.PRINTF, UcallCmd.ABORT, UcallCmd.UNHANDLED)
)


def cmd_name(cmd: int) -> str:
    """The name of a command, "SYNC" for 1 and so on; a number that is none as "0x17?"."""
    return CMD_NAMES.get(cmd) or f"0x{cmd:x}?"


def has_text(cmd: int) -> bool:
    """Whether the buffer belongs to this ucall.

    For other commands it holds what an earlier ucall left there.
    """
    return cmd in CMDS_WITH_TEXT


def decode_text(buffer: bytes | bytearray | memoryview) -> str:
    """The text of a buffer, up to its first NUL, or all of it when the guest wrote none.

    No more than UCALL_BUFFER_LEN bytes are read. Broken UTF-8 becomes U+FFFD.
    """
    text, _, _ = bytes(buffer[:UCALL_BUFFER_LEN]).partition(b"\0")
    return text.decode("utf-8", "replace")
