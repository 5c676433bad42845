"""Code as a person reads it: disassembly with symbols and source lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from labkit.engines.disasm import Decoded, disassemble
from labkit.errors import MemoryFault, PageFault
from labkit.guest.program import Program
from labkit.machine.memory import PAGE

__all__ = ["Listing", "read_code"]

Read = Callable[[int, int], bytes]  # read(gva, size)
MAX_INSN = 15  # bytes of the longest instruction, which is x86's
MAX_FUNCTION = 0x4000  # bytes that are decoded to find where the instructions before pc begin


def read_code(read: Read, gva: int, size: int) -> bytes:
    """Up to size bytes from gva on, as many as are mapped."""
    got = b""
    while size > 0:
        count = min(size, PAGE - gva % PAGE)
        try:
            got += read(gva, count)
        except (PageFault, MemoryFault):
            break
        gva += count
        size -= count
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
        data = read_code(read, gva, count * MAX_INSN)
        insns = tuple(islice(disassemble(arch, data, gva), count))
        found = program.symbol_at(gva) if program is not None else None
        if found is None:
            return cls(insns, pc, "", gva, gva)
        symbol, offset = found
        return cls(insns, pc, symbol.name, gva - offset, gva)

    @classmethod
    def around(
        cls, arch: str, program: Program | None, read: Read, pc: int, before: int, after: int
    ) -> Listing:
        """The instructions around pc, decoded from the start of its function to be aligned.

        Only those from pc on where pc is in no known function, or at none of its instructions: a
        data byte, or a jump into the middle of one.
        """
        found = program.symbol_at(pc) if program is not None else None
        if found is not None and found[1] <= MAX_FUNCTION:
            symbol, offset = found
            start = pc - offset
            data = read_code(read, start, offset + (after + 1) * MAX_INSN)
            insns = list(disassemble(arch, data, start))
            for at, insn in enumerate(insns):
                if insn.gva == pc:
                    some = tuple(insns[max(0, at - before) : at + after + 1])
                    return cls(some, pc, symbol.name, start, pc)
        return cls.at(arch, program, read, pc, after + 1, pc)

    def __len__(self) -> int:
        return len(self.insns)

    def __getitem__(self, index: int) -> Decoded:
        return self.insns[index]

    def __repr__(self) -> str:
        head = f"{self.symbol or hex(self.start)}:"
        if not self.insns:
            return f"{head} no instruction at {self.gva:#x}"
        rows = [head]
        for insn in self.insns:
            mark = "=>" if insn.gva == self.pc else "  "
            offset = insn.gva - self.start
            row = f"{mark} {insn.gva:x} +{offset:<4x} {insn.mnemonic:<9} {insn.op_str}"
            rows.append(row.rstrip())
        return "\n".join(rows)
