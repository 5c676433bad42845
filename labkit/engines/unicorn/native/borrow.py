"""One instruction on the host's own processor, where that is the guest's architecture too.

x87 and SSE arithmetic have results, flags and stack faults that Unicorn does not model. An
instruction of a fixed list (isa/x86_forms.py), none of which jumps, traps or touches more memory
than its one operand, is copied behind a load of the guest's registers and before a save of them.
Its memory operand is a buffer of ours. All exceptions are masked while it runs, so that the host
gets none: the flags say which the guest is owed.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from functools import cache

from labkit.engines.unicorn.native.stubs import host

__all__ = ["Borrowed", "borrowed"]

PAGE = 4096
# Offsets in the page of data, which lies behind the page of code
GUEST, HOST, GPRS, FLAGS, OPERAND = 0, 512, 1024, 1152, 1280
OPERAND_SIZE = 512
RSP = 4
MAX_CODES = 4096  # instructions that are kept ready
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3")
PUSHES, POPS = bytes.fromhex("5355415441554156 4157"), bytes.fromhex("415f415e415d415c5d5b")


def _modrm_at(data: bytes) -> int:
    """Where the ModRM byte of an instruction is."""
    at = 0
    while data[at] in PREFIXES:
        at += 1
    if data[at] >> 4 == 4:
        at += 1
    if data[at] != 0x0F:
        return at + 1
    return at + 3 if data[at + 1] in (0x38, 0x3A) else at + 2


def _tail(modrm: int, rest: bytes) -> bytes:
    """What follows the addressing bytes of a memory operand: the immediate."""
    mod, rm = modrm >> 6, modrm & 7
    size = {0: 0, 1: 1, 2: 4}[mod]
    if rm == 4:
        if mod == 0 and rest[0] & 7 == 5:
            size = 4
        size += 1
    elif mod == 0 and rm == 5:
        size = 4
    return rest[size:]


class Borrowed:
    """The host's processor, for one instruction at a time."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(
            -1, 2 * PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._call = ctypes.PYFUNCTYPE(None)(self._address)  # no other thread between
        self._codes: dict[bytes, bytes] = {}  # by instruction

    def _at(self, code: bytes, size: int, word: int) -> bytes:
        """The displacement of an instruction's RIP-relative operand; size of it to its end."""
        return struct.pack("<i", PAGE + word - len(code) - size)

    def _data(self, code: bytes, opcode: bytes, word: int) -> bytes:
        return code + opcode + self._at(code, len(opcode) + 4, word)

    def _relocated(self, code: bytes, insn: bytes) -> bytes:
        """The instruction with our buffer as its memory operand."""
        at = _modrm_at(insn)
        modrm = insn[at]
        if modrm >> 6 == 3:
            return code + insn

        tail = _tail(modrm, insn[at + 1 :])
        # A segment, an address size, and REX.X and B belong to the operand that was there
        head = bytes(byte for byte in insn[:at] if byte not in b"\x26\x2e\x36\x3e\x64\x65\x67")
        rex = next((i for i, byte in enumerate(head) if byte not in PREFIXES), 0)
        if head[rex] >> 4 == 4:
            head = head[:rex] + bytes([head[rex] & 0x4C]) + head[rex + 1 :]
        head += bytes([modrm & 0x38 | 5])
        return code + head + self._at(code, len(head) + 4 + len(tail), OPERAND) + tail

    def _code(self, insn: bytes) -> bytes:
        code = self._data(PUSHES, b"\x48\x0f\xae\x05", HOST)  # FXSAVE64
        code = self._data(code, b"\x48\x0f\xae\x0d", GUEST)  # FXRSTOR64
        code = self._data(code, b"\xff\x35", FLAGS) + b"\x9d"  # PUSH, POPFQ
        for number in range(16):
            if number != RSP:
                rex, modrm = 0x48 | number >> 3 << 2, (number & 7) << 3 | 5
                code = self._data(code, bytes([rex, 0x8B, modrm]), GPRS + 8 * number)
        code = self._relocated(code, insn)
        for number in range(16):
            if number != RSP:
                rex, modrm = 0x48 | number >> 3 << 2, (number & 7) << 3 | 5
                code = self._data(code, bytes([rex, 0x89, modrm]), GPRS + 8 * number)
        code = self._data(code + b"\x9c", b"\x8f\x05", FLAGS)  # PUSHFQ, POP
        code = self._data(code, b"\x48\x0f\xae\x05", GUEST)
        return self._data(code, b"\x48\x0f\xae\x0d", HOST) + POPS + b"\xc3"

    def run(
        self, insn: bytes, state: bytes, gprs: list[int], flags: int, operand: bytes
    ) -> tuple[bytes, list[int], int, bytes]:
        """Run it with this FXSAVE area, these registers, flags and bytes in memory.

        Returns the same four as it left them. RSP is not the guest's.
        """
        code = self._codes.get(insn)
        if code is None:
            if len(self._codes) >= MAX_CODES:
                self._codes.clear()
            code = self._codes[insn] = self._code(insn)
        memory = self._memory
        memory[: len(code)] = code
        memory[PAGE + GUEST : PAGE + GUEST + 512] = state
        struct.pack_into("<17Q", memory, PAGE + GPRS, *gprs, flags)
        memory[PAGE + OPERAND : PAGE + OPERAND + OPERAND_SIZE] = operand.ljust(OPERAND_SIZE, b"\0")
        self._call()
        *after, flags = struct.unpack_from("<17Q", memory, PAGE + GPRS)
        return (
            bytes(memory[PAGE + GUEST : PAGE + GUEST + 512]),
            after,
            flags,
            bytes(memory[PAGE + OPERAND : PAGE + OPERAND + len(operand)]),
        )


@cache
def borrowed() -> Borrowed | None:
    """The host's processor; None when it is another, or the host forbids code that is written."""
    if host() != "x86_64":
        return None
    try:
        return Borrowed()
    except OSError:
        return None
