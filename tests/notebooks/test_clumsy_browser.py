"""A clumsy user in a real JupyterLab: clicks while cells run, interrupts, restarts, two windows.

After each of it the notebook is still usable. Screenshots: tests/out/clumsy-*.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import books
import pytest
from lab_page import ADD_CELL, LAST_OUTPUT, READY, SOON, lab
from paths import REPO

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

OUT = REPO / "tests" / "out"
pytestmark = pytest.mark.slow

SOURCE = """import labkit as lk
SPIN = '''#include "labkit.h"
volatile long n;
void guest_spins(void) { for (;;) n++; }
void guest_code(uint64_t vcpu) { for (int i = 0; ; i++) { n += i; GUEST_SYNC(i); } }
'''
spin = lk.Program.compile(SPIN)
vm = lk.Vm.create(spin, nr_vcpus=2, name="clumsy", protect=PROTECT)"""
KINDS = ("vm", "stepper", "pool", "pages", "memory")
SECRET_KINDS = ("encryption", "eyes", "launch")
BUTTONS = """() => [...document.querySelectorAll('section.lk [data-act]')]
  .filter((one) => one.getBoundingClientRect().width > 0)
  .map((one) => one.dataset.act)"""
CLICK_ALL = """() => {
  // One of each kind of thing that can be clicked, in every view; twice the buttons.
  for (const root of document.querySelectorAll('section.lk')) {
    const seen = new Set();
    for (const one of root.querySelectorAll('[data-act]')) {
      const name = one.dataset.act + (one.dataset.kind ?? '');
      if (seen.has(name)) continue;
      seen.add(name);
      one.dispatchEvent(new MouseEvent('click', { bubbles: true }));
      if (one.tagName === 'BUTTON') one.dispatchEvent(new MouseEvent('click', { bubbles: true }));
    }
    for (const grid of root.querySelectorAll('[role=grid]')) {
      const box = grid.getBoundingClientRect();
      const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
      grid.dispatchEvent(new MouseEvent('click', { bubbles: true, ...at }));
    }
  }
}"""
IDLE = "async () => { await window.cellRun; }"
NOT_WAITING = "!document.querySelector('section.lk.wait')"
COMMAND = "(name) => window.jupyterapp.commands.execute(name)"
THEIRS = "Canceled future for create_subshell_request"  # JupyterLab's own, at each restart
KEYS = ("ArrowRight", "Shift+ArrowRight", "n", "f", "u", "t", "a", "g", "p", "x", "b", "d", "?")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    home = tmp_path_factory.mktemp("clumsy")
    notebook = home / "clumsy.ipynb"
    book = books.notebook(books.code("1"))
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    books.write(book, notebook)
    with lab(home, notebook) as address:
        yield address, notebook


class Desk:
    """A page with the notebook on it."""

    def __init__(self, browser: Any, address: str) -> None:
        OUT.mkdir(exist_ok=True)
        self.address = address
        self.context = browser.new_context(viewport={"width": 1400, "height": 900})
        self.errors: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        """One more window on the notebook."""
        page = self.context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.address)
        for attempt in range(3):
            try:
                page.wait_for_function("window.jupyterapp")
                page.evaluate(READY)
                break
            except sync_api.Error as error:  # a second window moves on to a workspace of its own
                if "navigation" not in str(error) or attempt == 2:
                    raise
        return page

    def cell(self, source: str, wait: bool = True) -> str:
        """Add a cell, run it, and return its outputs as JSON."""
        self.page.evaluate(ADD_CELL, [source, wait])
        return str(self.page.evaluate(LAST_OUTPUT)) if wait else ""

    def usable(self) -> bool:
        """Whether a cell still runs."""
        self.page.evaluate(f"async () => {{ {SOON} await soon(60, 'a cell', window.cellRun); }}")
        return "42" in self.cell("6 * 7")

    def settle(self) -> None:
        self.page.wait_for_function(NOT_WAITING)

    def command(self, name: str) -> None:
        self.page.evaluate(COMMAND, name)

    def views(self, protect: str | None = None) -> None:
        """A VM, and every view of it, each in a cell of its own."""
        self.cell(SOURCE.replace("PROTECT", repr(protect)))
        for kind in KINDS + (SECRET_KINDS if protect else ()):
            self.cell(f"vm.show({kind!r})")
        self.page.locator("section.lk").last.wait_for()


@pytest.fixture
def desk(browser: Any, address: tuple[str, Path]) -> Iterator[Desk]:
    """A notebook in a kernel that was just started, without cells of another test."""
    made = Desk(browser, address[0])
    made.page.evaluate("""async () => {
      const panel = window.jupyterapp.shell.currentWidget;
      await panel.sessionContext.session.kernel.restart();
      await panel.sessionContext.session.kernel.info;
      panel.content.model.sharedModel.transact(() => {
        const { cells } = panel.content.model.sharedModel;
        panel.content.model.sharedModel.deleteCellRange(1, cells.length);
      });
      window.cellRun = Promise.resolve();
    }""")
    yield made
    made.context.close()
    assert not [error for error in made.errors if THEIRS not in error]


@pytest.mark.parametrize("protect", [None, "sev"])
def test_that_every_button_of_every_view_may_be_pressed_while_a_cell_runs(
    desk: Desk, protect: str | None
) -> None:
    desk.views(protect)
    desk.cell("vm.vcpus[0].set_entry('guest_spins'); came = vm.vcpus[0].run()", wait=False)
    stop = desk.page.get_by_role("button", name="Stop the run").first
    stop.wait_for()
    for _ in range(3):
        desk.page.evaluate(CLICK_ALL)  # stop is among them
    assert desk.usable()
    desk.settle()
    assert "StopExit" in desk.cell("came")


def test_that_keys_in_a_view_cut_no_cell(desk: Desk) -> None:
    desk.views()
    cells = "window.jupyterapp.shell.currentWidget.content.widgets.length"
    before = desk.page.evaluate(cells)
    desk.page.locator("section.lk").first.focus()
    for key in KEYS:
        desk.page.keyboard.press(key)
        desk.settle()
    assert desk.page.evaluate(cells) == before
    assert desk.page.locator(".keys").count() == 1
    assert desk.usable()


def test_that_a_run_of_a_button_can_be_stopped_while_cells_run_too(desk: Desk) -> None:
    desk.views()
    desk.cell("for vcpu in vm.vcpus: vcpu.set_entry('guest_spins')")
    desk.cell("import labkit.hosts.buttons as b; b.RUN_LIMIT = 10**13")
    root = desk.page.locator("section.lk").first
    root.get_by_role("button", name="Run to the next ucall", exact=True).click()
    root.get_by_role("button", name="Stop the run").wait_for()
    assert "another thread runs it" in desk.cell("vm.run()")
    root.get_by_role("button", name="Stop the run").click()
    root.get_by_role("button", name="Step one instruction").wait_for()
    assert desk.usable()


def test_that_the_interrupt_button_ends_a_run_with_two_vms_on_show(desk: Desk) -> None:
    desk.views()
    desk.cell("other = lk.Vm.create(spin, name='other'); other.show()")
    desk.cell("other.run_until_done()", wait=False)
    desk.page.wait_for_timeout(500)
    desk.command("notebook:interrupt-kernel")
    desk.page.evaluate(CLICK_ALL)
    assert desk.usable()
    desk.settle()
    # A click was on "end", and its guest talks without end.
    desk.cell("""import time
