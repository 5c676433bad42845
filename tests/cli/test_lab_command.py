"""labkit lab: JupyterLab on loopback with its token, or the notebook in the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import books
import pytest

from labkit.cli import jupyter_server, lab, main


def write(path: Path, *cells: str) -> Path:
    notebook = books.notebook(books.markdown("# Title"), *map(books.code, cells))
    books.write(notebook, path)
    return path


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_that_a_notebook_runs_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.ipynb", "import sys; print(sys.prefix)\nx = 20", "x + 1")
    assert main(["lab", "--terminal", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# Title",
        "",
        ">>> import sys; print(sys.prefix)",
        "... x = 20",
        sys.prefix,
        "",
        ">>> x + 1",
        "21",
        "",
    ]


def test_that_a_failing_cell_ends_it_and_is_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.ipynb", "1 / 0", "never = 1")
    assert main(["lab", "--terminal", "--json", str(path)]) == 1
    *cells, end = lines(capsys.readouterr().out)
    assert end == {"end": "error", "why": "cell 1: ZeroDivisionError"} and len(cells) == 2
    assert "division by zero" in str(cells[1]["outputs"])


def test_that_a_dead_kernel_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.ipynb", "import os; os._exit(3)")
    assert main(["lab", "--terminal", "--json", str(path)]) == 1
    assert lines(capsys.readouterr().out)[-1] == {"end": "error", "why": "cell 1: DeadKernelError"}


@pytest.mark.parametrize(
    ("text", "error"),
    [(None, "NotAvailable"), ("not JSON", "InvalidState"), ('{"a": 1}', "InvalidState")],
)
def test_that_what_is_no_notebook_is_one_line(
    text: str | None, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ipynb"
    if text is not None:
        path.write_text(text)
    assert main(["lab", "--terminal", "--json", str(path)]) == 1
    [record] = lines(capsys.readouterr().out)
    assert record["error"] == error and "a.ipynb" in str(record["message"])


def test_that_the_server_is_bound_to_loopback(tmp_path: Path) -> None:
    command = jupyter_server.jupyter_command(tmp_path / "my notes.ipynb", port=9000, browser=False)
    assert (
        "--ServerApp.ip=127.0.0.1" in command
        and "--LabApp.default_url=/lab/tree/my%20notes.ipynb" in command
    )
    assert not any("token" in word or "password" in word for word in command)
    assert ("--allow-root" in command) == (os.geteuid() == 0)


def test_that_the_tour_opens_inside_the_clone() -> None:
    command = jupyter_server.jupyter_command(lab.TOUR)
    assert (
        f"--ServerApp.root_dir={jupyter_server.HOME}" in command
        and "--LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb" in command
    )


@pytest.mark.slow
def test_that_the_announced_address_works_and_needs_its_token(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb", "1")
    command = [sys.executable, "-m", "labkit.cli", "lab", "--json", "--no-browser", str(notebook)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        try:
            url = str(json.loads(process.stdout.readline())["url"])
            assert url.startswith("http://127.0.0.1:") and "/lab/tree/a.ipynb?token=" in url
            with urlopen(url.replace("/lab/tree/a.ipynb", "/api/contents/a.ipynb")) as answer:
                assert answer.status == 200
            with pytest.raises(HTTPError, match="403"):
                urlopen(url.partition("/lab/")[0] + "/api/contents/a.ipynb")
        finally:
            process.terminate()
    assert process.stdout is not None
