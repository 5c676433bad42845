"""Disassembly by capstone, for engines that must recognise instructions and for people who want to read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from labkit.errors import NotAvailable

__all__ = ["Decoded", "MemoryOperand", "branch_target", "decoder", "disassemble", "memory_operands"]


class Decoded(NamedTuple):
    """One instruction; bytes that are none come as `.byte`."""

    gva: int
    size: int
    mnemonic: str
    op_str: str

    @property
    def text(self) -> str:
        """Mnemonic and operands."""
        return f"{self.mnemonic} {self.op_str}".strip()


class MemoryOperand(NamedTuple):
    """What an instruction says of a memory access of its own; names are empty where it says nothing."""

    base: str
    segment: str
    reads: bool
    writes: bool


@cache
def decoder(arch: str, detail: bool = False) -> Any:
    """Capstone for an architecture; raises NotAvailable for one it is not set up for."""
    import capstone

    modes = {
        "x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64),
        "arm64": (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM),
        "riscv64": (capstone.CS_ARCH_RISCV, capstone.CS_MODE_RISCV64 | capstone.CS_MODE_RISCVC),
        "s390x": (capstone.CS_ARCH_SYSZ, capstone.CS_MODE_BIG_ENDIAN),
    }
    if arch not in modes:
        raise NotAvailable(f"no disassembler for {arch}", arch=arch)
    engine = capstone.Cs(*modes[arch])
    engine.detail = detail
    return engine


def disassemble(arch: str, data: bytes, gva: int) -> Iterator[Decoded]:
    """The instructions in data, which lies at gva; stops at the first bytes that are no instruction."""
    for at, size, mnemonic, op_str in decoder(arch).disasm_lite(data, gva):
        yield Decoded(at, size, mnemonic, op_str)


_BRANCHES = {  # how the mnemonic of a direct branch begins; a number without sign is an address, but in riscv64 an offset
    "x86_64": re.compile(r"j|call|loop"),
    "arm64": re.compile(r"bl?$|b\.|cbn?z|tbn?z"),
    "riscv64": re.compile(r"(c\.)?(j$|jal$|b)"),
    "s390x": re.compile(r"j|br(?!asl?$)|c(l?g?r?i?|g?f?i?)j|lo?c"),
}


def branch_target(arch: str, insn: Decoded) -> int | None:
    """Where a direct branch or call goes; None for any other instruction."""
    last = insn.op_str.rpartition(",")[2].strip().lstrip("#")
    if not _BRANCHES[arch].match(insn.mnemonic) or not re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", last):
        return None
    return int(last, 0) + (insn.gva if arch == "riscv64" else 0) & (1 << 64) - 1


def memory_operands(arch: str, data: bytes) -> list[MemoryOperand]:
    """The explicit memory operands of the first instruction in data; none for bytes that are no instruction."""
    insn = next(iter(decoder(arch, detail=True).disasm(data, 0)), None)
    name = decoder(arch, detail=True).reg_name
    if insn is None:
        return []
    both = 3 * ("cmpxchg" in insn.mnemonic)  # capstone says that it only reads
    return [
        MemoryOperand(
            name(op.mem.base) or "",
            name(op.mem.segment) or "",
            bool((op.access | both) & 1),
            bool((op.access | both) & 2),
        )
        for op in insn.operands
        if op.type == 3
    ]  # X86_OP_MEM
