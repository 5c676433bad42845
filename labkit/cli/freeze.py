"""`labkit freeze`: make notebooks fit to be committed.

Pictures and text stay; what needs a live kernel, or names a machine, goes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

from labkit.cli import notebooks
from labkit.cli.output import print_json, say
from labkit.errors import InvalidState

__all__ = ["ABOUT", "WIDGET", "declare", "freeze", "run"]

ABOUT = "make notebooks fit to be committed"

# without its kernel a page shows "model not found" instead of the picture
WIDGET = "application/vnd.jupyter.widget-view+json"
# of a notebook: the widgets' state
STATE = ("widgets",)
# of a cell: when it ran
TRACES = ("execution", "ExecuteTime")
# of a notebook; whose Python it was is nobody's business
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument(
        "--execute",
        action="store_true",
        help="run it first; it is written only when every cell succeeds",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 when a notebook is not frozen"
    )


def run(args: argparse.Namespace) -> int:
    """Freeze each notebook and say what changed; with --check nothing is written."""
    if args.check and args.execute:
        raise InvalidState("--check writes nothing, so it has nothing to --execute for")
    all_frozen = True
    for path in args.notebooks:
        found = notebooks.read(path)
        if not args.check and notebooks.clean_up(path):
            say(f"{path}: removed what a freeze that was killed had left", is_error=True)
        result = deepcopy(found)
        if args.execute:
            _execute(path, result)
        removed = freeze(result)
        changed = result != found
        if changed:
            all_frozen = False
        if changed and not args.check:
            notebooks.write(path, result)
        _show(path, changed, removed, args)
    return 1 if args.check and not all_frozen else 0


def _execute(path: Path, notebook: Any) -> None:
    """Run all cells; raises InvalidState when one fails."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    try:
        notebooks.client(path, notebook).execute(env=notebooks.environment())
    except CellExecutionError as err:
        raise InvalidState(
            f"{path}: a cell failed, nothing is written: {err.ename}: {err.evalue}", path=path
        ) from err
    except DeadKernelError as err:
        raise InvalidState(f"{path}: the kernel died, nothing is written", path=path) from err


def freeze(notebook: Any) -> list[str]:
    """Freeze a notebook in place and say what was removed.

    One word each time: "widget", "state", "trace" or "kernel". An output that was a widget and
    nothing else is removed as a whole; all others keep their text, HTML and pictures.
    """
    removed = _remove("state", notebook.metadata, STATE)
    for cell in notebook.cells:
        removed += _remove("trace", cell.metadata, TRACES)
        if cell.cell_type == "code":
            removed += _remove_widgets(cell)
    if any(notebook.metadata.get(name) != facts for name, facts in KERNEL.items()):
        notebook.metadata.update(deepcopy(KERNEL))
        removed.append("kernel")
    return removed


def _remove(word: str, facts: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Remove these names; the word for what went, once for each that was there."""
    found = [name for name in names if name in facts]
    for name in found:
        del facts[name]
    return [word for _ in found]


def _remove_widgets(cell: Any) -> list[str]:
    """Remove the widgets from a cell's outputs, and outputs that are empty then."""
    removed = []
    for output in cell.outputs:
        if "data" in output:
            removed += _remove("widget", output["data"], (WIDGET,))
    cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return removed


def _show(path: Path, changed: bool, removed: list[str], args: argparse.Namespace) -> None:
    counts = dict(sorted(Counter(removed).items()))
    if args.json:
        frozen = not changed or not args.check
        print_json({"notebook": str(path), "frozen": frozen, "changed": changed, "removed": counts})
        return
    if not changed:
        did = "frozen already"
    elif args.check:
        did = "not frozen"
    else:
        did = "written"
    if counts:
        what = ", ".join(f"{count} {word}" for word, count in counts.items())
        did += f" ({what} removed)"
    say(f"{path}: {did}")
