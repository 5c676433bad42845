"""A guest on a bare Unicorn without paging: the guest library's own test bench.

Nothing of labkit's is in it but the loader.
"""

from __future__ import annotations

import numpy as np
from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_64, Uc
from unicorn import x86_const as x86

from labkit.guest.program import Program
from labkit.ucall.abi import (
    BITMAP_BYTES,
    GUEST_UCALL_FAILED,
    HEADER_SIZE,
    NR_SLOTS,
    OFFSET_HVA,
    UCALL,
    UCALL_PIO_PORT,
    UCALL_SIZE,
    decode_text,
)

STACK, POOL, HANDLERS = 0x1000_0000, 0x2000_0000, 0x3000_0000
STACK_SIZE, PAGE = 0x10000, 0x1000
HVA = 0x7F00_0000_0000  # of slot 0; slot n has the next number, which is all that run() needs
ARGS = (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RCX)


def pages(size: int) -> int:
    """As many bytes in whole pages."""
    return -(-size // PAGE) * PAGE


def slot_gva(slot: int) -> int:
    return POOL + BITMAP_BYTES + slot * UCALL_SIZE


class Exhausted(Exception):
    """The guest sent the magic -1."""


class BareGuest:
    """One vCPU, and the host's half of a ucall pool."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.left: int | None = None  # what the guest left with at the port
        for segment in program.segments:
            offset = segment.gva % PAGE
            self.uc.mem_map(segment.gva - offset, pages(offset + segment.memsz))
            self.uc.mem_write(segment.gva, segment.data)
        self.uc.mem_map(STACK, STACK_SIZE)
        self.uc.mem_map(POOL, pages(HEADER_SIZE))
        self.uc.mem_map(HANDLERS, PAGE)
        for slot in range(NR_SLOTS):
            self.write_u64(slot_gva(slot) + OFFSET_HVA, HVA + slot)
        self.write_u64(program.symbol("ucall_pool").gva, POOL)
        self.write_u64(program.symbol("exception_handlers").gva, HANDLERS)
        self.uc.hook_add(UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)

    def write_u64(self, gva: int, value: int) -> None:
        self.uc.mem_write(gva, value.to_bytes(8, "little"))

    def read_u64(self, gva: int) -> int:
        return int.from_bytes(self.uc.mem_read(gva, 8), "little")

    def enter(self, function: str, *args: int) -> BareGuest:
        """Be about to call a function, which returns to 0."""
        rsp = STACK + STACK_SIZE // 2 - 8
        self.write_u64(rsp, 0)
        self.uc.reg_write(x86.UC_X86_REG_RSP, rsp)
        self.uc.reg_write(x86.UC_X86_REG_RIP, self.program.symbol(function).gva)
        for register, value in zip(ARGS, args, strict=False):
            self.uc.reg_write(register, value)
        return self

    def _in(self, uc: Uc, port: int, size: int, _: object) -> int:
        assert (port, size) == (UCALL_PIO_PORT, 1)
        self.left = uc.reg_read(x86.UC_X86_REG_RDI)
        uc.emu_stop()
        return 0

    def run(self, until: int = 0) -> tuple[int, tuple[int, ...], str, int] | None:
        """Go to the next ucall and return (cmd, args, text, slot); None when the entry returned.

        Raises Exhausted when the guest found no free slot.
        """
        self.left = None
        self.uc.emu_start(self.uc.reg_read(x86.UC_X86_REG_RIP), until, count=3_000_000)
        if self.left is None:
            assert self.uc.reg_read(x86.UC_X86_REG_RIP) == until
            return None
        if self.left == GUEST_UCALL_FAILED:
            raise Exhausted
        slot = self.left - HVA
        raw = np.frombuffer(self.uc.mem_read(slot_gva(slot), UCALL_SIZE), UCALL)[0]
        return (
            int(raw["cmd"]),
            tuple(map(int, raw["args"])),
            decode_text(raw["buffer"].tobytes()),
            slot,
        )

    def in_use(self) -> list[int]:
        """The slots whose bit is set."""
        bits = int.from_bytes(self.uc.mem_read(POOL, BITMAP_BYTES), "little")
        return [n for n in range(NR_SLOTS) if bits >> n & 1]

    def cstring(self, gva: int) -> str:
        return decode_text(bytes(self.uc.mem_read(gva, 64)))
