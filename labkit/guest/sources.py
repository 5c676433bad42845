"""Source text by the names that debug information uses, and from nowhere that it may choose.

A program's debug information is as hostile as the program: it may name its reader's own files. What
is shown comes with the program (recorded when labkit compiled it), from the guest library, from
folders that the user named, or from below the program's own folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from labkit.errors import InvalidState

__all__ = ["LIBRARY", "LIBRARY_NAME", "MAX_SOURCE", "SourceFiles", "SourcePath", "folders_of"]

SourcePath = str | Path | Sequence[str | Path]
"""A folder with sources, or several."""

LIBRARY = Path(__file__).parent / "lib"
LIBRARY_NAME = "labkit/"  # compile.py maps the library's directory to this
MAX_SOURCE = 4 << 20  # bytes
MAX_PARTS = 64  # folders in a name, each of which is looked for


class _Found(NamedTuple):
    """The lines of a file, or None and why they are not shown."""

    lines: list[str] | None
    why: str


class _Refused(Exception):
    """A file that is there and is not shown; the message says why."""


class SourceFiles:
    """The source files of one program."""

    def __init__(
        self, given: Mapping[str, str], program: Path | None, folders: Sequence[Path] = ()
    ) -> None:
        """Sources that came with it, the path of its file, folders that the user named."""
        self._folders = tuple(folders)
        self._program = program
        self._known = {name: _Found(text.splitlines(), "") for name, text in given.items()}

    def lines(self, file: str) -> list[str] | None:
        """The lines of a file; None when they are not shown."""
        return self._get(file).lines

    def why_not(self, file: str) -> str:
        """One sentence why the lines of a file are not shown; "" when they are."""
        return self._get(file).why

    def _get(self, file: str) -> _Found:
        if file not in self._known:
            self._known[file] = self._find(file)
        return self._known[file]

    def _find(self, file: str) -> _Found:
        why = ""
        for folder, name in self._places(file):
            try:
                lines = _lines_below(folder, name)
            except _Refused as refused:
                why = why or str(refused)
                continue
            if lines is not None:
                return _Found(lines, "")
        return _Found(None, why or self._nowhere())

    def _nowhere(self) -> str:
        """Why a file is in none of the places that count."""
        where = "it came without the program"
        if self._program is not None:
            where = "it does not lie below the program's folder"
        return f"{where}; source_path= names other folders"

    def _places(self, file: str) -> Iterator[tuple[Path, str]]:
        """Folders, and the name in each; the longest end of the file's name first.

        The guest library's names are those that compiling with labkit makes.
        """
        if file.startswith(LIBRARY_NAME):
            yield LIBRARY, file.removeprefix(LIBRARY_NAME)
        folders = list(self._folders)
        if self._program is not None:
            folders.append(self._program.resolve().parent)

        parts = [part for part in PurePosixPath(file).parts if part not in ("/", "//", "..")]
        for folder in folders:
            inside = _below(folder, file)
            if inside:
                yield folder, inside
            for start in range(max(0, len(parts) - MAX_PARTS), len(parts)):
                yield folder, "/".join(parts[start:])


def folders_of(source_path: SourcePath) -> tuple[Path, ...]:
    """The folders that a user named; raises InvalidState for what is none."""
    named = [source_path] if isinstance(source_path, str | Path) else source_path
    folders = tuple(Path(folder).expanduser().absolute() for folder in named)
    for folder in folders:
        if not folder.is_dir():
            raise InvalidState(f"source_path: {str(folder)!r} is no folder", folder=str(folder))
    return folders


def _below(folder: Path, file: str) -> str:
    """The rest of an absolute name that begins with the folder's; "" for any other."""
    try:
        return str(PurePosixPath(file).relative_to(folder.resolve()))
    except (ValueError, OSError):
        return ""


def _lines_below(folder: Path, name: str) -> list[str] | None:
    """The lines of a file below a folder, None when there is none; raises _Refused."""
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # a name with NUL, a circle of links
        return None
    if root == Path(root.anchor):
        return None  # everything lies below it
    if not path.is_relative_to(root) or path == root:
        raise _Refused("it leads out of the folder in which it was looked for")
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        raise _Refused("hidden files are no source")
    return _read(path)


def _read(path: Path) -> list[str]:
    """The lines of a regular file of text; raises _Refused with the reason for any other.

    A device or a FIFO is not even opened. The open file is asked once more, so that nobody can
    exchange it in between.
    """
    try:
        if not path.is_file():
            raise _Refused("it is not a regular file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _Refused(f"it cannot be read ({error.strerror})") from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _Refused("it is not a regular file")
        data = file.read(MAX_SOURCE + 1)
    if len(data) > MAX_SOURCE:
        raise _Refused(f"it is larger than {MAX_SOURCE >> 20} MiB")
    if b"\0" in data:
        raise _Refused("it is not text")
    return data.decode("utf-8", "replace").splitlines()
