"""Blocks that jump to themselves: how to stop a CPU that never comes back.

`uc_emu_stop` from another thread leaves the program counter where memory was last touched, or in the middle of a
read-modify-write; dropping translated code under a running CPU crashes it now and then. So a hook at the head of every loop
looks at a flag once a round and stops in order: whatever runs for ever jumps backwards. Only a block that jumps to itself and
touches no memory goes without: stopping it from outside is exact but for the program counter, which `settle` knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from labkit.engines.disasm import Decoded, branch_target, disassemble

__all__ = ["loop_head", "settle"]

_STACK = ("push", "pop", "call", "ret", "leave", "enter")


def loop_head(arch: str, gva: int, data: bytes) -> int | None:
    """Where a loop that this block closes must look at the flag: the block it jumps back to, itself if it touches memory."""
    block = list(disassemble(arch, data, gva))
    if _loops(arch, block):
        return gva if _touches(arch, block) else None
    target = branch_target(arch, block[-1]) if block else None
    return target if target is not None and target < gva else None


def _touches(arch: str, block: list[Decoded]) -> bool:
    """Whether a loop touches memory; known of x86-64 alone, where it is worth a flag less."""
    return arch != "x86_64" or any(("[" in i.op_str and i.mnemonic not in ("lea", "nop")) or i.mnemonic in _STACK for i in block)


def settle(arch: str, stale: int, blocks: Mapping[int, bytes]) -> int:
    """The start of the self-looping block without memory accesses that was running, given the program counter Unicorn left.

    That is the block's own start when it was entered once; else an instruction from which the block is reached without
    touching memory. `blocks` are the translated blocks by gva.
    """
    loops = {gva for gva, data in blocks.items() if _loops(arch, list(disassemble(arch, data, gva)))}
    seen: set[int] = set()
    ahead = [stale]
    while ahead:
        gva = ahead.pop(0)
        if gva in loops:
            return gva
        if gva not in seen:
            seen.add(gva)
            data = next((data[gva - start:] for start, data in blocks.items() if start <= gva < start + len(data)), b"")
            ahead += _successors(arch, list(disassemble(arch, data, gva)), gva + len(data))
    return stale


def _loops(arch: str, block: list[Decoded]) -> bool:
    return bool(block) and (branch_target(arch, block[-1]) == block[0].gva or block[0].mnemonic.startswith("rep"))


def _successors(arch: str, block: list[Decoded], end: int) -> list[int]:
    if not block:
        return []
    target = branch_target(arch, block[-1])
    return ([] if target is None else [target]) + ([] if block[-1].mnemonic in ("jmp", "ret", "hlt") else [end])
