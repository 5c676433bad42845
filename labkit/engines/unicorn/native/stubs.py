"""Hooks in machine code: what must happen at every block costs 2 ns this way, and 1 us as a Python callback."""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from functools import cache

from unicorn.x86_const import UC_X86_REG_RCX

from labkit.engines.unicorn.native.lib import LIB, STOP

__all__ = ["MACHINE_CODE", "SOURCE", "stub"]

# Called as hook(uc, address, size, u64 *data). SSSSSSSS and GGGGGGGG stand for the addresses of uc_emu_stop and uc_reg_read,
# RRRR for libunicorn's number of RCX.
SOURCE = """
tally:  entry = table + 16 * ((address ^ address >> 16) & 0xffff)       data: total, block, table, limit, stopped
        if entry.gva == address and total + entry.count <= limit: total += entry.count, block = address
        else: stopped = 1, uc_emu_stop(uc)
flag:   if *(u8 *)data: uc_emu_stop(uc)
locked: data[0] = *data[1], data[2] = address, data[3] = *(data[1] + 8)
rep:    n = *data[0], uc_reg_read(uc, RCX, &data[4]), data[5] = data[1] == address and data[2] + 1 == n
        if data[5] and data[4] == 0: data[3] += 1
        data[1] = address, data[2] = n
"""
MACHINE_CODE = {
    (
        "x86_64",
        "tally",
    ): "4889f048c1e8104831f00fb7c048c1e004480341104839307515488b5008480311483b5118770848891148897108c3c6412001"
    "48b85353535353535353ffe0",
    ("x86_64", "flag"): "8039007501c348b85353535353535353ffe0",
    ("x86_64", "locked"): "488b4108488b10488911488b50084889511848897110c3",
    (
        "x86_64",
        "rep",
    ): "53415441554889cb4989f44c8b2b4d8b6d00be52525252488d532048c7020000000048b84747474747474747ffd0488b431048ff"
    "c048c74328000000004c39e875194c396308751348c743280100000048837b2000750448ff43184c8963084c896b10415d415c5bc3",
    (
        "aarch64",
        "tally",
    ): "244041ca843c4092650840f9a510048ba60040f9df0001eb41010054a60440f9670040f9c600078b670c40f9df0007eb88000054"
    "660000f9610400f9c0035fd6240080526480003945000058a0001fd65353535353535353",
    ("aarch64", "flag"): "6400403944000035c0035fd645000058a0001fd65353535353535353",
    ("aarch64", "locked"): "640440f9850040f9650000f9850440f9650c00f9610800f9c0035fd6",
    (
        "aarch64",
        "rep",
    ): "fd7bbda9f35301a9f51300f9f30303aaf40301aa750240f9b50240f961030018628200915f0000f945030058a0003fd6640a40f9"
    "840400917f1600f99f0015eb61010054640640f99f0014eb01010054240080d2641600f9641240f9840000b5640e40f984040091"
    "640e00f9740600f9750a00f9f51340f9f35341a9fd7bc3a8c0035fd61f2003d552525252000000004747474747474747",
}
READ = ctypes.cast(LIB.uc_reg_read, ctypes.c_void_p).value
_PAGES: list[mmap.mmap] = []  # executable memory lives as long as the process


@cache
def stub(name: str) -> int | None:
    """The address of a hook in executable memory; None where the host's processor is another or forbids it."""
    code = MACHINE_CODE.get(
        ({"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()), name)
    )
    if code is None:
        return None
    try:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, AttributeError):
        return None
    raw = bytes.fromhex(code)
    for mark, value in (
        (b"SSSSSSSS", struct.pack("<Q", STOP or 0)),
        (b"GGGGGGGG", struct.pack("<Q", READ or 0)),
        (b"RRRR", struct.pack("<I", UC_X86_REG_RCX)),
    ):
        raw = raw.replace(mark, value)
    page[: len(raw)] = raw
    _PAGES.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))
