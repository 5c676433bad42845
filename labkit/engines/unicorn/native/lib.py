"""The few calls of libunicorn that labkit makes, bound directly.

The `unicorn` package brings the library and its constants; its Python layer costs 2 to 30 us a call
(a batch of 18 registers 35 us against 0.6 us here), which a ucall round trip cannot afford. Two of
its facilities have no binding at all: a hook whose callback is C's own `uc_emu_stop`, which ends a
run in 1 us, and the counter of a counted run.
"""

from __future__ import annotations

import ctypes
import resource
import struct
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from functools import partial
from typing import Any

from unicorn import unicorn_const as uc
from unicorn.unicorn_py3 import unicorn as binding

from labkit.errors import InvalidState, LabError, NotAvailable

__all__ = [
    "LIB",
    "READ_REG",
    "STOP",
    "CodeHook",
    "EdgeHook",
    "Handle",
    "InsnInvalidHook",
    "IntrHook",
    "MemHook",
    "Mmr",
    "Msr",
    "Page",
    "RegBatch",
    "Tb",
    "check",
]

CodeHook = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)
IntrHook = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
InsnInvalidHook = ctypes.CFUNCTYPE(ctypes.c_bool, c_void_p, c_void_p)
MemHook = ctypes.CFUNCTYPE(
    ctypes.c_bool, c_void_p, c_int, c_uint64, c_int, ctypes.c_int64, c_void_p
)


class Tb(ctypes.Structure):
    """`uc_tb`: one translated block."""

    _fields_ = [("pc", c_uint64), ("icount", c_uint16), ("size", c_uint16)]


EdgeHook = ctypes.CFUNCTYPE(None, c_void_p, POINTER(Tb), POINTER(Tb), c_void_p)


class Mmr(ctypes.Structure):
    """`uc_x86_mmr`: GDTR, IDTR, LDTR, TR."""

    _fields_ = [
        ("selector", c_uint16),
        ("base", c_uint64),
        ("limit", c_uint32),
        ("flags", c_uint32),
    ]


class Msr(ctypes.Structure):
    """`uc_x86_msr`."""

    _fields_ = [("rid", c_uint32), ("value", c_uint64)]


