"""How DWARF declares the type of a global, as what labkit.guest.values takes values apart by.

Debug information may be forged: types are read entry behind entry, never along links between
siblings, and what does not fit (a field outside its struct, a struct in itself) stays bytes.
Source: DWARF 5, sections 5 (types), 5.7.6 (bit-fields), 7.5.4 (attributes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from elftools.dwarf.die import DIE

from labkit.guest.types import ENCODINGS, MAX_DIES, variable_die
from labkit.guest.values import Array, CType, Field, Number, Opaque, Order, Record
from labkit.outside import plain

__all__ = ["declared_type"]

MAX_NESTING = 32
MAX_PARTS = 100_000  # numbers, elements, fields that one variable is taken apart into
POINTERS = ("DW_TAG_pointer_type", "DW_TAG_reference_type")
SAME_AS = ("DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_atomic_type")
RECORDS = {"DW_TAG_structure_type": "struct", "DW_TAG_union_type": "union"}
FLOAT_SIZES = (2, 4, 8)
INT_SIZES = (1, 2, 4, 8, 16)
DW_ATE_BOOLEAN, DW_ATE_FLOAT = 2, 4


def declared_type(image: bytes, gva: int) -> CType | None:
    """The type of the variable at a gva; None for want of debug information that can be read."""
    try:
        die = variable_die(image, gva)
        if die is None:
            return None
        found = _Types("big" if image[5] == 2 else "little").of(die)
    except Exception:  # pyelftools on hostile bytes
        return None
    return found


class _Broken(Exception):
    """A type that says nothing which can be held against bytes."""


class _Types:
    """Reads types; those with a place in the file once each."""

    def __init__(self, order: Order) -> None:
        self._order: Order = order
        self._known: dict[int, CType] = {}
        self._open: list[int] = []  # offsets of the types that are being read
        self._left = MAX_DIES

    def of(self, die: DIE) -> CType:
        """The type that an entry has (a variable, a member, a typedef)."""
        if "DW_AT_type" not in die.attributes and "DW_AT_specification" in die.attributes:
            die = die.get_DIE_from_attribute("DW_AT_specification")
        return self._type(die.get_DIE_from_attribute("DW_AT_type"))

    def _type(self, die: DIE) -> CType:
        if die.offset in self._known:
            return self._known[die.offset]
        if die.offset in self._open or len(self._open) > MAX_NESTING:
            raise _Broken("a type that contains itself")
        self._open.append(die.offset)
        found = self._read(die)
        self._open.pop()
        if found.parts > MAX_PARTS:
            found = Opaque(found.name, found.size)
        self._known[die.offset] = found
        return found

    def _read(self, die: DIE) -> CType:
        tag = str(die.tag)
        if tag == "DW_TAG_base_type":
            return _base(die)
        if tag in POINTERS:
            return Number("a pointer", _size(die, 8), "unsigned")
        if tag == "DW_TAG_enumeration_type":
            return self._enum(die)
        if tag == "DW_TAG_array_type":
            return self._array(die)
        if tag in RECORDS:
            return self._record(die)
        if tag in SAME_AS:
            return self.of(die)
        if tag == "DW_TAG_typedef":
            return _named(self.of(die), _name(die))
        raise _Broken(tag)

    def _enum(self, die: DIE) -> CType:
        kind: Literal["signed", "unsigned"] = "unsigned"
        if "DW_AT_type" in die.attributes:
            stored = self.of(die)
            if isinstance(stored, Number) and stored.kind == "signed":
                kind = "signed"
        elif any(_number(one, "DW_AT_const_value") < 0 for one in self._children(die)):
            kind = "signed"
        return Number(f"enum {_name(die)}".rstrip(), _size(die), kind)

    def _array(self, die: DIE) -> CType:
        counts = [
            _count(child) for child in self._children(die) if child.tag == "DW_TAG_subrange_type"
        ]
        element = found = self.of(die)
        dimensions = ""
        for count in reversed(counts):
            dimensions = f"[{count}]{dimensions}"
            found = Array(element.name + dimensions, found, count)
        return found

    def _record(self, die: DIE) -> CType:
        name = f"{RECORDS[str(die.tag)]} {_name(die)}".rstrip()
        size = _size(die)
        fields = []
        for child in self._children(die):
            if child.tag != "DW_TAG_member":
                continue
            field = self._field(child)
            if field.part.stop > size or field.part.start < 0:
                return Opaque(name, size)
            fields.append(field)
        return Record(name, size, tuple(fields))

    def _field(self, die: DIE) -> Field:
        kind = self.of(die)
        name = _name(die)
        at = _number(die, "DW_AT_data_member_location")
        if "DW_AT_bit_size" not in die.attributes:
            return Field(name, at, kind)
        return self._bit_field(die, name, at, kind)

    def _bit_field(self, die: DIE, name: str, at: int, kind: CType) -> Field:
        """A bit-field, whose first bit DWARF 4 and 5 count from the start of the struct.

        On a big-endian machine from its most significant bit. Older debug information counts from
        the most significant bit of the storage unit, on every machine.
        """
        count = _number(die, "DW_AT_bit_size")
        first = 8 * at + _number(die, "DW_AT_data_bit_offset")
        if "DW_AT_bit_offset" in die.attributes:
            first = 8 * at + _number(die, "DW_AT_bit_offset")
            if self._order == "little":
                unit = 8 * _size(die, kind.size)
                first = 8 * at + unit - _number(die, "DW_AT_bit_offset") - count
        start, inside = divmod(first, 8)
        size = (inside + count + 7) // 8
        if not 0 < count <= 64 or first < 0:
            raise _Broken("a bit-field without bits")
        low = inside if self._order == "little" else 8 * size - inside - count
        return Field(name, start, kind, (low, count, size))

    def _children(self, die: DIE) -> Iterator[DIE]:
        """The entries right below one, read one behind the other."""
        if not die.has_children:
            return
        offset = die.offset + die.size
        depth = 1
        while depth:
            self._left -= 1
            if self._left < 0:
                raise _Broken("too many entries")
            child = DIE(die.cu, die.stream, offset)
            offset += child.size
            if child.is_null():
                depth -= 1
                continue
            if depth == 1:
                yield child
            if child.has_children:
                depth += 1


def _named(kind: CType, name: str) -> CType:
    """A type under the name of a typedef, where it has none of its own."""
    if kind.name in (*RECORDS.values(), "enum"):
        return replace(kind, name=name)
    return kind


def _base(die: DIE) -> CType:
    name, size = _name(die), _size(die)
    encoding = die.attributes["DW_AT_encoding"].value
    if encoding == DW_ATE_FLOAT and size in FLOAT_SIZES:
        return Number(name, size, "float")
    if size not in INT_SIZES or encoding not in ENCODINGS:
        return Opaque(name, size)
    if encoding == DW_ATE_BOOLEAN:
        return Number(name, size, "bool")
    return Number(name, size, "signed" if ENCODINGS[encoding] == "signed" else "unsigned")


def _name(die: DIE) -> str:
    attribute = die.attributes.get("DW_AT_name")
    if attribute is None:
        return ""
    return plain(attribute.value.decode("utf-8", "replace"))


def _size(die: DIE, otherwise: int | None = None) -> int:
    """DW_AT_byte_size; raises _Broken without one, if nothing else is known."""
    attribute = die.attributes.get("DW_AT_byte_size")
    size = otherwise if attribute is None else attribute.value
    if not isinstance(size, int) or size < 0:
        raise _Broken("a type without a size")
    return size


def _number(die: DIE, name: str) -> int:
    attribute = die.attributes.get(name)
    value: Any = 0 if attribute is None else attribute.value
    if not isinstance(value, int):
        raise _Broken(f"{name} is no number")
    return value


def _count(die: DIE) -> int:
    """The elements of one dimension of an array; 0 for one without an end."""
    if "DW_AT_count" in die.attributes:
        count = _number(die, "DW_AT_count")
    elif "DW_AT_upper_bound" in die.attributes:
        count = _number(die, "DW_AT_upper_bound") + 1
    else:
        count = 0
    if count < 0:
        raise _Broken("an array of less than nothing")
    return count
