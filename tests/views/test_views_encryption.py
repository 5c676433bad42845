"""The views of encrypted guests without a browser: what is drawn, what is marked, and that nothing of it grows without bounds."""

from __future__ import annotations

import re
from dataclasses import replace

import encryption_sample as secrets
import numpy as np
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
    assert (
        "C=1, memory still plaintext" in view.panes["memory"]
        and view.panes["ranges"].count('class="bad"') == 2
    )
    assert (
        view.panes["problems"].count('class="hole"') == 2
        and "Page 0xd4000" in view.status
        and "it will read noise" in view.status
    )
    assert [line.split()[1] for line in view.text.split("\n") if re.match(r"! +0x", line)] == [
        "0xd4000",
        "0x102000",
    ]


def test_that_both_tracks_are_drawn() -> None:
    drawn = encryption.render(secrets.encryption()).panes["memory"]
    agree = encryption.render(
        encryption_map(
            sample.page_table(51), [PageStates.of(0, secrets.private())], sample.memory(True)
        )
    )
    assert marks(drawn)["c-enc"] > marks(agree.panes["memory"])["c-enc"] and "c-flt" not in marks(
        agree.panes["memory"]
    )
    assert "agree everywhere" in agree.status and not agree.panes["problems"]


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
    assert view.status.startswith(says) and ("c-sel" in view.panes["memory"]) == (gpa < 1 << 21)


def test_that_the_shared_bit_turns_words_and_not_colours_around() -> None:
    one, other = (
        encryption.render(secrets.encryption(47, inverted)).panes for inverted in (False, True)
    )
    assert marks(one["memory"]) == marks(other["memory"])
    assert (
        "C=1 encrypted" in one["ranges"]
        and "S=0 encrypted" in other["ranges"]
        and "C=" not in other["ranges"]
    )


def test_that_only_states_that_occur_are_in_the_key() -> None:
    shown = [
        encryption.render(found).panes["memory"] for found in (secrets.encryption(), secrets.snp())
    ]
    plain, snp = (re.findall(r'<i class="([\w-]+)"', drawn) for drawn in shown)
    assert set(snp) - set(plain) == {"k-raw", "k-epage", "k-flt"} and "k-sel" not in plain


def test_that_a_disagreement_is_never_left_out_of_a_long_table() -> None:
    states = np.tile(np.array([0, 1], np.uint8), 4000)
    states[-1] = PageState.UNLAUNCHED
    parts = tuple(
        EncryptionRange(
            i * 4096, 1, "not mapped", PageState(int(state)), (), 0, "x", "wrong" * (i == 7999)
        )
        for i, state in enumerate(states)
    )
    view = encryption.render(
        EncryptionMap(1, "SEV", ("C=1", "C=0"), (), ((0, 8000 * 4096),), parts)
    )
    assert (
        len(view.html) < 1_500_000
        and "0x1f3f000" in view.panes["ranges"]
        and view.panes["ranges"].count("<tr") <= 41
    )
    assert "40 of 8\u2009000 ranges" in view.panes["ranges"] and len(view.text) < 20_000


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
        assert (
            "<script" not in view.html + view.img_html
            and "\x1b" not in view.html + view.text
            and "\x00" not in view.text
        )
        (view.html + view.img_html + view.text).encode()


# --- the strip


@given(
    st.lists(
        st.tuples(
            st.integers(0, 500), st.integers(1, 9), st.text("abcdef ", min_size=1, max_size=30)
        ),
        max_size=40,
    )
)
def test_that_names_and_leaders_never_cross(named: list[strip.Named]) -> None:
    brackets = strip._brackets(named, 0, 512, 60, 6.6)
    placed = [(at, lane, brackets[i]) for i, (at, lane) in strip._lanes(brackets, 914).items()]
    for at, lane, (x, _, words) in placed:
        for other_at, other_lane, (other_x, _, other_words) in placed:
            if (at, lane) != (other_at, other_lane):
                assert (
                    lane != other_lane
                    or at + 5.7 * len(words) <= other_at
                    or other_at + 5.7 * len(other_words) <= at
                )
                assert other_lane <= lane or not at < other_x < at + 5.7 * len(words), (
                    words,
                    other_words,
                )
            assert x >= at


