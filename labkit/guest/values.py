"""C values of a guest as Python values, by the types that its debug information declares."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from labkit.errors import InvalidState, SymbolNotFound

__all__ = [
    "Array",
    "CType",
    "CValue",
    "Field",
    "Number",
    "Opaque",
    "Order",
    "Record",
    "Struct",
    "bits_of",
    "with_bits",
]

Order = Literal["little", "big"]


class Struct(Mapping[str, "CValue"]):
    """A struct or union of the guest: `x["field"]`, `x.field`; it compares equal to a dict."""

    def __init__(self, name: str, values: dict[str, CValue]) -> None:
        self._name = name
        self._values = values

    def __getitem__(self, name: str) -> CValue:
        try:
            return self._values[name]
        except KeyError:
            raise _no_field(self._name, name, self._values) from None

    def __getattr__(self, name: str) -> CValue:
        if name.startswith("__") or name not in self.__dict__.get("_values", {}):
            raise AttributeError(f"{self.__dict__.get('_name')} has no field {name}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __dir__(self) -> list[str]:
        return list(self._values)

    def __repr__(self) -> str:
        fields = ", ".join(f".{name} = {value!r}" for name, value in self._values.items())
        return f"{self._name} {{{fields}}}"


CValue = int | float | bytes | list["CValue"] | Struct
"""A number (pointers and enums are numbers too), text or bytes, an array, or a struct."""


@dataclass(frozen=True)
class Number:
    """An integer, a pointer, an enum, a _Bool or a floating-point number; size is in bytes."""

    name: str
    size: int
    kind: Literal["signed", "unsigned", "bool", "float"]
    parts = 1

    def decode(self, data: bytes, order: Order) -> CValue:
        """The number in these bytes."""
        if self.kind == "float":
            (number,) = struct.unpack(self._format(order), data)
            return float(number)
        found = int.from_bytes(data, order, signed=self.kind == "signed")
        return bool(found) if self.kind == "bool" and found < 2 else found

    def encode(self, value: object, order: Order, what: str) -> bytes:
        """The bytes of a number; raises InvalidState for one that does not fit."""
        try:
            if self.kind == "float":
                return struct.pack(self._format(order), value)
            return self._encode_whole(operator.index(value), order, what)  # type: ignore[arg-type]
        except (TypeError, struct.error, OverflowError):
            raise InvalidState(f"{what} is {self.name}, which takes no {value!r}") from None

    def _encode_whole(self, number: int, order: Order, what: str) -> bytes:
        bits = 8 * self.size
        low = -(1 << bits - 1) if self.kind == "signed" else 0
        high = (1 << bits) - 1 if self.kind == "unsigned" else (1 << bits - 1) - 1
        if self.kind == "bool":
            high = 1
        if not low <= number <= high:
            raise InvalidState(f"{number} does not fit into {what}, which is {self.name}")
        return number.to_bytes(self.size, order, signed=low < 0)

    def _format(self, order: Order) -> str:
        return (">" if order == "big" else "<") + {2: "e", 4: "f", 8: "d"}[self.size]


@dataclass(frozen=True)
class Opaque:
    """What debug information does not take apart, as bytes."""

    name: str
    size: int
    parts = 1

    def decode(self, data: bytes, order: Order) -> CValue:
        """The bytes as they are."""
        return bytes(data)

    def encode(self, value: object, order: Order, what: str) -> bytes:
        """Exactly so many bytes; raises InvalidState for anything else."""
        return _exact(value, self.size, what)


@dataclass(frozen=True)
class Array:
    """Elements of one type in a row; those of char are bytes in Python."""

    name: str
    element: CType
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.element.size * self.count

    @cached_property
    def parts(self) -> int:
        """How many values it is taken apart into."""
        return 1 if self.is_text else 1 + self.count * self.element.parts

    @property
    def is_text(self) -> bool:
        """Whether its elements are characters."""
        return isinstance(self.element, Number) and self.element.name in CHARS

    def decode(self, data: bytes, order: Order) -> CValue:
        """A list, or bytes for characters."""
        if self.is_text:
            return bytes(data)
        size = self.element.size
        starts = (size * index for index in range(self.count))
        return [self.element.decode(data[at : at + size], order) for at in starts]

    def encode(self, value: object, order: Order, what: str) -> bytes:
        """The bytes of a list with as many elements, or of so many bytes.

        Text that is shorter is filled up with NULs. Raises InvalidState.
        """
        if self.is_text:
            return self._encode_text(value, what)
        if isinstance(value, bytes | bytearray | memoryview):
            return _exact(value, self.size, what)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != self.count:
            raise InvalidState(f"{what} takes {self.count} elements, not {value!r}")
        parts = (
            self.element.encode(one, order, f"{what}[{index}]") for index, one in enumerate(value)
        )
        return b"".join(parts)

    def _encode_text(self, value: object, what: str) -> bytes:
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(value, bytes | bytearray | memoryview) or len(value) > self.size:
            raise InvalidState(f"{what} takes text of at most {self.size} bytes, not {value!r}")
        return bytes(value).ljust(self.size, b"\0")


CHARS = ("char", "signed char", "unsigned char", "char8_t")


@dataclass(frozen=True)
class Field:
    """A member of a struct; offset is in bytes.

    name is "" for an unnamed struct or union, whose fields count as the outer one's. bits is of a
    bit-field: the lowest bit in the number that its bytes are, how many bits, how many bytes.
    """

    name: str
    offset: int
    type: CType
    bits: tuple[int, int, int] | None = None

    @property
    def part(self) -> slice:
        """Which bytes of its struct it lies in."""
        size = self.type.size if self.bits is None else self.bits[2]
        return slice(self.offset, self.offset + size)


@dataclass(frozen=True)
class Record:
    """A struct or a union; size is in bytes."""

    name: str
    size: int
    fields: tuple[Field, ...]

    @cached_property
    def parts(self) -> int:
        """How many values it is taken apart into."""
        return 1 + sum(field.type.parts for field in self.fields)

    def decode(self, data: bytes, order: Order) -> CValue:
        """A Struct with the value of each field."""
        values: dict[str, CValue] = {}
        for field in self.fields:
            part = data[field.part]
            if field.bits is None:
                value = field.type.decode(part, order)
            else:
                value = bits_of(field.bits, field.type, part, order)
            if field.name:
                values[field.name] = value
            elif isinstance(value, Struct):
                values.update(value)
        return Struct(self.name, values)

    def encode(self, value: object, order: Order, what: str) -> bytes:
        """The bytes of a mapping with a value for every field; raises InvalidState."""
        if isinstance(value, bytes | bytearray | memoryview):
            return _exact(value, self.size, what)
        if not isinstance(value, Mapping):
            raise InvalidState(f"{what} is {self.name}: it takes its fields by name, not {value!r}")
        return self.updated(bytes(self.size), value, order, what)

    def updated(self, data: bytes, values: Mapping[str, object], order: Order, what: str) -> bytes:
        """These bytes with some fields set, the others as they are; raises InvalidState."""
        fresh = bytearray(data)
        for name, value in values.items():
            offset, field = self.find(name)
            part = slice(offset, offset + field.part.stop - field.part.start)
            where = f"{what}.{name}"
            before = bytes(fresh[part])
            if field.bits is not None:
                fresh[part] = with_bits(field.bits, field.type, before, value, order, where)
            elif isinstance(field.type, Record) and isinstance(value, Mapping):
                fresh[part] = field.type.updated(before, value, order, where)
            else:
                fresh[part] = field.type.encode(value, order, where)
        return bytes(fresh)

    def find(self, name: str) -> tuple[int, Field]:
        """A field by name, also one of an unnamed struct in it, and its offset in bytes.

        Raises SymbolNotFound with the fields that there are.
        """
        for field in self.fields:
            if field.name == name:
                return field.offset, field
            if not field.name and isinstance(field.type, Record) and name in field.type.names:
                offset, inner = field.type.find(name)
                return field.offset + offset, inner
        raise _no_field(self.name, name, self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all fields, those of unnamed structs in it too."""
        found: list[str] = []
        for field in self.fields:
            if field.name:
                found.append(field.name)
            elif isinstance(field.type, Record):
                found += field.type.names
        return tuple(found)


