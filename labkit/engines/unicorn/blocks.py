"""Loops, and how to stop a CPU that is in one for ever.

`uc_emu_stop` from another thread is followed where a block begins and behind every memory access. There the program counter is
that of the instruction, which begins anew when the run goes on: exact, unless it has changed memory or its own address by then,
as a read-modify-write does. So a hook at the head of every loop looks at a flag once a round and stops in order: whatever runs
for ever jumps backwards. Only a block that jumps to itself goes without, if all its instructions can begin anew. Loads of arm64
are over there: Unicorn has loaded straight into the register.
"""

from __future__ import annotations

import re

from labkit.engines.disasm import Decoded, branch_target, disassemble

__all__ = ["can_begin_anew", "hops", "is_over", "jump"]

_HOPS = {  # jumps to where a register or memory says; a return leads to where a call was, and calls are looked at
    "x86_64": re.compile(r"(notrack )?jmp"),
    "arm64": re.compile(r"br "),
    "riscv64": re.compile(r"(c\.)?jr (?!ra)"),
    "s390x": re.compile(r"br %r(?!14)"),
}
_MEMORY = re.compile(r"[\[(]")
_PLAIN = {  # loads and stores that can begin anew; of s390x, which loads into its registers one by one, none is taken to be one
    "x86_64": re.compile(r"lea|nop|\w+ \w+,.*\[|(mov|movabs|mov[au]ps|movdq[au]|cmp|test) \w+ ptr"),
    "arm64": re.compile(r"(ldu?r|stu?r|ldn?p|stn?p|prfm)(s?[bhw])? "),
    "riscv64": re.compile(r"(c\.)?f?[ls][bhwdq]u?(sp)? "),
    "s390x": re.compile(r"lay? "),
}
_LOAD = re.compile(r"ldu?r[bh]?$")
_NUMBER = re.compile(r"[wx](\d+)")
_STACK = re.compile(r"push|pop|call|ret|leave|enter")


def jump(arch: str, gva: int, data: bytes) -> int | None:
    """Where the direct branch or call that ends this block leads; None when none does. A REP leads to itself."""
    block = list(disassemble(arch, data, gva))
    if block and block[0].mnemonic.startswith("rep"):
        return gva
    return branch_target(arch, block[-1]) if block else None


def hops(arch: str, gva: int, data: bytes) -> bool:
    """Whether this block ends in a jump to where a register or memory says."""
    return any(
        _HOPS[arch].match(insn.text) and branch_target(arch, insn) is None
        for insn in disassemble(arch, data, gva)
    )


def can_begin_anew(arch: str, gva: int, data: bytes) -> bool:
    """Whether all these instructions give the same when they are run once more after a stop behind a memory access of their own."""
    block = list(disassemble(arch, data, gva))
    return all(_is_plain(arch, insn) or (insn.gva != gva and is_over(arch, insn)) for insn in block)


def is_over(arch: str, insn: Decoded) -> bool:
    """Whether nothing is left to do of an instruction that was stopped behind its memory access, and it must not run again."""
    return (
        arch == "arm64"
        and _LOAD.match(insn.mnemonic) is not None
        and insn.op_str.endswith("]")
        and not _is_plain(arch, insn)
    )


def _is_plain(arch: str, insn: Decoded) -> bool:
    if not _MEMORY.search(insn.op_str):
        return arch != "x86_64" or not _STACK.match(insn.mnemonic)
    if not _PLAIN[arch].match(insn.text):
        return False
    loaded, _, address = insn.op_str.partition("[")
    return arch != "arm64" or not set(_NUMBER.findall(loaded)) & set(_NUMBER.findall(address))
