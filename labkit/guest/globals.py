"""Guest globals, read and written from the host.

As in the kernel selftests a global exists once on the host and once in every VM; each VM's copy is
its own. The functions take the VM's access to guest-virtual memory as a callable, so that this room
needs no VM.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from labkit.errors import InvalidState
from labkit.guest.places import Variable
from labkit.guest.program import Program
from labkit.guest.types import Kind
from labkit.guest.values import Array, CValue, Number, Record, bits_of, with_bits

__all__ = [
    "GlobalVar",
    "HostGlobals",
    "Value",
    "global_var",
    "read_global",
    "read_guest_global",
    "write_guest_global",
]

Value = int | bytes
Read = Callable[[int, int], bytes]  # read(gva, size)
Write = Callable[[int, bytes], object]  # write(gva, data), in one piece

INT_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class GlobalVar:
    """A global variable; size is in bytes.

    Numbers are ints in Python, everything else is bytes. signed is None when the type is not known:
    then a number may be either.
    """

    name: str
    gva: int
    size: int
    is_int: bool
    signed: bool | None
    byteorder: Literal["little", "big"] = "little"

    def decode(self, data: bytes) -> Value:
        """The value of its bytes in memory."""
        if not self.is_int:
            return bytes(data)
        return int.from_bytes(data, self.byteorder, signed=bool(self.signed))

    def encode(self, value: object) -> bytes:
        """The bytes of a value; raises InvalidState when it does not fit."""
        if isinstance(value, bytes | bytearray | memoryview):
            return self._encode_bytes(bytes(value))
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            what = "a number or " if self.is_int else ""
            raise InvalidState(
                f"{self.name} takes {what}{self.size} bytes, not {value!r}", name=self.name
            ) from None
        return self._encode_number(number)

    def _encode_bytes(self, value: bytes) -> bytes:
        if len(value) != self.size:
            raise InvalidState(
                f"{self.name} has {self.size} bytes, not {len(value)}",
                name=self.name,
                size=self.size,
            )
        return value

    def _encode_number(self, number: int) -> bytes:
        bits = 8 * self.size
        low = 0 if self.signed is False else -(1 << bits - 1)
        high = (1 << bits - 1) - 1 if self.signed else (1 << bits) - 1
        if not self.is_int or not low <= number <= high:
            raise InvalidState(
                f"{number} does not fit: {self.name} is {self._what()} ({self.size} bytes)",
                name=self.name,
                value=number,
            )
        return (number & (1 << bits) - 1).to_bytes(self.size, self.byteorder)

    def _what(self) -> str:
        """What it is, in words."""
        if not self.is_int:
            return "no number"
        sign = {None: "", True: "signed ", False: "unsigned "}[self.signed]
        return f"a {8 * self.size}-bit {sign}number"


def global_var(program: Program, name: str) -> GlobalVar:
    """Where a global is and what it holds.

    Raises SymbolNotFound, or InvalidState for a function or a name without a size.
    """
    symbol = program.symbol(name)
    if symbol.kind == "func":
        raise InvalidState(f"{name} is no variable: it is a function", name=name)
    if not symbol.size:
        raise InvalidState(f"{name} is no variable: nobody says how large it is", name=name)

    kind: Kind = "other"
    if symbol.size in INT_SIZES:
        kind = program.kind_of_global(symbol.gva)
    signed = {"signed": True, "unsigned": False}.get(kind)
    return GlobalVar(name, symbol.gva, symbol.size, kind != "other", signed, program.byteorder)


def write_guest_global(
    program: Program, name: str, value: object, write: Write, read: Read | None = None
) -> None:
    """Set one VM's copy of a global, or of a part of it (write_guest_global() in C).

    A struct takes some or all of its fields by name, if it can be read. Raises SymbolNotFound, and
    InvalidState for what does not fit.
    """
    variable = _variable(program, name)
    if name in program.symbols and not _is_made_of_parts(variable, value):
        var = global_var(program, name)
        write(var.gva, var.encode(value))
        return
    write(variable.gva, _encoded(program, variable, value, read))


def _is_made_of_parts(variable: Variable, value: object) -> bool:
    """Whether a value is one that only the type in C can make bytes of."""
    if isinstance(value, bytes | bytearray | memoryview):
        return False
    match variable.type:
        case Number(kind="float"):
            return True
        case Array() | Record():
            return not isinstance(value, int)
    return False


def _encoded(program: Program, variable: Variable, value: object, read: Read | None) -> bytes:
    order = program.byteorder
    kind = variable.type
    if kind is None:
        return global_var(program, variable.name).encode(value)
    if variable.bits is None and not (isinstance(kind, Record) and isinstance(value, Mapping)):
        return kind.encode(value, order, variable.name)

    if read is None:
        raise InvalidState(f"{variable.name}: a part of it is set by who can read the rest")
    before = read(variable.gva, variable.size)
    if variable.bits is not None:
        return with_bits(variable.bits, kind, before, value, order, variable.name)
    assert isinstance(kind, Record) and isinstance(value, Mapping)
    return kind.updated(before, value, order, variable.name)


def read_global(program: Program, name: str, read: Read) -> CValue:
    """One VM's copy of a global, or of a part of one, by its type in C.

    Numbers, pointers and enums are ints, arrays lists, characters bytes, structs have their fields
    by name. Without debug information a number is an int, all else is bytes. Raises SymbolNotFound
    and InvalidState.
    """
    variable = _variable(program, name)
    kind = variable.type
    if kind is None:
        return read_guest_global(program, name, read)
    if variable.bits is not None:
        return bits_of(variable.bits, kind, read(variable.gva, variable.size), program.byteorder)
    return kind.decode(read(variable.gva, kind.size), program.byteorder)


def _variable(program: Program, name: str) -> Variable:
    """A variable with a size; raises InvalidState for what is none."""
    variable = program.variable(name)
    if name in program.symbols and variable.type is None:
        global_var(program, name)
    elif variable.type is None:
        raise InvalidState(f"{name} is no variable: nobody says how large it is", name=name)
    return variable


def read_guest_global(program: Program, name: str, read: Read) -> Value:
    """One VM's copy of a global."""
    var = global_var(program, name)
    return var.decode(read(var.gva, var.size))


