"""`labkit run` from outside: what it prints, how it ends, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import GUESTS

SOURCE = """
#include "labkit.h"
void guest_code(uint64_t vcpu) { GUEST_SYNC(7); GUEST_PRINTF("I am %lu\\n", vcpu); GUEST_DONE(); }
void guest_fails(uint64_t vcpu) { GUEST_ASSERT_EQ(1 + 1, 3); }
void guest_null(uint64_t vcpu) { *(volatile int *)0 = 1; }
void guest_spins(uint64_t vcpu) { for (;;); }
void guest_mmio(uint64_t vcpu) { ucall(0x17, 1, 5UL); GUEST_DONE(); }
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "guest.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def on(engine: dict[str, str]) -> list[str]:
    """Options that choose each engine and ring in turn."""
    return ["--backend", engine["backend"], "--privilege", engine["privilege"]]


def run(*args: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the objects that --json prints, and stderr."""
    command = [sys.executable, "-m", "labkit.cli", "run", *map(str, args)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if "--json" in args]
    return done.returncode, lines, done.stderr


def test_that_each_ucall_is_one_line_and_the_end_is_another(source: Path, on: list[str]) -> None:
    status, lines, _ = run(source, "--json", *on)
    assert status == 0
    sync, printf, done, end = lines
    assert (sync["cmd"], sync["vcpu"], sync["args"][1], sync["text"]) == ("SYNC", 0, 7, None)
    assert printf == {"vcpu": 0, "cmd": "PRINTF", "args": [0] * 7, "text": "I am 0\n"}
    assert done["cmd"] == "DONE"
    assert "cmd" not in end and end["end"] == "done"


def test_that_every_vcpu_gets_its_index(source: Path, on: list[str]) -> None:
    status, lines, _ = run(source, "--vcpus", 3, "--json", *on)
    texts = sorted(line["text"] for line in lines if line.get("text"))
    assert status == 0 and texts == ["I am 0\n", "I am 1\n", "I am 2\n"]


@pytest.mark.parametrize(
    ("entry", "end", "why"),
    [
        ("guest_fails", "abort", "guest.c:4"),
        ("guest_null", "unhandled", "#PF (error code 0x2) and no handler, at guest_null+"),
        ("guest_spins", "budget", "vCPU 0 running at guest_spins"),
    ],
)
def test_that_a_guest_that_is_not_done_says_why_and_where(
    source: Path, entry: str, end: str, why: str
) -> None:
    status, lines, _ = run(source, "--entry", entry, "--max-insns", 50_000, "--json")
    assert status == 1 and lines[-1]["end"] == end and why in lines[-1]["why"]


def test_that_an_abort_has_file_line_and_expression(source: Path, on: list[str]) -> None:
    abort = run(source, "--entry", "guest_fails", "--json", *on)[1][0]
    assert abort["file"].endswith("guest.c")
    assert (abort["line"], abort["expr"]) == (4, "1 + 1 == 3")


def test_that_a_number_that_is_no_command_is_none_with_its_number(
    source: Path, on: list[str]
) -> None:
    first = run(source, "--entry", "guest_mmio", "--json", *on)[1][0]
    assert (first["cmd"], first["number"], first["args"][0]) == ("NONE", 0x17, 5)


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        ("guest_halts", "halted"),
        ("guest_loses_idt", "shutdown"),
        ("guest_fills_bitmap", "bad-ucall"),
        ("guest_overflows_stack", "shutdown"),
    ],
)
def test_that_a_bad_guest_ends_in_its_own_word(entry: str, end: str) -> None:
    status, lines, _ = run(GUESTS / "bad.elf", "--entry", entry, "--json")
    assert status == 1 and lines[-1]["end"] == end and "vCPU 0" in lines[-1]["why"]


def test_that_a_forged_hva_is_reported_and_never_followed() -> None:
    _, lines, _ = run(
        GUESTS / "bad.elf", "--entry", "guest_forges_hva", "--max-insns", 5000, "--json"
    )
    assert lines[0]["cmd"] == "NONE"
    assert "0x4141414141414141 is no memory of this VM" in lines[0]["why"]


@pytest.mark.parametrize("protect", ["sev", "sev-es", "snp", "tdx"])
def test_that_an_encrypted_guest_says_the_same(protect: str) -> None:
    plain_status, plain, _ = run(GUESTS / "hello.elf", "--json")
    status, hidden, _ = run(GUESTS / "hello.elf", "--protect", protect, "--json")
    assert status == plain_status == 0
    assert hidden[:-1] == plain[:-1] and hidden[-1]["end"] == "done"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nowhere.c",), "No such file"),
        ((GUESTS / "hello.elf", "--entry", "nope"), "no symbol 'nope'"),
        ((GUESTS / "hello.elf", "--vcpus", "0"), "at least one vCPU"),
        ((GUESTS / "hello.elf", "--backend", "bochs"), "only unicorn"),
        ((GUESTS / "hello.elf", "--schedule", "lottery"), "round_robin"),
        ((GUESTS / "hello.elf", "--max-insns", "-1"), "not negative"),
        (("/bin/true",), "position independent"),
    ],
)
def test_that_bad_input_is_one_clear_line(args: tuple[object, ...], words: str) -> None:
    status, _, stderr = run(*args)
    assert status == 1 and words in stderr and "Traceback" not in stderr


def test_that_c_that_does_not_compile_is_the_compilers_own_message(tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int x = ;\n")
    status, _, stderr = run(tmp_path / "bad.c")
    assert status == 1 and "bad.c:1:9: error: expected expression" in stderr


def test_that_two_engines_are_told_apart_and_their_verdict_comes_last(source: Path) -> None:
    status, lines, _ = run(source, "--backend", "unicorn,unicorn", "--json")
    assert status == 0 and lines[-1]["end"] == "equal"
    assert lines[-1]["ends"] == {"unicorn": "done", "unicorn 2": "done"}
    assert [line.get("cmd") for line in lines[:-1]] == ["SYNC", "PRINTF", "DONE", None] * 2
    assert all(line["backend"] == "unicorn" for line in lines[:-1])


def test_that_two_engines_that_agree_on_a_failure_are_no_success(source: Path) -> None:
    status, lines, _ = run(
        source, "--backend", "unicorn,unicorn", "--entry", "guest_fails", "--json"
    )
    assert status == 1 and lines[-1]["end"] == "equal"
    assert set(lines[-1]["ends"].values()) == {"abort"}


@pytest.mark.usefixtures("kvm")
def test_that_unicorn_and_kvm_agree(source: Path) -> None:
    status, lines, _ = run(source, "--backend", "unicorn,kvm", "--json")
    assert status == 0 and lines[-1]["end"] == "equal"
    assert {line.get("backend") for line in lines} == {"unicorn", "kvm", None}


def test_that_an_encrypted_guest_takes_a_policy_and_a_place_for_its_bit_and_a_plain_one_does_not(
    source: Path,
) -> None:
    status, lines, _ = run(
        source, "--protect", "sev-es", "--policy", "0x5", "--c-bit", 47, "--json"
    )
    assert status == 0 and lines[-1]["end"] == "done"
    status, lines, said = run(source, "--c-bit", 47, "--json")
    assert status != 0 and not any("cmd" in line for line in lines)
    assert "c_bit=47: only an encrypted guest has that" in said + str(lines)


def test_that_a_terminal_without_the_letters_of_a_guest_is_shown_what_they_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "guest.c"
    body = r'GUEST_PRINTF("caf\xc3\xa9\n"); GUEST_DONE();'
    path.write_text(f'#include "labkit.h"\nvoid guest_code(void) {{ {body} }}\n')
    command = [sys.executable, "-m", "labkit.cli", "run", str(path)]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=env
    )
    assert done.returncode == 0 and b"caf\\xe9" in done.stdout and not done.stderr


def test_that_macros_reach_a_c_file(tmp_path: Path) -> None:
    guest = tmp_path / "guest.c"
    guest.write_text(
        '#include "labkit.h"\nvoid guest_code(void) { GUEST_SYNC(STAGE + DEBUG); GUEST_DONE(); }\n'
    )
    status, lines, _ = run(guest, "-D", "STAGE=41", "-DDEBUG", "--json")
    assert status == 0
    assert lines[0]["args"][1] == 42


def test_that_macros_for_an_elf_file_are_refused() -> None:
    status, lines, _ = run(GUESTS / "hello.elf", "-DX", "--json")
    assert status == 1
    assert "no C file" in lines[0]["message"]


def test_that_memory_is_as_large_as_was_said() -> None:
    status, lines, _ = run(GUESTS / "hello.elf", "--memory", "0x1000", "--json")
    assert status == 1
    assert lines[0]["error"] in ("OutOfMemory", "InvalidState")
    assert run(GUESTS / "hello.elf", "--memory", "0x1000000")[0] == 0


def test_that_the_version_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "labkit.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("labkit 0.")
