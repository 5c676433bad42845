"""Colours: readable, visible, an order where they stand for one, and the same in both themes."""

from __future__ import annotations

import re

import pytest

from labkit.views.drawing.style import DARK, LIGHT, css


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
    used = set(re.findall(r"var\(--([a-z0-9-]+)", css()))
    ours = {name for name in used if not name.startswith("jp-")}
    assert ours <= set(LIGHT) | {"mono", "sans"}
    assert set(DARK) == set(LIGHT)
    assert "[data-jp-theme-light=false]" in css()
    assert "@container" in css()
