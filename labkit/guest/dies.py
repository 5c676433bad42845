"""How long entries of debug information are, without reading what stands in them.

pyelftools takes 17 us to read an entry; to find one among 20 000 they only have to be stepped over
(DWARF 5, 7.5.3 and 7.5.6).
"""

from __future__ import annotations

from typing import Any

__all__ = ["DieSizes"]

FIXED = {
    "DW_FORM_data1": 1,
    "DW_FORM_ref1": 1,
    "DW_FORM_flag": 1,
    "DW_FORM_strx1": 1,
    "DW_FORM_addrx1": 1,
    "DW_FORM_data2": 2,
    "DW_FORM_ref2": 2,
    "DW_FORM_strx2": 2,
    "DW_FORM_data4": 4,
    "DW_FORM_ref4": 4,
    "DW_FORM_data8": 8,
    "DW_FORM_ref8": 8,
    "DW_FORM_ref_sig8": 8,
    "DW_FORM_data16": 16,
    "DW_FORM_flag_present": 0,
    "DW_FORM_implicit_const": 0,
}
OFFSETS = {"DW_FORM_strp", "DW_FORM_sec_offset", "DW_FORM_line_strp", "DW_FORM_ref_addr"}
LEB = {
    "DW_FORM_udata",
    "DW_FORM_sdata",
    "DW_FORM_ref_udata",
    "DW_FORM_strx",
    "DW_FORM_addrx",
    "DW_FORM_loclistx",
    "DW_FORM_rnglistx",
}
BLOCKS = {"DW_FORM_exprloc", "DW_FORM_block"}  # their length first, as a LEB

# Parts of an entry: so many bytes (>= 0), or one of these.
LEB128, STRING, BLOCK = -1, -2, -3


class DieSizes:
    """The sizes of the entries of one compilation unit, in bytes."""

    def __init__(self, unit: Any, data: bytes) -> None:
        self._data = data
        self._abbreviations = unit.get_abbrev_table()
        self._address_size = unit["address_size"]
        self._offset_size = 4 if unit.dwarf_format() == 32 else 8
        self._version = unit["version"]
        self._parts: dict[int, tuple[int, ...] | None] = {0: ()}

    def at(self, offset: int) -> int | None:
        """The size of the entry there; None for one whose form is not known here.

        Raises IndexError or ValueError where it leaves the section, KeyError for no abbreviation.
        """
        code, at = _leb128(self._data, offset)
        if code not in self._parts:
            self._parts[code] = self._parts_of(code)
        parts = self._parts[code]
        if parts is None:
            return None
        for part in parts:
            if part >= 0:
                at += part
            elif part == STRING:
                at = self._data.index(b"\0", at) + 1
            else:
                size, at = _leb128(self._data, at)
                if part == BLOCK:
                    at += size
        return at - offset

    def _parts_of(self, code: int) -> tuple[int, ...] | None:
        """What entries of one abbreviation consist of, neighbouring bytes together."""
        parts: list[int] = []
        for spec in self._abbreviations.get_abbrev(code).decl["attr_spec"]:
            part = self._part(spec.form)
            if part is None:
                return None
            if parts and part >= 0 and parts[-1] >= 0:
                parts[-1] += part
            else:
                parts.append(part)
        return tuple(parts)

    def _part(self, form: str) -> int | None:
        if form in FIXED:
            return FIXED[form]
        if form == "DW_FORM_addr" or (form == "DW_FORM_ref_addr" and self._version < 3):
            return int(self._address_size)
        if form in OFFSETS:
            return self._offset_size
        if form in LEB:
            return LEB128
        if form in BLOCKS:
            return BLOCK
        return STRING if form == "DW_FORM_string" else None


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number, and where it ends; for a signed one only the end is right."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value = shift = 0
    while byte >= 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        byte = data[at]
    return value | byte << shift, at + 1
