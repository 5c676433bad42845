"""Disassembly by capstone, for engines that recognise instructions and for people who read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from labkit.errors import NotAvailable

__all__ = ["Decoded", "MemoryOperand", "branch_target", "decoder", "disassemble", "memory_operands"]

# Of capstone, as numbers: it loads when it is first needed.
X86_OP_MEM = 3  # x86_op_type
AC_READ, AC_WRITE = 1, 2  # cs_ac_type

# How the mnemonic of a direct branch begins.
BRANCHES = {
    "x86_64": re.compile(r"j|call|loop"),
    "arm64": re.compile(r"bl?$|b\.|cbn?z|tbn?z"),
    "riscv64": re.compile(r"(c\.)?(j$|jal$|b)"),
    "s390x": re.compile(r"j|br(?!asl?$)|c(l?g?r?i?|g?f?i?)j|lo?c"),
}
NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d+)")


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
    """What an instruction says of a memory access of its own; what it does not name is empty."""

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
    """The instructions in data, which lies at gva; stops at the first bytes that are none."""
    for at, size, mnemonic, op_str in decoder(arch).disasm_lite(data, gva):
        yield Decoded(at, size, mnemonic, op_str)


def branch_target(arch: str, insn: Decoded) -> int | None:
    """Where a direct branch or call goes; None for any other instruction."""
    if not BRANCHES[arch].match(insn.mnemonic):
        return None
    last_operand = insn.op_str.rpartition(",")[2].strip().lstrip("#")
    if not NUMBER.fullmatch(last_operand):
        return None

    target = int(last_operand, 0)
    if arch == "riscv64":  # there it is an offset, elsewhere an address
        target += insn.gva
    return target & (1 << 64) - 1


def memory_operands(arch: str, data: bytes) -> list[MemoryOperand]:
    """The memory operands that the first instruction in data names; none where there is no such."""
    engine = decoder(arch, detail=True)
    insn = next(iter(engine.disasm(data, 0)), None)
    if insn is None:
        return []
    # Of CMPXCHG, capstone says that it only reads.
    unsaid = AC_READ | AC_WRITE if "cmpxchg" in insn.mnemonic else 0

    operands = []
    for operand in insn.operands:
        if operand.type != X86_OP_MEM:
            continue
        access = operand.access | unsaid
        operands.append(
            MemoryOperand(
                base=engine.reg_name(operand.mem.base) or "",
                segment=engine.reg_name(operand.mem.segment) or "",
                reads=bool(access & AC_READ),
                writes=bool(access & AC_WRITE),
            )
        )
    return operands
