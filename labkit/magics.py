"""%%guest: a cell of C becomes a Program; %%needs: a cell for an engine that may be missing. `%load_ext labkit.magics` turns both on."""

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
GUESTS = (
    HERE / "data" / "guests",
    HERE.parent / "data" / "guests",
)  # of an installed labkit, of a clone


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidState(f"%%guest: {message}\n{self.format_usage().strip()}")


def _arguments(line: str) -> argparse.Namespace:
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
    if not arguments.name.isidentifier() or keyword.iskeyword(arguments.name):
        raise InvalidState(
            f"%%guest: {arguments.name!r} cannot be the name of a variable", name=arguments.name
        )
    return arguments


def guest(line: str, cell: str) -> tuple[str, Program]:
    """Compile one cell; the magic's own line counts as the first, so that messages and steps carry the cell's line numbers."""
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
        kept = _prebuilt(arguments.name, cell, tuple(arguments.defines))
        if kept is None or arguments != _arguments(
            f"{arguments.name} {' '.join(f'-D{define}' for define in arguments.defines)}"
        ):
            raise
        program = kept
    return arguments.name, program


def _prebuilt(name: str, cell: str, defines: tuple[str, ...]) -> Program | None:
    """The guest of that name that comes with labkit, if its source is this cell: all lines but the first, a comment there."""
    for source in (folder / f"{name}.c" for folder in GUESTS):
        same = source.is_file() and source.read_text().partition("\n")[2].strip() == cell.strip()
        if same and prebuilt_defines(source) == defines:
            elf = source.with_suffix(".elf")
            said = f"No compiler here, so this is {elf.name}, built from the same source."
            return Program(elf.read_bytes(), name, elf, compiler_output=said)
    return None


class Needs:
    """The first line `%%needs BACKEND`: where that engine can be had the cell is as any other, elsewhere it only says why not."""

    def __init__(self) -> None:
        self.told: dict[
            str, list[str]
        ] = {}  # reason -> the cell that says it in full; IPython asks more than once a run

    def __call__(self, lines: list[str]) -> list[str]:
        """A cell's lines as IPython shall run them."""
        if not lines or lines[0].split()[:1] != ["%%needs"]:
            return lines
        why = _lacks(backend := lines[0][len("%%needs") :].strip())
        if not why:
            return [f"# {lines[0]}", *lines[1:]]
        in_full = self.told.setdefault(why, lines) == lines
        said = f"Not run: {why}." if in_full else f"Not run, for the same reason: no {backend}."
        return [f"print({said!r})\n"]


def _lacks(backend: str) -> str:
    """Why this engine cannot be had, "" when it can."""
    try:
        open_engine(backend, "x86_64", CpuModel()).close()
    except NotAvailable as err:
        return str(err)
    return ""


def load_ipython_extension(ipython: Any) -> None:
    """Register %%guest NAME [--arch A] [--compiler C] [--opt=-O1] [-DNAME] and %%needs BACKEND with this IPython."""

    def run(line: str, cell: str) -> Program:
        try:
            name, program = guest(line, cell)
        except LabError as error:
            text = str(
                error
            )  # what the compiler said is the whole story; Python's own traceback would bury it
            error.__dict__["_render_traceback_"] = lambda *_: text.splitlines()
            raise
        if program.compiler_output:
            print(program.compiler_output)
        ipython.user_ns[name] = program
        return program

    if not any(isinstance(known, Needs) for known in ipython.input_transformers_cleanup):
        ipython.input_transformers_cleanup.append(Needs())
    ipython.register_magic_function(run, magic_kind="cell", magic_name="guest")
