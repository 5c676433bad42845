"""Source lines of a program: the DWARF line tables, read once when asked for, then bisected."""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from labkit.guest.elf import Segment
from labkit.guest.sections import debug_info
from labkit.outside import plain

__all__ = ["Line", "LineTable", "Row"]

MAX_ROWS = 500_000
MAX_UNITS = 4096
MAX_NAME = 4096  # characters


@dataclass(frozen=True)
class Line:
    """A source line; text is None when the file is not at hand."""

    file: str
    line: int
    text: str | None


class Row(NamedTuple):
    """The code from one gva up to another, and where in the source it comes from."""

    gva: int
    end: int
    file: str
    line: int  # 0: unknown
    is_statement: bool  # a statement may begin here


@dataclass(frozen=True)
class LineTable:
    """Address ranges with their file and line, sorted; gvas are those of the rows."""

    rows: tuple[Row, ...] = ()
    gvas: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, image: bytes, segments: Sequence[Segment]) -> LineTable:
        """Read all line tables; what is broken in them is left out."""
        found: list[Row] = []
        with suppress(Exception):  # pyelftools on hostile bytes; a guest without lines still runs
            found.extend(_read_rows(image))

        code = [(segment.gva, segment.end) for segment in segments if segment.executable]
        rows = sorted(row for row in found if any(low <= row.gva < high for low, high in code))
        return cls(tuple(rows), [row.gva for row in rows])

    def at(self, gva: int) -> tuple[str, int] | None:
        """File and line of an address, None when nobody says."""
        row = self.row(gva)
        return None if row is None else (row.file, row.line)

    def row(self, gva: int) -> Row | None:
        """The row that an address lies in, None when nobody says its line."""
        index = bisect_right(self.gvas, gva) - 1
        if index < 0:
            return None
        row = self.rows[index]
        if gva >= row.end or row.line == 0:
            return None
        return row

    def starts(self, file: str, line: int) -> tuple[int, ...]:
        """The addresses at which code of a line begins; `file` is a full name or the end of one."""
        names = {name for name in self.files if name == file or name.endswith("/" + file)}
        found = []
        end_of_last = None  # where the row before ended, if it was of this line too
        for row in self.rows:
            if row.file not in names or row.line != line:
                end_of_last = None
                continue
            if row.is_statement and row.gva != end_of_last:
                found.append(row.gva)
            end_of_last = row.end
        return tuple(found)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that has code."""
        return tuple(dict.fromkeys(row.file for row in self.rows))


def _read_rows(image: bytes) -> Iterator[Row]:
    """At most MAX_ROWS rows, of every line program once."""
    dwarf = debug_info(image)
    if dwarf is None:
        return

    seen = set()
    count = 0
    for unit in islice(dwarf.iter_CUs(), MAX_UNITS):
        attributes = unit.get_top_DIE().attributes
        where = attributes.get("DW_AT_stmt_list")
        if where is None or where.value in seen:
            continue
        seen.add(where.value)

        directory = attributes.get("DW_AT_comp_dir")
        program = dwarf.line_program_for_CU(unit)
        names = _file_names(program, _text(directory.value) if directory else "")
        for row in _program_rows(program, names):
            yield row
            count += 1
            if count > MAX_ROWS:
                return


def _program_rows(program: Any, names: Mapping[int, str]) -> Iterator[Row]:
    """Each state of a line program lasts up to the next one's address."""
    last = None
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if last is not None and last.address < state.address:
            file = names.get(last.file, "?")
            yield Row(last.address, state.address, file, max(last.line, 0), last.is_stmt)
        last = None if state.end_sequence else state


def _file_names(program: Any, directory: str) -> dict[int, str]:
    """File numbers of a line program to names.

    DWARF 5 counts both files and directories from 0, older ones from 1.
    """
    header = program.header
    directories = [_text(name) for name in header["include_directory"]]
    first = 0
    if header["version"] < 5:
        first = 1
        directories.insert(0, directory)

    names = {}
    for number, entry in enumerate(header["file_entry"], first):
        inside = ""
        if entry.dir_index < len(directories):
            inside = directories[entry.dir_index]
        path = posixpath.join(directory, inside, _text(entry.name))
        names[number] = posixpath.normpath(path)
    return names


def _text(raw: bytes) -> str:
    return plain(raw.decode("utf-8", "replace"), MAX_NAME)
