"""A JupyterLab of this Python: how it is started, and where it listens once it is up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from labkit.cli.output import print_json
from labkit.errors import NotAvailable

__all__ = ["HOME", "announce", "jupyter_command", "jupyter_environment"]

HOME = Path(__file__).resolve().parents[2]  # the clone
UP_SECONDS = 120  # a cold start took 23 s on a small machine


def jupyter_command(notebook: Path, port: int | None = None, browser: bool = True) -> list[str]:
    """How JupyterLab is started: loopback only, its own token, no look for updates outside."""
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={_root(notebook)}",
        f"--LabApp.default_url={_page(notebook)}",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--ContentsManager.pre_save_hook=labkit.cli.saved.prefer_pictures",
    ]
    if port is not None:
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if not browser:
        command.append("--no-browser")
    if os.geteuid() == 0:
        # in a container one is root; the token still guards the server
        command.append("--allow-root")
    return command


def _root(notebook: Path) -> Path:
    """The folder that the server shows: the clone, or that of a notebook elsewhere."""
    return HOME if notebook.is_relative_to(HOME) else notebook.parent


def _page(notebook: Path) -> str:
    """The path of the notebook's page on the server."""
    return f"/lab/tree/{quote(str(notebook.relative_to(_root(notebook))))}"


def jupyter_environment() -> dict[str, str]:
    """Its environment: with a page configuration of ours before the user's own.

    It spares a newcomer the question about Jupyter's news, and has the state of widgets saved.
    """
    folders = [str(Path(__file__).with_name("jupyter"))]
    theirs = os.environ.get("JUPYTER_CONFIG_PATH")
    if theirs:
        folders.append(theirs)
    return {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(folders)}


def announce(command: list[str], notebook: Path) -> int:
    """Start the server as a child, print one JSON object with its address, and stay until it ends.

    Raises NotAvailable when it does not come up.
    """
    server = subprocess.Popen(command, stdout=sys.stderr, env=jupyter_environment())
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        facts = _server_facts(server)
        url = f"{facts['url'].rstrip('/')}{_page(notebook)}?token={facts['token']}"
        print_json({"url": url, "pid": server.pid})
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
