"""Drawing without a browser: what is in a picture, a table and a text, in both themes, and that a guest cannot break out of it."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import encryption_sample as secrets
import numpy as np
import pytest
import views_sample as sample
from hypothesis import given
from hypothesis import strategies as st

from labkit.arch.x86 import X86_PXXV48_4K, X86_PXXV57_4K
from labkit.look.snapshots import MemoryMap, MemoryRange
from labkit.paging.walk import walk
from labkit.views import dashboard, encryption, eyes, launch, memory, pages, pool, stepper
from labkit.views.drawing.markup import Html, el, esc, num, plain
from labkit.views.drawing.style import DARK, LIGHT, css, inline_styles, svg_css
from labkit.views.pictures import ruler
from labkit.views.pool_words import marks
from labkit.views.show import View, mimebundle
from labkit.views.transport import transport

EVIL = "<script>x</script>\"'&\x00\x1b[31m\u202e\ud800"
ALL = {
    "vm": lambda: dashboard.render(sample.vm(), sample.vm(late=False), actions=("run", "step")),
    "sev": lambda: dashboard.render(
        sample.vm(51), sample.vm(51, late=False), actions=("run", "step")
    ),
    "pool": lambda: pool.render(sample.pool(), selection=sample.selection()),
    "pool4096": lambda: pool.render(sample.pool(4096)),
    "tables": lambda: pages.render(sample.page_table(late=True), sample.page_table()),
    "walk": lambda: pages.render(sample.page_table(), gva=0x90406028D0, pinned=0x40126C),
    "stepper": lambda: stepper.render(sample.vcpu()),
    "memory": lambda: memory.render(sample.memory()),
    "encryption": lambda: encryption.render(secrets.encryption(), selection=sample.selection()),
    "tdx": lambda: encryption.render(secrets.encryption(47, inverted=True)),
    "snp": lambda: encryption.render(secrets.snp()),
    "eyes": lambda: eyes.render(secrets.eyes()),
    "eyes of a shared page": lambda: eyes.render(secrets.eyes(secret=False)),
    "launch": lambda: launch.render(secrets.launch(finished=False)),
    "snp launch": lambda: launch.render(secrets.snp_launch()),
    "sealed": lambda: stepper.render(
        replace(
            sample.vcpu(),
            registers=(),
            stack=(),
            touches=(),
            sealed="SEV-ES keeps them in the VMSA",
        )
    ),
}
every_view = pytest.mark.parametrize("name", ALL)


def contrast(one: str, two: str) -> float:
    """The contrast ratio of two #rrggbb colours (WCAG 2.1, 1.4.3)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def pictures(view: View) -> list[ET.Element]:
    """The drawings in the static form, parsed: a broken one raises."""
    data = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', view.img_html)
    return [ET.fromstring(base64.b64decode(one)) for one in data]


