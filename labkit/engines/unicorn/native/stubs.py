"""Hooks and callbacks in machine code: stubs.c and mmu.c in executable memory, once a process."""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import cache

from labkit.engines.unicorn.native.stubs_code import MACHINE_CODE

__all__ = ["executable", "host", "stub"]

_PAGES: list[mmap.mmap] = []  # executable memory lives as long as the process


def host() -> str:
    """The host's processor, as the tables of machine code call it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def executable(code: bytes) -> int:
    """The address of this code in executable memory; raises OSError where the host forbids it."""
    size = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
    page = mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(code)] = code
    _PAGES.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


@cache
def stub(name: str) -> int | None:
    """The address of a function of stubs.c.

    None where the host's processor is another or forbids it.
    """
    code = MACHINE_CODE.get((name, host()))
    if code is None:
        return None

    try:
        return executable(bytes.fromhex(code))
    except (OSError, AttributeError):  # a system without PROT_EXEC
        return None
