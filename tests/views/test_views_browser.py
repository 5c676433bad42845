"""The script of the widgets in a real browser, with a model that is a plain object.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encryption_sample as secrets
import pytest
import views_sample as sample

import labkit.views
from labkit.views import dashboard, stepper
from labkit.views.drawing.style import css

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

SCRIPT = Path(labkit.views.__file__).with_name("js") / "widget.js"

# show(state) makes a model of these traits, and a view of it; push() is a message from Python.
HARNESS = """
async ([script, state]) => {
  window.sent = [];
  window.saved = 0;
  window.show = async (state) => {
    const handlers = {};
    const model = {
      get: (name) => state[name],
      set: (name, value) => { state[name] = value; },
      on: (name, handler) => { (handlers[name] ??= new Set()).add(handler); },
      off: (name, handler) => { handlers[name]?.delete(handler); },
      save_changes: () => { window.saved++; },
      send: (message) => window.sent.push(message),
      push: (changes) => {
        const all = { batch: [state.batch[0] + 1, 1], ...changes };
        for (const [name, value] of Object.entries(all)) {
          state[name] = value;
          handlers[`change:${name}`]?.forEach((handler) => handler());
        }
      },
      handlers,
    };
    const module = await import(`data:text/javascript;base64,${script}#${Math.random()}`);
    model.close = module.default.render({ model, el: document.getElementById('here') });
    return model;
  };
  window.model = await window.show(state);
  window.close_ = window.model.close;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests here."""
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page with the dashboard in it, in something that can take the focus as a notebook can."""
    page = browser.new_page(viewport={"width": 1000, "height": 2000})
    body = "<div tabindex=0 id=notebook><div id=here></div></div>"
    page.set_content(f"<style>{css()}</style><body data-jp-theme-light=true>{body}")
    show(page, state())
    yield page
    page.close()


def show(page: Any, state: dict[str, object]) -> None:
    """A view of a widget with these traits, in the page's element "here"."""
    script = base64.b64encode(SCRIPT.read_bytes()).decode()
    page.evaluate(HARNESS, [script, json.loads(json.dumps(state))])


def state(kind: str = "vm", **changes: object) -> dict[str, object]:
    """The traits of a widget that shows the sample run."""
    actions = ("step", "step_line", "run", "select")
    view = dashboard.render(sample.vm(**changes), kind=kind, actions=actions)
    panes = {f"pane_{name}": body for name, body in view.panes.items()}
    return {
        "layout_html": view.layout,
        "step": 1277,
        "width": 940,
        "acks": 0,
        "heard": 0,
        "batch": [0, 1],
        **panes,
    }


def sent(page: Any) -> list[dict[str, object]]:
    """What the script sent after its hello."""
    first, *rest = page.evaluate("window.sent")
    assert first == {"act": "hello", "value": 1}
    return [_without_nulls(message) for message in rest]


def _without_nulls(message: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in message.items() if value is not None}


def status(page: Any) -> str:
    """The sentence in the status line."""
    return str(page.get_by_role("status").inner_text())


def cell(page: Any, name: str, index: int) -> tuple[float, float]:
    """The middle of a cell on the screen."""
    x, y = page.get_by_role("grid", name=name).evaluate(
        """(grid, i) => {
      const {rows, x, pitch, h} = JSON.parse(grid.dataset.grid);
      const [y, first] = rows.find(([, first, count]) => first <= i && i < first + count);
      const middle = new DOMPoint(x + (i - first + .5) * pitch, y + h / 2);
      const at = middle.matrixTransform(grid.ownerSVGElement.getScreenCTM());
      return [at.x, at.y];
    }""",
        index,
    )
    return x, y


def test_that_all_panes_are_shown(page: Any) -> None:
    names = page.evaluate("""
      [...document.querySelectorAll('[data-pane]')]
        .filter((pane) => pane.innerHTML)
        .map((pane) => pane.dataset.pane)
    """)
    wanted = "title transport source disassembly registers pool rail memory walk"
    assert set(wanted.split()) <= set(names)


@pytest.mark.parametrize(
    ("key", "act"), [("ArrowRight", "step"), ("Shift+ArrowRight", "step_line"), ("u", "run")]
)
def test_that_keys_press_the_buttons(page: Any, key: str, act: str) -> None:
    page.locator("section.lk").focus()
    page.keyboard.press(key)
    assert [message["act"] for message in sent(page)] == [act]


def test_that_no_key_pressed_in_a_view_reaches_the_notebook(page: Any) -> None:
    """There x cuts the cell with the dashboard in it, b inserts one; the browser's own go on."""
    page.evaluate("""() => {
      window.seen = [];
      document.addEventListener('keydown', (event) => window.seen.push(event.key), true);
    }""")
    page.locator("section.lk").focus()
    for key in ("ArrowRight", "ArrowLeft", "b", "x", "d", "Shift+Enter", "Control+s"):
        page.keyboard.press(key)
    assert page.evaluate("window.seen") == ["Control", "s"]


def test_that_a_question_mark_lists_the_keys(page: Any) -> None:
    page.locator("section.lk").focus()
    page.keyboard.press("?")
    shown = page.locator(".keys").inner_text()
    assert "→ Step one instruction" in shown
    assert "Esc let go of the selection" in shown
    page.keyboard.press("?")
    assert page.locator(".keys").count() == 0
    assert sent(page) == []


def test_that_a_double_click_runs_to_a_line_and_to_an_instruction(page: Any) -> None:
    page.locator("[data-pane=source] tr", has_text="memset").locator(".src").dblclick()
    page.locator("[data-pane=disassembly] tr", has_text="imul").locator(".op").dblclick()
    asked = [message for message in sent(page) if message["act"] == "run_to"]
    assert [message["kind"] for message in asked] == ["line", "gva"]
    assert asked[1]["value"] == "0x401273"


def test_that_a_pane_folds_and_stays_folded(page: Any) -> None:
    pane = page.locator("[data-pane=registers]")
    pane.locator(".lab").click()
    assert not pane.locator("table").is_visible()
    assert pane.locator(".lab").get_attribute("aria-expanded") == "false"
    after = state(step=1300)
    page.evaluate(
        "(panes) => window.model.push(panes)", {"pane_registers": after["pane_registers"]}
    )
    assert not pane.locator("table").is_visible()
    pane.locator(".lab").focus()
    page.keyboard.press("Enter")
    assert pane.locator("table").is_visible()
    assert sent(page) == []


def test_that_a_view_without_an_answer_says_so_until_one_comes(page: Any) -> None:
    page.locator(".gone-words").wait_for(timeout=10_000)
    assert "run the cell again" in page.locator(".gone-words").inner_text()
    page.evaluate("window.model.push({heard: 1})")
    assert page.locator(".gone-words").count() == 0


def test_that_a_restarted_kernel_is_asked_whether_it_is_there(page: Any) -> None:
    page.evaluate("window.model.handlers.comm_live_update.forEach((tell) => tell())")
    assert sent(page) == [{"act": "ping", "value": 2}]


def test_that_a_click_on_a_slot_selects_it(page: Any) -> None:
    page.mouse.click(*cell(page, "Pool of 512 slots", 3))
    assert sent(page) == [{"act": "select", "kind": "slot", "value": 3}]


def test_that_a_click_on_an_entry_says_its_level_and_index(page: Any) -> None:
    page.mouse.click(*cell(page, "PT at gpa 0x186000", 53))
    assert sent(page) == [{"act": "select", "kind": "entry", "value": 53, "arg": "3"}]


def test_that_hovering_speaks_and_leaving_restores_the_sentence(page: Any) -> None:
    before = status(page)
    page.mouse.move(*cell(page, "Pool of 512 slots", 4))
    assert status(page).startswith('Slot 4, vCPU 3, PRINTF "hello\\n"')
    page.mouse.move(*cell(page, "Pool of 512 slots", 30))
    assert status(page) == f"Slot 30: free, gva {0x9040602000 + 64 + 30 * 1096:#x}"
    page.mouse.move(2, 2)
    assert status(page) == before
    assert sent(page) == []


def test_that_a_grid_is_one_tab_stop_with_a_moving_cell(page: Any) -> None:
    grid = page.get_by_role("grid", name="Pool of 512 slots")
    grid.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    cell = page.locator("#" + grid.get_attribute("aria-activedescendant"))
    assert cell.get_attribute("role") == "gridcell"
    assert (
        cell.get_attribute("aria-label")
        == status(page)
        == f"Slot 67: free, gva {0x9040602000 + 64 + 67 * 1096:#x}"
    )
    page.keyboard.press("Enter")
    assert sent(page) == [{"act": "select", "kind": "slot", "value": 67}]


def test_that_focus_and_cell_survive_a_swap(page: Any) -> None:
    page.get_by_role("grid", name="Pool of 512 slots").focus()
    page.keyboard.press("ArrowRight")
    after = state(pool=sample.pool(changed_since=5))
    page.evaluate("(panes) => window.model.push(panes)", {"pane_pool": after["pane_pool"]})
    page.wait_for_function(
        "document.querySelector('[data-pane=pool]').textContent.includes('since step 5')"
    )
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Pool of 512 slots"
    page.keyboard.press("ArrowRight")
    assert status(page).startswith("Slot 4,")


def test_that_escape_lets_go_and_then_hands_the_keys_back(page: Any) -> None:
    page.get_by_role("grid", name="Pool of 512 slots").focus()
    page.keyboard.press("Escape")
    assert sent(page) == [{"act": "select", "kind": "none"}]
    page.evaluate("window.model.push({pane_rail: ''})")
    page.wait_for_function("!document.querySelector('.rail')")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "notebook"


def test_that_slash_finds_a_symbol(page: Any) -> None:
    page.locator("section.lk").focus()
    page.keyboard.press("/")
    page.keyboard.type("ucall_alloc u")
    page.keyboard.press("Enter")
    assert sent(page) == [{"act": "select", "kind": "symbol", "value": "ucall_alloc u"}]


def test_that_tabs_gutter_and_registers_act(page: Any) -> None:
    page.get_by_role("tab", name="vCPU 2").click()
    page.locator("[data-pane=source] .bp").nth(3).click()
    page.locator("[data-pane=disassembly] .bp").nth(5).click()
    page.locator("[data-pane=registers] tr", has_text="rdx").click()
    assert sent(page) == [
        {"act": "vcpu", "value": "2"},
        {"act": "toggle_breakpoint", "kind": "line", "value": "34"},
        {"act": "toggle_breakpoint", "kind": "gva", "value": "0x40126c"},
        {"act": "select", "kind": "register", "value": "rdx"},
    ]


def test_that_many_updates_between_two_frames_are_one_paint(page: Any) -> None:
    paints = page.evaluate("""async () => {
      const pane = document.querySelector('[data-pane=title]');
      let seen = 0;
      new MutationObserver(() => seen++).observe(pane, {childList: true});
      for (let step = 0; step < 500; step++) {
        window.model.push({step, pane_title: `<b>${step}</b>`});
      }
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      return [seen, pane.textContent, document.querySelector('.lk').dataset.step];
    }""")
    assert paints == [1, "499", "499"]


def test_that_views_whose_messages_left_together_are_painted_together(page: Any) -> None:
    first, last, alone = page.evaluate(
        """async (state) => {
      const other = await window.show(state);
      const titles = [...document.querySelectorAll('[data-pane=title]')];
      const pause = (ms) => new Promise((done) => setTimeout(done, ms));
      const said = () => titles.map((one) => one.textContent).join();
      const come = async (to, text, batch) => {
        to.push({pane_title: text, batch});
        await pause(1);
        return said();
      };
      titles.forEach((one) => { one.textContent = 'old'; });
      await pause(50);
      const seen = [await come(window.model, 'a', [1, 2]), await come(other, 'b', [1, 2])];
      await come(other, 'c', [2, 2]);
      await pause(100);
      return [...seen, said()];
    }""",
        state(),
    )
    assert first == "old,old"
    assert last == "a,b"
    assert alone == "a,c"  # the other message of its batch went to another page


def test_that_running_is_announced_at_most_twice_a_second(page: Any) -> None:
    live = page.evaluate("""async () => {
      const out = [];
      const look = () => {
        const line = document.querySelector('.status');
        out.push([line.textContent, line.getAttribute('aria-live')]);
      };
      const attributes = 'class="status" role="status" aria-live="polite"';
      await new Promise((done) => setTimeout(done, 600));
      for (const n of [1, 2]) {
        window.model.push({pane_status: `<div ${attributes}>s${n}</div>`});
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        look();
      }
      await new Promise((done) => setTimeout(done, 600));
      look();
      return out;
    }""")
    assert live == [["s1", "polite"], ["s2", "off"], ["s2", "polite"]]


def test_that_the_width_is_measured_and_waiting_is_shown(page: Any) -> None:
    page.wait_for_function("window.saved > 0")
    assert page.evaluate("window.model.get('width')") == page.evaluate(
        "document.querySelector('.lk').offsetWidth"
    )
    page.locator("section.lk").focus()
    page.keyboard.press("u")
    assert page.evaluate("document.querySelector('.lk').classList.contains('wait')")
    page.evaluate("window.model.push({acks: 1})")
    assert not page.evaluate("document.querySelector('.lk').classList.contains('wait')")


def test_that_closing_leaves_nothing_behind(page: Any) -> None:
    page.evaluate("window.close_()")
    assert sent(page) == [{"act": "bye"}]
    assert page.evaluate("Object.values(window.model.handlers).every((set) => set.size === 0)")


def test_that_a_guest_string_is_text_in_the_page(browser: Any) -> None:
    evil = '<img src=x onerror="window.owned=1"><script>window.owned=1</script>\x1b[31m'
    page = browser.new_page()
    page.set_content("<div id=here></div>")
    show(page, state(name=evil, status=evil))
    assert "<img src=x" in page.locator("h3").inner_text()
    assert page.evaluate("document.querySelectorAll('img,script').length") == 0
    assert page.evaluate("window.owned === undefined")
    page.close()


@pytest.mark.parametrize(("width", "side_by_side"), [(980, True), (480, False)])
def test_that_a_saved_view_has_the_columns_that_fit(
    page: Any, width: int, side_by_side: bool
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.set_content(str(stepper.render(sample.vcpu()).img_html))
    left, right = (
        page.get_by_role("table", name=name).bounding_box() for name in ("source", "disassembly")
    )
    assert (left["x"] + left["width"] <= right["x"]) == side_by_side
    assert right["x"] + right["width"] <= width


@pytest.mark.parametrize("width", [700, 980, 1060, 1180, 1500])
def test_that_a_saved_view_has_room_for_what_is_said_of_an_instruction(
    page: Any, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.set_content(str(stepper.render(sample.vcpu()).img_html))
    cut = """() => {
      const rows = [...document.querySelectorAll('table[aria-label=disassembly] tr')];
      const notes = rows.map((row) => row.lastElementChild).filter((note) => note.textContent);
      const right = (note) => note.closest('table').getBoundingClientRect().right;
      return notes.map((note) => [note.textContent, note.clientWidth, right(note)]);
    }"""
    notes = page.evaluate(cut)
    assert notes
    for said, room, right in notes:
        assert room >= 96 and right <= width, (said, room, right)


# --- a protected VM


@pytest.fixture
def protected(browser: Any) -> Iterator[Any]:
    """A page with the dashboard of a protected VM."""
    page = browser.new_page(viewport={"width": 1000, "height": 2200})
    page.set_content(f"<style>{css()}</style><body data-jp-theme-light=true><div id=here></div>")
    show(page, state(**secrets.vm_facts()))
    yield page
    page.close()


def test_that_a_click_on_a_block_says_which(protected: Any) -> None:
    protected.mouse.click(*cell(protected, "Blocks for the guest", 35))
    protected.mouse.click(*cell(protected, "Blocks for the host", 200))
    assert sent(protected) == [
        {"act": "select", "kind": "block", "value": 35, "arg": "1"},
        {"act": "select", "kind": "block", "value": 200, "arg": "0"},
    ]


def test_that_blocks_and_pages_speak_and_take_keys(protected: Any) -> None:
    protected.mouse.move(*cell(protected, "Blocks for the guest", 35))
    assert status(protected) == "Block 35 at 0xd0230"
    protected.mouse.move(*cell(protected, "Encryption of guest memory", 0xD4))
    assert status(protected).startswith("Page 0xd4000: test_mem, C=1, memory plaintext")
    assert "disagree" in status(protected)
    protected.get_by_role("grid", name="Blocks for the host").focus()
    for key in ("Home", "ArrowRight", "ArrowDown", "Enter"):
        protected.keyboard.press(key)
    assert sent(protected) == [{"act": "select", "kind": "block", "value": 17, "arg": "0"}]


def test_that_a_row_of_the_dump_selects_its_bytes(protected: Any) -> None:
    protected.locator("[data-pane=dump] tr[data-act]").first.click()
    assert [message["kind"] for message in sent(protected)] == ["byte"]


@pytest.mark.parametrize("width", [420, 700, 1000, 1500])
def test_that_nothing_of_a_protected_vm_sticks_out(protected: Any, width: int) -> None:
    protected.set_viewport_size({"width": width, "height": 2200})
    drawn = dashboard.render(sample.vm(**secrets.vm_facts()), kind="vm", width=width - 40)
    protected.evaluate(
        "(panes) => window.model.push(panes)",
        {f"pane_{name}": body for name, body in drawn.panes.items()},
    )
    protected.wait_for_timeout(100)
    edges = """() => {
      const right = (element) => element.getBoundingClientRect().right;
      const panes = [...document.querySelectorAll('.lk .pane')];
      return [Math.max(...panes.map(right)), right(document.querySelector('section.lk'))];
    }"""
    panes, view = protected.evaluate(edges)
    assert panes <= view + 1
