"""Which x86-64 instructions must not run inside Unicorn, and why.

Some are the host's business (IN, HLT, CPUID, MSRs), some Unicorn carries out wrongly without a
word: SYSCALL only moves on, RDTSC and RDRAND answer with the host's, an unknown RDMSR reads 0,
128-bit VEX computes something else, control registers take any bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from labkit.engines.disasm import decoder
from labkit.engines.unicorn.isa.check import Check
from labkit.engines.unicorn.isa.x86_forms import form

__all__ = ["PREFIXES", "SIZES", "Trap", "pio_form", "scan"]


@dataclass(frozen=True)
class Trap:
    """A sensitive instruction: `kind` names its handler.

    Only `stops` ones are taken out of Unicorn's hands before they run. The others only correct the
    count, or note what it is.
    """

    kind: str
    gva: int
    data: bytes
    mnemonic: str
    op_str: str
    stops: bool = True
    check: Check | None = None  # it is one only when this is so


_KINDS = {
    "pio": "in out",
    "string_pio": "insb insw insd outsb outsw outsd",
    "halt": "hlt",
    "cpuid": "cpuid",
    "rdtsc": "rdtsc rdtscp",
    "rdmsr": "rdmsr",
    "wrmsr": "wrmsr",
    "xgetbv": "xgetbv",
    "xsetbv": "xsetbv",
    "hypercall": "vmcall vmmcall",
    "random": "rdrand rdseed",
    "syscall": "syscall",
    "sysenter": "sysenter sysexit",
    "icebp": "int1",
    "iret": "iret iretd iretq",
    "monitor": "monitor mwait",
    "rdpmc": "rdpmc",
    "pause": "pause",
    "flush": "wbinvd wbnoinvd invd",
    "undefined": "vmrun vmload vmsave stgi clgi skinit invlpga vmxon vmlaunch vmresume vmread "
    "vmwrite vmptrld vmptrst vmclear monitorx mwaitx rsm getsec",
    "refused": "xsave xsave64 xsaveopt xsaveopt64 xsavec xsavec64 xsaves xsaves64 "
    "xrstor xrstor64 xrstors xrstors64",
}
_BY_MNEMONIC = {mnemonic: kind for kind, names in _KINDS.items() for mnemonic in names.split()}
PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
SIZES = {"b": 1, "w": 2, "d": 4}  # bytes, by the last letter of a string I/O instruction
LONGEST = 15  # bytes of an instruction
_COUNTED = frozenset({"rep", "shadow", "locked", "iret"})
# Intercepted where registers are encrypted, Unicorn's own business elsewhere
_SEALED = frozenset({"flush", "dr7"})
_DEBUG_REGISTER = re.compile(r"\bdr\d")
_STRING = frozenset(b"\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
# Every byte sequence that can begin or be part of one of them; a block without a match needs no
# decoding
_SUSPECT = re.compile(
    rb"[\xf0\x86\x87\xcf\xe4-\xe7\xec-\xef\x6c-\x6f\xf4\xc4\xc5\x62\x8f\xf1]"
    rb"|[\xd8-\xdf\x9b]|\x0f[\x0d-\x17\x28-\x2f\x38\x3a\x50-\x7f\xb1\xb8\xbc\xbd\xc2\xc4-\xc6\xd0-\xff]"
    rb"|[\xf2\xf3][\x26\x2e\x36\x3e\x40-\x4f\x64-\x67\xf0\xf2\xf3]*[\x90\xa4-\xa7\xaa-\xaf]"
    rb"|\x0f[\x00\x01\x05\x08\x09\x20\x21\x22\x23\x30-\x37\x78\x79\xa2\xaa\xae\xc7]|\x8e[\x10-\x17\x50-\x57\x90-\x97\xd0-\xd7]",
    re.DOTALL,
)

# Where Unicorn raises an exception and reads no further: control and debug registers, LGDT and the
# like in memory at CPL3; x87, MMX and SSE with CR0.TS or EM
_CUT = re.compile(
    rb"[\x26\x2e\x36\x3e\x64-\x67\xf2\xf3]*[\x40-\x4f]?"
    rb"([\xd8-\xdf]|\x0f("
    rb"[\x20-\x23]|[\x00\x01][\x00-\xbf]"
    rb"|[\x0e\x10-\x17\x28-\x2f\x38\x3a\x50-\x7f\xc2\xc4-\xc6\xd0-\xff]|\xae[\x00-\xbf]))",
    re.DOTALL,
)


def _kind(data: bytes, mnemonic: str, op_str: str) -> str | None:
    words = mnemonic.split()
    if words[-1] in _BY_MNEMONIC:
        return _BY_MNEMONIC[words[-1]]
    # Capstone does not show every REP
    if _opcode(data) in _STRING and (0xF2 in data or 0xF3 in data):
        return "rep"
    if words[-1] == "neg" and 0xF0 in data[:-1]:
        return "lock_neg"
    if words[0] in ("lock", "xacquire", "xrelease") or (words[-1] == "xchg" and "[" in op_str):
        return "locked"
    if words[-1] == "mov" and op_str.startswith("ss,"):
        return "shadow"
    if words[-1] == "mov" and (op_str.startswith("cr") or op_str.endswith("cr8")):
        return "control"
    if words[-1] == "mov" and _DEBUG_REGISTER.search(op_str):
        return "dr7" if "dr7" in op_str else "debug"
    return "vector" if _is_vector(data) else None


def _is_vector(data: bytes) -> bool:
    """VEX, EVEX, or XOP, which is a POP whose second byte would name no register."""
    rest = data.lstrip(bytes(PREFIXES))
    return rest[:1] in (b"\xc4", b"\xc5", b"\x62") or (
        rest[:1] == b"\x8f" and rest[1:2] != b"" and rest[1] & 0x1F >= 8
    )


def _opcode(data: bytes) -> int:
    """The first byte that is neither a prefix nor REX (0x4x)."""
    return next((byte for byte in data if byte not in PREFIXES and byte >> 4 != 4), 0)


@lru_cache(1 << 14)
def scan(
    data: bytes, gva: int, sealed: bool = False, absent: frozenset[str] = frozenset()
) -> Mapping[int, Trap]:
    """The sensitive instructions of one block by gva; sealed: of a guest with encrypted registers.

    `absent` are mnemonics that Unicorn has and the guest's CPU has not.

    Blocks come again: in other VMs too. Bytes inside a block that capstone cannot decode though
    Unicorn went on behind them are refused too ("unknown").
    """
    found: dict[int, Trap] = {}
    if not _SUSPECT.search(data):
        return found
    end = gva
    for at, size, mnemonic, op_str in decoder("x86_64").disasm_lite(data, gva):
        end = at + size
        raw = data[at - gva : end - gva]
        kind, check = _kind(raw, mnemonic, op_str), None
        if mnemonic in absent:
            kind = "absent"
        elif kind is None or kind == "locked":
            kind, check = form(raw, at, mnemonic) or (kind, None)
        if kind == "dr7" and not sealed:
            kind = "debug"
        if kind is not None and (sealed or kind not in _SEALED):
            stops = kind not in _COUNTED
            found[at] = Trap(kind, at, raw, mnemonic, op_str, stops, check)
    rest = data[end - gva :]
    is_too_long = len(rest) >= LONGEST and rest[0] in PREFIXES  # Unicorn has #GP for it
    if rest and not is_too_long and not _CUT.fullmatch(rest):
        kind = "vector" if _is_vector(rest) else "unknown"
        found[end] = Trap(kind, end, rest[:15], ".byte", rest[:15].hex(" "))
    return found


@cache
def pio_form(data: bytes) -> tuple[int | None, bool, int]:
    """(immediate port or None for DX, is OUT, bytes) of an IN or OUT."""
    opcode = _opcode(data)
    if not opcode & 1:
        size = 1
    elif b"\x66" in data[:-1]:
        size = 2
    else:
        size = 4
    port = data[-1] if opcode < 0xE8 else None
    return port, bool(opcode & 2), size
