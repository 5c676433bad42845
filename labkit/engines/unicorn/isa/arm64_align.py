"""Alignment on arm64: which instructions must look at an address, and which bits of it.

Acquire and release always (Arm ARM B2.8.2, without FEAT_LSE2), everything else with SCTLR_EL1.A,
and the stack pointer with SA or SA0 (D1.3.8).
"""

from __future__ import annotations

from dataclasses import dataclass

from unicorn import arm64_const as arm

from labkit.engines.unicorn.isa.check import Check

__all__ = ["SA", "SA0", "A", "Access", "access", "check"]

A, SA, SA0 = 1 << 1, 1 << 3, 1 << 4  # SCTLR_EL1
MASK64 = (1 << 64) - 1
SP = 31
_ORDERED = (  # mask, value: acquire and release without exclusives
    (0x3FFFFC00, 0x08DFFC00),  # LDAR
    (0x3FFFFC00, 0x089FFC00),  # STLR
    (0x3FFFFC00, 0x08DF7C00),  # LDLAR
    (0x3FFFFC00, 0x089F7C00),  # STLLR
    (0x3FFFFC00, 0x38BFC000),  # LDAPR
)


@dataclass(frozen=True)
class Access:
    """Where an instruction accesses memory, and by how many bytes at a time."""

    size: int
    base: int  # number of the register, 31 for SP, -1 for the PC
    index: int = -1
    scale: int = 0
    displacement: int = 0
    is_write: bool = False
    is_ordered: bool = False

    def gva(self, read: dict[int, int] | None = None) -> int:
        """The address, of the values of registers by number."""
        values = read or {}
        offset = self.displacement + values.get(self.base, 0)
        if self.index >= 0:
            offset += self.scale * values.get(self.index, 0)
        return offset & MASK64


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _single(word: int) -> tuple[int, bool] | None:
    """(bytes, writes) of a load or store of one register; None for a prefetch."""
    size, is_vector, opc = word >> 30, word >> 26 & 1, word >> 22 & 3
    if is_vector:
        return (16 if opc & 2 else 1 << size), not opc & 1
    if size == 3 and opc == 2:
        return None
    return 1 << size, opc == 0


def access(word: int, gva: int) -> Access | None:
    """The memory access of an instruction at gva; None when it has none, or QEMU checks it."""
    base = word >> 5 & 31
    for mask, value in _ORDERED:
        if word & mask == value:
            is_store = value in (0x089FFC00, 0x089F7C00)
            return Access(1 << (word >> 30), base, is_write=is_store, is_ordered=True)
    if word & 0x3B000000 in (0x39000000, 0x38000000):
        return _one_register(word, base)
    if word & 0x3A000000 == 0x28000000:
        return _pair(word, base)
    if word & 0x3B000000 == 0x18000000:
        return _literal(word, gva)
    if word & 0xBF3F0000 in (0x0C000000, 0x0C400000) or word & 0xBF200000 in (
        0x0C800000,
        0x0CC00000,
    ):
        return Access(1 << (word >> 10 & 3), base, is_write=not word >> 22 & 1)
    return None


def _one_register(word: int, base: int) -> Access | None:
    found = _single(word)
    if found is None:
        return None
    size, is_write = found
    if word & 0x01000000:  # an unsigned offset
        return Access(size, base, displacement=(word >> 10 & 0xFFF) * size, is_write=is_write)
    mode = word >> 10 & 3
    if not word >> 21 & 1:
        offset = 0 if mode == 1 else _signed(word >> 12 & 0x1FF, 9)
        return Access(size, base, displacement=offset, is_write=is_write)
    if mode != 2:
        return None  # atomics, which QEMU checks
    # Of a narrow index only the extension differs, far above the bits that matter
    scale = size if word >> 12 & 1 else 1
    index = word >> 16 & 31
    return Access(size, base, index if index != 31 else -1, scale, 0, is_write)


def _pair(word: int, base: int) -> Access:
    opc, is_vector = word >> 30, word >> 26 & 1
    if is_vector:
        size = 4 << opc
    else:
        size = 8 if opc == 2 else 4
    is_post = word >> 23 & 3 == 1
    offset = 0 if is_post else _signed(word >> 15 & 0x7F, 7) * size
    return Access(size, base, displacement=offset, is_write=not word >> 22 & 1)


def _literal(word: int, gva: int) -> Access | None:
    opc, is_vector = word >> 30, word >> 26 & 1
    if not is_vector and opc == 3:
        return None  # a prefetch
    if is_vector:
        size = 4 << opc
    else:
        size = 8 if opc == 1 else 4
    return Access(size, -1, displacement=gva + 4 * _signed(word >> 5 & 0x7FFFF, 19))


def _number(register: int) -> int:
    if register == SP:
        return arm.UC_ARM64_REG_SP
    return int(getattr(arm, f"UC_ARM64_REG_X{register}"))


def check(found: Access, sctlr: int, level: int) -> tuple[str, Check | None] | None:
    """(kind of trap, when) of an access; None when no address is wrong for it."""
    checks_stack = sctlr & (SA if level else SA0)
    if found.base == SP and checks_stack:
        return "stack", Check(arm.UC_ARM64_REG_SP, 0, 0, 0, 0, 15)
    if found.size == 1 or not (found.is_ordered or sctlr & A):
        return None
    mask = found.size - 1
    if found.base < 0:
        return ("unaligned", None) if found.displacement & mask else None
    index = _number(found.index) if found.index >= 0 else 0
    displacement = found.displacement & MASK64
    return "unaligned", Check(_number(found.base), index, found.scale, 0, displacement, mask)