def _load(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        lib = kind(binding.uclib._name)
    except (AttributeError, OSError) as err:
        raise NotAvailable(
            f"the unicorn package does not show where its library is: {err}"
        ) from err
    lib.uc_strerror.restype = c_char_p
    lib.uc_context_size.restype = c_size_t
    signatures = {
        "uc_open": [c_int, c_int, c_void_p],
        "uc_close": [c_void_p],
        "uc_emu_stop": [c_void_p],
        "uc_strerror": [c_int],
        "uc_reg_read": [c_void_p, c_int, c_void_p],
        "uc_reg_write": [c_void_p, c_int, c_void_p],
        "uc_mem_map_ptr": [c_void_p, c_uint64, c_size_t, c_uint32, c_void_p],
        "uc_mem_unmap": [c_void_p, c_uint64, c_size_t],
        "uc_context_alloc": [c_void_p, c_void_p],
        "uc_context_free": [c_void_p],
        "uc_context_size": [c_void_p],
        "uc_context_save": [c_void_p, c_void_p],
        "uc_context_restore": [c_void_p, c_void_p],
        "uc_hook_del": [c_void_p, c_size_t],
        "uc_vmem_translate": [c_void_p, c_uint64, c_uint32, c_void_p],
        **{
            f"uc_vmem_{what}": [c_void_p, c_uint64, c_uint32, c_void_p, c_size_t]
            for what in ("read", "write")
        },
        "uc_hook_add": [c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_uint64, c_uint64],
    }
    for name, argtypes in signatures.items():
        getattr(lib, name).argtypes = argtypes
    return lib


LIB = _load(ctypes.CDLL)
QUICK = _load(
    ctypes.PyDLL
)  # for calls that take less than to give the interpreter lock away and take it back
# For hooks in machine code: where the library has these functions
STOP: int = ctypes.cast(LIB.uc_emu_stop, c_void_p).value or 0
READ_REG: int = ctypes.cast(LIB.uc_reg_read, c_void_p).value or 0


ROOM = 64 << 20  # bytes of address space that an engine and what lies around it may take
TRANSLATIONS = 8 << 20  # bytes for translated code, of which what is used takes memory


def check(status: int, what: str) -> None:
    """Raise LabError when libunicorn refused a call that labkit believes to be right."""
    if status:
        raise LabError(f"unicorn: {what}: {LIB.uc_strerror(status).decode()}", status=status)


def _check_room() -> None:
    """Raise NotAvailable where a limit leaves no address space for an engine (ulimit -v).

    libunicorn would print one line and end the process.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    if used + ROOM > limit:
        raise NotAvailable(
            f"one more engine needs {ROOM >> 20} MiB of address space; this process has "
            f"{used >> 20} of the {limit >> 20} MiB that ulimit -v allows",
            needed=ROOM,
            used=used,
            limit=limit,
        )


class Page:
    """A page of host memory, to be mapped for a moment."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = ctypes.create_string_buffer(2 * 4096)
        self.hva = -(-ctypes.addressof(self.buffer) // 4096) * 4096
        ctypes.memmove(self.hva, data, len(data))


class RegBatch:
    """A fixed set of 64-bit registers read or written in one call.

    The arguments are made once: to convert them takes ctypes longer than libunicorn takes to
    answer.
    """

    def __init__(self, handle: Handle, ids: tuple[int, ...]) -> None:
        n = len(ids)
        self._values = (c_uint64 * n)()
        base, form = ctypes.addressof(self._values), struct.Struct(f"={n}Q")
        args = (
            c_void_p(handle.h),
            (c_int * n)(*ids),
            (c_void_p * n)(*(base + 8 * i for i in range(n))),
            c_int(n),
        )
        self._read, self._write = (
            partial(QUICK["uc_reg_read_batch"], *args),
            partial(QUICK["uc_reg_write_batch"], *args),
        )
        self._unpack, self._pack = (
            partial(form.unpack_from, self._values),
            partial(form.pack_into, self._values, 0),
        )
        handle.batches.append(self)

    def read(self) -> tuple[int, ...]:
        """The registers as they are in the CPU."""
        self._read()
        return self._unpack()

    def write(self, *values: int) -> None:
        """Set them all."""
        self._pack(*values)
        status = self._write()
        if status:
            check(status, "uc_reg_write_batch")

    def close(self) -> None:
        """The engine is gone."""
        self._read = self._write = partial(_closed)


def _closed(*_: object) -> int:
    raise InvalidState("this VM is closed")


class Handle:
    """One `uc_engine`, with the hooks and buffers that must live as long as it does."""

    def __init__(self, arch: int, mode: int, settings: tuple[tuple[int, int], ...] = ()) -> None:
        # What close() needs, before there is anything to close: whoever makes an engine may be
        # interrupted, or refused, at any point.
        self._context = c_void_p()
        self._callbacks: dict[int, object] = {}
        self.batches: list[RegBatch] = []
        _check_room()
        handle = c_void_p()
        check(LIB.uc_open(arch, mode, byref(handle)), "uc_open")
        assert handle.value is not None
        self.h: int = handle.value
        # Before all that makes the machine, or it has reserved a GiB of address space already.
        self.ctl_write(uc.UC_CTL_TCG_BUFFER_SIZE, c_uint32(TRANSLATIONS))
        for what, value in settings:  # CPU model, page size: before anything else
            self.ctl_write(what, c_int(value))
        self._removed: list[object] = []  # callbacks that translated code may still call
        self._from, self._count = c_uint64(), c_size_t()
        self._start = partial(
            LIB["uc_emu_start"],
            c_void_p(handle.value),
            self._from,
            c_uint64(0),
            c_uint64(0),
            self._count,
        )
        self._one = c_uint64()  # arguments and calls are made once, as in RegBatch
        self._one_at = byref(self._one)
        self._read, self._write = (
            partial(QUICK[f"uc_reg_{what}"], c_void_p(handle.value)) for what in ("read", "write")
        )
        self.ctl_write(uc.UC_CTL_UC_USE_EXITS, c_int(1))
        self.ctl_write(uc.UC_CTL_UC_EXITS, c_void_p(None), c_size_t(0))
        check(LIB.uc_context_alloc(self.h, byref(self._context)), "uc_context_alloc")
        self.context_size: int = LIB.uc_context_size(self.h)

    def run(self, gva: int, count: int = 0) -> int:
        """Run from gva, at most count instructions (0: any number); returns libunicorn's status."""
        self._from.value, self._count.value = gva, count
        return int(self._start())

    @property
    def started_at(self) -> int:
        """Where the present run began, or the last one."""
        return self._from.value

    def ctl_write(self, what: int, *args: Any) -> None:
        """`uc_ctl` in its writing form."""
        check(
            LIB.uc_ctl(
                c_void_p(self.h), c_uint32(uc.UC_CTL_IO_WRITE << 30 | len(args) << 26 | what), *args
            ),
            f"uc_ctl {what}",
        )

    def flush_tlb(self) -> None:
        """Forget every address translation."""
        self.ctl_write(uc.UC_CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        """Forget every translated block."""
        self.ctl_write(uc.UC_CTL_TB_FLUSH)
        self._removed.clear()

    def forget_code(self, gva: int, size: int) -> None:
        """Forget the translated blocks of a range.

        A range that is not mapped has none, and Unicorn's page fault is undone.
        """
        before = self.context()
        code = uc.UC_CTL_IO_WRITE << 30 | 2 << 26 | uc.UC_CTL_TB_REMOVE_CACHE
        LIB.uc_ctl(c_void_p(self.h), c_uint32(code), c_uint64(gva), c_uint64(gva + size))
        self.set_context(before)

    def hook(
        self, kind: int, callback: Any, begin: int = 1, end: int = 0, data: int | None = None
    ) -> int:
        """Add a hook (a ctypes callback, or the address of a C function).

        It is for the whole address space by default.
        """
        hook = c_size_t()
        pointer = callback if isinstance(callback, int) else ctypes.cast(callback, c_void_p)
        check(LIB.uc_hook_add(self.h, byref(hook), kind, pointer, data, begin, end), "uc_hook_add")
        self._callbacks[hook.value] = callback
        return hook.value

    def unhook(self, hook: int) -> None:
        """Remove a hook; `flush_code` must follow before the next run.

        Page faults that Unicorn makes of it are undone.
        """
        before = self.context()
        check(LIB.uc_hook_del(self.h, hook), "uc_hook_del")
        self.set_context(before)
        self._removed.append(self._callbacks.pop(hook))

    def read(self, reg: int) -> int:
        """One register of up to 64 bits."""
        self._one.value = 0
        self._read(reg, self._one_at)
        return self._one.value

    def write(self, reg: int, value: int) -> int:
        """Set one register of up to 64 bits; returns libunicorn's status."""
        self._one.value = value
        status: int = self._write(reg, self._one_at)
        return status

    def read_struct(self, reg: int, struct: Any) -> Any:
        """A register that is a structure (table registers, MSRs, vector registers)."""
        LIB.uc_reg_read(self.h, reg, byref(struct))
        return struct

    def write_struct(self, reg: int, struct: Any) -> int:
        """Set a structured register; returns libunicorn's status."""
        return int(LIB.uc_reg_write(self.h, reg, byref(struct)))

    def context(self) -> bytes:
        """The CPU state as libunicorn keeps it."""
        check(LIB.uc_context_save(self.h, self._context), "uc_context_save")
        return ctypes.string_at(self._context, self.context_size)

    def set_context(self, blob: bytes) -> None:
        """Put a CPU state back; the length is checked because a wrong one aborts the process."""
        if len(blob) != self.context_size:
            raise LabError(
                f"CPU state of {len(blob)} bytes given to an engine "
                f"whose states have {self.context_size}"
            )
        assert self._context.value is not None
        ctypes.memmove(self._context.value, blob, len(blob))
        check(LIB.uc_context_restore(self.h, self._context), "uc_context_restore")

    def patch_context(self, patch: Callable[[int], None]) -> None:
        """Save the CPU state, let `patch(address)` change it in place, and put it back."""
        LIB.uc_context_save(self.h, self._context)
        assert self._context.value is not None
        patch(self._context.value)
        LIB.uc_context_restore(self.h, self._context)

    def map(self, gpa: int, hva: int, size: int, prot: int) -> None:
        """Map host memory; the caller keeps it alive as long as this handle."""
        check(
            LIB.uc_mem_map_ptr(self.h, gpa, size, prot, hva),
            f"map of {size:#x} bytes at gpa {gpa:#x}",
        )

    def unmap(self, gpa: int, size: int) -> None:
        """Remove a mapping.

        A page fault that Unicorn makes of it is undone; an x86 guest's next one would be a double
        fault.
        """
        before = self.context()
        check(LIB.uc_mem_unmap(self.h, gpa, size), f"unmap at gpa {gpa:#x}")
        self.set_context(before)

    def close(self) -> None:
        """Free the engine; a second call does nothing."""
        if "h" in self.__dict__:
            engine = self.h
            context = self._context
            del self.h  # first: nothing is freed twice, whoever comes in between
            self._context = c_void_p()
            if context:
                LIB.uc_context_free(context)
            LIB.uc_close(engine)
            self._callbacks.clear()
            self._start = self._read = self._write = partial(_closed)
            for batch in self.batches:
                batch.close()
            self.batches.clear()

    def __getattr__(self, name: str) -> int:
        """A closed engine has no `h`: whoever still wants to use it is told so."""
        if name == "h":
            raise InvalidState("this VM is closed")
        raise AttributeError(name)

    def __del__(self) -> None:
        self.close()
