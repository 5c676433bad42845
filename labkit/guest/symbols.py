"""The symbols of an ELF file: names for addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from elftools.elf.elffile import ELFFile

from labkit.guest.sections import section_bytes
from labkit.outside import plain

__all__ = ["Symbol", "SymbolKind", "read_symbols"]

SymbolKind = Literal["func", "object", "notype"]

MAX_NAME = 4096  # bytes
SHN_UNDEF = 0
SHN_ABS = 0xFFF1
STB_LOCAL = 0

# riscv64: what gp holds; of all absolute symbols the only one that is a place.
GLOBAL_POINTER = b"__global_pointer$"

KINDS: dict[int, SymbolKind] = {  # STT_*
    0: "notype",
    1: "object",
    2: "func",
    10: "func",  # IFUNC
}

ELF64_SYM = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
assert ELF64_SYM.itemsize == 24


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name with an address; size 0 means that nobody said how long it is."""

    name: str
    gva: int
    size: int
    kind: SymbolKind


def read_symbols(elf: ELFFile, image: bytes) -> tuple[Symbol, ...]:
    """The symbol table, global names before local ones, each kind in file order.

    The dynamic one when the file is stripped; whatever is broken in it is left out.
    """
    try:
        sections = list(elf.iter_sections())
        table = _symbol_table(sections)
        if table is None:
            return ()
        rows = section_bytes(table.header, image)
        names = section_bytes(sections[table["sh_link"]].header, image)
    except Exception:  # pyelftools on hostile bytes; a guest without names still runs
        return ()

    global_symbols = []
    local_symbols = []
    for name_at, info, _, shndx, gva, size in _defined(rows, elf.little_endian, len(names)):
        name = _name(names, name_at)
        if name is None or (shndx == SHN_ABS and name != GLOBAL_POINTER):
            continue
        symbol = Symbol(
            plain(name.decode("utf-8", "replace"), MAX_NAME), gva, size, KINDS[info & 15]
        )
        if info >> 4 == STB_LOCAL:
            local_symbols.append(symbol)
        else:
            global_symbols.append(symbol)
    return (*global_symbols, *local_symbols)


def _symbol_table(sections: list[Any]) -> Any:
    """The section with the symbols, None when there is none."""
    for wanted in ("SHT_SYMTAB", "SHT_DYNSYM"):
        for section in sections:
            if section["sh_type"] == wanted:
                return section
    return None


def _defined(data: bytes, is_little: bool, names_size: int) -> list[tuple[int, ...]]:
    """The rows of ELF64_SYM that are of a known kind, defined here, and have a name."""
    whole = len(data) // ELF64_SYM.itemsize * ELF64_SYM.itemsize
    rows = np.frombuffer(data[:whole], ELF64_SYM.newbyteorder("<" if is_little else ">"))
    good = (
        (rows["shndx"] != SHN_UNDEF)
        & (rows["name"] < names_size)
        & np.isin(rows["info"] & 15, list(KINDS))
    )
    found: list[tuple[int, ...]] = rows[good].tolist()
    return found


def _name(names: bytes, start: int) -> bytes | None:
    """The name that begins there; None for one without an end, and for the tools' own: $x, .L1."""
    end = names.find(b"\0", start, start + MAX_NAME)
    if end <= start or names[start : start + 1] in (b"$", b"."):
        return None
    return names[start:end]
