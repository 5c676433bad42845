"""Code as a person reads it: disassembly with symbols and source lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from labkit.engines.disasm import Decoded, disassemble
from labkit.errors import MemoryFault, PageFault
from labkit.guest.program import Program

__all__ = ["Listing", "read_code"]

Read = Callable[[int, int], bytes]  # read(gva, size)
MAX_INSN = 15  # bytes


def read_code(read: Read, gva: int, size: int) -> bytes:
    """Up to size bytes from gva on, as many as are mapped."""
    got = b""
    while size > 0:
        count = min(size, 4096 - gva % 4096)
        try:
            got += read(gva, count)
        except (PageFault, MemoryFault):
            break
        gva, size = gva + count, size - count
    return got


@dataclass(frozen=True)
class Listing:
    """Some instructions in a row; `pc` marks the one that runs next."""

    insns: tuple[Decoded, ...]
    pc: int
    symbol: str
    start: int  # gva of the symbol
    gva: int  # where the first one was looked for

    @classmethod
    def at(
        cls, arch: str, program: Program | None, read: Read, gva: int, count: int, pc: int
    ) -> Listing:
        """count instructions from gva on; fewer when memory or code ends there."""
        found = program.symbol_at(gva) if program else None
        symbol, start = (found[0].name, gva - found[1]) if found else ("", gva)
        data = read_code(read, gva, count * MAX_INSN)
        insns: list[Decoded] = []
        for insn in disassemble(arch, data, gva):
            insns.append(insn)
            if len(insns) == count:
                break
        return cls(tuple(insns), pc, symbol, start, gva)

    @classmethod
    def around(
        cls, arch: str, program: Program | None, read: Read, pc: int, before: int, after: int
    ) -> Listing:
        """The instructions around pc, decoded from the start of its function so that they are aligned."""
        found = program.symbol_at(pc) if program else None
        if found is None or found[1] > 0x4000:
            return cls.at(arch, program, read, pc, after + 1, pc)
        start = pc - found[1]
        data = read_code(read, start, found[1] + (after + 1) * MAX_INSN)
        insns = list(disassemble(arch, data, start))
        at = next((i for i, insn in enumerate(insns) if insn.gva == pc), None)
        if at is None:  # a data byte, or a jump into the middle of an instruction
            return cls.at(arch, program, read, pc, after + 1, pc)
        return cls(tuple(insns[max(0, at - before) : at + after + 1]), pc, found[0].name, start, pc)

    def __len__(self) -> int:
        return len(self.insns)

    def __getitem__(self, index: int) -> Decoded:
        return self.insns[index]

    def __repr__(self) -> str:
        head = [f"{self.symbol or hex(self.start)}:"]
        if not self.insns:
            return f"{head[0]} no instruction at {self.gva:#x}"
        marks = ("=>" if insn.gva == self.pc else "  " for insn in self.insns)
        rows = (
            f"{mark} {i.gva:x} +{i.gva - self.start:<4x} {i.mnemonic:<9} {i.op_str}"
            for mark, i in zip(marks, self.insns, strict=True)
        )
        return "\n".join([*head, *(row.rstrip() for row in rows)])
