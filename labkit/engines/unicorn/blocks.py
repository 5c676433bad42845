"""Hooks in machine code, and blocks that jump to themselves: how to stop a CPU that never comes back.

`uc_emu_stop` from another thread leaves the program counter where memory was last touched, or in the middle of a
read-modify-write. Dropping the translated code brings the CPU back in order, but a block that jumps to itself stays linked to
itself. If such a block touches memory, a hook looks at a flag once a round and stops in order; it is ten bytes of machine
code, because a Python callback would cost 1 us a round. If not, stopping it from outside is exact but for the program
counter, which `settle` knows.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from collections.abc import Callable, Mapping
from functools import cache

from labkit.engines.disasm import Decoded, disassemble
from labkit.engines.unicorn.lib import STOP

__all__ = ["MACHINE_CODE", "is_memory_loop", "settle", "stub"]

Read = Callable[[int, int], bytes | None]

# Hooks, called as hook(uc, address, size, data); the 8-byte address of uc_emu_stop is put in place of the Ss.
# "flag": if (*(char *)data) uc_emu_stop(uc).   "locked": data[0] = *data[1], the counter at the last locked instruction.
MACHINE_CODE = {
    ("x86_64", "flag"): b"\x80\x39\x00\x75\x01\xc3\x48\xb8SSSSSSSS\xff\xe0",
    ("x86_64", "locked"): b"\x48\x8b\x41\x08\x48\x8b\x00\x48\x89\x01\xc3",
    ("aarch64", "flag"): struct.pack("<5I", 0x39400064, 0x35000044, 0xD65F03C0, 0x58000045, 0xD61F00A0) + b"SSSSSSSS",
    ("aarch64", "locked"): struct.pack("<4I", 0xF9400464, 0xF9400084, 0xF9000064, 0xD65F03C0),
}
_STACK = ("push", "pop", "call", "ret", "leave", "enter")


@cache
def stub(name: str) -> int | None:
    """The address of a hook in executable memory; None where the host's processor is another or forbids it."""
    code = MACHINE_CODE.get(({"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()), name))
    if code is None:
        return None
    try:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, AttributeError):
        return None
    code = code.replace(b"SSSSSSSS", struct.pack("<Q", STOP))
    page[:len(code)] = code
    _PAGES.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


_PAGES: list[mmap.mmap] = []  # executable memory lives as long as the process


def is_memory_loop(arch: str, gva: int, data: bytes) -> bool:
    """Whether a block jumps to its own start and touches memory on the way."""
    block = list(disassemble(arch, data, gva))
    return _loops(block) and any("[" in i.op_str and i.mnemonic not in ("lea", "nop") or i.mnemonic in _STACK for i in block)


def settle(arch: str, stale: int, blocks: Mapping[int, int], read: Read) -> int:
    """The start of the self-looping block without memory accesses that was running, given the program counter Unicorn left.

    That is the block's own start when it was entered once; else an instruction from which the block is reached without
    touching memory. `blocks` are the translated blocks, gva -> bytes.
    """
    loops = {gva for gva, size in blocks.items() if _loops(_decode(arch, gva, size, read))}
    seen: set[int] = set()
    ahead = [stale]
    while ahead:
        gva = ahead.pop(0)
        if gva in loops:
            return gva
        if gva not in seen:
            seen.add(gva)
            size = next((start + length - gva for start, length in blocks.items() if start <= gva < start + length), 0)
            ahead += _successors(_decode(arch, gva, size, read), gva + size) if size else []
    return stale


def _decode(arch: str, gva: int, size: int, read: Read) -> list[Decoded]:
    data = read(gva, size)
    return list(disassemble(arch, data, gva)) if data else []


def _target(insn: Decoded) -> int | None:
    branch = insn.mnemonic[0] == "j" or insn.mnemonic.startswith(("call", "loop"))
    return int(insn.op_str, 16) if branch and insn.op_str.startswith("0x") else None


def _loops(block: list[Decoded]) -> bool:
    return bool(block) and (_target(block[-1]) == block[0].gva or block[0].mnemonic.startswith("rep"))


def _successors(block: list[Decoded], end: int) -> list[int]:
    if not block:
        return []
    target = _target(block[-1])
    return ([] if target is None else [target]) + ([] if block[-1].mnemonic in ("jmp", "ret", "hlt") else [end])
