"""Compilers read what a guest needs and nothing else, where the kernel has Landlock.

A C file that somebody else wrote can name any file of its reader's: `#include "/etc/passwd"` puts
its lines into an error, `.incbin` and `#embed` put its bytes into the guest. No look at the text
finds all of them, since macros make names too. So the kernel is asked to hold the compiler
(Documentation/userspace-api/landlock.rst, Linux 5.19). A domain belongs to the thread that asks and
to what it starts: a compiler is started on a thread of its own, and nobody else is held.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from labkit.errors import NotAvailable

__all__ = ["confined", "why_not_confined"]

R = TypeVar("R")

# System calls, whose numbers are the same everywhere (include/uapi/asm-generic/unistd.h).
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
GET_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH
NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS

# Rights of include/uapi/linux/landlock.h: EXECUTE, READ_FILE, READ_DIR; all of the second version.
# The first one lets nobody rename a file into another folder, as zig does in its cache.
READ = 1 << 0 | 1 << 2 | 1 << 3
ALL = (1 << 14) - 1
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2

# What every program reads: itself and its libraries. Then what a compiler asks of its machine.
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store")
FILES = ("/etc/ld.so.cache", "/proc/cpuinfo", "/proc/meminfo", "/dev/urandom", "/dev/random")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def why_not_confined() -> str:
    """Why this machine cannot hold a compiler; "" when it can."""
    try:
        version = _libc().syscall(CREATE_RULESET, None, 0, GET_VERSION)
    except AttributeError:
        return "this system has no system calls of Linux"
    if version < 2:
        return "this kernel has no Landlock that can (Linux 5.19 and later, in its list of lsm=)"
    return ""


def confined(call: Callable[[], R], read: Iterable[Path], write: Iterable[Path]) -> R:
    """Call with no files but those below these folders, and the system's programs.

    Where the kernel cannot do that it is called all the same; `why_not_confined` says so.
    """
    if why_not_confined():
        return call()

    def held() -> R:
        _hold(read, write)
        return call()

    with ThreadPoolExecutor(1, "labkit-compiler") as pool:
        return pool.submit(held).result()


def _hold(read: Iterable[Path], write: Iterable[Path]) -> None:
    """Hold this thread, for good, and whatever it starts."""
    ruleset = _ask(CREATE_RULESET, struct.pack("=Q", ALL), 8, 0)
    try:
        for path in (*map(Path, SYSTEM + FILES), *read):
            _allow(ruleset, path, READ)
        for path in (*write, Path(os.devnull)):
            _allow(ruleset, path, ALL)
        if _libc().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise NotAvailable(f"a compiler cannot be held: {os.strerror(ctypes.get_errno())}")
        _ask(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    """Allow what lies below a folder, or one file; what is not there needs no rule."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            rights &= OF_FILES
        _ask(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
    finally:
        os.close(fd)


def _ask(call: int, *arguments: int | bytes) -> int:
    """One system call; raises NotAvailable for an error, which after the probe nobody expects."""
    result: int = _libc().syscall(call, *arguments)
    if result < 0:
        why = os.strerror(ctypes.get_errno())
        raise NotAvailable(f"a compiler cannot be held by Landlock: {why}")
    return result
