"""The pool drawn: who holds which slot, what changed, and that cells stay where they are."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import views_sample as sample

from labkit.ucall.snapshot import PoolSnapshot
from labkit.views import pool
from labkit.views.pool_words import marks
from labkit.words import num


def test_that_pool_marks_say_state_and_owner() -> None:
    assert marks(sample.pool())[:8] == "0.2xxxD."
    many = sample.pool(owner=np.where(np.arange(512) == 0, 11, -1).astype(np.int16))
    assert marks(many)[:3] == "b.?"


def test_that_the_pool_counts_what_it_draws() -> None:
    view = pool.render(sample.pool())
    assert view.status == f"6 of 512 in use, 3 of them leaked; 2 changed since step {num(1180)}."
    drawn = view.panes["pool"]
    paths = dict(re.findall(r'<path d="([^"]*)" class="(c-use|c-flt|c-done|c-chg)"', drawn))
    nr_marks = {cls: d.count("M") for d, cls in paths.items()}
    assert nr_marks == {"c-use": 2, "c-flt": 3, "c-done": 1, "c-chg": 2}
    assert re.findall(r'class="own(?: dn)?"[^>]*>([^<]*)<', drawn) == ["0", "2", "D"]


def test_that_pool_cells_do_not_move_when_slots_change() -> None:
    none = np.zeros(512, bool)
    free = sample.pool(in_use=none, done=none, leaked=none, changed=none)

    def grounds(snapshot: PoolSnapshot) -> list[str]:
        drawn = pool.render(snapshot).panes["pool"]
        return re.findall(r'<path d="([^"]*)" class="c-cell"', drawn)

    assert grounds(free) == grounds(sample.pool())


def test_that_a_full_pool_draws_every_cell() -> None:
    full = np.ones(512, bool)
    cut = "…"  # is where a long text ends
    assert cut not in pool.render(sample.pool(in_use=full, done=full)).html


def test_that_a_previous_snapshot_decides_what_changed() -> None:
    view = pool.render(sample.pool(), sample.pool(step=900))
    assert "none changed since step 900" in view.status
    assert "c-chg" not in view.html


@pytest.mark.parametrize(
    ("slot", "says"),
    [
        (2, f'Slot 2, vCPU 2, PRINTF "vCPU 2: 128 pages touched\\n", since step {num(1080)}.'),
        (6, "Slot 6, vCPU 3, DONE, since step 986, held by design."),
        (3, 'Slot 3, vCPU 3, PRINTF "hello\\n", since step 498, leaked.'),
        (1, "Slot 1 is free, used 5 times."),
        (99, "Slot 99 is free, never used."),
    ],
)
def test_that_the_status_spells_the_selected_slot(slot: int, says: str) -> None:
    view = pool.render(sample.pool(), selection=replace(sample.selection(), slot=slot))
    assert view.status == says
    assert f"slot {slot}" in view.panes["card"]
    assert "c-sel" in view.panes["pool"]


def test_that_unused_rows_fold_in_text_and_dashboard_but_not_in_the_pool_view() -> None:
    assert "slots 64 to 511: never used" in pool.render(sample.pool()).text
    assert "never used" in pool.render(sample.pool(), fold=True).panes["pool"]
    assert "never used" not in pool.render(sample.pool()).panes["pool"]


def test_that_a_big_pool_drops_digits_and_draws_leaks_as_triangles() -> None:
    drawn = pool.render(sample.pool(4096)).panes["pool"]
    assert 'class="own"' not in drawn
    assert 'class="c-x"' not in drawn
    assert len(drawn) < 12_000


def test_that_only_marks_that_occur_are_in_the_key() -> None:
    none = np.zeros(512, bool)
    quiet = sample.pool(leaked=none, done=none, changed=none, next_slot=None)
    shown = pool.render(quiet).panes["poolkey"]
    assert "in use" in shown
    for words in ("leaked", "DONE", "changed", "next"):
        assert words not in shown


def test_that_a_foreign_hva_is_called_out() -> None:
    held = tuple(replace(slot, hva_ok=False) for slot in sample.pool().held)
    view = pool.render(sample.pool(held=held), selection=sample.selection())
    assert "not this slot" in view.panes["card"]
