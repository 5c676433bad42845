"""What readers of a notebook need is in `lk`: no inner room is named, and every word is public."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paths import REPO

import labkit as lk

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

INNER = re.compile(r"^\s*(from|import)\s+labkit\.", re.MULTILINE)


def code(path: Path) -> str:
    """All code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@each
def test_that_no_inner_room_is_imported(path: Path) -> None:
    found = INNER.search(code(path))
    assert found is None, f"{path.name}: {found and found.group()}...: say it with a word of lk"


@each
def test_that_every_word_of_lk_is_public(path: Path) -> None:
    words = set(re.findall(r"\blk\.(\w+)", code(path)))
    assert words and words <= set(dir(lk))


@pytest.mark.parametrize("line", ["from labkit.arch import ARCHES", "    import labkit.explore"])
def test_that_the_rule_can_be_broken(line: str) -> None:
    assert INNER.search(f"import labkit as lk\n{line}\n")
