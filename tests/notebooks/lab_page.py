"""A JupyterLab of labkit on a notebook, with directories of its own, and what a page does there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paths import REPO

__all__ = ["ADD_CELL", "LAST_OUTPUT", "READY", "RUN", "SOON", "lab"]

SOON = """const soon = (seconds, what, promise) => {
  const late = () => new Error(`${what} took more than ${seconds} s`);
  const end = new Promise((_, fail) => setTimeout(() => fail(late()), seconds * 1000));
  return Promise.race([promise, end]);
};"""
READY = f"""async () => {{
  {SOON}
  const pause = () => new Promise((wait) => setTimeout(wait, 100));
  const ready = async (app) => {{
    await app.restored;
    while (!app.shell.currentWidget?.sessionContext) await pause();
    const {{ sessionContext, content }} = app.shell.currentWidget;
    await sessionContext.ready;
    await sessionContext.session.kernel.info;
    while (!content.widgets.length) await pause();
  }};
  await soon(90, 'opening the notebook', ready(window.jupyterapp));
}}"""
RUN = f"""async () => {{
  {SOON}
  const all = window.jupyterapp.commands.execute('notebook:run-all-cells');
  await soon(90, 'running all cells', all);
}}"""
ADD_CELL = """async ([source, wait]) => {
  const app = window.jupyterapp;
  const { content } = app.shell.currentWidget;
  content.activeCellIndex = content.widgets.length - 1;
  await app.commands.execute('notebook:insert-cell-below');
  content.activeCell.model.sharedModel.setSource(source);
  window.cellRun = app.commands.execute('notebook:run-cell');
  if (wait) await window.cellRun;
}"""
LAST_OUTPUT = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets;
  const { outputs } = cells[cells.length - 1].model;
  return JSON.stringify(outputs.toJSON());
}"""


@contextmanager
def lab(home: Path, notebook: Path) -> Iterator[str]:
    """The address of labkit's JupyterLab on a notebook; all it keeps is in the folder home."""
    (home / "config").mkdir()
    (home / "config" / "jupyter_lab_config.json").write_text(
        '{"LabApp": {"expose_app_in_browser": true}}'
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "run"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "set"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "work"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [sys.executable, "-m", "labkit.cli", "lab", "--json", "--no-browser", str(notebook)]
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env) as server,
    ):
        assert server.stdout
        try:
            yield str(json.loads(server.stdout.readline())["url"])
        finally:
            server.terminate()
