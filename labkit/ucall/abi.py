"""The ucall ABI of the Linux 6.12 KVM selftests: struct ucall, the pool in front of it, the command numbers.

Source: tools/testing/selftests/kvm/include/ucall_common.h and lib/ucall_common.c; x86's exit is include/x86_64/ucall.h.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = [
    "BITMAP_BYTES",
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
NR_SLOTS = 512  # KVM_MAX_VCPUS
GUEST_UCALL_FAILED = 2**64 - 1  # (u64)-1 instead of an hva: the pool is exhausted
UCALL_PIO_PORT = 0x1000
GUEST_ERROR_STRING, GUEST_FILE, GUEST_LINE = range(3)  # args of an ABORT: two gvas and a number

UCALL = np.dtype(
    [
        ("cmd", "<u8"),
        ("args", "<u8", UCALL_MAX_ARGS),
        ("buffer", "V", UCALL_BUFFER_LEN),
        ("hva", "<u8"),
    ]
)
HEADER = np.dtype(
    [("in_use", "u1", NR_SLOTS // 8), ("ucalls", UCALL, NR_SLOTS)]
)  # struct ucall_header, little-endian
UCALL_SIZE, HEADER_SIZE, BITMAP_BYTES = UCALL.itemsize, HEADER.itemsize, NR_SLOTS // 8
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


def cmd_name(cmd: int) -> str:
    """ "SYNC" for 1 and so on; a number that is no command as "0x17?"."""
    return UcallCmd(cmd).name if 0 <= cmd < len(UcallCmd) else f"0x{cmd:x}?"


def has_text(cmd: int) -> bool:
    """Whether the buffer belongs to this ucall; for other commands it holds what an earlier one left."""
    return cmd in (UcallCmd.PRINTF, UcallCmd.ABORT, UcallCmd.UNHANDLED)


def decode_text(buffer: bytes | bytearray | memoryview) -> str:
    """The text of a buffer: up to the first NUL, or all of it when the guest wrote none; broken UTF-8 becomes U+FFFD."""
    return bytes(buffer[:UCALL_BUFFER_LEN]).split(b"\0", 1)[0].decode("utf-8", "replace")
