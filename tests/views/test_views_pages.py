"""Page tables drawn: the walk, the ruler, ranges and changes, and the objects in the page."""

from __future__ import annotations

import re

import numpy as np
import pytest
import views_sample as sample

from labkit.arch.x86 import X86_PXXV48_4K, X86_PXXV57_4K
from labkit.paging.walk import walk
from labkit.views import pages
from labkit.views.pictures import ruler

GVA = 0x90406028D0  # of slot 2


def test_that_a_walk_draws_one_outline_and_one_curve_per_entry() -> None:
    drawn = pages.render(sample.page_table(), gva=GVA, pinned=0x40126C).panes["walk"]
    assert drawn.count('class="c-walk"') == 4
    assert drawn.count('role="grid"') == 4
    assert "c-cross" not in drawn
    assert re.findall(r"(\d+) of 512, (\S+ \S+) each", drawn) == [
        ("2", "512 GiB"),
        ("1", "1 GiB"),
        ("1", "2 MiB"),
        ("190", "4 KiB"),
    ]


def test_that_tables_count_their_present_entries() -> None:
    table = sample.page_table()
    drawn = pages.render(table, gva=GVA).panes["walk"]
    for step in table.walk(GVA).steps:
        raw = np.frombuffer(table.tables[step.entry_gpa & -4096], "<u8")
        assert f"{int((raw & 1).sum())} of 512" in drawn


def test_that_a_hole_ends_in_a_cross_and_the_sentence_of_the_error() -> None:
    view = pages.render(sample.page_table(), gva=0x201234)
    drawn = view.panes["walk"]
    assert "c-cross" in drawn
    assert "is not present (entry 0x0)." in drawn
    assert drawn.count('role="grid"') == 3
    assert view.status.startswith("gva 0x201234: PD[0x1] at gpa ")


def test_that_walks_without_tables_and_not_canonical_ones_are_drawn() -> None:
    table = sample.page_table()
    alone = pages.render_walk(table.walk(0x400000))
    assert alone.panes["walk"].count("c-walk") == 4
    assert "not canonical" in pages.render(table, gva=1 << 50).panes["walk"]
    assert alone.text.split("\n")[2].startswith("PML4[0x000] 0x180000 -> ")


def test_that_five_levels_fit_every_width() -> None:
    found = walk(lambda gpa, n: (0x1007).to_bytes(8, "little"), X86_PXXV57_4K, 0x1000, 0x1234)
    for width in (560, 620, 940, 1400):
        drawn = pages.render_walk(found, width=width).panes["walk"]
        xs = [float(x) for x in re.findall(r'<rect x="([\d.]+)" y="20', drawn)]
        assert len(xs) == 6
        assert xs == sorted(xs)
        assert xs[-1] < width


def test_that_changes_are_bars_on_cells_and_rows() -> None:
    view = pages.render(sample.page_table(late=True), sample.page_table(), gva=GVA)
    bars = re.findall(r'<path d="([^"]*)" class="c-chg"', view.panes["walk"])
    assert sum(d.count("M") for d in bars) == 4
    assert re.findall(r'class="sg">(.)<', view.panes["changes"]) == ["−", "~", "+"]
    assert "2 added, 1 removed, 1 changed" in view.panes["changes"]


def test_that_encryption_is_fill_and_word() -> None:
    view = pages.render(sample.page_table(51), gva=GVA)
    assert "c-enc" in view.panes["walk"]
    assert "c-shr" in view.panes["walk"]
    assert "c-mem" not in view.panes["walk"]
    assert "encrypted" in view.panes["ranges"]
    assert "shared" in view.panes["ranges"]
    assert "shared (C=0)" in view.status
    assert "c-enc" not in pages.render(sample.page_table(), gva=GVA).html


def test_that_the_ruler_names_every_flag_once_and_shows_every_bit() -> None:
    mode = X86_PXXV48_4K.with_c_bit(51)
    parts = ruler.parts(mode, mode.levels[-1])
    assert [part.name for part in parts if part.flag] == ["NX", "C", "D", "A", "U", "W", "P"]
    assert sum(part.high - part.low + 1 for part in parts) == 64
    step = sample.page_table(51).walk(GVA).steps[-1]
    for width in (560, 914):
        drawn = ruler.draw(mode, [(step, "")], width)
        digits = "".join(re.findall(r'class="m (?:one|d|one onc)"[^>]*>([01]+)<', drawn))
        assert len(digits) == 64
        assert digits.count("1") == step.entry.bit_count()


@pytest.mark.parametrize(
    ("level", "index", "leads"),
    [
        (0, 0, 0x400000),
        (3, 5, 0x9040605000),
        (3, 0x1FF, 0x90407FF000),
        (1, 0x41, GVA),
        (0, 256, 0xFFFF800000000000),
    ],
)
def test_that_a_click_on_an_entry_leads_to_its_first_page(
    level: int, index: int, leads: int
) -> None:
    assert pages.gva_of(sample.page_table(), GVA, level, index) == leads


def test_that_the_page_shows_the_slots_in_it() -> None:
    table, snapshot = sample.page_table(), sample.pool()
    first = pages.pool_objects(snapshot, table.walk(0x9040602000), 2)
    assert [thing.name for thing in first] == ["in_use", "slot 0", "slot 1", "slot 2", "slot 3"]
    assert [thing.name for thing in first if thing.chosen] == ["slot 2"]
    second = pages.pool_objects(snapshot, table.walk(0x9040603000))
    assert second[0].name == "slot 3"
    assert second[0].offset < 0
    assert pages.pool_objects(snapshot, table.walk(0x400000)) == []
    assert pages.pool_objects(None, table.walk(0x9040602000)) == []
