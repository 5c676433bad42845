"""Hooks in machine code: what must happen at every block costs 2 ns this way, and 1 us as a Python callback."""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from functools import cache

from labkit.engines.unicorn.lib import STOP

__all__ = ["MACHINE_CODE", "SOURCE", "stub"]

# Called as hook(uc, address, size, u64 *data); the eight bytes SSSSSSSS are the address of uc_emu_stop.
SOURCE = """
tally:  entry = table + 16 * ((address ^ address >> 16) & 0xffff)       data: total, block, table, limit, stopped
        if entry.gva == address and total + entry.count <= limit: total += entry.count, block = address
        else: stopped = 1, uc_emu_stop(uc)
flag:   if *(u8 *)data: uc_emu_stop(uc)
locked: data[0] = *data[1], data[2] = address, data[3] = *(data[1] + 8)
"""
MACHINE_CODE = {
    ("x86_64", "tally"): "4889f048c1e8104831f00fb7c048c1e004480341104839307515488b5008480311483b5118770848891148897108c3c6412001"
                         "48b85353535353535353ffe0",
    ("x86_64", "flag"): "8039007501c348b85353535353535353ffe0",
    ("x86_64", "locked"): "488b4108488b10488911488b50084889511848897110c3",
    ("aarch64", "tally"): "244041ca843c4092650840f9a510048ba60040f9df0001eb41010054a60440f9670040f9c600078b670c40f9df0007eb88000054"
                          "660000f9610400f9c0035fd6240080526480003945000058a0001fd65353535353535353",
    ("aarch64", "flag"): "6400403944000035c0035fd645000058a0001fd65353535353535353",
    ("aarch64", "locked"): "640440f9850040f9650000f9850440f9650c00f9610800f9c0035fd6",
}
_PAGES: list[mmap.mmap] = []  # executable memory lives as long as the process


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
    raw = bytes.fromhex(code).replace(b"SSSSSSSS", struct.pack("<Q", STOP or 0))
    page[:len(raw)] = raw
    _PAGES.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))
