"""The notebooks: as they are committed, and as a run leaves them."""

from __future__ import annotations

import os
import re
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import books
from paths import REPO

FOLDER = REPO / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TOUR = FOLDER / "00_tour.ipynb"
BITS = FOLDER / "05_encryption_bits.ipynb"
LAUNCH = FOLDER / "06_sev_launch.ipynb"
FOUR = FOLDER / "07_four_architectures.ipynb"
REAL_KVM = FOLDER / "10_real_kvm.ipynb"


@cache
def read(path: Path) -> Any:
    """The notebook as it is committed."""
    return books.read(path)


def cells(path: Path, kind: str) -> list[Any]:
    """Its cells of a kind: "code" or "markdown"."""
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def text(path: Path, kind: str) -> str:
    """What stands in all its cells of a kind."""
    return "\n".join(cell.source for cell in cells(path, kind))


def sections(path: Path) -> list[list[Any]]:
    """The cells from each ## heading to the next."""
    found: list[list[Any]] = []
    for cell in read(path).cells:
        if cell.source.startswith("## "):
            found.append([])
        if found:
            found[-1].append(cell)
    return found


def guests(path: Path) -> list[str]:
    """The names of the guests that a notebook shows and compiles."""
    sources = [cell.source for cell in cells(path, "code")]
    return [source.split()[1] for source in sources if source.startswith("%%guest ")]


def said(notebook: Any) -> list[list[str]]:
    """The plain text of each output of each code cell."""
    return [
        [_plain(output) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _plain(output: Any) -> str:
    printed = output.get("text", "")
    return str(printed or output.get("data", {}).get("text/plain", ""))


@dataclass(frozen=True)
class Run:
    """A notebook after a run, and how long that took."""

    notebook: Any
    seconds: float


def run(path: Path, seed: int | None = None, **env: str) -> Run:
    """Run a copy of a notebook in a kernel of this Python that finds no program in PATH.

    Raises when a cell fails.
    """
    from nbclient import NotebookClient  # nbformat comes with it: see books.py

    notebook = _fresh(path, seed)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
    )
    start = time.monotonic()
    quiet = {"TQDM_DISABLE": "1"}  # as labkit freeze has it: no line of progress in outputs
    client.execute(env={**os.environ, **quiet, "PATH": "", "PYTHONPATH": str(REPO), **env})
    return Run(notebook, time.monotonic() - start)


def _fresh(path: Path, seed: int | None) -> Any:
    """A copy without outputs; `seed` takes the place of the exercises' own."""
    notebook = deepcopy(read(path))
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = []
        cell.execution_count = None
        if seed is not None:
            cell.source = re.sub(r"^seed = \d+$", f"seed = {seed}", cell.source, flags=re.MULTILINE)
    return notebook


@cache
def ran(path: Path, seed: int | None = None) -> Run:
    """One run of a notebook, with its own seeds or another one, for all tests."""
    return run(path, seed)
