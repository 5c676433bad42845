"""Views as files and as image/png: every kind of picture, both themes, without a browser."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from base64 import b64decode

import numpy as np
import pytest
from paths import GUESTS
from PIL import Image

import labkit as lk
from labkit.views import dashboard, show
from labkit.views.drawing.static import alone
from labkit.views.picture import png

OF = {
    "vm": lambda vm: vm.look(),
    "vcpu": lambda vm: vm.vcpus[0].look(),
    "pool": lambda vm: vm.pool,
    "page table": lambda vm: vm.page_table(),
    "walk": lambda vm: vm.page_table().walk("ucall_pool"),
    "memory": lambda vm: vm.memory_map(),
    "encryption": lambda vm: vm.encryption_map(),
    "eyes": lambda vm: vm.eyes(gva="secret"),
    "launch": lambda vm: vm.launch_progress(),
    "comparison": lambda vm: lk.compare(vm.program, ["unicorn", "unicorn"], ucall="pool"),
    "live view": lambda vm: vm.show("pool"),
}
GROUND = {"light": (255, 255, 255), "dark": (17, 17, 17)}


@pytest.fixture(scope="module")
def vm():
    with lk.Vm.create(GUESTS / "secret.elf", protect="snp") as vm:
        yield vm


@pytest.mark.parametrize("theme", GROUND)
@pytest.mark.parametrize("name", OF)
def test_that_everything_that_shows_itself_can_be_saved(vm, tmp_path, name, theme):
    shown = OF[name](vm)
    for suffix in ("svg", "png", "pdf"):
        shown.save(tmp_path / f"x.{suffix}", theme=theme)
    root = ET.fromstring((tmp_path / "x.svg").read_text())
    picture = Image.open(tmp_path / "x.png").convert("RGB")
    assert abs(picture.width - 2 * float(root.get("width"))) <= 2
    assert abs(picture.height - 2 * float(root.get("height"))) <= 2
    assert picture.getpixel((1, 1)) == GROUND[theme]
    assert len(picture.getcolors(1 << 20)) > 20, "there is more than the ground"
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_that_an_svg_needs_nothing_that_only_browsers_know(vm):
    for name, of in OF.items():
        if name != "live view":
            svg = dashboard.draw(of(vm)).sheet("dark").svg
            assert "var(" not in svg and "data-" not in svg and "http://www.w3.org" in svg


def test_that_nothing_is_drawn_outside_the_picture(vm):
    for name, of in OF.items():
        if name == "live view":
            continue
        sheet = dashboard.draw(of(vm)).sheet()
        pixels = np.asarray(Image.open(io.BytesIO(png(sheet, 1))).convert("RGB")).astype(int)
        edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
        assert all((edge == 255).all() for edge in edges), name


def test_that_indentation_is_in_the_picture_of_source(vm):
    with lk.Vm.create(GUESTS / "two_vcpus.elf") as guest:
        guest.run()
        svg = dashboard.draw(guest.vcpus[0].look()).sheet().svg
    assert 'xml:space="preserve"' in svg
    assert re.search(r">\s+\d+ {4,}\S", svg)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (("x.gif",), lk.InvalidState, r"x\.gif: a picture is saved as \.svg, \.png, \.pdf"),
        (("x",), lk.InvalidState, "saved as"),
        ((None,), lk.InvalidState, "path takes text or a Path, not None"),
        (("x.png", "pink"), lk.InvalidState, "no theme 'pink', only light and dark"),
        (("/nowhere/x.png",), lk.NotAvailable, r"/nowhere/x\.png: cannot be written"),
        (("a\0b.png",), lk.NotAvailable, "cannot be written"),
    ],
)
@pytest.mark.parametrize("of", [OF["pool"], OF["live view"]], ids=["snapshot", "live view"])
def test_that_what_cannot_be_saved_is_said(vm, tmp_path, monkeypatch, of, args, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        of(vm).save(*args)
    assert not list(tmp_path.iterdir())


def test_that_outputs_of_a_notebook_carry_a_png(vm, monkeypatch):
    monkeypatch.setattr(show, "is_notebook", lambda: True)
    for of in (OF["pool"], OF["vcpu"], OF["live view"]):
        data, metadata = of(vm)._repr_mimebundle_()
        picture = Image.open(io.BytesIO(b64decode(data["image/png"])))
        size = metadata["image/png"]
        assert abs(picture.width - 1.5 * size["width"]) <= 2
        assert abs(picture.height - 1.5 * size["height"]) <= 2
        assert "text/html" in data


def test_that_elsewhere_nobody_waits_for_one(vm):
    assert "image/png" not in vm.pool._repr_mimebundle_()[0]


def test_that_a_hostile_name_stays_text():
    view = dashboard.draw(lk.Vm.create(GUESTS / "hello.elf", name="<b>&\"'</text>").look())
    assert ET.fromstring(view.sheet().svg) is not None


# --- what nbconvert makes of it

SPACES = re.compile(r"(?<=>)[ \t]+(?=<)")


def test_that_indentation_does_not_hang_on_spaces_that_tools_drop():
    page = "<table><tr><td>    <b>return</b> 0;</td><td>\t<i>x</i></td><td>a b</td></tr></table>"
    tidy = SPACES.sub("", str(alone(page, "")))
    hard = "\N{NO-BREAK SPACE}"
    assert f">{4 * hard}<b>return</b> 0;<" in re.sub(r' style="[^"]*"', "", tidy)
    assert f">{8 * hard}<i" in tidy and ">a b<" in tidy


def test_that_source_keeps_its_indentation_when_such_spaces_go():
    with lk.Vm.create(GUESTS / "two_vcpus.elf") as vm:
        vm.run()
        look = vm.vcpus[0].look()
    tidy = SPACES.sub("", str(dashboard.draw(look).img_html))
    words = re.sub(r"<[^>]*>", "", tidy)
    for _, text in look.source:
        indent = len(text.expandtabs(4)) - len(text.expandtabs(4).lstrip())  # as the pane has it
        first = text.split()[:1]
        if indent and first and first[0].isidentifier():
            assert indent * "\N{NO-BREAK SPACE}" + first[0] in words
