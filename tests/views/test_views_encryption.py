"""The views of encrypted guests drawn: what is marked, and that nothing grows without bounds."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import encryption_sample as secrets
import pytest
import views_sample as sample
from hypothesis import given
from hypothesis import strategies as st

from labkit.look.encryption import (
    EncryptionMap,
    EncryptionRange,
    PageState,
    PageStates,
)
from labkit.look.encryption_map import encryption_map
from labkit.look.eyes import PageEyes
from labkit.look.launch import LaunchProgress, LaunchStep, policy_text
from labkit.look.snapshots import Selection
from labkit.sev.commands import GuestState
from labkit.views import encryption, eyes, launch, pages, stepper
from labkit.views.drawing import strip
from labkit.views.pictures import ruler

EVIL = "<script>x</script>\"'&\x00\x1b[31m\u202e\ud800"


def page_at(gpa: int) -> Selection:
    """A selection of one page."""
    return Selection("page", hex(gpa), None, gpa, None, 4096, ())


def marks(drawn: str) -> dict[str, int]:
    """Class -> number of pieces of all paths of a drawing."""
    out: dict[str, int] = {}
    for d, cls in re.findall(r'<path d="([^"]*)" class="([\w -]+)"', drawn):
        out[cls] = out.get(cls, 0) + d.count("M")
    return out


# --- the map


def test_that_a_disagreement_is_a_triangle_a_row_and_a_sentence() -> None:
    view = encryption.render(secrets.encryption())
    assert "C=1, memory still plaintext" in view.panes["memory"]
    assert view.panes["ranges"].count('class="bad"') == 2
    assert view.panes["problems"].count('class="hole"') == 2
    assert "Page 0xd4000" in view.status
    assert "it will read noise" in view.status
    lines = [line for line in view.text.split("\n") if re.match(r"! +0x", line)]
    assert [line.split()[1] for line in lines] == ["0xd4000", "0x102000"]


def test_that_both_tracks_are_drawn() -> None:
    states = [PageStates.of(0, secrets.private())]
    found = encryption_map(sample.page_table(51), states, sample.memory(True))
    agree = encryption.render(found)
    disagree = encryption.render(secrets.encryption())
    drawn = marks(agree.panes["memory"])
    assert marks(disagree.panes["memory"])["c-enc"] > drawn["c-enc"]
    assert "c-flt" not in drawn
    assert "agree everywhere" in agree.status
    assert not agree.panes["problems"]


@pytest.mark.parametrize(
    ("gpa", "says"),
    [
        (0xD0000, "Page 0xd0000, test_mem: C=1, encrypted."),
        (0x40123, "Page 0x40000, ucall pool: C=0, plaintext."),
        (0x180000, "Page 0x180000, page tables: page table, encrypted."),
        (0, "Page 0x0: not mapped, plaintext."),
        (0x102000, "Page 0x102000, mailbox: C=0, memory still ciphertext."),
        (1 << 40, "Page 0xd4000: C=1, memory still plaintext."),
    ],
)
def test_that_the_status_spells_the_selected_page(gpa: int, says: str) -> None:
    view = encryption.render(secrets.encryption(), selection=page_at(gpa))
    assert view.status.startswith(says)
    assert ("c-sel" in view.panes["memory"]) == (gpa < 1 << 21)


def test_that_the_shared_bit_turns_words_and_not_colours_around() -> None:
    one, other = (
        encryption.render(secrets.encryption(47, inverted)).panes for inverted in (False, True)
    )
    assert marks(one["memory"]) == marks(other["memory"])
    assert "C=1 encrypted" in one["ranges"]
    assert "S=0 encrypted" in other["ranges"]
    assert "C=" not in other["ranges"]


def test_that_only_states_that_occur_are_in_the_key() -> None:
    def marks_of(found: EncryptionMap) -> set[str]:
        return set(re.findall(r'<i class="([\w-]+)"', encryption.render(found).panes["memory"]))

    plain, snp = marks_of(secrets.encryption()), marks_of(secrets.snp())
    assert snp - plain == {"k-raw", "k-epage", "k-flt"}
    assert "k-sel" not in plain


def test_that_a_disagreement_is_never_left_out_of_a_long_table() -> None:
    parts = []
    for i in range(8000):
        state = PageState.PRIVATE if i % 2 else PageState.SHARED
        parts.append(EncryptionRange(i * 4096, 1, "not mapped", state, (), 0, "x"))
    parts[-1] = replace(parts[-1], memory=PageState.UNLAUNCHED, problem="wrong")
    slots = ((0, 8000 * 4096),)
    view = encryption.render(EncryptionMap(1, "SEV", ("C=1", "C=0"), (), slots, tuple(parts)))
    assert len(view.html) < 1_500_000
    assert "0x1f3f000" in view.panes["ranges"]
    assert view.panes["ranges"].count("<tr") <= 41
    assert "40 of 8\u2009000 ranges" in view.panes["ranges"]
    assert len(view.text) < 20_000


def test_that_names_from_a_guest_stay_text() -> None:
    found = secrets.encryption()
    parts = tuple(replace(part, what=EVIL, problem=EVIL, why=EVIL) for part in found.ranges)
    bad = replace(found, protection=EVIL, facts=(EVIL,), ranges=parts)
    page = replace(secrets.eyes(what=EVIL), names=(EVIL, EVIL), word=EVIL)
    steps = tuple(
        replace(step, command=EVIL, kind=EVIL, found=EVIL) for step in secrets.launch().steps
    )
    shown = [
        encryption.render(bad),
        eyes.render(page),
        launch.render(replace(secrets.launch(), protection=EVIL, steps=steps)),
        stepper.render(replace(sample.vcpu(), sealed=EVIL)),
    ]
    for view in shown:
        assert "<script" not in view.html + view.img_html
        assert "\x1b" not in view.html + view.text
        assert "\x00" not in view.text
        (view.html + view.img_html + view.text).encode()


# --- the strip


NAMES = st.text("abcdef ", min_size=1, max_size=30)
RANGES = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 9), NAMES), max_size=40)


class Placed(NamedTuple):
    """A name in its lane; x is where the leader rises from the range."""

    at: float
    end: float
    lane: int
    x: float
    name: str


@given(RANGES)
def test_that_names_and_leaders_never_cross(named: list[strip.Named]) -> None:
    brackets = strip._brackets(named, 0, 512, 60, 6.6)
    placed = []
    for i, (at, lane) in strip._lanes(brackets, 914).items():
        x, _, name = brackets[i]
        placed.append(Placed(at, at + strip.LETTER * len(name), lane, x, name))
        assert x >= at

    for one, other in permutations(placed, 2):
        if one.lane == other.lane:
            assert one.end <= other.at or other.end <= one.at, (one, other)
        if one.lane < other.lane:  # the leader of the upper one passes beside the lower name
            assert not one.at < other.x < one.end, (one, other)


# --- one page, two eyes


def test_that_a_row_is_a_block_and_changes_are_marked_in_both() -> None:
    view = eyes.render(secrets.eyes())
    rows = re.findall(r"<tr data-act.*?</tr>", view.panes["dump"])
    assert len(rows) == eyes.ROWS
    assert sum(' cc"' in row for row in rows) == 2
    cells = re.findall(r'<td class="e[hg][^"]*">(.*?)</td>', "".join(rows))
    digits = [re.sub(r"<[^>]*>|\s", "", cell) for cell in cells]
    assert len(digits) == 2 * eyes.ROWS
    assert {len(cell) for cell in digits} == {32}
    for_the_guest = r'class="eg cc">.*?<span class="cb">(.*?)</span>'
    assert re.findall(for_the_guest, view.panes["dump"]) == ["74", "74"]


def test_that_changes_far_apart_are_all_shown_with_what_lies_between_folded() -> None:
    view = eyes.render(secrets.eyes(at=(0x10, 0x300, 0x555, 0x900, 0xFF0)))
    marked = re.findall(r'class="ad">(\w+)</td><td class="eh cc"', view.panes["dump"])
    assert marked == ["010", "300", "550", "900", "ff0"]
    assert "blocks as before" in view.panes["dump"]
    assert "blocks as before" in view.text


def test_that_more_changes_than_rows_are_cut_and_the_map_still_has_them() -> None:
    view = eyes.render(secrets.eyes(at=tuple(range(0, 4096, 16))))
    assert len(re.findall(r"<tr data-act", view.panes["dump"])) == eyes.ROWS
    assert marks(view.panes["blocks"])["c-chg"] == 512


def test_that_the_selected_row_is_outlined_and_in_view() -> None:
    view = eyes.render(secrets.eyes(), selection=page_at(0xD0FF0))
    assert re.findall(r'class="sel"><td class="ad">(\w+)', view.panes["dump"]) == ["ff0"]
    elsewhere = eyes.render(secrets.eyes(), selection=page_at(0x400000))
    assert 'class="sel"' not in elsewhere.panes["dump"]


def test_that_one_block_alone_and_a_page_without_a_past_are_drawn() -> None:
    alone = eyes.render(PageEyes(0x1230, bytes(16), bytes(range(16))))
    assert alone.panes["dump"].count("<tr data-act") == 1
    assert "0.00" in alone.panes["words"]
    assert "cb" not in alone.panes["dump"]


# --- the launch


def test_that_the_states_so_far_are_filled_and_the_present_one_is_dark() -> None:
    def fills(finished: bool) -> list[str]:
        drawn = launch.render(secrets.launch(finished)).panes["states"]
        return re.findall(r'class="(c-ink|c-cell2|c-off)"', drawn)

    assert fills(finished=False) == ["c-cell2", "c-ink", "c-off", "c-off"]
    assert fills(finished=True) == ["c-cell2", "c-cell2", "c-cell2", "c-ink"]


def test_that_a_refused_command_is_a_marked_row_with_the_firmwares_name() -> None:
    view = launch.render(secrets.launch())
    assert re.findall(r"✕ (\w+)", view.panes["steps"]) == ["INVALID_GUEST_STATE"]
    assert view.panes["steps"].count('class="bad"') == 1
    assert "refused: INVALID_GUEST_STATE 0x02" in view.text


def test_that_the_last_refusal_is_the_status() -> None:
    found = replace(secrets.launch(), steps=secrets.launch().steps[:5])
    refused = "LAUNCH_FINISH was refused: INVALID_GUEST_STATE (0x02)"
    assert launch.render(found).status.startswith(refused)


def test_that_pages_fill_up_and_the_digest_grows() -> None:
    early, late = secrets.launch(finished=False), secrets.launch()
    first, last = (marks(launch.render(found).panes["pages"]) for found in (early, late))
    assert first["c-enc"] < last["c-enc"] == last["c-plan"]
    assert (early.nr_pages, late.nr_pages) == (34, 90)
    assert len({step.digest for step in late.steps if step.digest}) == 5
    assert early.digest != late.digest
    assert "as the owner computed" in late.status
    assert "not what the owner computed" in secrets.snp_launch().status


def test_that_a_launch_that_has_not_begun_is_drawn() -> None:
    view = launch.render(LaunchProgress("SEV", GuestState.UNINIT, ()))
    assert "none yet" in view.panes["owner"]
    assert view.status == "UNINIT: 0 pages measured, digest none yet…."


@pytest.mark.parametrize("state", GuestState)
def test_that_every_state_is_on_its_path(state: GuestState) -> None:
    assert state.name in launch.render(LaunchProgress("SEV", state, ())).panes["states"]


def test_that_a_launch_of_many_pages_keeps_first_and_last_commands() -> None:
    steps = tuple(
        LaunchStep("SNP_LAUNCH_UPDATE", "NORMAL", gpa << 12, 4096, bytes(48))
        for gpa in range(20_000)
    )
    view = launch.render(replace(secrets.snp_launch(1), steps=steps, slots=((0, 1 << 30),)))
    assert "… 19\u2009976 more" in view.panes["steps"]
    assert len(view.panes["steps"]) < 20_000
    assert len(view.panes["pages"]) < 4_000_000


@pytest.mark.parametrize(
    ("policy", "snp", "says"),
    [
        (0x5, False, "0x5: NODBG, ES; API 0.0 or later"),
        (0x37010000, False, "0x37010000: nothing demanded; API 1.55 or later"),
        (0xB0000, True, "0xb0000: SMT, DEBUG; API 0.0 or later"),
    ],
)
def test_that_policies_are_spelled(policy: int, snp: bool, says: str) -> None:
    assert policy_text(policy, snp) == says


# --- colours in the older views


def test_that_sealed_registers_are_a_dark_pane_with_the_reason() -> None:
    view = stepper.render(sample.sealed_vcpu())
    assert "c-hatch" in view.panes["registers"]
    assert "SEV-ES keeps them in the VMSA" in view.panes["registers"] + view.status
    assert "registers sealed: SEV-ES" in view.text
    assert "sealed" in view.panes["stack"]


def test_that_a_header_has_no_gap_where_a_fact_is_missing() -> None:
    nowhere = replace(sample.vcpu(), sealed="x", where="", mode="")
    title = stepper.render(nowhere).panes["title"]
    assert "· ·" not in re.sub("<[^>]*>", "", title)


@pytest.mark.parametrize(
    ("c_bit", "inverted", "said"), [(47, False, "C=0"), (51, False, "C=0"), (47, True, "S=1")]
)
def test_that_walk_ruler_and_ranges_agree_about_a_shared_page(
    c_bit: int, inverted: bool, said: str
) -> None:
    table = sample.page_table(c_bit, inverted=inverted)
    view = pages.render(table, gva=sample.POOL_GVA)
    assert f"shared ({said})" in view.status
    assert f"{said} shared" in view.panes["ranges"]
    bit = ruler.draw(table.mode, [(table.walk(sample.POOL_GVA).steps[-1], "")], 914)
    assert bit.count('class="c-shr"') == 1
    assert "c-enc" not in bit
    assert f">{said[0]}</text>" in bit
    assert marks(view.panes["walk"])["c-shr thin"] == 138 + 4
    assert marks(view.panes["walk"])["c-enc"] == 48


def test_that_a_cleared_bit_shows_before_and_after() -> None:
    view = pages.render(sample.page_table(51, late=True), sample.page_table(51))
    cells = re.findall(r'class="chg"><td class="sg">~.*?</tr>', view.panes["changes"])
    assert len(cells) == 1
    assert re.sub(r"<[^>]*>", "", cells[0]).count("C=1 encrypted → C=0 shared") == 1