# --- one page, two eyes


def test_that_a_row_is_a_block_and_changes_are_marked_in_both() -> None:
    view = eyes.render(secrets.eyes())
    rows = re.findall(r"<tr data-act.*?</tr>", view.panes["dump"])
    assert len(rows) == eyes.ROWS and sum(' cc"' in row for row in rows) == 2
    digits = [
        re.sub(r"<[^>]*>|\s", "", cell)
        for cell in re.findall(r'<td class="e[hg][^"]*">(.*?)</td>', "".join(rows))
    ]
    assert len(digits) == 2 * eyes.ROWS and {len(cell) for cell in digits} == {32}
    assert re.findall(r'class="eg cc">.*?<span class="cb">(.*?)</span>', view.panes["dump"]) == [
        "74",
        "74",
    ]


def test_that_changes_far_apart_are_all_shown_with_what_lies_between_folded() -> None:
    view = eyes.render(secrets.eyes(at=(0x10, 0x300, 0x555, 0x900, 0xFF0)))
    assert re.findall(r'class="ad">(\w+)</td><td class="eh cc"', view.panes["dump"]) == [
        "010",
        "300",
        "550",
        "900",
        "ff0",
    ]
    assert "blocks as before" in view.panes["dump"] and "blocks as before" in view.text


def test_that_more_changes_than_rows_are_cut_and_the_map_still_has_them() -> None:
    view = eyes.render(secrets.eyes(at=tuple(range(0, 4096, 16))))
    assert (
        len(re.findall(r"<tr data-act", view.panes["dump"])) == eyes.ROWS
        and marks(view.panes["blocks"])["c-chg"] == 512
    )


def test_that_the_selected_row_is_outlined_and_in_view() -> None:
    view = eyes.render(secrets.eyes(), selection=page_at(0xD0FF0))
    assert re.findall(r'class="sel"><td class="ad">(\w+)', view.panes["dump"]) == ["ff0"]
    assert (
        'class="sel"' not in eyes.render(secrets.eyes(), selection=page_at(0x400000)).panes["dump"]
    )


def test_that_one_block_alone_and_a_page_without_a_past_are_drawn() -> None:
    alone = eyes.render(PageEyes(0x1230, bytes(16), bytes(range(16))))
    assert (
        alone.panes["dump"].count("<tr data-act") == 1
        and "0.00" in alone.panes["words"]
        and "cb" not in alone.panes["dump"]
    )


# --- the launch


def test_that_the_states_so_far_are_filled_and_the_present_one_is_dark() -> None:
    early, late = (
        launch.render(secrets.launch(finished)).panes["states"] for finished in (False, True)
    )
    assert re.findall(r'class="(c-ink|c-cell2|c-off)"', early) == [
        "c-cell2",
        "c-ink",
        "c-off",
        "c-off",
    ]
    assert re.findall(r'class="(c-ink|c-cell2|c-off)"', late) == [
        "c-cell2",
        "c-cell2",
        "c-cell2",
        "c-ink",
    ]


def test_that_a_refused_command_is_a_marked_row_with_the_firmwares_name() -> None:
    view = launch.render(secrets.launch())
    assert (
        re.findall(r"✕ (\w+)", view.panes["steps"]) == ["INVALID_GUEST_STATE"]
        and view.panes["steps"].count('class="bad"') == 1
    )
    assert "refused: INVALID_GUEST_STATE 0x02" in view.text


