"""`labkit lab`: JupyterLab on a notebook, the tour by default.

With `--terminal` the notebook runs here, without Jupyter.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit.cli import notebooks
from labkit.cli.jupyter_server import HOME, announce, jupyter_command, jupyter_environment
from labkit.cli.output import print_json
from labkit.errors import NotAvailable

__all__ = ["ABOUT", "TOUR", "declare", "run"]

ABOUT = "open the tour, or another notebook, in JupyterLab"
TOUR = HOME / "notebooks" / "00_tour.ipynb"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "notebook", nargs="?", type=Path, default=TOUR, help="default: notebooks/00_tour.ipynb"
    )
    parser.add_argument(
        "--terminal",
        action="store_true",
        help="run it here and print its cells; status 1 when one fails",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="start the server only, and print its address"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 8888")


def run(args: argparse.Namespace) -> int:
    """Become JupyterLab; with --json stay its parent, with --terminal do without."""
    notebook = args.notebook.resolve()
    if not notebook.is_file():
        raise NotAvailable(
            f"no notebook {args.notebook}; the tour comes with a clone of labkit's repository"
        )
    if args.terminal:
        return _in_terminal(notebook, args.json)
    command = jupyter_command(notebook, args.port, browser=not args.no_browser)
    if args.json:
        return announce(command, notebook)
    os.execve(command[0], command, jupyter_environment())


def _in_terminal(path: Path, as_json: bool) -> int:
    """Run the cells one by one in a kernel of this Python, and print each with what it shows."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = notebooks.read(path)
    client = notebooks.client(path, notebook)
    failed = ""
    with client.setup_kernel(env=notebooks.environment()):
        for index, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as err:
                failed = f"cell {index}: {err.ename}"
            except DeadKernelError:
                failed = f"cell {index}: DeadKernelError"
            _show(index, cell, as_json)
            if failed:
                break
    if as_json:
        print_json({"end": "error" if failed else "done", "why": failed})
    elif failed:
        print(f"The notebook stopped at {failed}.", file=sys.stderr)
    return 1 if failed else 0


def _show(index: int, cell: Any, as_json: bool) -> None:
    texts = [_text(output) for output in cell.get("outputs", ())]
    outputs = [text for text in texts if text]
    if as_json:
        print_json(
            {"cell": index, "type": cell.cell_type, "source": cell.source, "outputs": outputs}
        )
        return
    if cell.cell_type == "code":
        print(">>> " + cell.source.replace("\n", "\n... "))
    else:
        print(cell.source)
    print("".join(f"{text.rstrip()}\n" for text in outputs), flush=True)


def _text(output: Mapping[str, Any]) -> str:
    """The plain-text form of one output of a cell."""
    if output["output_type"] == "stream":
        return str(output["text"])
    if output["output_type"] == "error":
        return ANSI.sub("", "\n".join(output["traceback"]))
    return str(output["data"].get("text/plain", ""))
