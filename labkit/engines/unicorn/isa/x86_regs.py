"""x86-64 registers by their architectural names, over libunicorn."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from unicorn import x86_const as x86

from labkit.engines.unicorn.native.calibrate import SEGMENT, calibrate
from labkit.engines.unicorn.native.lib import Mmr, Msr, RegBatch, check
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.unicorn.native.lib import Handle

__all__ = ["CODE64", "DATA", "GPRS", "NATIVE_MSRS", "PLAIN", "X86Registers"]

GPRS = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    *(f"r{i}" for i in range(8, 16)),
    "rip",
    "rflags",
)
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")  # in the order of their records
# Base, limit, second word of a flat descriptor
CODE64 = (0, 0xFFFFFFFF, 0x00AF9B00)
DATA = (0, 0xFFFFFFFF, 0x00CF9300)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
_NAMES = (*GPRS, *_SEGMENTS, *_CONTROL, "fs_base", "gs_base", "mxcsr")
PLAIN = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in _NAMES}
_TABLES = {
    "gdt": x86.UC_X86_REG_GDTR,
    "idt": x86.UC_X86_REG_IDTR,
    "tr": x86.UC_X86_REG_TR,
    "ldt": x86.UC_X86_REG_LDTR,
}
_VECTORS = {f"xmm{i}": getattr(x86, f"UC_X86_REG_XMM{i}") for i in range(16)}
# MSRs that live in the emulated CPU; every other one is kept by the engine
NATIVE_MSRS = {
    "efer": 0xC000_0080,
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "sfmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
}
# Descriptor tables before segments (a segment write reads the GDT through paging), paging before
# both, bases after segments
_ORDER = ("efer", "cr4", "cr3", "gdt_base", "gdt_limit", "idt_base", "idt_limit", "cr0")


class _Xmm(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


def _order(name: str) -> int:
    """When to set a register among others."""
    if name in _ORDER:
        return _ORDER.index(name)
    if name in _SEGMENTS:
        return 21
    return 20 if name.startswith("tr") else 30


def _width(name: str) -> int:
    """Bits of a register."""
    if name in _VECTORS:
        return 128
    return 16 if name in _SEGMENTS else 64


class X86Registers:
    """Reads and writes one CPU's registers; `extra` holds those that libunicorn lacks (xcr0).

    "msr_0x10" is the MSR of that number: `any_msr(index)` reads one, `any_msr(index, value)` sets
    one, None means there is none. `fetch(gva, size)` reads guest memory.
    """

    def __init__(
        self,
        handle: Handle,
        extra: dict[str, int],
        any_msr: Callable[[int, int | None], int | None],
        fetch: Callable[[int, int], bytes | None],
    ) -> None:
        self.handle, self.extra, self.any_msr, self.fetch = handle, extra, any_msr, fetch
        self.batch = RegBatch(handle, tuple(PLAIN.values()))
        self.pc = self.rdi = -1  # as last read in a batch; -1 when they may have changed since
        self.names = (
            *PLAIN,
            *(f"{t}_{part}" for t in ("gdt", "idt") for part in ("base", "limit")),
            "tr",
            "tr_base",
            "tr_limit",
            "ldt",
            *NATIVE_MSRS,
            *_VECTORS,
            *extra,
        )

    def read_all(self) -> dict[str, int]:
        """Every register by name."""
        values = dict(zip(PLAIN, self.batch.read(), strict=True))
        return {name: values[name] if name in values else self.read(name) for name in self.names}

    def read(self, name: str) -> int:
        """One register; raises InvalidState for a name that x86-64 does not have."""
        if name in PLAIN:
            if name == "rdi" and self.pc >= 0:
                return self.rdi
            return self.handle.read(PLAIN[name])
        if name in self.extra:
            return self.extra[name]
        if name in NATIVE_MSRS:
            return self.msr(NATIVE_MSRS[name])
        if name in _VECTORS:
            xmm = self.handle.read_struct(_VECTORS[name], _Xmm())
            return int(xmm.high << 64 | xmm.low)
        table, _, part = name.partition("_")
        if table == "msr":
            return self._numbered(part)
        if table in _TABLES and part in ("", "base", "limit"):
            return int(getattr(self.handle.read_struct(_TABLES[table], Mmr()), part or "selector"))
        raise InvalidState(f"x86-64 has no register {name!r}", name=name)

    def write_many(self, regs: Mapping[str, int]) -> None:
        """Set several registers in an order that the CPU accepts, whatever order they come in."""
        for name in sorted(regs, key=_order):
            self.write(name, regs[name])

    def write(self, name: str, value: int) -> None:
        """Set one register.

        Raises InvalidState for a name x86-64 lacks or a value the CPU refuses.
        """
        width = _width(name)
        if not 0 <= value < 1 << width:
            raise InvalidState(f"{name} takes {width} bits, not {value:#x}", name=name, value=value)
        if name in _SEGMENTS:
            self._load_segment(name, value)
            return
        if name in PLAIN:
            status = self.handle.write(PLAIN[name], value)
            if name == "rip" or name == "rdi":
                self.pc = -1
        elif name in self.extra:
            self.extra[name], status = value, 0
        elif name in NATIVE_MSRS:
            status = self.set_msr(NATIVE_MSRS[name], value)
        elif name in _VECTORS:
            status = self.handle.write_struct(
                _VECTORS[name], _Xmm(value & (1 << 64) - 1, value >> 64)
            )
        else:
            status = self._write_table(name, value)
        check(status, f"{name} = {value:#x}")

    def _load_segment(self, name: str, selector: int) -> None:
        if selector & ~3:
            table = "LDT" if selector & 4 else "GDT"
            hidden = self.descriptor(selector)
            if hidden is None or (name == "cs" and not hidden[2] & 1 << 21):  # L
                raise InvalidState(
                    f"{name} = {selector:#x}: the {table} has no such segment", name=name
                )
            self.set_segment(name, selector, hidden)
        else:
            self.set_segment(name, selector, (0, 0, 0))
        if name == "cs":
            self.set_ring(selector & 3)

    def descriptor(self, selector: int) -> tuple[int, int, int] | None:
        """(base, limit, second word) from the descriptor table, read in ring 0 as the CPU does."""
        table = "ldt" if selector & 4 else "gdt"
        base, end = self.read(f"{table}_base"), self.read(f"{table}_limit")
        if selector | 7 > end:
            return None

        ring = self.read("cs") & 3
        if ring:
            self.set_ring(0)
        raw = self.fetch(base + (selector & ~7), 8)
        if ring:
            self.set_ring(ring)
        if raw is None:
            return None

        low, high = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little")
        start = high & 0xFF00_0000 | (high & 0xFF) << 16 | low >> 16
        limit = high & 0xF0000 | low & 0xFFFF
        in_pages = high & 1 << 23  # G
        if in_pages:
            limit = limit << 12 | 0xFFF
        return start, limit, high

    def set_segment(self, name: str, selector: int, hidden: tuple[int, int, int]) -> None:
        """Set a segment register with its hidden part, as an interrupt does.

        The hidden part is (base, limit, second word of the descriptor).
        """
        at = calibrate().segments + SEGMENT.size * _SEGMENTS.index(name)
        record = SEGMENT.pack(selector, *hidden)

        def patch(context: int) -> None:
            ctypes.memmove(context + at, record, len(record))

        self.handle.patch_context(patch)

    def set_ring(self, level: int) -> None:
        """Set the privilege level that instructions run and memory is accessed with."""

        def patch(context: int) -> None:
            word = ctypes.c_uint32.from_address(context + calibrate().hflags)
            word.value = word.value & ~3 | level

        self.handle.patch_context(patch)

    def _write_table(self, name: str, value: int) -> int:
        table, _, part = name.partition("_")
        if table == "msr":
            self._numbered(part, value)
            return 0
        if table not in _TABLES or part not in ("", "base", "limit"):
            raise InvalidState(f"x86-64 has no register {name!r}", name=name)
        mmr = self.handle.read_struct(_TABLES[table], Mmr())
        setattr(mmr, part or "selector", value)
        if table == "tr":
            mmr.flags = 0x8B00  # busy 64-bit TSS
        return self.handle.write_struct(_TABLES[table], mmr)

    def _numbered(self, number: str, value: int | None = None) -> int:
        try:
            found = self.any_msr(int(number, 0), value)
        except ValueError:
            found = None
        if found is None:
            refused = "" if value is None else f", or it does not take {value:#x}"
            raise InvalidState(f"this CPU has no MSR {number!r}{refused}", name=f"msr_{number}")
        return found

    def msr(self, index: int) -> int:
        """An MSR that libunicorn holds."""
        return int(self.handle.read_struct(x86.UC_X86_REG_MSR, Msr(index, 0)).value)

    def set_msr(self, index: int, value: int) -> int:
        """Set an MSR that libunicorn holds; returns its status."""
        return self.handle.write_struct(x86.UC_X86_REG_MSR, Msr(index, value))