CType = Number | Opaque | Array | Record


def _exact(value: object, size: int, what: str) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview) or len(value) != size:
        raise InvalidState(f"{what} takes {size} bytes, not {value!r}")
    return bytes(value)


def _no_field(record: str, name: object, names: Mapping[str, object] | Sequence[str]) -> Exception:
    return SymbolNotFound(
        f"{record} has no field {name!r}, but {', '.join(names) or 'none at all'}",
        name=name,
        near=tuple(names),
    )


Bits = tuple[int, int, int]
"""Of a bit-field: its lowest bit in the number that its bytes are, how many bits and bytes."""


def bits_of(bits: Bits, kind: CType, data: bytes, order: Order) -> int:
    """The value of a bit-field of a type in its bytes."""
    low, count, _ = bits
    found = int.from_bytes(data, order) >> low & (1 << count) - 1
    if _is_signed(kind) and found >> count - 1:
        found -= 1 << count
    return found


def with_bits(
    bits: Bits, kind: CType, data: bytes, value: object, order: Order, what: str
) -> bytes:
    """These bytes with a bit-field in them set; raises InvalidState for a value too large."""
    low, count, size = bits
    least, most = 0, (1 << count) - 1
    if _is_signed(kind):
        least, most = -(1 << count - 1), (1 << count - 1) - 1
    if not isinstance(value, int) or not least <= value <= most:
        raise InvalidState(f"{what} has {count} bits, which {value!r} does not fit")
    mask = (1 << count) - 1
    kept = int.from_bytes(data, order) & ~(mask << low)
    return (kept | (value & mask) << low).to_bytes(size, order)


def _is_signed(kind: CType) -> bool:
    return isinstance(kind, Number) and kind.kind == "signed"
