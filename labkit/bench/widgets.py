"""20 000 steps with every live view open in a real JupyterLab.

When the last of it is painted, and whether all is still alive.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.bench.measure import Result, at_most
from labkit.errors import NotAvailable

if TYPE_CHECKING:
    from playwright.sync_api import Page  # type: ignore[import-not-found, unused-ignore]

__all__ = ["results"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
STEPS = 20_000

OPEN_VIEWS = r"""import time
from IPython.display import display
import labkit as lk
source = '''#include "labkit.h"
void guest_code(void) { for (volatile int i = 0;; i++) GUEST_SYNC(i); }
'''
program = lk.Program.compile(source)
vm = lk.Vm.create(program)
vcpu = vm.vcpus[0]
for kind in ('vm', 'pool', 'pages', 'stepper', 'memory'):
    display(vm.show(kind))
"""
STEP = f"""begin = time.time()
for _ in range({STEPS}):
    vcpu.step()
end = time.time()
print('END', end, end - begin)
"""
STEP_WITHOUT_VIEWS = f"""bare = lk.Vm.create(program).vcpus[0]
begin = time.time()
for _ in range({STEPS}):
    bare.step()
print('BARE', time.time() - begin)
"""

# In the page. The notebook is open and its kernel answers:
READY = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  while (!app.shell.currentWidget?.sessionContext) {
    await new Promise((wait) => setTimeout(wait, 100));
  }
  await app.shell.currentWidget.sessionContext.ready;
  await app.shell.currentWidget.sessionContext.session.kernel.info;
}"""
RUN_CELL = "window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')"
VIEWS_THERE = "document.querySelectorAll('section.lk').length >= 5"
# window.painted is when the last view was painted. The views put a step into data-step when they
# have drawn it; the announcement to a screen reader may come later.
WATCH = """() => {
  window.painted = 0;
  const seen = () => requestAnimationFrame(() => { window.painted = Date.now() / 1000; });
  for (const one of document.querySelectorAll('section.lk')) {
    new MutationObserver(seen).observe(one, { attributeFilter: ['data-step'] });
  }
}"""


def results() -> Iterator[Result]:
    """Every figure of this file; raises NotAvailable without Playwright or a Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as err:
        raise NotAvailable(
            "the widgets are measured with Playwright: pip install 'labkit[test]'"
        ) from err
    chromium = _chromium()
    with tempfile.TemporaryDirectory() as home, _lab(Path(home)) as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 3000})
        page.set_default_timeout(60_000)
        page.goto(url)
        page.wait_for_function("window.jupyterapp")
        page.evaluate(READY)
        yield _measure(page)
        browser.close()


def _chromium() -> str:
    for name in BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NotAvailable("the widgets are measured in Chromium, which is not installed here")


@contextlib.contextmanager
def _lab(home: Path) -> Iterator[str]:
    """A JupyterLab with directories of its own, on the notebook; gives its address."""
    notebook = home / "bench.ipynb"
    notebook.write_text(json.dumps(_notebook()))
    command = [sys.executable, "-m", "labkit.cli", "lab", "--json", "--no-browser", str(notebook)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(home),
    ) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def _notebook() -> dict[str, Any]:
    """The three cells, as nbformat 4."""
    cells: list[dict[str, Any]] = [
        {
            "cell_type": "code",
            "id": f"c{index}",
            "source": source,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for index, source in enumerate((OPEN_VIEWS, STEP, STEP_WITHOUT_VIEWS))
    ]
    # without a kernel JupyterLab asks which
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _environment(home: Path) -> dict[str, str]:
    """Every directory that Jupyter uses lies in home; its page tells scripts of its application."""
    config = home / "config"
    config.mkdir()
    (config / "jupyter_lab_config.json").write_text('{"LabApp": {"expose_app_in_browser": true}}')
    return {
        **os.environ,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_RUNTIME_DIR": str(home / "run"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "set"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "work"),
        "IPYTHONDIR": str(home / "ipython"),
    }


def _measure(page: Page) -> Result:
    """Run the cells in the page; what counts is how long after the loop the last paint is."""
    page.evaluate(RUN_CELL)
    page.wait_for_function(VIEWS_THERE)
    page.wait_for_timeout(1000)

    page.evaluate(WATCH)
    page.evaluate(RUN_CELL)
    _, end, seconds = _printed(page, "END")
    page.wait_for_timeout(1500)
    painted = float(page.evaluate("window.painted"))

    page.evaluate(RUN_CELL)
    _, alone = _printed(page, "BARE")
    loops = f"loop {float(seconds):.2f} s, without widgets {float(alone):.2f} s"
    return at_most(
        50.0,
        "20 000 steps, all widgets open: last paint",
        1000 * (painted - float(end)),
        "ms after the loop",
        note=f"{loops}, the notebook ran its next cell",
    )


def _printed(page: Page, word: str) -> list[str]:
    """The words of the line that a cell printed."""
    line = page.locator(".jp-OutputArea-output pre", has_text=word).last
    line.wait_for()
    return str(line.inner_text()).split()
