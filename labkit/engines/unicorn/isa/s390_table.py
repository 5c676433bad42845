"""libunicorn's table of s390x instructions, with one row made harmless.

libunicorn 2.1.4 follows a null pointer while it translates SET CLOCK (SCK, B204), before any hook
is asked: a guest that only reaches one would end the process. Its row is given the functions of the
next one (SCKC, B206), and `scan` sees to it that none ever runs.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from functools import cache
from pathlib import Path

from labkit.engines.unicorn.native.lib import LIB

__all__ = ["mend"]

SCK, SCKC = (b"SCK", 0xB204), (b"SCKC", 0xB206)
_NAME, _FUNCTIONS = 8, slice(16, 64)  # of a row: DisasInsn in qemu/target/s390x/translate.c
_MAPS = Path("/proc/self/maps")


@cache
def mend() -> bool:
    """Mend the row, once a process.

    False where the two rows are not found, as in another libunicorn or outside Linux.
    """
    parts = _parts()
    rows = [_row(parts, *insn) for insn in (SCK, SCKC)]
    if None in rows:
        return False
    to, source = (row or 0 for row in rows)
    functions = ctypes.string_at(source, _FUNCTIONS.stop)[_FUNCTIONS]
    page, last = (hva & -mmap.PAGESIZE for hva in (to, to + _FUNCTIONS.stop - 1))
    protect, arguments = (
        ctypes.CDLL(None).mprotect,
        (ctypes.c_void_p(page), ctypes.c_size_t(last - page + mmap.PAGESIZE)),
    )
    if protect(*arguments, mmap.PROT_READ | mmap.PROT_WRITE):
        return False
    ctypes.memmove(to + _FUNCTIONS.start, functions, len(functions))
    return not protect(*arguments, mmap.PROT_READ)


def _parts() -> list[tuple[int, bytes]]:
    """(hva, bytes) of what is mapped of the library and only read.

    These are its strings and its relocated tables.
    """
    lines = (line.split() for line in _MAPS.read_text().splitlines()) if _MAPS.exists() else ()
    name = Path(LIB._name).resolve().name
    spans = (
        [int(end, 16) for end in line[0].split("-")]
        for line in lines
        if line[1] == "r--p" and line[-1].endswith(name)
    )
    return [(start, ctypes.string_at(start, end - start)) for start, end in spans]


def _row(parts: list[tuple[int, bytes]], name: bytes, code: int) -> int | None:
    """The hva of an instruction's row: where a pointer to its name lies behind its operation code.

    None unless exactly one does.
    """
    names = [
        start + found.start() + 1
        for start, data in parts
        for found in re.finditer(b"\0" + name + b"\0", data)
    ]
    pointers = [re.escape(struct.pack("=Q", hva)) for hva in names]
    found = [
        start + at.start() - _NAME
        for start, data in parts
        for pointer in pointers
        for at in re.finditer(pointer, data)
    ]
    rows = [
        hva for hva in found if hva % 8 == 0 and ctypes.c_uint16.from_address(hva).value == code
    ]
    return rows[0] if len(rows) == 1 else None
