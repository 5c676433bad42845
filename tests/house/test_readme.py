"""The README says what is so: its example runs, its commands, files and capabilities exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paths import REPO

from labkit.arch.x86_cpu import CpuModel
from labkit.cli import COMMANDS
from labkit.engines import open_engine

README = (REPO / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """All code blocks of a language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE))


def test_that_the_example_runs() -> None:
    names: dict[str, object] = {}
    exec(compile(block("python"), "README.md", "exec"), names)
    assert repr(names["uc"]) and "vCPU 1" in repr(names["vm"])


def test_that_every_notebook_is_named_with_its_question() -> None:
    missing = [
        row for path in (REPO / "notebooks").glob("*.ipynb") if (row := _row(path)) not in README
    ]
    assert not missing


def _row(path: Path) -> str:
    """A notebook in the README's table."""
    first_cell = "".join(json.loads(path.read_text())["cells"][0]["source"])
    question = first_cell.partition("\n")[0].lstrip("# ")
    return f"| [{path.stem}](notebooks/{path.name}) | {question} |"


def test_that_every_command_is_shown_and_exists() -> None:
    assert set(re.findall(r"^labkit (\w+)", block("sh"), re.MULTILINE)) == set(COMMANDS)


def test_that_every_make_target_exists() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)`", README))
    named |= set(re.findall(r"^make (\w+)", block("sh"), re.MULTILINE))
    assert {"lab", "test", "tour"} <= named <= targets


def test_that_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert not [path for path in (*links, *pictures) if not (REPO / path).is_file()]


def test_that_the_layout_is_that_of_the_package() -> None:
    layout = README.partition("## How it is laid out")[2].partition("notebooks/")[0]
    rooms = {
        path.name
        for path in (REPO / "labkit").iterdir()
        if path.is_dir() and (path / "__init__.py").exists()
    }
    assert rooms == set(re.findall(r"(\w+)/", layout)) - {"labkit", "lib"}


@pytest.mark.parametrize(
    ("column", "name"), [(2, "unicorn"), pytest.param(3, "kvm", marks=pytest.mark.kvm)]
)
def test_that_the_table_is_what_the_engine_says(
    column: int, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "kvm":
        request.getfixturevalue("kvm")
    rows = capability_table(column)
    engine = open_engine(name, "x86_64", CpuModel())
    capabilities = engine.capabilities
    engine.close()
    for capability in capabilities:
        said = rows.get(capability.name, "")
        if name == "kvm" and (not said or "kvm_pvm" in said):
            continue  # which of KVM's modules it is, the machine says
        assert said.startswith("yes" if capability.have else "no"), capability


def capability_table(column: int) -> dict[str, str]:
    """What the table says of each capability in one of its columns."""
    found = {}
    for row in README.splitlines():
        if row.startswith("| ") and row.count("|") == 5:
            cells = [cell.strip() for cell in row.split("|")]
            name = cells[1].partition(":")[0].lower().replace(" ", "_")
            found[name] = cells[column]
    return found
