"""%%guest: a cell of C becomes a Program; %%needs: a cell for an engine that may be missing.

`%load_ext labkit.magics` turns both on.
"""

from __future__ import annotations

import argparse
import keyword
import shlex
from pathlib import Path
from typing import Any, NoReturn

from labkit.arch.x86_cpu import CpuModel
from labkit.engines import open_engine
from labkit.errors import InvalidState, LabError, NotAvailable
from labkit.guest.prebuilt import prebuilt_defines
from labkit.guest.program import Program

__all__ = ["Needs", "guest", "load_ipython_extension"]

HERE = Path(__file__).parent
# of an installed labkit, of a clone
GUESTS = (HERE / "data" / "guests", HERE.parent / "data" / "guests")
NEEDS = "%%needs"


class _Parser(argparse.ArgumentParser):
    """One that raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise InvalidState(f"%%guest: {message}\n{self.format_usage().strip()}")


def _arguments(line: str) -> argparse.Namespace:
    """What stands behind %%guest; raises InvalidState."""
    parser = _Parser(prog="%%guest", add_help=False)
    parser.add_argument("name", help="the Python variable that gets the Program")
    parser.add_argument("--arch", default="x86_64")
    parser.add_argument("--compiler", default=None)
    parser.add_argument("--opt", default="-O1")
    parser.add_argument("-D", dest="defines", metavar="NAME", action="append", default=[])
    try:
        arguments = parser.parse_args(shlex.split(line))
    except ValueError as error:  # an open quote
        raise InvalidState(f"%%guest: {error}") from error
    name = arguments.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise InvalidState(f"%%guest: {name!r} cannot be the name of a variable", name=name)
    return arguments


def guest(line: str, cell: str) -> tuple[str, Program]:
    """Compile one cell; returns the variable's name and the program.

    The magic's own line counts as the first, so that messages and steps carry the cell's line
    numbers. Without a compiler the guest of that name that comes with labkit will do, if it was
    built from this very cell. Raises InvalidState for a wrong line, CompileError and NotAvailable.
    """
    arguments = _arguments(line)
    text = f"// %%guest {arguments.name}\n{cell}"
    try:
        program = Program.compile(
            text,
            arguments.arch,
            arguments.compiler,
            arguments.opt,
            tuple(arguments.defines),
            name=f"{arguments.name}.c",
        )
    except NotAvailable:
        prebuilt = _prebuilt(arguments, cell)
        if prebuilt is None:
            raise
        program = prebuilt
    return arguments.name, program


def _prebuilt(arguments: argparse.Namespace, cell: str) -> Program | None:
    """The guest that comes with labkit, if it is what compiling this cell would give.

    Its source is the cell but for the first line, which is a comment there. It was built for
    x86-64 with the options that %%guest has by default, and with the defines its source names.
    """
    by_default = _arguments(arguments.name)
    by_default.defines = arguments.defines
    if arguments != by_default:
        return None
    for folder in GUESTS:
        source = folder / f"{arguments.name}.c"
        if _is_source(source, cell) and prebuilt_defines(source) == tuple(arguments.defines):
            elf = source.with_suffix(".elf")
            said = f"No compiler here, so this is {elf.name}, built from the same source."
            return Program(elf.read_bytes(), arguments.name, elf, compiler_output=said)
    return None


def _is_source(path: Path, cell: str) -> bool:
    """Whether this file is the source of a cell, blank lines at either end left out."""
    if not path.is_file():
        return False
    _, _, below_the_comment = path.read_text().partition("\n")
    return below_the_comment.strip() == cell.strip()


class Needs:
    """The first line `%%needs BACKEND` makes a cell depend on an engine.

    Where that engine can be had the cell is as any other, elsewhere it only says why not: in full
    in the first such cell, in short in the others. An instance is one of IPython's input
    transformers.
    """

    def __init__(self) -> None:
        # reason -> the cell that says it in full; IPython asks more than once a run
        self.told: dict[str, list[str]] = {}

    def __call__(self, lines: list[str]) -> list[str]:
        """A cell's lines as IPython shall run them."""
        if not lines or lines[0].split()[:1] != [NEEDS]:
            return lines
        first, *rest = lines
        backend = first.removeprefix(NEEDS).strip()
        why = _lacks(backend)
        if not why:
            return [f"# {first}", *rest]
        if self.told.setdefault(why, lines) == lines:
            said = f"Not run: {why}."
        else:
            said = f"Not run, for the same reason: no {backend}."
        return [f"print({said!r})\n"]


def _lacks(backend: str) -> str:
    """Why this engine cannot be had, "" when it can."""
    try:
        open_engine(backend, "x86_64", CpuModel()).close()
    except NotAvailable as err:
        return str(err)
    return ""


def load_ipython_extension(ipython: Any) -> None:
    """Register both magics with this IPython, an InteractiveShell.

    %%guest NAME [--arch A] [--compiler C] [--opt=-O1] [-DNAME], and %%needs BACKEND.
    """

    def run(line: str, cell: str) -> Program:
        try:
            name, program = guest(line, cell)
        except LabError as error:
            _show_without_traceback(error)
            raise
        if program.compiler_output:
            print(program.compiler_output)
        ipython.user_ns[name] = program
        return program

    transformers = ipython.input_transformers_cleanup
    if not any(isinstance(known, Needs) for known in transformers):
        transformers.append(Needs())
    ipython.register_magic_function(run, magic_kind="cell", magic_name="guest")


def _show_without_traceback(error: LabError) -> None:
    """IPython then prints the message alone.

    What the compiler said is the whole story; Python's own traceback would bury it.
    """
    lines = str(error).splitlines()
    error.__dict__["_render_traceback_"] = lambda *_: lines
