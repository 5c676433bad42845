"""20 000 steps with every live view open in a real JupyterLab: when the last of it is painted, and whether all is still alive."""

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
from typing import Any

from labkit.bench.measure import Result
from labkit.errors import NotAvailable

__all__ = ["results"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
STEPS = 20_000
CELLS = (
    "import time\nfrom IPython.display import display\nimport labkit as lk\n"
    "program = lk.Program.compile('#include \"labkit.h\"\\nvoid guest_code(void) { for (volatile int i = 0;; i++) GUEST_SYNC(i); }')\n"
    "vm = lk.Vm.create(program)\nvcpu = vm.vcpus[0]\nfor kind in ('vm', 'pool', 'pages', 'stepper', 'memory'):\n    display(vm.show(kind))",
    f"begin = time.time()\nfor _ in range({STEPS}):\n    vcpu.step()\nend = time.time()\nprint('END', end, end - begin)",
    "bare = lk.Vm.create(program).vcpus[0]\nbegin = time.time()\n"
    f"for _ in range({STEPS}):\n    bare.step()\nprint('BARE', time.time() - begin)",
)
READY = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  while (!app.shell.currentWidget?.sessionContext) await new Promise((wait) => setTimeout(wait, 100));
  await app.shell.currentWidget.sessionContext.ready;
  await app.shell.currentWidget.sessionContext.session.kernel.info;
}"""
WATCH = """() => {
  window.painted = 0;
  const seen = () => requestAnimationFrame(() => { window.painted = Date.now() / 1000; });
  for (const one of document.querySelectorAll('section.lk')) new MutationObserver(seen).observe(one, { attributeFilter: ['data-step'] });
}"""  # the views put a step into data-step when they have drawn it; the announcement to a screen reader may come later


@contextlib.contextmanager
def _lab(home: Path) -> Iterator[str]:
    """A JupyterLab with directories of its own; gives its address."""
    kernel = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }  # without it JupyterLab asks which
    fresh: dict[str, object] = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    cells = [{**fresh, "id": f"c{i}", "source": cell} for i, cell in enumerate(CELLS)]
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (home / "bench.ipynb").write_text(json.dumps(book))
    (home / "config").mkdir()
    (home / "config" / "jupyter_lab_config.json").write_text(
        '{"LabApp": {"expose_app_in_browser": true}}'
    )
    dirs = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "run",
        "JUPYTERLAB_SETTINGS_DIR": "set",
        "JUPYTERLAB_WORKSPACES_DIR": "work",
        "IPYTHONDIR": "ipython",
    }
    env = {
        **os.environ,
        "JUPYTER_PREFER_ENV_PATH": "1",
        **{name: str(home / part) for name, part in dirs.items()},
    }
    command = [
        sys.executable,
        "-m",
        "labkit.cli",
        "lab",
        "--json",
        "--no-browser",
        str(home / "bench.ipynb"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def results() -> Iterator[Result]:
    """Every figure of this file; raises NotAvailable without Playwright or a Chromium."""
    try:
        from playwright.sync_api import sync_playwright  # type: ignore[import-not-found, unused-ignore]
    except ImportError as err:
        raise NotAvailable(
            "the widgets are measured with Playwright: pip install 'labkit[test]'"
        ) from err
    chromium = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if chromium is None:
        raise NotAvailable("the widgets are measured in Chromium, which is not installed here")
    with tempfile.TemporaryDirectory() as home, _lab(Path(home)) as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 3000})
        page.set_default_timeout(60_000)
        page.goto(url)
        page.wait_for_function("window.jupyterapp")
        page.evaluate(READY)
        yield from _measure(page)
        browser.close()


def _measure(page: Any) -> Iterator[Result]:
    run = "window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')"
    page.evaluate(run)
    page.wait_for_function("document.querySelectorAll('section.lk').length >= 5")
    page.wait_for_timeout(1000)
    page.evaluate(WATCH)
    page.evaluate(run)
    _, end, seconds = _printed(page, "END")
    page.wait_for_timeout(1500)
    late = 1000 * (float(page.evaluate("window.painted")) - float(end))
    page.evaluate(run)
    _, alone = _printed(page, "BARE")
    yield Result(
        "20 000 steps, all widgets open: last paint",
        late,
        "ms after the loop",
        50.0,
        False,
        f"loop {float(seconds):.2f} s, without widgets {float(alone):.2f} s, the notebook ran its next cell",
    )


def _printed(page: Any, word: str) -> list[str]:
    """The words of the line that a cell printed."""
    line = page.locator(".jp-OutputArea-output pre", has_text=word).last
    line.wait_for()
    return str(line.inner_text()).split()
