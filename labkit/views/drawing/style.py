"""The colours, one per meaning, as data: themes, style sheets, and styles for places without."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ["DARK", "LIGHT", "css", "inline_styles", "sheet_css", "svg_css"]

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
    "mono": "--jp-code-font-family",
    "sans": "--jp-ui-font-family",
}
DARK_WHERE = "[data-jp-theme-light=false] .lk, body.vscode-dark .lk, [data-theme=dark] .lk"
FONTS = {
    "mono": "ui-monospace,'SF Mono',Menlo,Consolas,'Liberation Mono','DejaVu Sans Mono',monospace",
    "sans": (
        "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',Arial,sans-serif"
    ),
}


def _file(name: str) -> str:
    return files(__package__).joinpath("css", name).read_text(encoding="utf-8")


def _variables(theme: dict[str, str], jupyter: bool) -> str:
    """The colours and fonts as CSS variables; with jupyter they stand behind JupyterLab's own."""
    out = []
    for name, ours in {**theme, **FONTS}.items():
        value = ours
        if jupyter and name in JUPYTER:
            value = f"var({JUPYTER[name]},{ours})"
        out.append(f"--{name}:{value};")
    return "".join(out)


def _compact(sheet: str) -> str:
    """A style sheet without comments and without the space that only people need."""
    sheet = re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)
    sheet = re.sub(r"\s+", " ", sheet)
    sheet = re.sub(r"\s*([{};,])\s*", r"\1", sheet)
    sheet = sheet.replace(": ", ":")  # never before one: "a :hover" is not "a:hover"
    return sheet.replace(";}", "}").strip()


@cache
def css() -> str:
    """The style sheet of the live views: both themes, drawings and layout."""
    light = f".lk{{{_variables(LIGHT, jupyter=True)}}}"
    dark = f"{DARK_WHERE}{{{_variables(DARK, jupyter=True)}}}"
    return "\n".join([light, dark, _compact(_file("drawing.css")), _compact(_file("views.css"))])


@cache
def svg_css() -> str:
    """The style sheet inside a picture that stands alone: light theme, nothing from outside."""
    return f".lk-d{{{_variables(LIGHT, jupyter=False)}}}" + _compact(_file("drawing.css"))


@cache
def sheet_css(theme: str) -> str:
    """The style sheet of a picture in a file: "light" or "dark", values in place of variables.

    Programs that draw SVG without a browser know no variables.
    """
    values = {**(DARK if theme == "dark" else LIGHT), **FONTS}
    sheet = _compact(_file("drawing.css"))
    return re.sub(r"var\(--([\w-]+)\)", lambda hit: values[hit[1]], sheet)


@cache
def inline_styles() -> dict[str, str]:
    """Tag or .class -> style attribute (light theme), from css/static.css.

    For HTML that a sanitizer has stripped of its style sheets.
    """
    values = {**LIGHT, **FONTS}
    sheet = _compact(_file("static.css"))
    sheet = re.sub(r"var\(--([\w-]+)\)", lambda hit: values[hit[1]], sheet)

    styles: dict[str, list[str]] = {}
    for selectors, declarations in re.findall(r"([^{}]+){([^{}]*)}", sheet):
        for selector in selectors.split(","):
            styles.setdefault(selector, []).append(declarations)
    return {selector: ";".join(parts) for selector, parts in styles.items()}
