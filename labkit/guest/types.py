"""What DWARF says about the type of a global: is it a number, and has it a sign?"""

from __future__ import annotations

import re
from typing import Any, Literal

from elftools.dwarf.die import DIE

from labkit.guest.dies import DieSizes
from labkit.guest.sections import debug_info

__all__ = ["ENCODINGS", "MAX_DIES", "Kind", "kind_of_global", "variable_die"]

Kind = Literal["signed", "unsigned", "other", "unknown"]

MAX_DIES = 100_000
MAX_TYPE_CHAIN = 32

# Types that are another type under a name or a qualifier; an enum has its own integer type.
SAME_AS = (
    "DW_TAG_typedef",
    "DW_TAG_const_type",
    "DW_TAG_volatile_type",
    "DW_TAG_atomic_type",
    "DW_TAG_enumeration_type",
)

ENCODINGS: dict[int, Kind] = {  # DW_ATE_*
    2: "unsigned",  # boolean
    5: "signed",
    6: "signed",  # signed char
    7: "unsigned",
    8: "unsigned",  # unsigned char
}

# An exprloc (its length first) with DW_OP_addr base, DW_OP_plus_uconst offset. In a lookahead, so
# that matches may overlap: the bytes may stand inside something else.
_MERGED = re.compile(rb"(?=([\x0b-\x0d])\x03(.{8})\x23([\x80-\xff]{0,2}[\0-\x7f]))", re.DOTALL)
DW_OP_ADDR = b"\x03"
DW_OP_ADDRX = b"\xa1"
EXPRLOC_9 = b"\x09"  # an exprloc of nine bytes: DW_OP_addr and its address


def kind_of_global(image: bytes, gva: int) -> Kind:
    """Signed or unsigned number, other type, or unknown without debug information.

    A pointer is unsigned, an enum as it is stored.
    """
    try:
        die = variable_die(image, gva)
        return "unknown" if die is None else _kind(die)
    except Exception:  # pyelftools on hostile bytes
        return "unknown"


def variable_die(image: bytes, gva: int) -> DIE | None:
    """The DIE whose location is this address.

    Entries are read one behind the other: links between them may be forged. Raises what pyelftools
    does on hostile bytes.
    """
    dwarf = debug_info(image)
    if dwarf is None or dwarf.debug_info_sec is None:
        return None
    stream = dwarf.debug_info_sec.stream
    order: Literal["little", "big"] = "big" if image[5] == 2 else "little"
    at = _location(stream.getvalue(), gva, order)
    if at is None:
        at = _indexed_location(dwarf, stream.getvalue(), gva, order)
    if at is None:
        return None
    unit = _unit_at(dwarf, at)
    if unit is None:
        return None

    sizes = DieSizes(unit, stream.getvalue())
    offset = unit.cu_die_offset
    for _ in range(MAX_DIES):
        size = sizes.at(offset) or DIE(unit, stream, offset).size
        if offset + size > at:
            die = DIE(unit, stream, offset)
            return die if die.tag == "DW_TAG_variable" else None
        offset += size
    return None


def _unit_at(dwarf: Any, at: int) -> Any:
    """The compilation unit that a byte of .debug_info lies in, or None."""
    for unit in dwarf.iter_CUs():
        if unit.cu_offset <= at < unit.cu_offset + unit.size:
            return unit
    return None


def _location(data: bytes, gva: int, order: Literal["little", "big"]) -> int | None:
    """Where in .debug_info an exprloc says this address, None when none does.

    It says DW_OP_addr gva, or, as LLVM merges globals, DW_OP_addr base, DW_OP_plus_uconst offset.
    """
    at = data.find(EXPRLOC_9 + DW_OP_ADDR + gva.to_bytes(8, order))
    if at >= 0:
        return at
    for found in _MERGED.finditer(data):
        size, base, uleb = found.groups()
        offset = sum((byte & 127) << 7 * i for i, byte in enumerate(uleb))
        if size[0] == 10 + len(uleb) and int.from_bytes(base, order) + offset == gva:
            return found.start()
    return None


def _indexed_location(
    dwarf: Any, data: bytes, gva: int, order: Literal["little", "big"]
) -> int | None:
    """Where an exprloc says this address by its index in .debug_addr (DWARF 5, clang), or None.

    It says DW_OP_addrx index; each compilation unit counts from a base of its own.
    """
    if dwarf.debug_addr_sec is None:
        return None
    table = dwarf.debug_addr_sec.stream.getvalue()
    entry = gva.to_bytes(8, order)
    for unit in dwarf.iter_CUs():
        base = unit.get_top_DIE().attributes.get("DW_AT_addr_base")
        if base is None:
            continue
        place = table.find(entry, base.value)
        while place >= 0 and (place - base.value) % 8:
            place = table.find(entry, place + 1)
        if place < 0:
            continue
        operation = DW_OP_ADDRX + _uleb((place - base.value) // 8)
        end = unit.cu_offset + unit.size
        at = data.find(bytes([len(operation)]) + operation, unit.cu_offset, end)
        if at >= 0:
            return at
    return None


def _uleb(number: int) -> bytes:
    """A number as DWARF writes it (LEB128, unsigned)."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _kind(die: Any) -> Kind:
    """The kind of a variable's type, behind its typedefs and qualifiers."""
    for _ in range(MAX_TYPE_CHAIN):
        if "DW_AT_type" not in die.attributes and "DW_AT_specification" in die.attributes:
            die = die.get_DIE_from_attribute("DW_AT_specification")
        die = die.get_DIE_from_attribute("DW_AT_type")

        if die.tag == "DW_TAG_base_type":
            return ENCODINGS.get(die.attributes["DW_AT_encoding"].value, "other")
        if die.tag == "DW_TAG_pointer_type":
            return "unsigned"
        if die.tag == "DW_TAG_enumeration_type" and "DW_AT_type" not in die.attributes:
            return "unsigned"
        if die.tag not in SAME_AS:
            return "other"
    return "other"
