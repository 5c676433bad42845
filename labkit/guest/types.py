"""What DWARF says about the type of a global: is it a number, and has it a sign?"""

from __future__ import annotations

from typing import Any

from elftools.dwarf.die import DIE

from labkit.guest.elf import debug_info

__all__ = ["is_signed_int"]

MAX_DIES, MAX_TYPE_CHAIN = 100_000, 32
SAME_AS = ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_atomic_type")
ENCODINGS = {2: False, 5: True, 6: True, 7: False, 8: False}  # DW_ATE_boolean, signed, signed_char, unsigned, unsigned_char


def is_signed_int(image: bytes, gva: int) -> bool | None:
    """True or False for an integer (pointers and enums have no sign), None for other types; LookupError when DWARF is silent."""
    try:
        die = _variable(image, gva)
        return _signed(die) if die is not None else _silent()
    except LookupError:
        raise
    except Exception:  # pyelftools on hostile bytes
        return _silent()


def _silent() -> bool | None:
    raise LookupError("no debug information about this variable")


def _variable(image: bytes, gva: int) -> DIE | None:
    """The DIE whose location is this address. Entries are read one behind the other: links between them may be forged."""
    dwarf = debug_info(image)
    if dwarf is None or dwarf.debug_info_sec is None:
        return None
    stream = dwarf.debug_info_sec.stream
    location = b"\x09\x03" + gva.to_bytes(8, "little")  # an exprloc of 9 bytes: DW_OP_addr gva
    at = stream.getvalue().find(location)
    cu = next((cu for cu in dwarf.iter_CUs() if cu.cu_offset <= at < cu.cu_offset + cu.size), None) if at >= 0 else None
    offset = cu.cu_die_offset if cu else at
    for _ in range(MAX_DIES):
        if cu is None or offset > at:
            return None
        die = DIE(cu, stream, offset)
        offset += die.size
        if offset > at:
            return die if die.tag == "DW_TAG_variable" else None
    return None


def _signed(die: Any) -> bool | None:
    for _ in range(MAX_TYPE_CHAIN):
        if "DW_AT_type" not in die.attributes and "DW_AT_specification" in die.attributes:
            die = die.get_DIE_from_attribute("DW_AT_specification")
        die = die.get_DIE_from_attribute("DW_AT_type")
        if die.tag == "DW_TAG_base_type":
            return ENCODINGS.get(die.attributes["DW_AT_encoding"].value)
        if die.tag in ("DW_TAG_pointer_type", "DW_TAG_enumeration_type"):
            return False
        if die.tag not in SAME_AS:
            return None
    return None
