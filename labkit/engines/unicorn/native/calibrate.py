"""Where libunicorn keeps what it does not show: measured on a scratch engine, never written in.

Needed are the instruction counter of a counted run (in `uc_engine`) and parts of the x86 CPU state
(QEMU's CPUX86State): `error_code`, `exception_is_int`, `old_exception`, the segment registers with
their hidden parts, and `hflags`, which holds the privilege level. Their offsets belong to the
build, so they are found by running known code and searching, then proved by a run that fails when
one of them is wrong.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass
from functools import cache

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86

from labkit.engines.unicorn.native.lib import LIB, Handle, IntrHook, Mmr
from labkit.errors import NotAvailable

__all__ = ["CC_OP_EFLAGS", "Calibration", "calibrate"]

PATTERN = 0x0123_4567_89AB_CDEF
CC_OP_EFLAGS = 1  # QEMU's target/i386/cpu.h: cc_src holds the flags
CODE, TABLES, GDT, HOLE = 0x1000, 0x8000, 0x2000, 0x4000_0000
SEGMENT = struct.Struct(
    "<I4xQII"
)  # SegmentCache: selector, base, limit, second word of the descriptor
_DATA_SEGMENTS = {
    0: 0x10,
    2: 0x18,
    3: 0x20,
    4: 0x28,
    5: 0x30,
}  # place in CPUX86State.segs: selector; place 1 is CS


@dataclass(frozen=True)
class Calibration:
    """Byte offsets.

    The counter's is from the engine handle, the others are from the start of a saved CPU state.
    """

    counter: int
    error_code: int
    is_int: int
    old_exception: int
    hflags: int
    cc_op: int  # how the arithmetic flags are to be worked out
    segments: int  # six SEGMENTs: ES CS SS DS FS GS


class _Scratch:
    """A long-mode machine of 64 KiB, identity mapped.

    It runs a few bytes and reports the exceptions it met.
    """

    def __init__(self, code: bytes) -> None:
        self.memory = mmap.mmap(-1, 0x10000)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for gpa, value in (
            (TABLES, TABLES + 0x1003),
            (TABLES + 0x1000, TABLES + 0x2003),
            (TABLES + 0x2000, 0x83),
            (GDT + 8, 0x00AF9B000000FFFF),
            *((GDT + s, 0x00CF93000000FFFF) for s in _DATA_SEGMENTS.values()),
        ):
            self.memory[gpa : gpa + 8] = struct.pack("<Q", value)
        self.memory[CODE : CODE + len(code)] = code
        self.handle = Handle(uc.UC_ARCH_X86, uc.UC_MODE_64)
        self.handle.map(0, hva, 0x10000, uc.UC_PROT_ALL)
        self.handle.write_struct(x86.UC_X86_REG_GDTR, Mmr(0, GDT, 0x37, 0))
        for reg, value in ((x86.UC_X86_REG_CR4, 0x20), (x86.UC_X86_REG_CR3, TABLES)):
            self.handle.write(reg, value)
        self.handle.write_struct(x86.UC_X86_REG_MSR, _efer())
        self.handle.write(x86.UC_X86_REG_CR0, 0x80000021)
        self.handle.write(x86.UC_X86_REG_CS, 8)
        self.vectors: list[int] = []
        self.hook = IntrHook(lambda _h, vector, _d: self._intr(vector))
        self.handle.hook(uc.UC_HOOK_INTR, self.hook)

    def _intr(self, vector: int) -> None:
        self.vectors.append(vector)
        LIB.uc_emu_stop(self.handle.h)

    def run(self, count: int = PATTERN) -> bytes:
        self.handle.run(CODE, count)
        return self.handle.context()


def _efer() -> ctypes.Structure:
    from labkit.engines.unicorn.native.lib import Msr

    return Msr(0xC0000080, 0xD00)


def _words(blob: bytes) -> list[int]:
    return list(struct.unpack_from(f"<{len(blob) // 4}i", blob))


def _segments_offset() -> int:
    """Load five segment registers, look for their records, and prove `hflags` before them.

    The proof is that outside ring 0 no code is in reach.
    """
    code = b"".join(
        b"\xb8" + struct.pack("<I", s) + b"\x8e" + bytes([0xC0 | place << 3])
        for place, s in _DATA_SEGMENTS.items()
    )
    scratch = _Scratch(code + b"\xf4")
    blob = scratch.run()
    records = {
        place: SEGMENT.pack(selector, 0, 0xFFFFFFFF, 0x00CF9300)
        for place, selector in _DATA_SEGMENTS.items()
    }
    at = blob.find(records[0])
    if at < 8 or any(
        blob[at + 24 * place : at + 24 * place + 24] != record for place, record in records.items()
    ):
        raise NotAvailable(
            "libunicorn's segment registers were not found; this build cannot be used"
        )
    scratch.handle.patch_context(
        lambda p: _poke(p + at - 8, ctypes.c_int32.from_address(p + at - 8).value | 3)
    )
    scratch.run()
    if scratch.vectors != [14]:
        raise NotAvailable("libunicorn's privilege level was not found; this build cannot be used")
    scratch.handle.close()
    return at


def _cc_op_offset(hflags: int) -> int:
    """Where `cc_op` is: it lies before `hflags`, and `cc_src` before both.

    Set flags stand in the one as they are, and the other says so.
    """
    scratch, flags = _Scratch(b"\xf4"), 0x8D5  # OF SF ZF AF PF CF
    scratch.handle.write(x86.UC_X86_REG_RFLAGS, flags | 2)
    blob = scratch.handle.context()
    scratch.handle.close()
    if struct.unpack_from("<Q8xi", blob, hflags - 24) != (flags, CC_OP_EFLAGS):
        raise NotAvailable(
            "libunicorn's arithmetic flags were not found; this build cannot be used"
        )
    return hflags - 8


def _find(what: str, runs: list[tuple[bytes, int]]) -> list[int]:
    """Offsets of 32-bit words that hold the wanted value in every one of these CPU states."""
    columns = [[w == wanted for w in _words(blob)] for blob, wanted in runs]
    hits = [4 * i for i, row in enumerate(zip(*columns, strict=True)) if all(row)]
    if not hits:
        raise NotAvailable(
            f"libunicorn's CPU state does not show {what}; this build cannot be used"
        )
    return hits


def _counter_offset() -> int:
    scratch = _Scratch(b"\x90" * 5 + b"\xf4")
    scratch.run()
    raw = ctypes.string_at(scratch.handle.h, 2048)
    at = raw.find(struct.pack("<Q", PATTERN))
    if at < 8 or struct.unpack_from("<Q", raw, at - 8)[0] != 6:
        raise NotAvailable(
            "libunicorn's instruction counter was not found; this build cannot be used"
        )
    scratch.handle.close()
    return at - 8


def _faults(old_exception: int) -> list[int]:
    """Three page faults in a row, with `old_exception` reset after each: the vectors seen."""
    scratch = _Scratch(b"\x48\x8b\x04\x25" + struct.pack("<I", HOLE))
    for _ in range(3):
        scratch.run()
        scratch.handle.patch_context(lambda p: _poke(p + old_exception, -1))
    scratch.handle.close()
    return scratch.vectors


def _poke(hva: int, value: int) -> None:
    ctypes.c_int32.from_address(hva).value = value


@cache
def calibrate() -> Calibration:
    """Measure the offsets once a process.

    Raises NotAvailable, saying what, when a build does not show them.
    """

    def mov_ds(selector: int) -> bytes:
        return (
            b"\x66\xb8" + struct.pack("<H", selector) + b"\x8e\xd8"
        )  # mov ax, selector; mov ds, ax: #GP(selector)

    selector_faults = [(_Scratch(mov_ds(s)).run(), s) for s in (0x1230, 0x4560)]
    page_fault = _Scratch(b"\x48\x8b\x04\x25" + struct.pack("<I", HOLE)).run()
    soft_int = _Scratch(b"\xcd\x21").run()
    is_int = _find("exception_is_int", [(soft_int, 1), (page_fault, 0), (selector_faults[0][0], 0)])
    error_code = [
        offset for offset in _find("error_code", selector_faults) if offset + 4 in is_int
    ]  # the two are neighbours
    old = _find(
        "old_exception",
        [(selector_faults[0][0], 13), (selector_faults[1][0], 13), (page_fault, 14)],
    )
    good = [offset for offset in old if _faults(offset) == [14, 14, 14]]
    if not good or not error_code:
        raise NotAvailable(
            "libunicorn turns a second page fault into a double fault and the cause was not found; "
            "this build cannot be used"
        )
    segments = _segments_offset()
    hflags = segments - 8
    return Calibration(
        _counter_offset(),
        error_code[0],
        error_code[0] + 4,
        good[0],
        hflags,
        _cc_op_offset(hflags),
        segments,
    )
