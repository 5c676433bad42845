"""`labkit selftest`: the kernel's guest functions from a table, and every bad file a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkit.guest.program import Program
from labkit.hosts.hosting import Hosted, host
from labkit.hosts.selftests import HOSTED
from labkit.lab import Vm


def run(*args: object) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "labkit.cli", "selftest", *map(str, args)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if "--json" in args]
    return done.returncode, lines, done.stdout + done.stderr


@pytest.fixture
def few(selftests: Path, tmp_path: Path) -> Path:
    """A folder with two selftests, and files that no guest can come from."""
    (tmp_path / "x86_64").mkdir()
    for name in ("guest_print_test", "x86_64/cr4_cpuid_sync_test", "x86_64/amx_test"):
        shutil.copy(selftests / name, tmp_path / name)
    image = bytearray((selftests / "guest_print_test").read_bytes())
    (tmp_path / "truncated").write_bytes(image[:3000])
    image[18] = 21  # EM_PPC64
    (tmp_path / "ppc").write_bytes(image)
    (tmp_path / "magic_only").write_bytes(b"\x7fELF")
    (tmp_path / "notes.txt").write_text("no ELF")
    return tmp_path


def _path(selftests: Path, name: str) -> Path:
    return next(path for path in (selftests / name, selftests / "x86_64" / name) if path.is_file())


@pytest.mark.parametrize("hosted", HOSTED, ids=lambda hosted: f"{hosted.binary}-{hosted.entry}")
def test_that_a_hosted_guest_passes_on_the_default_engine(selftests: Path, hosted: Hosted) -> None:
    found = host(hosted, Program.load(_path(selftests, hosted.binary)), "unicorn", Vm.create)
    assert (found.verdict, found.why) == ("passes", "")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("hosted", HOSTED, ids=lambda hosted: f"{hosted.binary}-{hosted.entry}")
def test_that_kvm_passes_or_says_why_it_cannot(selftests: Path, hosted: Hosted) -> None:
    found = host(hosted, Program.load(_path(selftests, hosted.binary)), "kvm", Vm.create)
    assert found.verdict == "passes" or (found.verdict == "cannot" and found.why), found


def test_that_a_host_that_expects_something_else_fails_with_what_came(selftests: Path) -> None:
    program = Program.load(_path(selftests, "cr4_cpuid_sync_test"))
    found = host(Hosted("cr4_cpuid_sync_test", says=(7, "DONE")), program, "unicorn", Vm.create)
    assert found.verdict == "fails" and "GUEST_SYNC(0x7) was due, but" in found.why
    limits = host(
        Hosted("guest_print_test", "guest_code_limits"),
        Program.load(_path(selftests, "guest_print_test")),
        "unicorn",
        Vm.create,
    )
    assert limits.verdict == "fails" and "str < end" in limits.why  # the guest's own assertion


def test_that_nothing_in_the_folder_is_lost(few: Path) -> None:
    status, lines, _ = run(few, "--json")
    got = {(line["binary"], line["function"]): (line["verdict"], line["why"]) for line in lines}
    assert status == 0 and len(lines) == 7
    assert got["guest_print_test", "guest_code"] == ("passes", "")
    assert got["x86_64/cr4_cpuid_sync_test", "guest_code"] == ("passes", "")
    assert got["x86_64/amx_test", ""] == ("cannot", "labkit knows no host half for guest_code")
    for name in ("truncated", "ppc", "magic_only"):
        assert got[name, ""][0] == "cannot" and name in got[name, ""][1], got[name, ""]


def test_that_the_table_names_binary_function_and_engine(few: Path) -> None:
    status, _, text = run(few)
    assert status == 0 and "3 passes" in text
    rows = [line.split()[:4] for line in text.splitlines()]
    assert ["guest_print_test", "guest_code", "unicorn", "passes"] in rows


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "nowhere", "no such folder"),
        (lambda path: path / "file", "not a folder"),
        (lambda path: path, "no ELF file in it"),
    ],
)
def test_that_a_folder_without_selftests_is_one_clear_line(
    tmp_path: Path, make: Any, words: str
) -> None:
    if make(tmp_path).name == "file":
        (tmp_path / "file").write_bytes(b"\x7fELF")
    status, _, text = run(make(tmp_path))
    assert status == 1
    assert len(text.splitlines()) == 1 and words in text and os.fspath(tmp_path) in text


def test_that_an_engine_that_is_not_there_is_said(few: Path) -> None:
    _, lines, _ = run(few, "--backend", "bochs", "--json")
    assert any(line["verdict"] == "cannot" and "bochs" in line["why"] for line in lines)
