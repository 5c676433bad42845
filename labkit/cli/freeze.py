"""`labkit freeze`: make notebooks fit to be committed: pictures and text stay, what needs a live kernel or names a machine goes."""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from labkit.cli import notebooks
from labkit.errors import InvalidState

__all__ = ["WIDGET", "add", "freeze"]

WIDGET = "application/vnd.jupyter.widget-view+json"  # without its kernel a page shows "model not found" instead of the picture
STATE = ("widgets",)  # of the notebook
TRACES = ("execution", "ExecuteTime")  # of a cell: when it ran
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}  # whose Python it was is nobody's business


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "make notebooks fit to be committed"
    parser: argparse.ArgumentParser = commands.add_parser("freeze", help=about, description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument(
        "--execute",
        action="store_true",
        help="run it first; it is written only when every cell succeeds",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 when a notebook is not frozen"
    )
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.check and args.execute:
        raise InvalidState("--check writes nothing, so it has nothing to --execute for")
    stale = 0
    for path in args.notebooks:
        found = notebooks.read(path)
        result = deepcopy(found)
        if args.execute:
            _execute(path, result)
        removed = freeze(result)
        changed = result != found
        stale += changed
        if changed and not args.check:
            notebooks.write(path, result)
        _show(path, changed, removed, args)
    return 1 if args.check and stale else 0


def _execute(path: Path, notebook: Any) -> None:
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    try:
        notebooks.client(path, notebook).execute()
    except CellExecutionError as err:
        raise InvalidState(
            f"{path}: a cell failed, nothing is written: {err.ename}: {err.evalue}", path=path
        ) from err
    except DeadKernelError as err:
        raise InvalidState(f"{path}: the kernel died, nothing is written", path=path) from err


def freeze(notebook: Any) -> list[str]:
    """Freeze a notebook in place and say what was removed, one word each time: widget, state, trace or kernel.

    An output that was a widget and nothing else is removed as a whole; all others keep their text, HTML and pictures.
    """
    removed = ["state" for name in STATE if notebook.metadata.pop(name, None) is not None]
    for cell in notebook.cells:
        removed += ["trace" for name in TRACES if cell.metadata.pop(name, None) is not None]
        if cell.cell_type == "code":
            removed += [
                "widget"
                for output in cell.outputs
                if output.get("data", {}).pop(WIDGET, None) is not None
            ]
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    if any(notebook.metadata.get(name) != facts for name, facts in KERNEL.items()):
        notebook.metadata.update(deepcopy(KERNEL))
        removed.append("kernel")
    return removed


def _show(path: Path, changed: bool, removed: list[str], args: argparse.Namespace) -> None:
    counts = {word: removed.count(word) for word in sorted(set(removed))}
    if args.json:
        print(
            json.dumps(
                {
                    "notebook": str(path),
                    "frozen": not changed or not args.check,
                    "changed": changed,
                    "removed": counts,
                }
            ),
            flush=True,
        )
        return
    did = "not frozen" if args.check else "written"
    what = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(
        f"{path}: {did if changed else 'frozen already'}{f' ({what} removed)' if what else ''}",
        flush=True,
    )
