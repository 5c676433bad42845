"""Drawing without a browser: every view goes everywhere, and no guest breaks out of one."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import encryption_sample as secrets
import pytest
import views_sample as sample
from hypothesis import given
from hypothesis import strategies as st

from labkit.outside import plain
from labkit.paging.entries import U64
from labkit.views import dashboard, encryption, eyes, launch, memory, pages, pool, stepper
from labkit.views.drawing.markup import Html, el, esc
from labkit.views.drawing.style import LIGHT, css, inline_styles, svg_css
from labkit.views.show import View, mimebundle

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
    "sealed": lambda: stepper.render(sample.sealed_vcpu()),
}
every_view = pytest.mark.parametrize("name", ALL)


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
        if tag != "img":  # which has no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@every_view
def test_that_every_class_has_a_style(name: str) -> None:
    view = ALL[name]()
    styled = set(re.findall(r"\.([a-zA-Z][\w-]*)", css()))
    need_none = {"side", "op", "v"}
    used = " ".join(re.findall(r'class="([^"]*)"', view.html)).split()
    assert set(used) <= styled | need_none


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
    assert alts[:1] in ([], [esc(view.status)])
    assert all(alts)
    assert view.status.endswith(".")
    assert "\n" not in view.status


@every_view
def test_that_the_text_starts_with_title_and_status(name: str) -> None:
    view = ALL[name]()
    assert view.text.split("\n")[:2] == [view.title, view.status]
    assert all(line.isprintable() or "\u2009" in line for line in view.text.split("\n"))


def test_that_a_mimebundle_carries_the_widget_and_the_fallbacks() -> None:
    view = ALL["pool"]()
    widget = "application/vnd.jupyter.widget-view+json"
    data, metadata = mimebundle(view, ({widget: {"model_id": "x"}, "text/plain": "repr"}, {"a": 1}))
    assert set(data) == {widget, "text/html", "text/plain"}
    assert metadata == {"a": 1}
    assert data["text/plain"] == view.text

    alone, _ = view._repr_mimebundle_()
    assert set(alone) == {"text/html", "text/plain"}


def test_that_inline_styles_are_plain_css() -> None:
    styles = " ".join(inline_styles().values())
    for foreign in ("{", "@", "var("):
        assert foreign not in styles
    assert "<" not in svg_css()
    assert "&" not in svg_css()


def test_that_every_snapshot_has_a_bundle() -> None:
    shown = {
        "alloc4": sample.vm(),
        "vCPU 1": sample.vcpu(),
        "ucall pool": sample.pool(),
        "guest memory": sample.memory(),
        "page tables": sample.page_table(),
        "page walk": sample.page_table().walk(0x400000),
        "encryption, SEV-ES": secrets.encryption(),
        "page 0xd0000": secrets.eyes(),
        "launch of a SEV-ES guest": secrets.launch(),
    }
    for title, snapshot in shown.items():
        data, _ = dashboard.bundle(snapshot)
        assert data["text/plain"].startswith(title)
        assert data["text/html"].startswith("<section")
    with pytest.raises(TypeError):
        dashboard.bundle(5)


# --- hostile text


@given(st.text())
def test_that_text_is_escaped_whatever_it_is(words: str) -> None:
    made = el("p", words, title=words)
    inner = ET.fromstring(made)
    assert inner.text in (None, plain(words, 4000))
    assert plain(plain(words, 4000), 9000) == plain(words, 4000)
    made.encode()


def test_that_control_characters_are_spelled_out_and_long_text_is_cut() -> None:
    assert plain("a\n\t\x1b\u202e\ud800") == "a\\n\\t\\x1b\\u202e\\ud800"
    assert plain("x" * 300, 10) == "x" * 9 + "…"
    assert esc(Html("<b>")) == "<b>"
    assert Html("<b>") + "<i>" == "<b>&lt;i&gt;"


class EvilNames:
    """A guest's program that has one name for everything."""

    def label(self, gva: int) -> str:
        return EVIL

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        return [EVIL] * len(gvas)


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
    table = replace(sample.page_table(), names=EvilNames())
    layout = sample.memory()
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
        assert "<script" not in view.html + view.img_html
        assert not parser.open
        assert "\x1b" not in view.text + view.html
        assert "\x00" not in view.text + view.html
        for picture in pictures(view):
            assert picture.tag.endswith("svg")
        (view.html + view.img_html + view.text + view.status).encode()
