"""The oracle of single steps: the machine's own CPU under PTRACE_SINGLESTEP.

It runs a child process that has the same memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS = 9, 12, 13
# struct user_regs_struct
NAMES = (
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "rflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
)
PUSHF = b"\x9c"
SIZE = 4 * 4096  # bytes of each area of memory that the tests share with it
GPRS = tuple(name for name in NAMES if name[0] == "r")
CHILD = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for base, size in zip(*[iter(map(int, sys.argv[1:]))] * 2):
    assert libc.mmap(base, size, 7, 0x100022, -1, 0) == base
assert libc.ptrace(0, 0, 0, 0) == 0
os.kill(os.getpid(), signal.SIGSTOP)
"""


class Native:
    """A stopped child process whose registers and memory are ours."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.ranges = ranges
        words = [str(word) for pair in ranges for word in pair]
        self.child = subprocess.Popen([sys.executable, "-S", "-c", CHILD, *words])
        status = os.waitpid(self.child.pid, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            raise OSError("this machine does not let a process trace its child")
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.memory = os.open(f"/proc/{self.child.pid}/mem", os.O_RDWR)
        self._regs = (ctypes.c_uint64 * len(NAMES))()
        self._ptrace(PTRACE_GETREGS, self._regs)
        self.initial = dict(zip(NAMES, self._regs, strict=True))

    def _ptrace(self, request: int, data: object = None) -> None:
        if self.libc.ptrace(request, self.child.pid, None, data) < 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request}")

    def begin(self, memory: dict[int, bytes], regs: dict[str, int]) -> None:
        """Zero the memory, fill it, set the registers; those not named are 0."""
        for gva, size in self.ranges:
            os.pwrite(self.memory, bytes(size), gva)
        for gva, data in memory.items():
            os.pwrite(self.memory, data, gva)
        keep = {name: 0 if name in GPRS else value for name, value in self.initial.items()}
        self._regs[:] = [(keep | regs)[name] for name in NAMES]
        self._regs[NAMES.index("orig_rax")] = (1 << 64) - 1
        self._ptrace(PTRACE_SETREGS, self._regs)

    def step(self) -> int:
        """One step; returns the signal of the fault that it met, 0 for none."""
        before = self.regs()
        self._ptrace(PTRACE_SINGLESTEP)
        stopped = os.WSTOPSIG(os.waitpid(self.child.pid, 0)[1])
        rip, rsp = self.regs()["rip"], self.regs()["rsp"]
        pushed = rsp < before["rsp"]
        if pushed and self.read(rip - 1, 1) == PUSHF:
            # it shows the trap flag that the step itself needs
            high = self.read(rsp + 1, 1)[0]
            os.pwrite(self.memory, bytes([high & ~1]), rsp + 1)
        return 0 if stopped == signal.SIGTRAP else stopped

    def regs(self) -> dict[str, int]:
        """The general registers, rip and rflags."""
        self._ptrace(PTRACE_GETREGS, self._regs)
        return {name: value for name, value in zip(NAMES, self._regs, strict=True) if name in GPRS}

    def read(self, gva: int, size: int) -> bytes:
        """The child's memory."""
        return os.pread(self.memory, size, gva)

    def close(self) -> None:
        """End the child."""
        os.close(self.memory)
        self.child.kill()
        self.child.wait()
