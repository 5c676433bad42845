"""Every notebook runs from top to bottom, and what is committed is what a run gives."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from committed import (
    BITS,
    FOUR,
    LAUNCH,
    NOTEBOOKS,
    REAL_KVM,
    TOUR,
    cells,
    guests,
    ran,
    read,
    run,
    said,
)
from elftools.elf.elffile import ELFFile
from paths import GUESTS, REPO

from labkit.guest.compile import compile_guest

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# all their guests come prebuilt
without_compiler = pytest.mark.parametrize(
    "path", (TOUR, BITS, LAUNCH, FOUR), ids=lambda path: path.stem
)

# an address of host memory differs from run to run
HOST = re.compile(r"\b0x7[0-9a-f]{11}\b")
# of a page with such an address in it
ENTROPY = re.compile(r"\d\.\d\d bits a byte")
# another compiler makes other steps and addresses
NUMBERS = re.compile(r"\b(0x)?[0-9a-f]*\d[0-9a-f]*\b( \d{3})*")


def test_that_host_addresses_and_numbers_are_recognised() -> None:
    assert HOST.sub("HVA", "hva 0x7f3a5c0408d0, gpa 0x408d0") == "hva HVA, gpa 0x408d0"
    assert NUMBERS.sub("N", "step 2 736 640, 400ff0 +20 lock bts") == "step N, N +N lock bts"


@each
def test_that_it_runs_in_under_a_minute_with_ziglang_alone(path: Path) -> None:
    assert ran(path).seconds < 60


def producer(file: BinaryIO) -> object:
    """The compiler that made an ELF file, as its debug information names it."""
    unit = next(ELFFile(file).get_dwarf_info().iter_CUs())
    return unit.get_top_DIE().attributes["DW_AT_producer"].value


def compiled_alike() -> bool:
    """Whether this compiler is the one that made the committed guests, and so the outputs."""
    with (GUESTS / "hello.elf").open("rb") as kept:
        committed = producer(kept)
    fresh = compile_guest(GUESTS / "hello.c", compiler="zig")
    return committed == producer(io.BytesIO(fresh.image))


def is_settled(cell: Any) -> bool:
    """Whether a cell says the same on all machines, or on all that have /dev/kvm as this has."""
    if "machine" in cell.metadata.get("tags", ()):
        return False
    needs_kvm = cell.source.startswith("%%needs kvm")
    return not needs_kvm or os.access("/dev/kvm", os.R_OK | os.W_OK)


def comparable(texts: list[str], alike: bool) -> list[str]:
    """Texts without what differs from run to run, and between compilers."""
    texts = [HOST.sub("HVA", text) for text in texts]
    texts = [ENTROPY.sub("some bits a byte", text) for text in texts]
    return texts if alike else [NUMBERS.sub("N", text) for text in texts]


@each
def test_that_the_committed_text_is_what_a_run_gives(path: Path) -> None:
    alike = compiled_alike()
    rows = zip(cells(path, "code"), said(read(path)), said(ran(path).notebook), strict=True)
    for number, (cell, kept, now) in enumerate(rows, 1):
        if is_settled(cell):
            assert comparable(kept, alike) == comparable(now, alike), (
                f"code cell {number} is stale: labkit freeze --execute {path.relative_to(REPO)}"
            )


@without_compiler
def test_that_it_runs_without_any_compiler(path: Path, tmp_path: Path) -> None:
    # found before the real one, and has no compiler in it
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    done = run(path, PYTHONPATH=f"{tmp_path}:{REPO}")
    texts = "".join(text for cell in said(done.notebook) for text in cell)
    assert re.findall(r"No compiler here, so this is (\w+)\.elf", texts) == guests(path)


def test_that_a_notebook_about_kvm_says_why_it_cannot_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from labkit.engines.kvm import vm\nvm.DEVICE = '/nowhere/kvm'\n"
    )
    done = run(REAL_KVM, PYTHONPATH=f"{tmp_path}:{REPO}")
    needs = [cell for cell in done.notebook.cells if cell.source.startswith("%%needs kvm")]
    words = ["".join(output.get("text", "") for output in cell.outputs) for cell in needs]
    assert len(words) > 10
    assert words[0].startswith("Not run: there is no /nowhere/kvm: load kvm_intel")
    assert set(words[1:]) == {"Not run, for the same reason: no kvm.\n"}
