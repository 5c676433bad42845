"""A guest on a bare Unicorn without paging, made with nothing of labkit's but the loader: the guest library's own test bench."""

from __future__ import annotations

import numpy as np
from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_64, Uc
from unicorn import x86_const as x86

from labkit.guest.program import Program
from labkit.ucall.abi import (
    GUEST_UCALL_FAILED,
    HEADER_SIZE,
    NR_SLOTS,
    UCALL,
    UCALL_PIO_PORT,
    UCALL_SIZE,
    decode_text,
)

STACK, POOL, HANDLERS = 0x10000000, 0x20000000, 0x30000000
HVA = 0x7F0000000000
ARGS = (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RCX)


class Exhausted(Exception):
    """The guest sent the magic -1."""


class BareGuest:
    """One vCPU; `run` goes to the next ucall and returns (cmd, args, text, slot), or None when the entry function returned."""

    def __init__(self, program: Program) -> None:
        self.program, self.uc, self.left = program, Uc(UC_ARCH_X86, UC_MODE_64), None
        for segment in program.segments:
            self.uc.mem_map(
                segment.gva & ~0xFFF, (segment.gva & 0xFFF) + segment.memsz + 0xFFF & ~0xFFF
            )
            self.uc.mem_write(segment.gva, segment.data)
        for base, size in (
            (STACK, 0x10000),
            (POOL, HEADER_SIZE + 0xFFF & ~0xFFF),
            (HANDLERS, 0x1000),
        ):
            self.uc.mem_map(base, size)
        for slot in range(NR_SLOTS):
            self.write_u64(POOL + 64 + slot * UCALL_SIZE + 1088, HVA + slot)
        self.write_u64(program.symbol("ucall_pool").gva, POOL)
        self.write_u64(program.symbol("exception_handlers").gva, HANDLERS)
        self.uc.hook_add(UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)

    def write_u64(self, gva: int, value: int) -> None:
        self.uc.mem_write(gva, value.to_bytes(8, "little"))

    def read_u64(self, gva: int) -> int:
        return int.from_bytes(self.uc.mem_read(gva, 8), "little")

    def enter(self, function: str, *args: int) -> BareGuest:
        self.uc.reg_write(x86.UC_X86_REG_RSP, STACK + 0x8000 - 8)
        self.write_u64(STACK + 0x8000 - 8, 0)
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
        self.left = None
        self.uc.emu_start(self.uc.reg_read(x86.UC_X86_REG_RIP), until, count=3_000_000)
        if self.left is None:
            assert self.uc.reg_read(x86.UC_X86_REG_RIP) == until
            return None
        if self.left == GUEST_UCALL_FAILED:
            raise Exhausted
        slot = self.left - HVA
        raw = np.frombuffer(self.uc.mem_read(POOL + 64 + slot * UCALL_SIZE, UCALL_SIZE), UCALL)[0]
        return (
            int(raw["cmd"]),
            tuple(map(int, raw["args"])),
            decode_text(raw["buffer"].tobytes()),
            slot,
        )

    def in_use(self) -> list[int]:
        bits = int.from_bytes(self.uc.mem_read(POOL, 64), "little")
        return [n for n in range(NR_SLOTS) if bits >> n & 1]

    def cstring(self, gva: int) -> str:
        return decode_text(bytes(self.uc.mem_read(gva, 64)))
