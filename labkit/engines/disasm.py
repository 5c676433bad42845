"""Disassembly by capstone, for engines that must recognise instructions and for people who want to read them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from labkit.errors import NotAvailable

__all__ = ["Decoded", "decoder", "disassemble"]


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


@cache
def decoder(arch: str, detail: bool = False) -> Any:
    """Capstone for an architecture; raises NotAvailable for one it is not set up for."""
    import capstone

    modes = {"x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64)}
    if arch not in modes:
        raise NotAvailable(f"no disassembler for {arch}", arch=arch)
    engine = capstone.Cs(*modes[arch])
    engine.detail = detail
    return engine


def disassemble(arch: str, data: bytes, gva: int) -> Iterator[Decoded]:
    """The instructions in data, which lies at gva; stops at the first bytes that are no instruction."""
    for at, size, mnemonic, op_str in decoder(arch).disasm_lite(data, gva):
        yield Decoded(at, size, mnemonic, op_str)
