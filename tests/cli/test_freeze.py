"""labkit freeze: what needs a live kernel goes, what a person looks at stays."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import books
import pytest

from labkit.cli import main
from labkit.cli.freeze import WIDGET, freeze

BUNDLE = {
    WIDGET: {"model_id": "1"},
    "text/html": "<b>x</b>",
    "text/plain": "x",
    "image/png": "AAAA",
}


def notebook(*outputs: Any, source: str = "1 + 1", **metadata: Any) -> Any:
    """A notebook with one cell."""
    return books.notebook(books.code(source, *outputs, **metadata))


def shown(data: dict[str, Any]) -> Any:
    return books.output("execute_result", data=dict(data), execution_count=1)


def test_that_the_widget_goes_and_its_fallbacks_stay() -> None:
    book = notebook(shown(BUNDLE))
    assert freeze(book) == ["widget", "kernel"]
    assert set(book.cells[0].outputs[0].data) == {"text/html", "text/plain", "image/png"}


def test_that_an_output_that_was_only_a_widget_goes_as_a_whole() -> None:
    book = notebook(
        books.output("display_data", data={WIDGET: {}}), books.output("stream", text="kept")
    )
    freeze(book)
    assert [output.output_type for output in book.cells[0].outputs] == ["stream"]


def test_that_state_times_and_the_kernels_version_go() -> None:
    book = notebook(execution={"iopub.execute_input": "2020-01-01T00:00:00Z"}, tags=["kept"])
    book.metadata.update(
        widgets={"x": {}}, language_info={"name": "python", "version": "3.11.7"}, title="kept"
    )
    assert freeze(book) == ["state", "trace", "kernel"]
    assert book.metadata.language_info == {"name": "python"} and book.metadata.title == "kept"
    assert book.cells[0].metadata == {"tags": ["kept"]} and "widgets" not in book.metadata


def test_that_freezing_twice_changes_nothing() -> None:
    book = notebook(shown(BUNDLE))
    freeze(book)
    once = deepcopy(book)
    assert freeze(book) == [] and book == once


def test_that_other_cells_are_left_alone() -> None:
    book = books.notebook(books.markdown("# Title"), books.raw("raw"))
    before = [dict(cell) for cell in book.cells]
    freeze(book)
    assert [dict(cell) for cell in book.cells] == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A notebook that is not frozen, in a file."""
    path = tmp_path / "a.ipynb"
    books.write(notebook(shown(BUNDLE)), path)
    return path


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_that_the_command_writes_and_says_so(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["freeze", "--json", str(path)]) == 0
    assert records(capsys) == [
        {
            "notebook": str(path),
            "frozen": True,
            "changed": True,
            "removed": {"kernel": 1, "widget": 1},
        }
    ]
    assert WIDGET not in path.read_text() and not list(path.parent.glob("*.new"))
    assert main(["freeze", str(path)]) == 0 and "frozen already" in capsys.readouterr().out


def test_that_check_writes_nothing_and_is_the_status(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_bytes()
    assert main(["freeze", "--check", "--json", str(path)]) == 1
    assert records(capsys)[0]["frozen"] is False and path.read_bytes() == before
    assert main(["freeze", str(path)]) == 0 and main(["freeze", "--check", str(path)]) == 0


def test_that_execute_runs_it_first(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books.write(notebook(source="print(6 * 7)"), path)
    assert main(["freeze", "--execute", "--json", str(path)]) == 0
    [cell] = books.read(path).cells
    assert cell.outputs[0].text == "42\n" and "execution" not in cell.metadata


@pytest.mark.parametrize(
    ("source", "says"), [("1 / 0", "ZeroDivisionError"), ("import os; os._exit(1)", "kernel died")]
)
def test_that_a_failing_notebook_is_not_written(
    source: str, says: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books.write(notebook(source=source), path)
    before = path.read_bytes()
    assert main(["freeze", "--execute", "--json", str(path)]) == 1
    [record] = records(capsys)
    assert record["error"] == "InvalidState" and says in record["message"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "NotAvailable"),
        ("not JSON", "InvalidState"),
        ("[1]", "InvalidState"),
        ('{"a": 1}', "InvalidState"),
        ('{"nbformat": 4, "cells": 3}', "InvalidState"),
    ],
)
def test_that_what_is_no_notebook_is_one_line(
    text: str | None, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    assert main(["freeze", "--json", str(tmp_path / "a.ipynb")]) == 1
    [record] = records(capsys)
    assert record["error"] == error and "a.ipynb" in record["message"]


def test_that_check_and_execute_exclude_each_other(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["freeze", "--check", "--execute", str(path)]) == 1
    assert "--execute" in capsys.readouterr().err


def test_that_what_a_killed_freeze_left_is_removed_and_said(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = path.with_suffix(".ipynb.new")
    left.write_text("half a note")
    main(["freeze", "--check", str(path)])
    assert left.exists()
    capsys.readouterr()
    assert main(["freeze", "--json", str(path)]) == 0
    said = capsys.readouterr()
    assert "killed" in said.err and not left.exists()
    assert [json.loads(line)["frozen"] for line in said.out.splitlines()] == [True]
