"""Places of a program by name: a symbol, "symbol+0x10", "variable.field[3]"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from labkit.errors import InvalidState, SymbolNotFound
from labkit.guest.symbols import Symbol
from labkit.guest.values import Array, CType, Record

__all__ = ["Variable", "find_variable", "variable_of"]

_PATH = re.compile(r"([^.\[+]+)((?:\.\w+|\[\d+\])+)")
_PART = re.compile(r"\.(\w+)|\[(\d+)\]")
_OFFSET = re.compile(r"(.+?)\s*\+\s*(0[xX][0-9a-fA-F]+|\d+)")


@dataclass(frozen=True)
class Variable:
    """A place in a program's data: what it is called, where it lies, and what it is.

    size is in bytes, 0 when nobody says it. type is None where debug information does not say, or
    not in a way that fits the symbol. bits is of a bit-field, as labkit.guest.values has it.
    """

    name: str
    gva: int
    size: int
    type: CType | None
    bits: tuple[int, int, int] | None = None


def variable_of(symbol: Symbol, type_at: Callable[[int], CType | None]) -> Variable:
    """What a symbol is; its type only where that is no larger than the symbol."""
    declared = type_at(symbol.gva)
    if isinstance(declared, Array) and declared.count == 0 and declared.element.size:
        # "extern int x[]": only the symbol knows how many there are.
        declared = replace(declared, count=symbol.size // declared.element.size)
    if declared is not None and symbol.size and declared.size > symbol.size:
        declared = None
    size = symbol.size
    if not size and declared is not None:
        size = declared.size
    return Variable(symbol.name, symbol.gva, size, declared)


def find_variable(
    place: str, symbols: Mapping[str, Symbol], type_at: Callable[[int], CType | None]
) -> Variable | None:
    """What a name, a name with an offset, or a path through arrays and structs means.

    None for a name that no symbol has. Raises InvalidState for an index that is too large or where
    nothing says what a variable is made of, SymbolNotFound for a field that is not there.
    """
    if place in symbols:
        return variable_of(symbols[place], type_at)
    moved = _OFFSET.fullmatch(place)
    if moved is not None:
        start = find_variable(moved[1], symbols, type_at)
        if start is None:
            return None
        return Variable(place, start.gva + int(moved[2], 0), 0, None)
    path = _PATH.fullmatch(place)
    if path is None or path[1] not in symbols:
        return None
    found = variable_of(symbols[path[1]], type_at)
    for part in _PART.finditer(path[2]):
        found = _field(found, part[1]) if part[1] else _element(found, int(part[2]))
    return found


def _field(variable: Variable, name: str) -> Variable:
    record = variable.type
    if not isinstance(record, Record):
        raise SymbolNotFound(
            f"{variable.name} has no field {name!r}: it is {_what(variable)}", name=name, near=()
        )
    offset, field = record.find(name)
    size = field.part.stop - field.part.start
    full_name = f"{variable.name}.{name}"
    return Variable(full_name, variable.gva + offset, size, field.type, field.bits)


def _element(variable: Variable, index: int) -> Variable:
    array = variable.type
    if not isinstance(array, Array):
        raise InvalidState(f"{variable.name}[{index}]: {variable.name} is {_what(variable)}")
    if index >= array.count:
        raise InvalidState(f"{variable.name}[{index}]: {variable.name} has {array.count} elements")
    element = array.element
    gva = variable.gva + index * element.size
    return Variable(f"{variable.name}[{index}]", gva, element.size, element)


def _what(variable: Variable) -> str:
    """What a variable is, in words."""
    if variable.type is None:
        return "without a type: no debug information says what it is made of"
    return variable.type.name
