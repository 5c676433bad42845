"""A whole folder of kernel selftests: what labkit makes of every file in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from labkit.errors import LabError, NotAvailable
from labkit.guest.program import Program
from labkit.hosts.hosting import Hosted, Verdict, host

__all__ = ["survey"]

# The names of guests' first functions; memstress is a library that many selftests are linked with.
ENTRY = re.compile(r"(?!memstress)\w*guest_(code|main)\w*")


def survey(folder: Path, backends: Sequence[str], known: Sequence[Hosted]) -> Iterator[Verdict]:
    """A verdict for every guest function below a folder that is known, on each engine.

    And one for every ELF file without such a function, or that cannot be read. Raises NotAvailable
    when it is no folder, or holds no ELF file.
    """
    for path in _elf_files(folder):
        name = str(path.relative_to(folder))
        try:
            program = Program.load(path)
        except LabError as err:
            yield Verdict(name, "", "", "cannot", str(err))
            continue

        mine = [hosted for hosted in known if hosted.binary == path.name]
        if not mine:
            yield Verdict(name, "", "", "cannot", _why_unknown(program))
        for hosted in mine:
            for backend in backends:
                yield _verdict(name, program, hosted, backend)


def _verdict(name: str, program: Program, hosted: Hosted, backend: str) -> Verdict:
    if hosted.entry not in program.symbols:
        why = "this binary has no such function"
        return Verdict(name, hosted.entry, backend, "cannot", why)
    return replace(host(hosted, program, backend), binary=name)


def _why_unknown(program: Program) -> str:
    guests = sorted(symbol for symbol in program.symbols if ENTRY.fullmatch(symbol))
    if not guests:
        return "no function is named guest_code or guest_main"
    return f"labkit knows no host half for {', '.join(guests)}"


def _elf_files(folder: Path) -> list[Path]:
    """Every ELF file below a folder, in alphabetical order; raises NotAvailable for none."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise NotAvailable(f"{folder}: {what}", path=folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_elf(path)]
    if not paths:
        raise NotAvailable(
            f"{folder}: no ELF file in it; build the kernel's tools/testing/selftests/kvm first",
            path=folder,
        )
    return paths


def _is_elf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err
