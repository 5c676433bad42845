"""The colours, one per meaning, as data: themes, style sheets, and plain inline styles for places without a style sheet."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ["DARK", "LIGHT", "css", "inline_styles", "svg_css"]

LIGHT = {
    "bg": "#ffffff",
    "ink": "#000000",
    "ink1": "#212121",
    "dim": "#616161",
    "focus": "#1976d2",
    "rule": "#e2e2e2",
    "faint": "#d3d6da",
    "wash": "#f5f6f7",
    "cell": "#eceef0",
    "none": "#c9cdd2",
    "enc": "#0072B2",
    "enc-ink": "#00639b",
    "enc-tint": "#dcebf5",
    "shr": "#E69F00",
    "shr-edge": "#b37b00",
    "shr-ink": "#855800",
    "shr-tint": "#fbeccb",
    "use": "#009E73",
    "use-ink": "#00704f",
    "on-use": "#00281d",
    "chg-edge": "#b04f86",
    "chg-ink": "#96386c",
    "chg-tint": "#f7e4ee",
    "flt": "#D55E00",
    "flt-ink": "#a84800",
    "flt-tint": "#fbe3d3",
    "on-flt": "#ffffff",
    "now": "#F0E442",
    "now-tint": "#fbf7c6",
    "now-edge": "#8a8100",
    "l5": "#1f2632",
    "l4": "#3d4657",
    "l3": "#5d6a80",
    "l2": "#8794a9",
    "l1": "#b1bbca",
}
DARK = LIGHT | {
    "bg": "#111111",
    "ink": "#ffffff",
    "ink1": "#dedede",
    "dim": "#aaaaaa",
    "focus": "#2196f3",
    "rule": "#333333",
    "faint": "#3d3f43",
    "wash": "#1b1c1e",
    "cell": "#26282b",
    "none": "#4a4d52",
    "enc-ink": "#6cb9ec",
    "enc-tint": "#0c2b40",
    "shr-edge": "#E69F00",
    "shr-ink": "#f0b63c",
    "shr-tint": "#362708",
    "use-ink": "#3fcca3",
    "on-use": "#00150e",
    "chg-edge": "#CC79A7",
    "chg-ink": "#e4a5c8",
    "chg-tint": "#3b2131",
    "flt-ink": "#ff9a57",
    "flt-tint": "#3d1f0b",
    "now-tint": "#35330f",
    "now-edge": "#d9ce3c",
    "l5": "#f2f5fa",
    "l4": "#d5dbe6",
    "l3": "#a7b1c3",
    "l2": "#7b869a",
    "l1": "#566073",
}
# What JupyterLab's theme hands us; our own value stands behind it.
JUPYTER = {
    "bg": "--jp-layout-color0",
    "ink": "--jp-ui-font-color0",
    "ink1": "--jp-ui-font-color1",
    "focus": "--jp-brand-color1",
}
DARK_WHERE = "[data-jp-theme-light=false] .lk, body.vscode-dark .lk, [data-theme=dark] .lk"
MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'Liberation Mono','DejaVu Sans Mono',monospace"
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',Arial,sans-serif"


def _file(name: str) -> str:
    return files(__package__).joinpath("css", name).read_text(encoding="utf-8")


def _tokens(theme: dict[str, str], jupyter: bool) -> str:
    """The colours and fonts as CSS variables, standing behind JupyterLab's own where there are such."""
    fonts = {"mono": ("--jp-code-font-family", MONO), "sans": ("--jp-ui-font-family", SANS)}
    both = {name: (JUPYTER.get(name, ""), colour) for name, colour in theme.items()} | fonts
    return "".join(
        f"--{name}:{f'var({theirs},{ours})' if jupyter and theirs else ours};"
        for name, (theirs, ours) in both.items()
    )


@cache
def css() -> str:
    """The style sheet of the live views: both themes, drawings and layout."""
    return f".lk{{{_tokens(LIGHT, True)}}}\n{DARK_WHERE}{{{_tokens(DARK, True)}}}\n{_file('drawing.css')}\n{_file('views.css')}"


@cache
def svg_css() -> str:
    """The style sheet inside a picture that stands alone: light theme, no variables from outside."""
    return re.sub(r"\s*\n\s*", "", f".lk-d{{{_tokens(LIGHT, False)}}}{_file('drawing.css')}")


@cache
def inline_styles() -> dict[str, str]:
    """Tag or .class -> inline style (light), for HTML that a sanitizer has stripped of style sheets; from css/static.txt."""
    out: dict[str, str] = {}
    for name, style in (
        line.split(None, 1) for line in _file("static.txt").splitlines() if line.strip()
    ):
        style = re.sub(r"@(\w+)", lambda hit: out[f"@{hit[1]}"], style.strip())
        out[name] = re.sub(
            r"{([\w-]+)}", lambda hit: {**LIGHT, "mono": MONO, "sans": SANS}[hit[1]], style
        )
    return out
