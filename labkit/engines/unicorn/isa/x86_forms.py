"""Which x86-64 instructions owe more than Unicorn gives, and how to tell when they do.

x87 and SSE arithmetic is the host processor's (native/borrow.py). Others are Unicorn's until an
address or a register has certain bits: a hook in machine code looks (`Check`, stubs.c).
"""

from __future__ import annotations

from unicorn import x86_const as x86

from labkit.engines.unicorn.isa.check import Check
from labkit.engines.unicorn.isa.x86_operands import Place, place, registers, wide

__all__ = ["ABSENT", "FLOATS", "form"]

HIGH = 0xFFFF_FFFF_0000_0000
NOT_CANONICAL = 0xFFFF_0000_0000_0000  # bits of an address to which 1 << 47 was added
PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")

# Results, flags or exceptions come from the host: IEEE arithmetic, and PCMPxSTRx
_SUFFIXED = {
    "ps pd ss sd": "add sub mul div sqrt min max round",
    "ps pd": "addsub hadd hsub dp",
    "ss sd": "comi ucomi",
}
# fmt: off
FLOATS = frozenset({
    *(f"{name}{suffix}" for suffixes, names in _SUFFIXED.items()
      for name in names.split() for suffix in suffixes.split()),
    *(f"cmp{relation}{suffix}" for relation in
      ("", "eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord")
      for suffix in ("ps", "pd", "ss", "sd")),
    "cvtdq2ps", "cvtps2dq", "cvttps2dq", "cvtpd2dq", "cvttpd2dq", "cvtps2pd", "cvtpd2ps",
    "cvtss2sd", "cvtsd2ss", "cvtsi2ss", "cvtsi2sd", "cvtss2si", "cvtsd2si", "cvttss2si",
    "cvttsd2si", "cvtpi2ps", "cvtps2pi", "cvttps2pi", "cvtpi2pd", "cvtpd2pi", "cvttpd2pi",
    "pcmpestri", "pcmpestrm", "pcmpistri", "pcmpistrm",
})
# SSE instructions whose operand of 16 bytes may lie anywhere (SDM vol. 1 11.4.1, vol. 2)
_ANYWHERE = frozenset({
    "movups", "movupd", "movdqu", "lddqu", "pcmpestri", "pcmpestrm", "pcmpistri", "pcmpistrm",
})
# What Unicorn has, by the CPUID bit that announces it: (leaf, register, bit)
ABSENT = {
    name: bit
    for bit, names in {
        (1, 2, 1): "pclmulqdq",
        (1, 2, 22): "movbe",
        (1, 2, 25): "aesenc aesenclast aesdec aesdeclast aesimc aeskeygenassist",
        (7, 1, 19): "adcx adox",
        (7, 1, 23): "clflushopt",
        (7, 1, 24): "clwb",
        (7, 2, 22): "rdpid",
        (7, 1, 10): "invpcid",
        (7, 1, 0): "rdfsbase rdgsbase wrfsbase wrgsbase",
        (7, 1, 20): "stac clac",
        (7, 1, 29): "sha1rnds4 sha1nexte sha1msg1 sha1msg2 sha256rnds2 sha256msg1 sha256msg2",
        (7, 2, 3): "rdpkru wrpkru",
        (1, 2, 23): "popcnt",
        (1, 2, 20): "crc32 pcmpestri pcmpestrm pcmpistri pcmpistrm pcmpgtq",
        (0x8000_0001, 2, 6): "extrq insertq movntss movntsd",
        (0x8000_0001, 2, 8): "prefetchw",
    }.items()
    for name in names.split()
}
# fmt: on


def _number(name: str) -> int:
    return int(getattr(x86, f"UC_X86_REG_{name.upper()}")) if name else 0


def _aligned(place: Place, mask: int) -> Check:
    segment = f"{place.segment}_base" if place.segment in ("fs", "gs") else ""
    return Check(
        _number(wide(place.base) if place.base else ""),
        _number(wide(place.index) if place.index else ""),
        place.scale,
        _number(segment),
        place.displacement & (1 << 64) - 1,
        mask,
    )


def _opcode(data: bytes) -> tuple[bytes, bool]:
    """(the bytes from the opcode on, REX.W)."""
    rest = data.lstrip(bytes(PREFIXES))
    if rest and rest[0] >> 4 == 4:
        return rest[1:], bool(rest[0] & 8)
    return rest, False


def form(data: bytes, gva: int, mnemonic: str) -> tuple[str, Check | None] | None:
    """(kind of trap, when) of an instruction; None when it owes nothing."""
    name = mnemonic.split()[-1]
    rest, is_wide = _opcode(data)
    if 0xD8 <= rest[0] <= 0xDF or rest[0] == 0x9B:
        return "x87", None
    if rest[0] != 0x0F:
        return None
    if name in FLOATS and b"\xf0" not in data[: len(data) - len(rest)]:
        return "sse", None
    if name == "cmpxchg":
        return _cmpxchg(data, gva, rest, is_wide)
    if rest[1] == 0xAE:
        return _extended_state(data, gva, rest, is_wide, name)
    if rest[1] == 0x00 and name == "ltr":
        return "ltr", None

    where = place(data, gva)
    if where is None or where.size != 16 or name in _ANYWHERE or rest[1] < 0x10:
        return None
    return _unaligned(where, gva)


def _unaligned(where: Place, gva: int) -> tuple[str, Check | None] | None:
    """#GP for an operand that is not at a multiple of 16."""
    if where.base or where.index or where.segment in ("fs", "gs"):
        return "unaligned", _aligned(where, 15)
    return ("unaligned", None) if where.displacement & 15 else None


def _cmpxchg(data: bytes, gva: int, rest: bytes, is_wide: bool) -> tuple[str, Check | None] | None:
    """Of 32 bits: Unicorn clears upper halves that are not written."""
    is_32 = rest[1] == 0xB1 and not is_wide and 0x66 not in data[: len(data) - len(rest)]
    if not is_32:
        return None
    if place(data, gva) is None:
        return "cmpxchg32", None
    return "cmpxchg32", Check(x86.UC_X86_REG_RAX, 0, 0, 0, 0, HIGH)


def _extended_state(
    data: bytes, gva: int, rest: bytes, is_wide: bool, name: str
) -> tuple[str, Check | None] | None:
    """0F AE: state in memory, cache lines, FS and GS."""
    where = place(data, gva)
    if name in ("ldmxcsr", "clflush"):
        return name, None
    if name in ("fxrstor", "fxrstor64"):
        return "fxrstor", None
    if name in ("fxsave", "fxsave64") and where is not None:
        return _unaligned(where, gva)
    if name in ("wrfsbase", "wrgsbase") and is_wide:
        register = registers(data)[0][0]
        return "wrbase", Check(_number(register), 0, 0, 0, 1 << 47, NOT_CANONICAL)
    return None
