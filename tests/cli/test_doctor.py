"""labkit doctor: it finds what is there, and gives the reason for what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from labkit.cli import findings, main
from labkit.sev import SIMPLIFIED

RUN = "import sys; {0}; from labkit.cli import main; sys.exit(main(sys.argv[1:]))"


def run_doctor(*args: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN.format(before), "doctor", *args], capture_output=True, text=True
    )


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_that_json_is_one_object_per_line_and_nothing_else() -> None:
    done = run_doctor("--json")
    found = {(record["kind"], record["name"]): record for record in records(done.stdout)}
    assert done.returncode == 0 and not done.stderr
    assert found["engine", "unicorn"]["ok"]
    assert found["engine", "unicorn"]["version"] == metadata.version("unicorn")
    assert ("unicorn can", "step") in found and not found["engine", "qemu"]["ok"]
    assert found["compiler", "ziglang"]["ok"] and ("machine", "/dev/kvm") in found
    assert all(
        set(record) == {"kind", "name", "ok", "version", "note"} for record in found.values()
    )


def test_that_it_says_what_is_encrypted_and_where_the_model_is_simpler() -> None:
    found = [(f.kind, f.name) for f in findings.examine()]
    assert [name for kind, name in found if kind == "protection"] == ["sev", "sev-es", "snp", "tdx"]
    simplified = {name for kind, name in found if kind == "simplified in encryption"}
    assert simplified == {name for name, _ in SIMPLIFIED}
    assert next(f for f in findings.examine() if (f.kind, f.name) == ("unicorn can", "protect")).ok


def test_that_the_table_names_the_default_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "  yes  unicorn" in text and text.endswith("The default engine, unicorn, is usable.\n")


def test_that_a_missing_default_engine_is_the_exit_status() -> None:
    done = run_doctor("--json", before="sys.modules['unicorn'] = None")
    engine = next(
        r for r in records(done.stdout) if (r["kind"], r["name"]) == ("engine", "unicorn")
    )
    assert done.returncode == 1 and not engine["ok"] and "unicorn" in str(engine["note"])


def test_that_an_engine_that_is_not_built_yet_says_so() -> None:
    [finding] = findings._engine("nosuch")
    assert not finding.ok and "not part of this labkit" in finding.note


def test_that_what_is_missing_has_a_reason() -> None:
    for finding in findings.examine():
        assert finding.ok or finding.note, finding


def test_that_a_missing_device_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(findings, "KVM", tmp_path / "kvm")
    assert not findings._kvm().ok and "no such device" in findings._kvm().note


def test_that_a_program_that_does_not_run_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = findings._program("compiler", "gcc", "")
    assert not finding.ok and finding.note == f"{tmp_path / 'gcc'} --version does not run"


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("gcc (Debian 12.2.0-14+deb12u1) 12.2.0", "12.2.0"),
        ("Debian clang version 14.0.6", "14.0.6"),
        ("0.17.1", "0.17.1"),
        ("QEMU emulator version 7.2.11 (Debian 1:7.2+dfsg-7)", "7.2.11"),
        ("Chromium 156.0.8078.79 built on Debian", "156.0.8078.79"),
        ("no number", ""),
    ],
)
def test_that_the_version_is_read_off(line: str, number: str) -> None:
    assert findings._number(line) == number


def test_that_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m labkit.cli doctor | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
