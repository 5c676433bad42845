"""`labkit lab`: JupyterLab on a notebook, the tour by default; with `--terminal` the notebook runs here, without Jupyter."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from labkit.cli import notebooks
from labkit.errors import NotAvailable

__all__ = ["HOME", "TOUR", "add", "jupyter_command", "jupyter_environment"]

HOME = Path(__file__).resolve().parents[2]  # the clone
TOUR = HOME / "notebooks" / "00_tour.ipynb"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
UP_SECONDS = 120  # a cold start took 23 s on a small machine


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "open the tour, or another notebook, in JupyterLab"
    parser: argparse.ArgumentParser = commands.add_parser("lab", help=about, description=__doc__)
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
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    notebook = args.notebook.resolve()
    if not notebook.is_file():
        raise NotAvailable(
            f"no notebook {args.notebook}; the tour comes with a clone of labkit's repository"
        )
    if args.terminal:
        return _in_terminal(notebook, args.json)
    command = jupyter_command(notebook, args.port, browser=not args.no_browser)
    if args.json:
        return _announce(command)
    os.execve(command[0], command, jupyter_environment())


def jupyter_command(notebook: Path, port: int | None = None, browser: bool = True) -> list[str]:
    """How JupyterLab is started: loopback only, its own token, no look for updates outside."""
    root = HOME if notebook.is_relative_to(HOME) else notebook.parent
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{quote(str(notebook.relative_to(root)))}",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]
    if port is not None:
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if not browser:
        command.append("--no-browser")
    if os.geteuid() == 0:
        command.append(
            "--allow-root"
        )  # in a container one is root; the token still guards the server
    return command


def jupyter_environment() -> dict[str, str]:
    """Its environment: a page configuration of ours, which spares a newcomer the question about Jupyter's news."""
    ours = str(Path(__file__).with_name("jupyter"))
    return {
        **os.environ,
        "JUPYTER_CONFIG_PATH": os.pathsep.join(
            filter(None, (ours, os.environ.get("JUPYTER_CONFIG_PATH")))
        ),
    }


def _announce(command: list[str]) -> int:
    """Start the server as a child, print one JSON object with its address, and stay until it ends."""
    server = subprocess.Popen(command, stdout=sys.stderr, env=jupyter_environment())
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        facts = _server_facts(server)
        page = next(arg for arg in command if arg.startswith("--LabApp.default_url=")).partition(
            "="
        )[2]
        print(
            json.dumps(
                {
                    "url": f"{facts['url'].rstrip('/')}{page}?token={facts['token']}",
                    "pid": server.pid,
                }
            ),
            flush=True,
        )
        return server.wait()
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()


def _server_facts(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What Jupyter writes about a server once it listens: url, token, port."""
    from jupyter_core.paths import jupyter_runtime_dir

    record = Path(jupyter_runtime_dir(), f"jpserver-{server.pid}.json")
    deadline = time.monotonic() + UP_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or half written
            facts: dict[str, Any] = json.loads(record.read_text())
            return facts
        time.sleep(0.1)
    raise NotAvailable("JupyterLab did not start; its own messages are on stderr")


def _in_terminal(path: Path, as_json: bool) -> int:
    """Run the notebook's cells one after the other in a kernel of this Python and print each with what it shows."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = notebooks.read(path)
    client = notebooks.client(path, notebook)
    failed = ""
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, DeadKernelError) as err:
                failed = f"cell {index}: {getattr(err, 'ename', type(err).__name__)}"
            _show(index, cell, as_json)
            if failed:
                break
    if as_json:
        print(json.dumps({"end": "error" if failed else "done", "why": failed}), flush=True)
    elif failed:
        print(f"The notebook stopped at {failed}.", file=sys.stderr)
    return 1 if failed else 0


def _show(index: int, cell: Any, as_json: bool) -> None:
    outputs = [text for output in cell.get("outputs", ()) if (text := _text(output))]
    if as_json:
        print(
            json.dumps(
                {"cell": index, "type": cell.cell_type, "source": cell.source, "outputs": outputs}
            ),
            flush=True,
        )
        return
    source = cell.source.replace("\n", "\n... ")
    print(f">>> {source}" if cell.cell_type == "code" else cell.source)
    print("".join(f"{text.rstrip()}\n" for text in outputs), flush=True)


def _text(output: Mapping[str, Any]) -> str:
    """The plain-text form of one output of a cell."""
    if output["output_type"] == "stream":
        return str(output["text"])
    if output["output_type"] == "error":
        return ANSI.sub("", "\n".join(output["traceback"]))
    return str(output["data"].get("text/plain", ""))