while vm.stop(): time.sleep(0.1)""")
    assert "SYNC" in desk.cell("vm.vcpus[0].set_entry('guest_code'); vm.vcpus[0].run()")


def test_that_a_second_window_shows_and_steps_the_same_vm(desk: Desk) -> None:
    desk.views()
    desk.command("docmanager:save")
    second = desk.open()
    view = second.locator("section.lk").first
    view.wait_for()
    before = int(view.get_attribute("data-step"))
    view.get_by_role("button", name="Step one instruction").click()
    for page in (desk.page, second):
        page.wait_for_function(
            "(step) => document.querySelector('section.lk')?.dataset.step == step",
            arg=str(before + 1),
        )
    second.close()
    assert desk.usable()


def test_that_a_cell_with_a_view_can_be_deleted_while_its_vm_runs(desk: Desk) -> None:
    desk.views()
    desk.cell("vm.vcpus[0].set_entry('guest_spins'); came = vm.vcpus[0].run()", wait=False)
    desk.page.get_by_role("button", name="Stop the run").first.wait_for()
    desk.page.evaluate("""() => {
      window.jupyterapp.shell.currentWidget.content.model.sharedModel.deleteCellRange(2, 3);
    }""")
    desk.page.get_by_role("button", name="Stop the run").last.click()
    assert desk.usable()
    assert "StopExit" in desk.cell("came")


def test_that_the_view_of_a_closed_vm_says_so(desk: Desk) -> None:
    desk.views()
    desk.cell("vm.close()")
    desk.page.wait_for_function("""[...document.querySelectorAll('section.lk')]
      .every((view) => view.textContent.includes('clumsy is closed'))""")
    desk.page.evaluate(CLICK_ALL)
    desk.settle()
    assert desk.usable()


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_that_a_view_without_its_kernel_says_so_and_is_a_picture_when_opened_again(
    desk: Desk, address: tuple[str, Path], how: str
) -> None:
    desk.views()
    desk.command("docmanager:save")
    if how == "restart":
        desk.page.evaluate("""async () => {
          const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
          await kernel.restart();
        }""")
    else:
        desk.cell("import os; os._exit(1)", wait=False)
        desk.page.locator(".jp-Dialog button").first.click()
    desk.page.locator(".gone-words").first.wait_for()
    desk.page.evaluate(CLICK_ALL)
    assert "restarted" in desk.page.locator(".gone-words").first.text_content()
    desk.page.screenshot(path=OUT / f"clumsy-{how}.png")

    desk.page.evaluate("window.cellRun = Promise.resolve()")
    desk.command("docmanager:save")
    saved = json.loads(address[1].read_text())
    assert "data:image/svg+xml" in json.dumps(saved["cells"])
    desk.page.reload()
    desk.page.wait_for_function("window.jupyterapp")
    desk.page.evaluate(READY)
    desk.page.locator(".jp-OutputArea img, section.lk").first.wait_for()
    shown = desk.page.locator(".jp-Notebook").inner_text()
    assert "not found" not in shown
    desk.page.screenshot(path=OUT / f"clumsy-{how}-again.png")
    desk.page.evaluate("window.cellRun = Promise.resolve()")
    assert desk.usable()
