"""The tour in a real browser: one JupyterLab, the committed notebook as it opens, then all cells.

Then hands on the live dashboard.

Screenshots for people to look at: tests/out/tour-*.png.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from lab_page import ADD_CELL, LAST_OUTPUT, READY, RUN, SOON, lab
from paths import REPO

OUT = REPO / "tests" / "out"
pytestmark = pytest.mark.slow

OUTPUTS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets;
  const types = (model) => model.outputs.toJSON().map((one) => one.output_type);
  return cells.filter((cell) => cell.model.type === 'code')
    .map(({ model }) => [model.executionCount, types(model)]);
}"""
SETTLED = (
    "document.querySelector('section.lk[data-step]') && !document.querySelector('section.lk.wait')"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of labkit's JupyterLab on a copy of the tour."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    notebook = Path(shutil.copy(REPO / "notebooks" / "00_tour.ipynb", home / "notebooks"))
    with lab(home, notebook) as address:
        yield address


@dataclass
class Tour:
    """The tour after all cells ran, and what was seen on the way."""

    page: Any
    saved: dict[str, Any]  # what the page showed before any cell ran
    hosts: set[str]  # that the browser asked for something
    errors: list[str]

    @property
    def status(self) -> str:
        """The sentence in the live dashboard's status line."""
        return str(self.page.locator("section.lk [role=status]").first.inner_text())

    def says(self, words: str) -> None:
        """Wait until the status line has these words."""
        status = "document.querySelector('section.lk [role=status]')"
        self.page.wait_for_function(f"(words) => {status}.innerText.includes(words)", arg=words)

    def shoot(self, name: str) -> None:
        """A picture of the page, and one of the whole dashboard."""
        dashboard = self.page.locator("section.lk").first
        dashboard.scroll_into_view_if_needed()
        self.page.screenshot(path=OUT / f"tour-{name}.png")
        self.page.set_viewport_size({"width": 1400, "height": 1900})
        dashboard.scroll_into_view_if_needed()
        dashboard.screenshot(path=OUT / f"tour-{name}-dashboard.png")
        self.page.set_viewport_size({"width": 1400, "height": 1000})


def pictures() -> int:
    """How many pictures the outputs of the committed tour hold."""
    cells = json.loads((REPO / "notebooks" / "00_tour.ipynb").read_text())["cells"]
    outputs = [
        output.get("data", {}).get("text/html", "")
        for cell in cells
        for output in cell.get("outputs", [])
    ]
    return sum("".join(output).count("<img") for output in outputs)


@pytest.fixture(scope="module")
def tour(browser: Any, address: str) -> Iterator[Tour]:
    """The tour, run from top to bottom in Chromium."""
    OUT.mkdir(exist_ok=True)
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.set_default_timeout(60_000)
    hosts: set[str] = set()
    errors: list[str] = []
    page.on(
        "request",
        lambda request: hosts.add(urlsplit(request.url).hostname or urlsplit(request.url).scheme),
    )
    page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname or "websocket"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_function("window.jupyterapp")
    page.evaluate(READY)
    come = "(count) => document.querySelectorAll('.jp-OutputArea img').length >= count"
    page.wait_for_function(come, arg=pictures())  # JupyterLab draws cells far down later
    saved = {
        "alts": page.eval_on_selector_all(
            ".jp-OutputArea img", "(images) => images.map((one) => [one.alt, one.naturalWidth])"
        ),
        "widgets": page.locator("section.lk").count(),
        "text": page.locator(".jp-Notebook").inner_text(),
    }
    page.evaluate(RUN)
    page.locator("section.lk").first.scroll_into_view_if_needed()
    page.wait_for_function(SETTLED)
    yield Tour(page, saved, hosts, errors)
    page.context.close()


def test_that_the_saved_tour_shows_pictures_before_a_cell_has_run(tour: Tour) -> None:
    assert tour.saved["widgets"] == 0 and "model not found" not in tour.saved["text"].lower()
    alts = [alt for alt, _ in tour.saved["alts"]]
    assert all(width > 0 for _, width in tour.saved["alts"])
    assert any("512 of 512 in use" in alt for alt in alts) and any(
        "is gpa 0x" in alt for alt in alts
    )


def test_that_every_cell_ran_and_none_failed(tour: Tour) -> None:
    cells = tour.page.evaluate(OUTPUTS)
    assert [count for count, _ in cells] == list(range(1, len(cells) + 1))
    assert not [kinds for _, kinds in cells if "error" in kinds]


def test_that_the_dashboard_followed_the_cells_after_it(tour: Tour) -> None:
    tour.says("is about to run jae")
    assert "The jump will be taken." in tour.status
    tour.shoot("light")


def test_that_the_step_button_steps_once(tour: Tour) -> None:
    root = tour.page.locator("section.lk").first
    before = int(root.get_attribute("data-step"))
    root.get_by_role("button", name="Step one instruction").click()
    tour.says("is about to run mov")
    assert int(root.get_attribute("data-step")) == before + 1


def test_that_the_arrow_key_steps_and_stays_in_the_dashboard(tour: Tour) -> None:
    root = tour.page.locator("section.lk").first
    before = int(root.get_attribute("data-step"))
    root.focus()
    tour.page.keyboard.press("ArrowRight")
    tour.page.wait_for_function(
        "(step) => document.querySelector('section.lk').dataset.step == step", arg=str(before + 1)
    )
    assert tour.page.evaluate("document.activeElement.closest('section.lk') !== null")


def test_that_arrow_keys_move_in_the_pool_and_enter_selects(tour: Tour) -> None:
    root = tour.page.locator("section.lk").first
    root.get_by_role("grid", name="Pool of 512 slots").focus()
    tour.page.keyboard.press("Home")
    tour.says("Slot 0, vCPU 0")
    tour.page.keyboard.press("ArrowRight")
    tour.says("Slot 1: free")
    tour.page.keyboard.press("Enter")
    rail = root.get_by_role("group", name="selection")
    rail.wait_for()
    assert "slot 1" in rail.inner_text() and "gpa 0xa488" in rail.inner_text()
    tour.page.keyboard.press("Escape")
    rail.wait_for(state="detached")


def test_that_the_dark_theme_reaches_the_dashboard(tour: Tour) -> None:
    ground = "getComputedStyle(document.querySelector('section.lk')).backgroundColor"
    light = tour.page.evaluate(ground)
    tour.page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    tour.page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    tour.page.wait_for_function(f"(light) => {ground} !== light", arg=light)
    tour.shoot("dark")


BUSY = """import labkit as lk
SPIN = '#include "labkit.h"\\nvolatile long n; void guest_code(void) { for (;;) n++; }'
busy = lk.Vm.create(SPIN, name="busy")
busy.show()"""


def test_that_clicks_while_a_cell_runs_are_answered_and_stop_ends_it(tour: Tour) -> None:
    page = tour.page
    page.evaluate(ADD_CELL, [BUSY, True])
    root = page.locator("section.lk").last
    root.scroll_into_view_if_needed()
    page.evaluate(ADD_CELL, ["busy.run()", False])
    stop = root.get_by_role("button", name="Stop the run")
    stop.wait_for()
    status = root.locator("[role=status]").first
    assert "Running: run() on thread MainThread" in status.inner_text()
    root.screenshot(path=OUT / "tour-running.png")

    root.locator("[data-act=vcpu]").first.click()
    root.focus()
    for key in ("ArrowRight", "Shift+ArrowRight", "p"):
        page.keyboard.press(key)
    stop.click()
    page.evaluate(f"async () => {{ {SOON} await soon(20, 'the run', window.cellRun); }}")
    assert "StopExit()" in page.evaluate(LAST_OUTPUT)
    root.get_by_role("button", name="Step one instruction").wait_for()
    assert "Running" not in status.inner_text()

    page.evaluate(ADD_CELL, ["1 + 1", True])
    assert "2" in page.evaluate(LAST_OUTPUT)


def test_that_nothing_was_asked_of_the_outside(tour: Tour) -> None:
    assert "127.0.0.1" in tour.hosts
    assert tour.hosts <= {"127.0.0.1", "data", "blob"}


def test_that_no_script_failed(tour: Tour) -> None:
    assert not tour.errors
