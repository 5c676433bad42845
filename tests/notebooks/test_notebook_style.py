"""How a notebook is written, as STYLE.md asks for it, and what may be committed with it."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import books
import pytest
from committed import BITS, FOUR, LAUNCH, NOTEBOOKS, REAL_KVM, TOUR, cells, read, sections, text

import labkit as lk
from labkit.cli import freeze

MAX_CELL, MEDIAN_CELL = 12, 3
LONG_DEF = re.compile(r"^def .*\n(?:[ \t]+.*\n){5}", re.MULTILINE)
COMMIT = re.compile(r"commit [0-9a-f]{12}\b")
INNER_IMPORT = re.compile(r"^\s*(?:from|import)\s+labkit\..*$", re.MULTILINE)
PLACES = re.compile(r"/(home|Users|root|tmp|work|usr|opt|mnt|var)/|site-packages|[A-Z]:\\\\")

# yields what is wrong in a notebook
Rule = Callable[[Path], Iterator[str]]


def no_question(path: Path) -> Iterator[str]:
    """The title is one question, in the first cell."""
    lines = text(path, "markdown").splitlines()
    titles = [line for line in lines if line.startswith("# ")]
    if len(titles) != 1:
        yield f"{len(titles)} titles"
        return
    [title] = titles
    if title.count("?") != 1 or not title.endswith("?"):
        yield f"{title!r} is not one question"
    if not read(path).cells[0].source.startswith(title):
        yield "does not begin with its title"


def little_prose(path: Path) -> Iterator[str]:
    """There is as much prose as code."""
    prose = sum(len(cell.source) for cell in cells(path, "markdown"))
    code = sum(len(cell.source) for cell in cells(path, "code"))
    if prose < code:
        yield f"{code} characters of code, {prose} of prose"


def long_cells(path: Path) -> Iterator[str]:
    """Code cells are short; C cells do not count for the median."""
    sources = [cell.source for cell in cells(path, "code")]
    for source in sources:
        first = source.partition("\n")[0]
        if len(source.splitlines()) > MAX_CELL:
            yield f"a cell of more than {MAX_CELL} lines: {first}"
        if LONG_DEF.search(source):
            yield f"a def of more than five lines: {first}"
    lengths = sorted(nr_statements(one) for one in sources if not one.startswith("%%guest"))
    if lengths[len(lengths) // 2] > MEDIAN_CELL:
        yield f"half of the cells have more than {MEDIAN_CELL} statements"


def nr_statements(source: str) -> int:
    """How many statements a cell has, wrapped or not; a magic is one."""
    python = re.sub(r"^%", "#%", source, flags=re.MULTILINE)
    tokens = tokenize.generate_tokens(io.StringIO(python).readline)
    return sum(token.type == tokenize.NEWLINE for token in tokens) + source.startswith("%")


def parts_without_lesson(path: Path) -> Iterator[str]:
    """Each part lets the reader predict and pins its lesson with an assert."""
    for part in sections(path)[:-1]:
        heading = part[0].source.splitlines()[0]
        source = "\n".join(cell.source for cell in part)
        if "**Predict:**" not in source:
            yield f"{heading}: nothing to predict"
        if not re.search(r"^assert ", source, re.MULTILINE):
            yield f"{heading}: no assert"


def exercises_missing(path: Path) -> Iterator[str]:
    """Three exercises close it, each with a seed and a folded answer."""
    source = "\n".join(cell.source for cell in sections(path)[-1])
    answers = source.count("<details><summary>Answer</summary>")
    seeds = len(re.findall(r"^seed = \d+$", source, re.MULTILINE))
    if not answers == source.count("</details>") == seeds == 3:
        yield f"{answers} answers, {seeds} seeds"


def no_commit(path: Path) -> Iterator[str]:
    """A commit of the kernel is cited."""
    if not COMMIT.search(text(path, "markdown")):
        yield "cites no commit"


def inner_imports(path: Path) -> Iterator[str]:
    """What readers need is in `lk`."""
    for found in INNER_IMPORT.finditer(text(path, "code")):
        yield f"{found[0]}: not from an inner room"


def words_not_public(path: Path) -> Iterator[str]:
    """Every word of `lk` that it uses is public."""
    words = re.findall(r"\blk\.(\w+)", text(path, "code"))
    if not words:
        yield "uses no word of lk"
    for word in sorted(set(words) - set(dir(lk))):
        yield f"lk.{word} is not public"


def not_frozen(path: Path) -> Iterator[str]:
    """It is committed frozen, with the outputs of one run from top to bottom."""
    removed = freeze.freeze(deepcopy(read(path)))
    if removed:
        yield f"not frozen: {', '.join(removed)}"
    counts = [cell.execution_count for cell in cells(path, "code")]
    if counts != list(range(1, len(counts) + 1)):
        yield f"its cells ran in the order {counts}"
    kinds = [output.output_type for output in outputs(path)]
    if "error" in kinds:
        yield "an error is committed"
    if kinds.count("execute_result") <= len(kinds) // 2:
        yield "less than half of its outputs are results"


def outputs(path: Path) -> list[Any]:
    return [output for cell in cells(path, "code") for output in cell.outputs]


def bare_pictures(path: Path) -> Iterator[str]:
    """A picture comes from nowhere else and has a text, for terminals and who does not see it."""
    datas = [output.data for output in outputs(path) if "data" in output]
    html = "".join(data["text/html"] for data in datas if "text/html" in data)
    images = re.findall(r"<img[^>]*>", html)
    if not images:
        yield "no picture"
    for image in images:
        if not re.search(r'src="data:image/', image) or not re.search(r'alt="[^"]+"', image):
            yield f"{image[:60]}: not inside the page, or without alt"
    if not all("text/plain" in data for data in datas):
        yield "an output without text"
    if "http" in html:
        yield "an address in its HTML"


def machines_named(path: Path) -> Iterator[str]:
    """No path of the machine it ran on."""
    found = PLACES.search(path.read_text(encoding="utf-8"))
    if found:
        yield f"names a place on a machine: {found[0]}"


RULES = (
    no_question,
    little_prose,
    long_cells,
    parts_without_lesson,
    exercises_missing,
    no_commit,
    inner_imports,
    words_not_public,
    not_frozen,
    bare_pictures,
    machines_named,
)


def test_that_the_notebooks_are_there() -> None:
    assert {TOUR, BITS, LAUNCH, FOUR, REAL_KVM} <= set(NOTEBOOKS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_that_every_notebook_keeps_the_rule(rule: Rule) -> None:
    places = [f"{path.name}: {what}" for path in NOTEBOOKS for what in rule(path)]
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (no_question, ["# A statement"]),
        (no_question, ["prose", "# A question?"]),
        (no_question, ["# One?", "# Two?"]),
        (little_prose, ["# Why?", ">>> x = 'more code than prose'"]),
        (long_cells, [">>> 1" + "\n1" * 12]),
        (long_cells, [">>> def f():" + "\n    x = 1" * 5 + "\n"]),
        (long_cells, [">>> 1\n2\n3\n4", ">>> %%guest a"]),
        (parts_without_lesson, ["## A part", ">>> assert True", "## Exercises"]),
        (parts_without_lesson, ["## A part: **Predict:** what?", ">>> 1", "## Exercises"]),
        (exercises_missing, ["## Exercises", ">>> seed = 1"]),
        (no_commit, ["commit 1234"]),
        (inner_imports, [">>> from labkit.arch import ARCHES"]),
        (inner_imports, [">>> def f():\n    import labkit.lab"]),
        (words_not_public, [">>> lk.nonsense()"]),
        (words_not_public, [">>> 1"]),
        (not_frozen, [">>> 1"]),
        (bare_pictures, [">>> 1"]),
        (machines_named, ["/home/me/labkit"]),
    ],
)
def test_that_a_rule_can_be_broken(rule: Rule, sources: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    made = [
        books.code(source.removeprefix(">>> "))
        if source.startswith(">>> ")
        else books.markdown(source)
        for source in sources
    ]
    books.write(books.notebook(*made), path)
    assert list(rule(path))
