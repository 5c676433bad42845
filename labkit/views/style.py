"""The colours, one per meaning, as data: themes, style sheets, and plain inline styles for places without a style sheet."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ["DARK", "LIGHT", "contrast", "css", "inline_styles", "svg_css"]

LIGHT = {
    "bg": "#ffffff", "ink": "#000000", "ink1": "#212121", "dim": "#616161", "focus": "#1976d2",
    "rule": "#e2e2e2", "faint": "#d3d6da", "wash": "#f5f6f7", "cell": "#eceef0", "none": "#c9cdd2",
    "enc": "#0072B2", "enc-ink": "#00639b", "enc-tint": "#dcebf5",
    "shr": "#E69F00", "shr-edge": "#b37b00", "shr-ink": "#855800", "shr-tint": "#fbeccb",
    "use": "#009E73", "use-ink": "#00704f", "on-use": "#00281d",
    "chg-edge": "#b04f86", "chg-ink": "#96386c", "chg-tint": "#f7e4ee",
    "flt": "#D55E00", "flt-ink": "#a84800", "flt-tint": "#fbe3d3", "on-flt": "#ffffff",
    "now": "#F0E442", "now-tint": "#fbf7c6", "now-edge": "#8a8100",
    "l5": "#1f2632", "l4": "#3d4657", "l3": "#5d6a80", "l2": "#8794a9", "l1": "#b1bbca",
}
DARK = LIGHT | {
    "bg": "#111111", "ink": "#ffffff", "ink1": "#dedede", "dim": "#aaaaaa", "focus": "#2196f3",
    "rule": "#333333", "faint": "#3d3f43", "wash": "#1b1c1e", "cell": "#26282b", "none": "#4a4d52",
    "enc-ink": "#6cb9ec", "enc-tint": "#0c2b40", "shr-edge": "#E69F00", "shr-ink": "#f0b63c", "shr-tint": "#362708",
    "use-ink": "#3fcca3", "on-use": "#00150e", "chg-edge": "#CC79A7", "chg-ink": "#e4a5c8", "chg-tint": "#3b2131",
    "flt-ink": "#ff9a57", "flt-tint": "#3d1f0b", "now-tint": "#35330f", "now-edge": "#d9ce3c",
    "l5": "#f2f5fa", "l4": "#d5dbe6", "l3": "#a7b1c3", "l2": "#7b869a", "l1": "#566073",
}
# What JupyterLab's theme hands us; our own value stands behind it.
JUPYTER = {"bg": "--jp-layout-color0", "ink": "--jp-ui-font-color0", "ink1": "--jp-ui-font-color1", "focus": "--jp-brand-color1"}
DARK_WHERE = "[data-jp-theme-light=false] .lk, body.vscode-dark .lk, [data-theme=dark] .lk"
MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'Liberation Mono','DejaVu Sans Mono',monospace"
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',Arial,sans-serif"


def contrast(one: str, two: str) -> float:
    """The contrast ratio of two #rrggbb colours (WCAG 2.1, 1.4.3)."""
    low, high = sorted(_luminance(colour) for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _file(name: str) -> str:
    return files(__package__).joinpath("css", name).read_text(encoding="utf-8")


def _tokens(theme: dict[str, str], jupyter: bool) -> str:
    def value(name: str, colour: str) -> str:
        return f"var({JUPYTER[name]},{colour})" if jupyter and name in JUPYTER else colour
    mono, sans = ("var(--jp-code-font-family,%s)" % MONO, "var(--jp-ui-font-family,%s)" % SANS) if jupyter else (MONO, SANS)
    return "".join(f"--{name}:{value(name, colour)};" for name, colour in theme.items()) + f"--mono:{mono};--sans:{sans}"


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
    """Tag or .class -> inline style, in the light theme, for HTML that a sanitizer has stripped of style sheets."""
    mono, plain = f"font-family:{MONO}", "border:0;text-align:left;vertical-align:top;max-width:none"
    mark = "display:inline-block;width:9px;height:9px;margin-left:10px;margin-right:4px;border:2px solid "
    side = "display:inline-block;vertical-align:top;margin-right:24px"
    raw = {
        "section": f"background:{{bg}};color:{{ink1}};border:1px solid {{rule}};padding:12px;font-family:{SANS};font-size:12px;line-height:16px",
        "h3": "font-size:15px;line-height:20px;font-weight:600;margin:0;color:{ink};display:inline-block;margin-right:12px",
        "table": f"border:0;border-collapse:collapse;margin:0;table-layout:auto;color:{{ink1}};{mono};font-size:12px;line-height:17px",
        "tr": "background:{bg}", "td": plain + ";padding:0 10px 0 0;white-space:pre",
        "th": plain + ";padding:0 10px 2px 0;color:{dim};font-weight:600", "img": "max-width:100%;height:auto;background:{bg}",
        ".hd": "margin-bottom:8px", ".facts": "color:{dim}", ".r": "text-align:right", ".right": "color:{dim};margin-left:16px",
        ".mono": mono, ".lab": "font-size:11px;font-weight:600;color:{ink};margin-top:8px;margin-bottom:4px",
        ".sub": "font-weight:400;color:{dim};margin-left:6px", ".d": "color:{dim}", ".z": "color:{dim}", ".nm": "color:{dim}",
        ".status": "background:{wash};padding:6px 10px;margin-top:8px;border-left:3px solid {ink}",
        ".rail": "border:2px solid {ink};padding:6px 10px;margin-top:8px", ".card": "border:1px solid {dim};padding:8px 10px;margin-top:4px",
        ".key": "color:{dim};font-size:11px;margin-top:4px", ".cur": "background:{now-tint};font-weight:600",
        ".chg": "background:{chg-tint}", ".del": "color:{dim};text-decoration:line-through",
        ".et": "color:{enc-ink}", ".st": "color:{shr-ink}", ".ft": "color:{flt-ink}", ".ct": "color:{chg-ink}", ".ut": "color:{use-ink}",
        ".hole": "border-left:3px solid {flt};background:{flt-tint};padding:6px 10px;color:{ink}",
        ".sel": "outline:2px solid {ink}", ".pane": "margin-bottom:10px", ".two": side, ".side": side, ".stk": side,
        ".cm": "color:{dim};font-size:11px", ".k-free": mark + "{cell};background:{cell}", ".k-dot": mark + "{bg};background:{none}",
        ".k-use": mark + "{use};background:{use}", ".k-done": mark + "{use}", ".k-next": mark + "{now-edge};background:{now-tint}",
        ".k-flt": mark + "{flt};background:{flt}", ".k-tri": mark + "{flt};background:{flt}", ".k-chg": mark + "{cell};border-bottom:4px solid {chg-edge}",
        ".k-sel": mark + "{ink}", ".k-enc": mark + "{enc};background:{enc}", ".k-shr": mark + "{shr-edge};background:{shr-tint}",
        ".k-mem": mark + "{l2};background:{l2}", ".k-tab": mark + "{bg};background:{l3}", ".sw": mark + "{dim}", ".e": "background:{enc}",
        ".s": "background:{shr-tint}",
    }
    return {name: re.sub(r"{([\w-]+)}", lambda hit: LIGHT[hit[1]], style) for name, style in raw.items()}
