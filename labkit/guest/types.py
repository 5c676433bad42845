"""What DWARF says about the type of a global: is it a number, and has it a sign?"""

from __future__ import annotations

import re
from typing import Any, Literal

from elftools.dwarf.die import DIE

from labkit.guest.elf import debug_info

__all__ = ["Kind", "kind_of_global"]

MAX_DIES, MAX_TYPE_CHAIN = 100_000, 32
SAME_AS = (
    "DW_TAG_typedef",
    "DW_TAG_const_type",
    "DW_TAG_volatile_type",
    "DW_TAG_atomic_type",
    "DW_TAG_enumeration_type",
)
_MERGED = re.compile(rb"(?=([\x0b-\x0d])\x03(.{8})\x23([\x80-\xff]{0,2}[\0-\x7f]))", re.DOTALL)
Kind = Literal["signed", "unsigned", "other", "unknown"]
ENCODINGS: dict[int, Kind] = {
    2: "unsigned",
    5: "signed",
    6: "signed",
    7: "unsigned",
    8: "unsigned",
}  # DW_ATE_*; 2: boolean


def kind_of_global(image: bytes, gva: int) -> Kind:
    """Signed or unsigned number (a pointer is unsigned, an enum as it is stored), other type, or unknown without debug information."""
    try:
        die = _variable(image, gva)
        return _kind(die) if die is not None else "unknown"
    except Exception:  # pyelftools on hostile bytes
        return "unknown"


def _variable(image: bytes, gva: int) -> DIE | None:
    """The DIE whose location is this address. Entries are read one behind the other: links between them may be forged."""
    dwarf = debug_info(image)
    if dwarf is None or dwarf.debug_info_sec is None:
        return None
    stream = dwarf.debug_info_sec.stream
    at = _location(stream.getvalue(), gva, "big" if image[5] == 2 else "little")
    cu = (
        next((cu for cu in dwarf.iter_CUs() if cu.cu_offset <= at < cu.cu_offset + cu.size), None)
        if at >= 0
        else None
    )
    offset = cu.cu_die_offset if cu else at
    for _ in range(MAX_DIES):
        if cu is None or offset > at:
            return None
        die = DIE(cu, stream, offset)
        offset += die.size
        if offset > at:
            return die if die.tag == "DW_TAG_variable" else None
    return None


def _location(data: bytes, gva: int, order: Literal["little", "big"]) -> int:
    """Where an exprloc says DW_OP_addr gva, or as LLVM merges globals, DW_OP_addr base, DW_OP_plus_uconst offset; -1: nowhere."""
    at = data.find(b"\x09\x03" + gva.to_bytes(8, order))
    for found in _MERGED.finditer(data) if at < 0 else ():
        size, base, uleb = found.groups()
        offset = sum((byte & 127) << 7 * i for i, byte in enumerate(uleb))
        if size[0] == 10 + len(uleb) and int.from_bytes(base, order) + offset == gva:
            return found.start()
    return at


def _kind(die: Any) -> Kind:
    for _ in range(MAX_TYPE_CHAIN):
        if "DW_AT_type" not in die.attributes and "DW_AT_specification" in die.attributes:
            die = die.get_DIE_from_attribute("DW_AT_specification")
        die = die.get_DIE_from_attribute("DW_AT_type")
        if die.tag == "DW_TAG_base_type":
            return ENCODINGS.get(die.attributes["DW_AT_encoding"].value, "other")
        if die.tag == "DW_TAG_pointer_type" or (
            die.tag == "DW_TAG_enumeration_type" and "DW_AT_type" not in die.attributes
        ):
            return "unsigned"
        if die.tag not in SAME_AS:
            break
    return "other"
