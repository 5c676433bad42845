"""A guest program: bytes at fixed addresses, their names, and the source lines behind them."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from labkit.checked import checked
from labkit.errors import ElfError, InvalidState, SymbolNotFound
from labkit.guest.declared import declared_type
from labkit.guest.elf import Segment, Symbol, read_elf
from labkit.guest.frames import FrameRule, FrameTable
from labkit.guest.lines import Line, LineTable, Row
from labkit.guest.places import Variable, find_variable
from labkit.guest.sources import SourceFiles, SourcePath, folders_of
from labkit.guest.symbols import MAX_NAME
from labkit.guest.types import Kind, kind_of_global
from labkit.guest.values import CType
from labkit.outside import plain, printable

__all__ = ["Line", "Program", "Segment", "Symbol"]

MAX_IMAGE = 1 << 28  # bytes of an ELF file
MAX_DIGITS = 9  # of a line number
MAX_NESTED = 8  # symbols inside another one that symbol_at looks behind


class _ByGva(NamedTuple):
    """Symbols sorted by address, one for each address, and where each of them starts and ends."""

    gvas: list[int]
    symbols: list[Symbol]
    ends: list[int]


@checked
class Program:
    """A guest that can be loaded into any number of VMs; it never changes.

    Attributes: arch ("x86_64"), byteorder ("little"), name, path (None: compiled from text), image
    (the ELF file), entry (gva, 0: none), segments (sorted by gva), symbols (by name),
    all_symbols (those that share a name too), compiler_output (warnings, "" for loaded files).
    """

    def __init__(
        self,
        image: bytes,
        name: str,
        path: Path | None = None,
        sources: Mapping[str, str] | None = None,
        compiler_output: str = "",
        source_path: SourcePath = (),
    ) -> None:
        facts = read_elf(image, name)
        self.image = image
        self.name = plain(name)
        self.path = path
        self.arch = facts.arch
        self.byteorder = facts.byteorder
        self.entry = facts.entry
        self.segments = facts.segments
        self.compiler_output = printable(compiler_output)
        self.all_symbols = facts.symbols
        self.symbols: dict[str, Symbol] = {}
        for symbol in facts.symbols:
            # The first counts: a global one, else that of the file that was linked first.
            self.symbols.setdefault(symbol.name, symbol)
        self._kinds: dict[int, Kind] = {}
        self._types: dict[int, CType | None] = {}
        self._files = SourceFiles(sources or {}, path, folders_of(source_path))

    @classmethod
    def load(
        cls,
        path_or_bytes: str | Path | bytes,
        name: str | None = None,
        source_path: SourcePath = (),
    ) -> Program:
        """Load an ELF file linked at fixed addresses, a kernel selftest's binary included.

        Its source is looked for below the file's own folder and below those of `source_path`, a
        folder or several, and nowhere else, whatever its debug information says. Raises ElfError
        for any other file, and for one that cannot be read; InvalidState for no folder.
        """
        if isinstance(path_or_bytes, bytes | bytearray | memoryview):
            return cls(bytes(path_or_bytes), name or "guest", source_path=source_path)
        path = Path(path_or_bytes)
        return cls(_read_image(path), name or path.name, path, source_path=source_path)

    @classmethod
    def compile(
        cls,
        source_or_path: str | Path,
        arch: str = "x86_64",
        compiler: str | None = None,
        opt: str = "-O1",
        defines: Sequence[str] = (),
        name: str | None = None,
        source_path: SourcePath = (),
    ) -> Program:
        """Compile a guest written in C; see labkit.guest.compile.compile_guest.

        `source_or_path` is a Path, a str that ends in .c, or the C text itself. Raises CompileError
        with the compiler's own message, NotAvailable, InvalidState.
        """
        from labkit.guest.compile import compile_guest

        return compile_guest(source_or_path, arch, compiler, opt, defines, name, source_path)

    def __repr__(self) -> str:
        size = sum(segment.memsz for segment in self.segments)
        segments = f"{len(self.segments)} segments of {size} bytes at 0x{self.segments[0].gva:x}"
        return f"Program({self.name!r}, {self.arch}, {segments})"

    # --- names ---

    def symbol(self, name: str) -> Symbol:
        """The symbol of that name; raises SymbolNotFound with the names that come near."""
        try:
            return self.symbols[plain(name, MAX_NAME)]
        except KeyError:
            raise self._no_symbol(name) from None

    def _no_symbol(self, name: str) -> SymbolNotFound:
        near = difflib.get_close_matches(name, self.symbols, n=3)
        hint = ""
        if near:
            hint = f"; did you mean {' or '.join(near)}?"
        elif not self.symbols:
            hint = "; it has no symbols at all"
        return SymbolNotFound(
            f"{self.name} has no symbol {name!r}{hint}", name=name, near=tuple(near)
        )

    @cached_property
    def _by_gva(self) -> _ByGva:
        """Of symbols that share an address the one that says most: typed, and with a size."""
        best: dict[int, Symbol] = {}
        for symbol in sorted(self.all_symbols, key=lambda s: (s.kind != "notype", s.size > 0)):
            best[symbol.gva] = symbol
        symbols = [best[gva] for gva in sorted(best)]
        return _ByGva([s.gva for s in symbols], symbols, [s.gva + s.size for s in symbols])

    def symbol_at(self, gva: int) -> tuple[Symbol, int] | None:
        """The symbol that covers an address and how far into it the address is, in bytes.

        A symbol without a size covers what follows it up to the next one or its segment's end. None
        when no symbol does.
        """
        segment = self.segment_at(gva)
        if segment is None:
            return None

        gvas, symbols, ends = self._by_gva
        last = bisect_right(gvas, gva) - 1
        if last < 0:
            return None
        if not symbols[last].size and gvas[last] >= segment.gva:
            return symbols[last], gva - gvas[last]
        # A nested symbol may end before its outer one does.
        for i in range(last, max(last - MAX_NESTED, -1), -1):
            if gva < ends[i]:
                return symbols[i], gva - gvas[i]
        return None

    def segment_at(self, gva: int) -> Segment | None:
        """The segment that an address lies in."""
        for segment in self.segments:
            if segment.gva <= gva < segment.end:
                return segment
        return None

    def kind_of_global(self, gva: int) -> Kind:
        """What the variable at an address is: a "signed" or "unsigned" number, or "other".

        "unknown" for want of DWARF.
        """
        if gva not in self._kinds:
            self._kinds[gva] = kind_of_global(self.image, gva)
        return self._kinds[gva]

    def type_at(self, gva: int) -> CType | None:
        """How the variable at an address is declared; None where debug information does not say."""
        if gva not in self._types:
            self._types[gva] = declared_type(self.image, gva)
        return self._types[gva]

    def variable(self, place: str) -> Variable:
        """A global, or a part of one: "x", "x.field[3]", "x+0x10".

        Raises SymbolNotFound with the names that come near, InvalidState for an index too large.
        """
        found = find_variable(place, self.symbols, self.type_at)
        if found is None:
            raise self._no_symbol(place)
        return found

    def describe(self, gva: int) -> str:
        """An address in words: "ucall_alloc+0x2c", or its digits where no symbol is."""
        found = self.symbol_at(gva)
        if found is None:
            return f"0x{gva:x}"
        symbol, offset = found
        return f"{symbol.name}+0x{offset:x}" if offset else symbol.name

    # --- source ---

    @cached_property
    def _lines(self) -> LineTable:
        return LineTable.read(self.image, self.segments)

    def line_at(self, gva: int) -> Line | None:
        """The source line that an instruction belongs to, None when nobody says."""
        found = self._lines.at(gva)
        if found is None:
            return None
        file, line = found
        text = None
        source = self.source(file)
        if source is not None and line <= len(source):
            text = source[line - 1]
        return Line(file, line, text)

    def row_at(self, gva: int) -> Row | None:
        """The code around an instruction that belongs to one source line; None when nobody says."""
        return self._lines.row(gva)

    def gva_of_line(self, file: str, line: int) -> tuple[int, ...]:
        """Where the code of a source line begins, one address for each place it was compiled to.

        () when it has no code. `file` is a full name or the end of one.
        """
        return self._lines.starts(file, line)

    @cached_property
    def _frames(self) -> FrameTable:
        return FrameTable(self.image)

    def frame_rule(self, gva: int) -> FrameRule | None:
        """How to find the caller's frame from an instruction; None where nothing says it."""
        return self._frames.rule(gva)

    def places(self, place: str) -> tuple[int, ...]:
        """The addresses of a symbol, a part of a global ("x.field[3]", "f+0x10"), or "file.c:12".

        Raises SymbolNotFound, or InvalidState for a line without code.
        """
        if place in self.symbols:
            return (self.symbols[place].gva,)
        if ":" not in place:
            return (self.variable(place).gva,)
        file, _, line = place.rpartition(":")
        is_number = line.isdecimal() and len(line) <= MAX_DIGITS
        found = self.gva_of_line(file, int(line)) if is_number else ()
        if not found:
            raise InvalidState(
                f"no code at {place}; lines with code are those of {', '.join(self.files)}"
            )
        return found

    @property
    def files(self) -> tuple[str, ...]:
        """The source files that have code, as the debug information names them."""
        return self._lines.files

    def source(self, file: str) -> list[str] | None:
        """The lines of a source file, None when they are not shown (see why_no_source)."""
        return self._files.lines(file)

    def why_no_source(self, file: str) -> str:
        """Why the lines of a source file are not shown, in words; "" when they are."""
        return self._files.why_not(file)


def _read_image(path: Path) -> bytes:
    """The bytes of an ELF file; raises ElfError when there are none, or too many."""
    try:
        if not path.exists():
            raise ElfError(f"{path}: no such file", path=str(path))
        if not path.is_file():
            raise ElfError(f"{path}: not a regular file", path=str(path))
        with path.open("rb") as file:
            image = file.read(MAX_IMAGE + 1)
    except (OSError, ValueError) as error:
        raise ElfError(f"{path}: cannot be read ({error})", path=str(path)) from error
    if len(image) > MAX_IMAGE:
        raise ElfError(f"{path}: larger than 0x{MAX_IMAGE:x} bytes", path=str(path))
    return image
