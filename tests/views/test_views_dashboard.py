"""The stepper, memory and the timeline drawn, and the dashboard that holds all views."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import views_sample as sample

from labkit.look.snapshots import MemoryMap, MemoryRange
from labkit.views import dashboard, memory, stepper
from labkit.views.scene import Memo
from labkit.views.transport import transport
from labkit.words import num


def test_that_source_and_disassembly_mark_the_same_instruction() -> None:
    view = stepper.render(sample.vcpu())
    for pane in ("source", "disassembly"):
        assert view.panes[pane].count('aria-current="true"') == 1

    def marked(sign: str) -> list[str]:
        return [line.split()[1] for line in view.text.split("\n") if line.startswith(sign)]

    assert marked("=>") == ["34", "40126c"]
    assert marked("*") == ["rax", "rflags"]


def test_that_the_stepper_says_what_the_last_step_changed() -> None:
    assert stepper.render(sample.vcpu(), sample.vcpu(late=False)).status == (
        f"Step {num(1277)}, vCPU 1, next: lock bts [rdx], rax. "
        "The last step changed rax and rflags. Bit 1 of in_use is clear: slot 1 will be its own."
    )


def test_that_rip_is_never_marked_and_a_lost_source_is_explained() -> None:
    drawn = stepper.render(sample.vcpu(), sample.vcpu(late=False)).panes["registers"]
    marked = re.findall(r'class="chg"[^>]*><td class="nm">(\w+)', drawn)
    assert marked == ["rax", "rflags"]

    lost = replace(sample.vcpu(), source=())
    assert "not on this machine" in stepper.render(lost).panes["source"]
    unknown = replace(lost, line=None, file=None)
    assert "no line numbers" in stepper.render(unknown).panes["source"]


def test_that_the_selection_is_outlined_on_what_points_to_it() -> None:
    chosen = replace(sample.selection(), gva=sample.POOL_GVA, slot=None, kind="register")
    view = stepper.render(sample.vcpu(), selection=chosen)
    assert re.search(r'class="sel"[^>]*><td class="nm">rdx', view.panes["registers"])
    assert view.panes["touches"].count('class="sel"') == 2


def painted(drawn: str) -> int:
    """How many pieces of memory in use a picture has."""
    (path,) = re.findall(r'<path d="([^"]*)" class="c-mem"', drawn)
    return path.count("M")


def test_that_memory_folds_free_rows_and_names_every_range() -> None:
    ranges = (MemoryRange(0, 4, "code"), MemoryRange(1 << 32, 2, "alloc"))
    gigabyte = MemoryMap(((0, 1 << 30), (1 << 32, 1 << 20)), ranges, 5)
    drawn = memory.render(gigabyte).panes["memory"]
    for words in (f"free, {num(262144 - 128)} pages", ">code<", ">alloc<", "0x100000000"):
        assert words in drawn
    assert painted(drawn) == 2


def test_that_a_full_memory_gets_longer_rows_instead_of_more() -> None:
    full = MemoryMap(((0, 1 << 30),), (MemoryRange(0, 1 << 18, "data"),), 0)
    drawn = memory.render(full).panes["memory"]
    assert painted(drawn) <= 16
    assert len(drawn) < 20_000


def test_that_memory_without_slots_is_drawn() -> None:
    assert memory.render(MemoryMap((), (), 0)).status == "0 of 0 pages in use: all free."


def test_that_crowded_events_become_ticks_and_the_newest_keep_their_letter() -> None:
    crowd = tuple(replace(sample.vm().events[0], step=step, vcpu=1) for step in range(1, 1278))
    drawn = dashboard.render(sample.vm(events=crowd)).panes["timeline"]
    assert drawn.count('class="mk"') < 60
    assert "c-exit" in drawn
    assert 'data-say="Step 1\u2009277, vCPU 1: SYNC"' in drawn


def test_that_the_time_axis_stays_while_steps_go_by() -> None:
    def labels(step: int) -> list[str]:
        drawn = dashboard.render(sample.vm(step=step)).panes["timeline"]
        return re.findall(r">([\d\u2009]+)</text>", drawn)

    assert labels(1100) == labels(1999) != labels(2001)
    assert len(labels(1100)) == 4


@pytest.mark.parametrize(
    "actions", [(), ("run",), ("step", "step_line", "run"), ("home", "back", "step", "run", "end")]
)
def test_that_only_buttons_on_offer_are_shown_and_run_is_the_filled_one(
    actions: tuple[str, ...],
) -> None:
    shown = transport(sample.vm(), actions)
    assert re.findall(r'data-act="(?!vcpu)(\w+)"', shown) == list(actions)
    filled = re.findall(r'class="pri"[^>]*aria-label="([^"]*)"', shown)
    assert filled == (["Run to the next ucall"] if "run" in actions else [])
    assert re.findall(r'aria-selected="(\w+)"', shown) == ["false", "true", "false", "false"]
    assert "vCPU 3 done" in shown


def test_that_the_rail_spells_the_path() -> None:
    rail = re.sub(r"<[^>]*>", "", dashboard.render(sample.vm(51)).panes["rail"])
    assert rail == (
        "slot 2 vCPU 2, PRINTF → gva 0x90406028d0 → PML4[0x1] PDPT[0x41] PD[0x3] PT[0x2] → "
        "gpa 0x408d0 shared → hva 0x7f3a5c0408d0"
    )


def test_that_one_selection_is_outlined_in_every_view() -> None:
    panes = dashboard.render(sample.vm()).panes
    for name in ("pool", "memory", "walk"):
        assert 'class="c-sel"' in panes[name]


def test_that_a_vm_without_pool_selection_or_source_is_drawn() -> None:
    bare = sample.vm(pool=None, selection=None, events=())
    for kind in dashboard.VIEWS:
        assert dashboard.render(bare, kind=kind).html
    assert "of the next instruction" in dashboard.render(bare).panes["walk"]


def test_that_what_did_not_change_is_not_drawn_again() -> None:
    memo: Memo = {}
    first = dashboard.render(sample.vm(), memo=memo)
    again = dashboard.render(sample.vm(step=1300), memo=memo)
    assert again.panes["memory"] is first.panes["memory"]
    assert again.panes["title"] != first.panes["title"]
    moved = dashboard.render(sample.vm(selection=None), memo=memo)
    assert moved.panes["memory"] != first.panes["memory"]
    assert moved.panes["walk"] != first.panes["walk"]