def test_that_the_last_refusal_is_the_status() -> None:
    found = replace(secrets.launch(), steps=secrets.launch().steps[:5])
    assert launch.render(found).status.startswith(
        "LAUNCH_FINISH was refused: INVALID_GUEST_STATE (0x02)"
    )


def test_that_pages_fill_up_and_the_digest_grows() -> None:
    early, late = secrets.launch(finished=False), secrets.launch()
    panes = [marks(launch.render(found).panes["pages"]) for found in (early, late)]
    assert panes[0]["c-enc"] < panes[1]["c-enc"] == panes[1]["c-plan"] and (
        early.nr_pages,
        late.nr_pages,
    ) == (34, 90)
    assert (
        len({step.digest for step in late.steps if step.digest}) == 5
        and early.digest != late.digest
    )
    assert (
        "as the owner computed" in late.status
        and "not what the owner computed" in secrets.snp_launch().status
    )


def test_that_a_launch_that_has_not_begun_is_drawn() -> None:
    view = launch.render(LaunchProgress("SEV", GuestState.UNINIT, ()))
    assert (
        "none yet" in view.panes["owner"]
        and view.status == "UNINIT: 0 pages measured, digest none yet…."
    )


@pytest.mark.parametrize("state", GuestState)
def test_that_every_state_is_on_its_path(state: GuestState) -> None:
    assert state.name in launch.render(LaunchProgress("SEV", state, ())).panes["states"]


def test_that_a_launch_of_many_pages_keeps_first_and_last_commands() -> None:
    steps = tuple(
        LaunchStep("SNP_LAUNCH_UPDATE", "NORMAL", gpa << 12, 4096, bytes(48))
        for gpa in range(20_000)
    )
    view = launch.render(replace(secrets.snp_launch(1), steps=steps, slots=((0, 1 << 30),)))
    assert (
        "… 19\u2009976 more" in view.panes["steps"]
        and len(view.panes["steps"]) < 20_000
        and len(view.panes["pages"]) < 4_000_000
    )


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
    view = stepper.render(
        replace(
            sample.vcpu(),
            registers=(),
            stack=(),
            touches=(),
            sealed="SEV-ES keeps them in the VMSA",
        )
    )
    assert "· ·" not in re.sub(
        "<[^>]*>",
        "",
        stepper.render(replace(sample.vcpu(), sealed="x", where="", mode="")).panes["title"],
    )
    assert (
        "c-hatch" in view.panes["registers"]
        and "SEV-ES keeps them in the VMSA" in view.panes["registers"] + view.status
    )
    assert "registers sealed: SEV-ES" in view.text and "sealed" in view.panes["stack"]


@pytest.mark.parametrize(
    ("c_bit", "inverted", "said"), [(47, False, "C=0"), (51, False, "C=0"), (47, True, "S=1")]
)
def test_that_walk_ruler_and_ranges_agree_about_a_shared_page(
    c_bit: int, inverted: bool, said: str
) -> None:
    table = sample.page_table(c_bit, inverted=inverted)
    view = pages.render(table, gva=sample.POOL_GVA)
    assert f"shared ({said})" in view.status and f"{said} shared" in view.panes["ranges"]
    bit = ruler.draw(table.mode, [(table.walk(sample.POOL_GVA).steps[-1], "")], 914)
    assert bit.count('class="c-shr"') == 1 and "c-enc" not in bit and f">{said[0]}</text>" in bit
    assert (
        marks(view.panes["walk"])["c-shr thin"] == 138 + 4
        and marks(view.panes["walk"])["c-enc"] == 48
    )


def test_that_a_cleared_bit_shows_before_and_after() -> None:
    view = pages.render(sample.page_table(51, late=True), sample.page_table(51))
    cells = re.findall(r'class="chg"><td class="sg">~.*?</tr>', view.panes["changes"])
    assert (
        len(cells) == 1
        and re.sub(r"<[^>]*>", "", cells[0]).count("C=1 encrypted → C=0 shared") == 1
    )