class HostGlobals:
    """The host's own copy of a program's globals.

    `host["x"] = 5`, then to_guest("x", ...) for each VM that shall see it.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._data: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Value:
        var = global_var(self._program, name)
        return var.decode(self._bytes(var))

    def __setitem__(self, name: str, value: object) -> None:
        self._data[name] = global_var(self._program, name).encode(value)

    def to_guest(self, name: str, write: Write) -> None:
        """Copy the host's value into a VM (sync_global_to_guest() in C)."""
        var = global_var(self._program, name)
        write(var.gva, self._bytes(var))

    def from_guest(self, name: str, read: Read) -> Value:
        """Copy a VM's value to the host (sync_global_from_guest() in C) and return it."""
        var = global_var(self._program, name)
        self._data[name] = bytes(read(var.gva, var.size))
        return var.decode(self._data[name])

    def _bytes(self, var: GlobalVar) -> bytes:
        """The host's bytes; before anybody set them, those that the ELF file starts with."""
        if var.name not in self._data:
            self._data[var.name] = self._first_bytes(var)
        return self._data[var.name]

    def _first_bytes(self, var: GlobalVar) -> bytes:
        segment = self._program.segment_at(var.gva)
        if segment is None or var.gva + var.size > segment.end:
            raise InvalidState(
                f"{var.name} at 0x{var.gva:x} lies outside the program's segments",
                name=var.name,
                gva=var.gva,
            )
        start = var.gva - segment.gva
        return segment.data[start : start + var.size].ljust(var.size, b"\0")
