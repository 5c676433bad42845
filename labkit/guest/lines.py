"""Source lines of a program: the DWARF line tables, read once when first asked for, then looked up by bisect."""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from labkit.guest.elf import Segment, debug_info

__all__ = ["Line", "LineTable", "SourceFiles"]

LIBRARY = Path(__file__).parent / "lib"
LIBRARY_NAME = "labkit/"  # compile.py maps the library's directory to this
MAX_ROWS, MAX_UNITS = 500_000, 4096
MAX_SOURCE = 4 << 20  # bytes

Row = tuple[
    int, int, str, int, bool
]  # start gva, end gva, file, line (0: unknown), may a statement begin here


@dataclass(frozen=True)
class Line:
    """A source line; text is None when the file is not at hand."""

    file: str
    line: int
    text: str | None


@dataclass(frozen=True)
class LineTable:
    """Address ranges with their file and line, sorted."""

    rows: tuple[Row, ...] = ()
    gvas: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, image: bytes, segments: Sequence[Segment]) -> LineTable:
        """Read all line tables; what is broken in them is left out."""
        rows: list[Row] = []
        with suppress(Exception):  # pyelftools on hostile bytes; a guest without lines still runs
            rows.extend(_rows(image))
        code = [(s.gva, s.end) for s in segments if s.executable]
        rows = sorted(row for row in rows if any(low <= row[0] < high for low, high in code))
        return cls(tuple(rows), [row[0] for row in rows])

    def at(self, gva: int) -> tuple[str, int] | None:
        """File and line of an address."""
        i = bisect_right(self.gvas, gva) - 1
        if i < 0 or gva >= self.rows[i][1] or not self.rows[i][3]:
            return None
        return self.rows[i][2], self.rows[i][3]

    def starts(self, file: str, line: int) -> tuple[int, ...]:
        """The addresses at which code of a line begins; `file` is a full name or the end of one."""
        names = {name for name in self.files if name == file} or {
            n for n in self.files if n.endswith("/" + file)
        }
        found, before = [], None
        for start, end, name, number, statement in self.rows:
            here = name in names and number == line
            if here and statement and before != start:
                found.append(start)
            before = end if here else None
        return tuple(found)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that has code."""
        return tuple(dict.fromkeys(row[2] for row in self.rows))


def _rows(image: bytes) -> Iterator[Row]:
    dwarf, seen, count = debug_info(image), set(), 0
    for cu in islice(dwarf.iter_CUs(), MAX_UNITS) if dwarf else ():
        top = cu.get_top_DIE()
        where = top.attributes.get("DW_AT_stmt_list")
        if where is None or where.value in seen:
            continue
        seen.add(where.value)
        directory = top.attributes.get("DW_AT_comp_dir")
        program = dwarf.line_program_for_CU(cu)
        names = _file_names(
            program, directory.value.decode("utf-8", "replace") if directory else ""
        )
        for row in _program_rows(program, names):
            yield row
            count += 1
            if count > MAX_ROWS:
                return


def _program_rows(program: Any, names: Mapping[int, str]) -> Iterator[Row]:
    last = None
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if last is not None and last.address < state.address:
            yield (
                last.address,
                state.address,
                names.get(last.file, "?"),
                max(last.line, 0),
                last.is_stmt,
            )
        last = None if state.end_sequence else state


def _file_names(program: Any, directory: str) -> dict[int, str]:
    """File numbers of a line program to names; DWARF 5 counts both files and directories from 0, older ones from 1."""
    header, names = program.header, {}
    first = 0 if header["version"] >= 5 else 1
    directories = [directory] * first + [
        d.decode("utf-8", "replace") for d in header["include_directory"]
    ]
    for number, entry in enumerate(header["file_entry"], first):
        inside = directories[entry.dir_index] if entry.dir_index < len(directories) else ""
        path = posixpath.join(directory, inside, entry.name.decode("utf-8", "replace"))
        names[number] = posixpath.normpath(path)
    return names


class SourceFiles:
    """Source text by the names that debug information uses."""

    def __init__(self, given: Mapping[str, str], program: Path | None) -> None:
        self._program = program
        self._known: dict[str, list[str] | None] = {
            name: text.splitlines() for name, text in given.items()
        }

    def lines(self, file: str) -> list[str] | None:
        """The lines of a file: given with the program, from the guest library, at its own path, or beside the program."""
        if file not in self._known:
            self._known[file] = next(
                (t for path in self._places(file) if (t := _read_lines(path)) is not None), None
            )
        return self._known[file]

    def _places(self, file: str) -> Iterator[Path]:
        if file.startswith(LIBRARY_NAME):
            yield LIBRARY / file.removeprefix(LIBRARY_NAME)
        if self._program is not None:
            yield self._program.parent / Path(file).name
        yield Path(file)


def _read_lines(path: Path) -> list[str] | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_SOURCE:
            return None
        return path.read_text("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return None