class Balance(HTMLParser):
    """Fails where a tag is left open or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open += [tag] if tag != "img" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- colours


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "grounds"),
    [
        ("ink", "bg wash now-tint chg-tint"),
        ("ink1", "bg wash chg-tint"),
        ("dim", "bg wash"),
        ("enc-ink", "bg wash enc-tint"),
        ("shr-ink", "bg wash shr-tint"),
        ("use-ink", "bg wash"),
        ("chg-ink", "bg wash chg-tint"),
        ("flt-ink", "bg wash flt-tint"),
        ("on-use", "use"),
    ],
)
def test_that_text_is_readable(theme: dict[str, str], ink: str, grounds: str) -> None:
    for ground in grounds.split():
        assert contrast(theme[ink], theme[ground]) >= 4.5, ground


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    "fill", ["enc", "shr-edge", "use", "chg-edge", "flt", "now-edge", "l2", "l3"]
)
def test_that_state_is_visible_on_the_ground(theme: dict[str, str], fill: str) -> None:
    assert contrast(theme[fill], theme["bg"]) >= 3


def test_that_the_level_ramp_is_an_order_in_both_themes() -> None:
    for theme in (LIGHT, DARK):
        ratios = [contrast(theme[f"l{level}"], theme["bg"]) for level in (5, 4, 3, 2, 1)]
        assert ratios == sorted(ratios, reverse=True)


def test_that_both_themes_define_every_variable_that_the_style_sheet_uses() -> None:
    used = set(re.findall(r"var\(--([a-z0-9-]+)", css())) - set(
        re.findall(r"var\(--(jp-[a-z0-9-]+)", css())
    )
    assert used <= set(LIGHT) | {"mono", "sans"} and set(DARK) == set(LIGHT)
    assert "[data-jp-theme-light=false]" in css() and "@container" in css()


@every_view
def test_that_every_class_has_a_style(name: str) -> None:
    view = ALL[name]()
    known = set(re.findall(r"\.([a-zA-Z][\w-]*)", css())) | {"side", "op", "v"}  # these need none
    assert {
        one for names in re.findall(r'class="([^"]*)"', view.html) for one in names.split()
    } <= known


# --- a view goes everywhere


@every_view
def test_that_markup_is_balanced_and_pictures_are_documents(name: str) -> None:
    view = ALL[name]()
    for page in (view.html, view.img_html):
        parser = Balance()
        parser.feed(page)
        assert not parser.open
    for picture in pictures(view):
        defined = set(re.findall(r"--([\w-]+):", svg_css()))
        assert set(re.findall(r"var\(--([\w-]+)", ET.tostring(picture, "unicode"))) <= defined


@every_view
def test_that_the_static_form_needs_no_script_no_style_sheet_and_no_svg(name: str) -> None:
    page = ALL[name]().img_html
    assert not re.search(
        r"<svg|<script|<style|<button| class=| data-(?!uri)\w+=", page.replace("data:image", "")
    )
    assert f"background:{LIGHT['bg']}" in page


@every_view
def test_that_the_first_picture_is_named_by_the_status_sentence(name: str) -> None:
    view = ALL[name]()
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', view.img_html)
    assert alts[:1] in ([], [esc(view.status)]) and all(alts)
    assert view.status.endswith(".") and "\n" not in view.status


@every_view
def test_that_the_text_starts_with_title_and_status(name: str) -> None:
    view = ALL[name]()
    assert view.text.split("\n")[:2] == [view.title, view.status]
    assert all(line.isprintable() or "\u2009" in line for line in view.text.split("\n"))


def test_that_a_mimebundle_carries_the_widget_and_the_fallbacks() -> None:
    view = ALL["pool"]()
    data, metadata = mimebundle(
        view,
        (
            {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "repr"},
            {"a": 1},
        ),
    )
    assert set(data) == {
        "application/vnd.jupyter.widget-view+json",
        "text/html",
        "text/plain",
    } and metadata == {"a": 1}
    assert data["text/plain"] == view.text and view._repr_mimebundle_()[0].keys() == {
        "text/html",
        "text/plain",
    }


def test_that_inline_styles_are_plain_css() -> None:
    assert all(
        "{" not in style and "@" not in style and "var(" not in style
        for style in inline_styles().values()
    )
    assert "<" not in svg_css() and "&" not in svg_css()


def test_that_every_snapshot_has_a_bundle() -> None:
    shown = (
        sample.vm(),
        sample.vcpu(),
        sample.pool(),
        sample.memory(),
        sample.page_table(),
        sample.page_table().walk(0x400000),
        secrets.encryption(),
        secrets.eyes(),
        secrets.launch(),
    )
    titles = (
        "alloc4",
        "vCPU 1",
        "ucall pool",
        "guest memory",
        "page tables",
        "page walk",
        "encryption, SEV-ES",
        "page 0xd0000",
        "launch of a SEV-ES guest",
    )
    for snapshot, title in zip(shown, titles, strict=True):
        data, _ = dashboard.bundle(snapshot)
        assert data["text/plain"].startswith(title) and data["text/html"].startswith("<section")
    with pytest.raises(TypeError):
        dashboard.bundle(5)


# --- hostile text


@given(st.text())
def test_that_text_is_escaped_whatever_it_is(words: str) -> None:
    made = el("p", words, title=words)
    inner = ET.fromstring(made)
    assert inner.text in (None, plain(words, 4000)) and plain(plain(words, 4000), 9000) == plain(
        words, 4000
    )
    made.encode()


def test_that_control_characters_are_spelled_out_and_long_text_is_cut() -> None:
    assert plain("a\n\t\x1b\u202e\ud800") == "a\\n\\t\\x1b\\u202e\\ud800"
    assert plain("x" * 300, 10) == "x" * 9 + "…"
    assert esc(Html("<b>")) == "<b>" and Html("<b>") + "<i>" == "<b>&lt;i&gt;"


def hostile() -> list[View]:
    """Every guest-controlled string replaced by an attack."""
    held = tuple(replace(slot, text=EVIL, cmd=EVIL) for slot in sample.pool().held)
    vcpu = sample.vcpu()
    bad = replace(
        vcpu,
        where=EVIL,
        symbol=EVIL,
        file=EVIL,
        mode=EVIL,
        state=EVIL,
        outlook=EVIL,
        source=((34, EVIL + "// int " + EVIL),),
        disassembly=tuple(
            replace(insn, mnemonic=EVIL, op_str=EVIL, comment=EVIL) for insn in vcpu.disassembly
        ),
        registers=tuple(replace(row, name=EVIL, note=EVIL) for row in vcpu.registers),
        stack=tuple(replace(row, note=EVIL) for row in vcpu.stack),
        touches=tuple(replace(touch, note=EVIL, gpa=None) for touch in vcpu.touches),
    )
    table, layout = replace(sample.page_table(), labels=lambda gva: EVIL), sample.memory()
    layout = replace(layout, ranges=tuple(replace(part, kind=EVIL) for part in layout.ranges))
    vm = sample.vm(
        name=EVIL,
        schedule=EVIL,
        status=EVIL,
        vcpus=(bad,),
        vcpu=1,
        pool=sample.pool(held=held),
        page_table=table,
        memory=layout,
        selection=replace(sample.selection(), label=EVIL, path=(EVIL,)),
        events=tuple(replace(mark, text=EVIL, kind=EVIL, vcpu=1) for mark in sample.vm().events),
    )
    return [dashboard.render(vm, kind=kind, actions=("run",)) for kind in dashboard.VIEWS]


def test_that_a_guest_cannot_break_out_of_any_view() -> None:
    for view in hostile():
        parser = Balance()
        parser.feed(view.html)
        assert "<script" not in view.html + view.img_html and not parser.open
        assert "\x1b" not in view.text + view.html and "\x00" not in view.text + view.html
        for picture in pictures(view):
            assert picture.tag.endswith("svg")
        (view.html + view.img_html + view.text + view.status).encode()


# --- pool


def test_that_pool_marks_say_state_and_owner() -> None:
    assert marks(sample.pool())[:8] == "0.2xxxD."
    many = sample.pool(owner=np.where(np.arange(512) == 0, 11, -1).astype(np.int16))
    assert marks(many)[:3] == "b.?"


def test_that_the_pool_counts_what_it_draws() -> None:
    view = pool.render(sample.pool())
    assert view.status == f"6 of 512 in use, 3 of them leaked; 2 changed since step {num(1180)}."
    drawn = view.panes["pool"]
    paths = dict(re.findall(r'<path d="([^"]*)" class="(c-use|c-flt|c-done|c-chg)"', drawn))
    assert {cls: d.count("M") for d, cls in paths.items()} == {
        "c-use": 2,
        "c-flt": 3,
        "c-done": 1,
        "c-chg": 2,
    }
    assert re.findall(r'class="own(?: dn)?"[^>]*>([^<]*)<', drawn) == ["0", "2", "D"]


def test_that_pool_cells_do_not_move_when_slots_change() -> None:
    free = sample.pool(
        in_use=np.zeros(512, bool),
        done=np.zeros(512, bool),
        leaked=np.zeros(512, bool),
        changed=np.zeros(512, bool),
    )

    def grounds(snapshot: object) -> list[str]:
        return re.findall(r'<path d="([^"]*)" class="c-cell"', pool.render(snapshot).panes["pool"])  # type: ignore[arg-type]

    assert grounds(free) == grounds(sample.pool())


def test_that_a_full_pool_draws_every_cell() -> None:
    full = np.ones(512, bool)
    assert (
        "…" not in pool.render(sample.pool(in_use=full, done=full)).html
    )  # where a long text would have been cut


def test_that_a_previous_snapshot_decides_what_changed() -> None:
    view = pool.render(sample.pool(), sample.pool(step=900))
    assert "none changed since step 900" in view.status and "c-chg" not in view.html


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
    assert (
        view.status == says
        and f"slot {slot}" in view.panes["card"]
        and "c-sel" in view.panes["pool"]
    )


def test_that_unused_rows_fold_in_text_and_dashboard_but_not_in_the_pool_view() -> None:
    assert "slots 64 to 511: never used" in pool.render(sample.pool()).text
    assert "never used" in pool.render(sample.pool(), fold=True).panes["pool"]
    assert "never used" not in pool.render(sample.pool()).panes["pool"]


def test_that_a_big_pool_drops_digits_and_draws_leaks_as_triangles() -> None:
    drawn = pool.render(sample.pool(4096)).panes["pool"]
    assert 'class="own"' not in drawn and 'class="c-x"' not in drawn and len(drawn) < 12_000


def test_that_only_marks_that_occur_are_in_the_key() -> None:
    none = np.zeros(512, bool)
    quiet = pool.render(sample.pool(leaked=none, done=none, changed=none, next_slot=None)).panes[
        "poolkey"
    ]
    assert (
        "in use" in quiet
        and "leaked" not in quiet
        and "DONE" not in quiet
        and "changed" not in quiet
        and "next" not in quiet
    )


def test_that_a_foreign_hva_is_called_out() -> None:
    held = tuple(replace(slot, hva_ok=False) for slot in sample.pool().held)
    assert (
        "not this slot"
        in pool.render(sample.pool(held=held), selection=sample.selection()).panes["card"]
    )


# --- pages


def test_that_a_walk_draws_one_outline_and_one_curve_per_entry() -> None:
    drawn = ALL["walk"]().panes["walk"]
    assert (
        drawn.count('class="c-walk"') == 4
        and drawn.count('role="grid"') == 4
        and "c-cross" not in drawn
    )
    assert re.findall(r"(\d+) of 512, (\S+ \S+) each", drawn) == [
        ("2", "512 GiB"),
        ("1", "1 GiB"),
        ("1", "2 MiB"),
        ("190", "4 KiB"),
    ]


def test_that_tables_count_their_present_entries() -> None:
    table = sample.page_table()
    drawn = pages.render(table, gva=0x90406028D0).panes["walk"]
    found = table.walk(0x90406028D0)
    for step in found.steps:
        raw = np.frombuffer(table.tables[step.entry_gpa & -4096], "<u8")
        assert f"{int((raw & 1).sum())} of 512" in drawn


def test_that_a_hole_ends_in_a_cross_and_the_sentence_of_the_error() -> None:
    view = pages.render(sample.page_table(), gva=0x201234)
    drawn = view.panes["walk"]
    assert (
        "c-cross" in drawn
        and "is not present (entry 0x0)." in drawn
        and drawn.count('role="grid"') == 3
    )
    assert view.status.startswith("gva 0x201234: PD[0x1] at gpa ")


def test_that_walks_without_tables_and_not_canonical_ones_are_drawn() -> None:
    table = sample.page_table()
    alone = pages.render_walk(table.walk(0x400000))
    assert (
        alone.panes["walk"].count("c-walk") == 4
        and "not canonical" in pages.render(table, gva=1 << 50).panes["walk"]
    )
    assert alone.text.split("\n")[2].startswith("PML4[0x000] 0x180000 -> ")


def test_that_five_levels_fit_every_width() -> None:
    found = walk(lambda gpa, n: (0x1007).to_bytes(8, "little"), X86_PXXV57_4K, 0x1000, 0x1234)
    for width in (560, 620, 940, 1400):
        xs = [
            float(x)
            for x in re.findall(
                r'<rect x="([\d.]+)" y="20', pages.render_walk(found, width=width).panes["walk"]
            )
        ]
        assert len(xs) == 6 and xs == sorted(xs) and xs[-1] < width


def test_that_changes_are_bars_on_cells_and_rows() -> None:
    view = pages.render(sample.page_table(late=True), sample.page_table(), gva=0x90406028D0)
    bars = re.findall(r'<path d="([^"]*)" class="c-chg"', view.panes["walk"])
    assert sum(d.count("M") for d in bars) == 4
    assert re.findall(r'class="sg">(.)<', view.panes["changes"]) == ["−", "~", "+"]
    assert "2 added, 1 removed, 1 changed" in view.panes["changes"]


def test_that_encryption_is_fill_and_word() -> None:
    view = pages.render(sample.page_table(51), gva=0x90406028D0)
    assert (
        "c-enc" in view.panes["walk"]
        and "c-shr" in view.panes["walk"]
        and "c-mem" not in view.panes["walk"]
    )
    assert (
        "encrypted" in view.panes["ranges"]
        and "shared" in view.panes["ranges"]
        and "shared (C=0)" in view.status
    )
    assert "c-enc" not in pages.render(sample.page_table(), gva=0x90406028D0).html


def test_that_the_ruler_names_every_flag_once_and_shows_every_bit() -> None:
    mode = X86_PXXV48_4K.with_c_bit(51)
    parts = ruler.parts(mode, mode.levels[-1])
    assert [part.name for part in parts if part.flag] == ["NX", "C", "D", "A", "U", "W", "P"]
    assert sum(part.high - part.low + 1 for part in parts) == 64
    step = sample.page_table(51).walk(0x90406028D0).steps[-1]
    for width in (560, 914):
        digits = "".join(
            re.findall(
                r'class="m (?:one|d|one onc)"[^>]*>([01]+)<', ruler.draw(mode, [(step, "")], width)
            )
        )
        assert len(digits) == 64 and digits.count("1") == step.entry.bit_count()


@pytest.mark.parametrize(
    ("level", "index", "leads"),
    [
        (0, 0, 0x400000),
        (3, 5, 0x9040605000),
        (3, 0x1FF, 0x90407FF000),
        (1, 0x41, 0x90406028D0),
        (0, 256, 0xFFFF800000000000),
    ],
)
def test_that_a_click_on_an_entry_leads_to_its_first_page(
    level: int, index: int, leads: int
) -> None:
    assert pages.gva_of(sample.page_table(), 0x90406028D0, level, index) == leads


def test_that_the_page_shows_the_slots_in_it() -> None:
    table, snapshot = sample.page_table(), sample.pool()
    first = pages.pool_objects(snapshot, table.walk(0x9040602000), 2)
    assert [thing.name for thing in first] == ["in_use", "slot 0", "slot 1", "slot 2", "slot 3"]
    assert [thing.name for thing in first if thing.chosen] == ["slot 2"]
    second = pages.pool_objects(snapshot, table.walk(0x9040603000))
    assert second[0].name == "slot 3" and second[0].offset < 0
    assert (
        pages.pool_objects(snapshot, table.walk(0x400000))
        == []
        == pages.pool_objects(None, table.walk(0x9040602000))
    )


# --- stepper, memory, timeline, dashboard


def test_that_source_and_disassembly_mark_the_same_instruction() -> None:
    view = stepper.render(sample.vcpu())
    assert (
        view.panes["source"].count('aria-current="true"')
        == view.panes["disassembly"].count('aria-current="true"')
        == 1
    )
    assert [line.split()[1] for line in view.text.split("\n") if line.startswith("=>")] == [
        "34",
        "40126c",
    ]
    assert [line.split()[1] for line in view.text.split("\n") if line.startswith("*")] == [
        "rax",
        "rflags",
    ]


def test_that_the_stepper_says_what_the_last_step_changed() -> None:
    assert stepper.render(sample.vcpu(), sample.vcpu(late=False)).status == (
        f"Step {num(1277)}, vCPU 1, next: lock bts [rdx], rax. The last step changed rax and rflags. "
        "Bit 1 of in_use is clear: slot 1 will be its own."
    )


def test_that_rip_is_never_marked_and_a_lost_source_is_explained() -> None:
    view = stepper.render(sample.vcpu(), sample.vcpu(late=False))
    assert re.findall(r'class="chg"[^>]*><td class="nm">(\w+)', view.panes["registers"]) == [
        "rax",
        "rflags",
    ]
    assert (
        "no line numbers"
        in stepper.render(replace(sample.vcpu(), source=(), line=None, file=None)).panes["source"]
    )
    assert (
        "not on this machine" in stepper.render(replace(sample.vcpu(), source=())).panes["source"]
    )


def test_that_the_selection_is_outlined_on_what_points_to_it() -> None:
    chosen = replace(sample.selection(), gva=sample.POOL_GVA, slot=None, kind="register")
    view = stepper.render(sample.vcpu(), selection=chosen)
    assert (
        re.search(r'class="sel"[^>]*><td class="nm">rdx', view.panes["registers"])
        and view.panes["touches"].count('class="sel"') == 2
    )


def test_that_memory_folds_free_rows_and_names_every_range() -> None:
    gigabyte = MemoryMap(
        ((0, 1 << 30), (1 << 32, 1 << 20)),
        (MemoryRange(0, 4, "code"), MemoryRange(1 << 32, 2, "alloc")),
        5,
    )
    drawn = memory.render(gigabyte).panes["memory"]
    assert (
        f"free, {num(262144 - 128)} pages" in drawn
        and ">code<" in drawn
        and ">alloc<" in drawn
        and "0x100000000" in drawn
    )
    assert [d.count("M") for d in re.findall(r'<path d="([^"]*)" class="c-mem"', drawn)] == [2]


def test_that_a_full_memory_gets_longer_rows_instead_of_more() -> None:
    full = MemoryMap(((0, 1 << 30),), (MemoryRange(0, 1 << 18, "data"),), 0)
    drawn = memory.render(full).panes["memory"]
    assert (
        max(d.count("M") for d in re.findall(r'<path d="([^"]*)" class="c-mem"', drawn)) <= 16
        and len(drawn) < 20_000
    )


def test_that_memory_without_slots_is_drawn() -> None:
    assert memory.render(MemoryMap((), (), 0)).status == "0 of 0 pages in use: all free."


def test_that_crowded_events_become_ticks_and_the_newest_keep_their_letter() -> None:
    crowd = tuple(replace(sample.vm().events[0], step=step, vcpu=1) for step in range(1, 1278))
    drawn = dashboard.render(sample.vm(events=crowd)).panes["timeline"]
    assert (
        drawn.count('class="mk"') < 60
        and "c-exit" in drawn
        and 'data-say="Step 1\u2009277, vCPU 1: SYNC"' in drawn
    )


def test_that_the_time_axis_stays_while_steps_go_by() -> None:
    drawn = [
        dashboard.render(sample.vm(step=step)).panes["timeline"] for step in (1100, 1999, 2001)
    ]
    labels = [re.findall(r">([\d\u2009]+)</text>", one) for one in drawn]
    assert labels[0] == labels[1] != labels[2] and len(labels[0]) == 4


@pytest.mark.parametrize(
    "actions", [(), ("run",), ("step", "step_line", "run"), ("home", "back", "step", "run", "end")]
)
def test_that_only_buttons_on_offer_are_shown_and_run_is_the_filled_one(
    actions: tuple[str, ...],
) -> None:
    shown = transport(sample.vm(), actions)
    assert re.findall(r'data-act="(?!vcpu)(\w+)"', shown) == list(actions)
    assert re.findall(r'class="pri"[^>]*aria-label="([^"]*)"', shown) == [
        "Run to the next ucall"
    ] * ("run" in actions)
    assert (
        re.findall(r'aria-selected="(\w+)"', shown) == ["false", "true", "false", "false"]
        and "vCPU 3 done" in shown
    )


def test_that_the_rail_spells_the_path() -> None:
    rail = re.sub(r"<[^>]*>", "", dashboard.render(sample.vm(51)).panes["rail"])
    assert rail == (
        "slot 2 vCPU 2, PRINTF → gva 0x90406028d0 → PML4[0x1] PDPT[0x41] PD[0x3] PT[0x2] → "
        "gpa 0x408d0 shared → hva 0x7f3a5c0408d0"
    )


def test_that_one_selection_is_outlined_in_every_view() -> None:
    panes = dashboard.render(sample.vm()).panes
    assert all('class="c-sel"' in panes[name] for name in ("pool", "memory", "walk"))


def test_that_a_vm_without_pool_selection_or_source_is_drawn() -> None:
    bare = sample.vm(pool=None, selection=None, events=())
    for kind in dashboard.VIEWS:
        assert dashboard.render(bare, kind=kind).html
    assert "of the next instruction" in dashboard.render(bare).panes["walk"]


def test_that_what_did_not_change_is_not_drawn_again() -> None:
    memo: dict[str, object] = {}
    first = dashboard.render(sample.vm(), memo=memo)
    again = dashboard.render(sample.vm(step=1300), memo=memo)
    assert (
        again.panes["memory"] is first.panes["memory"]
        and again.panes["title"] != first.panes["title"]
    )
    moved = dashboard.render(sample.vm(selection=None), memo=memo)
    assert (
        moved.panes["memory"] != first.panes["memory"]
        and moved.panes["walk"] != first.panes["walk"]
    )
