"""Source and disassembly of one vCPU: both mark the same instruction, both take breakpoints."""

from __future__ import annotations

import re

from labkit.look.snapshots import VcpuSnapshot
from labkit.outside import plain
from labkit.views.drawing.markup import Attribute, Html, cat, el, esc, hx
from labkit.views.drawing.tables import Row, label, select, table

__all__ = ["disassembly", "source", "why_no_source"]

KEYWORDS = re.compile(
    r"\b(auto|break|case|char|const|continue|default|do|double|else|enum|extern|float|for|goto|if"
    r"|inline|int|long|register|return|short|signed|sizeof|static|struct|switch|typedef|union"
    r"|unsigned|void|volatile|while)\b"
)
COMMENT = re.compile(r"(//.*|/\*.*?(?:\*/|$))")
MAX_LINE = 300  # characters


def source(vcpu: VcpuSnapshot) -> Html:
    """The lines around the one about to run, or why there are none."""
    rows: list[Row] = []
    for n, words in vcpu.source:
        is_here = n == vcpu.line
        gutter = _gutter("line", str(n), n in vcpu.breakpoint_lines, is_here)
        rows.append(((gutter, ("n", str(n)), ("src", _c(words))), _now(is_here)))
    name = plain(vcpu.file or "", 80)
    if vcpu.frame:
        name += f", of #{vcpu.frame} in the backtrace"
    said = name if rows else f"none: {why_no_source(vcpu)}"
    return label("Source", said) + _table("source", rows)


def why_no_source(vcpu: VcpuSnapshot) -> str:
    """Why there are no lines, for a person."""
    if vcpu.sealed:
        return "the instruction pointer is sealed"
    if vcpu.line:
        why = plain(vcpu.why_no_source) or "it is not on this machine"
        return f"{plain(vcpu.file, 80)}:{vcpu.line} is not shown: {why}"
    return "this code has no line numbers"


def _c(words: str) -> Html:
    """A line of C with bold keywords and dim comments: syntax is weight, not colour."""
    pieces = COMMENT.split(words.expandtabs(4)[:MAX_LINE])
    out = []
    for i, piece in enumerate(pieces):
        is_comment = i % 2 == 1  # what split() puts between the pieces
        if is_comment:
            out.append(el("span", piece, cls="d"))
        else:
            out.append(Html(KEYWORDS.sub(r"<b>\1</b>", esc(piece))))
    return cat(out)


def disassembly(vcpu: VcpuSnapshot) -> Html:
    """The instructions around the one about to run, with what their operands point to, now."""
    rows: list[Row] = []
    for insn in vcpu.disassembly:
        cells = (
            _gutter("gva", hx(insn.gva), insn.breakpoint, insn.current),
            ("a", f"{insn.gva:x}"),
            ("o", f"+{insn.offset:x}"),
            ("mn", insn.mnemonic),
            ("op", insn.op_str),
            ("cm", insn.comment),
        )
        rows.append((cells, {**select("byte", hx(insn.gva)), **_now(insn.current)}))

    if rows:
        said = plain(vcpu.symbol, 80)
    else:
        said = "none: sealed" if vcpu.sealed else "none: no code here"
    return label("Disassembly", said) + _table("disassembly", rows)


def _table(name: str, rows: list[Row]) -> Html:
    return table(name, rows, cls="code") if rows else Html()


def _gutter(kind: str, value: str, stop: bool, here: bool) -> tuple[str, str]:
    """The place to click for a breakpoint, and the arrow at the instruction."""
    spot = el(
        "span",
        "●" if stop else "",
        cls="bp",
        data_act="toggle_breakpoint",
        data_kind=kind,
        data_value=value,
    )
    return "g", spot + el("span", "▶" if here else "", cls="pc")


def _now(here: bool) -> dict[str, Attribute]:
    """The attributes of the row that is about to run."""
    return {"cls": "cur", "aria_current": "true"} if here else {}
