"""One vCPU between two instructions: source, disassembly, registers, stack, and what the next instruction touches."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace

from labkit.look.snapshots import Insn, Selection, VcpuSnapshot
from labkit.views.draw import (
    Attribute,
    Html,
    Row,
    cat,
    el,
    esc,
    hx,
    label,
    num,
    path,
    plain,
    rect,
    select,
    svg,
    table,
    text,
)
from labkit.views.show import View, columns, header, pane, status_line

__all__ = ["render", "status"]

KEYWORDS = re.compile(
    r"\b(auto|break|case|char|const|continue|default|do|double|else|enum|extern|float|for|goto|if|inline|int"
    r"|long|register|return|short|signed|sizeof|static|struct|switch|typedef|union|unsigned|void|volatile|while)\b"
)
COMMENT = re.compile(r"(//.*|/\*.*?(?:\*/|$))")
PC = ("rip", "pc", "psw")  # never marked: it always changes
CODE = (
    pane("source"),
    pane("disassembly"),
    pane("registers"),
    el("div", pane("stack"), pane("touches"), cls="stk"),
)
LAYOUT = cat([pane("title"), pane("transport"), columns("c2e w4", *CODE), pane("status")])


def render(
    vcpu: VcpuSnapshot,
    previous: VcpuSnapshot | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """One vCPU as a view (of any width); registers are marked against previous, else as the snapshot says."""
    since = "the last look"
    if previous is not None:
        since = "the last step" if vcpu.step - previous.step == 1 else f"step {num(previous.step)}"
        before = {row.name: row.value for row in previous.registers}
        vcpu = replace(
            vcpu,
            registers=tuple(
                replace(
                    row, changed=row.name not in PC and before.get(row.name, row.value) != row.value
                )
                for row in vcpu.registers
            ),
        )
    said, chosen = status(vcpu, since), None if selection is None else selection.gva
    where = el("span", vcpu.where, cls="mono") if vcpu.where else ""
    panes = {
        "title": header(
            f"vCPU {vcpu.index}", filter(plain, (where, vcpu.mode, vcpu.state)), vcpu.step
        ),
        "source": _source(vcpu),
        "disassembly": _disassembly(vcpu),
        "registers": _registers(vcpu, since, chosen),
        "stack": _stack(vcpu, chosen),
        "touches": _touches(vcpu, chosen),
        "status": status_line(said),
    }
    place = plain(vcpu.where) or "its registers sealed"
    return View(
        f"vCPU {vcpu.index}, step {num(vcpu.step)}, {place}",
        said,
        panes,
        LAYOUT,
        lambda: _lines(vcpu),
    )


def status(vcpu: VcpuSnapshot, since: str = "the last look") -> str:
    """The status sentence: "Step 1 277, vCPU 1, next: lock bts [rdx], rax. The last step changed rax and rflags."."""
    if vcpu.sealed:
        return f"Step {num(vcpu.step)}, vCPU {vcpu.index}: its registers are sealed. {plain(vcpu.sealed, 160).rstrip('.')}."
    insn = next((insn for insn in vcpu.disassembly if insn.current), None)
    ended = "" if vcpu.state in ("running", "not started") else f"{plain(vcpu.state)}, "
    coming = f"next: {_insn(insn)}." if insn else f"at {plain(vcpu.where)}."
    head = f"Step {num(vcpu.step)}, vCPU {vcpu.index}, {ended}{coming}"
    names = [plain(row.name) for row in vcpu.registers if row.changed]
    listed = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
    said = (
        f" The last step changed {listed}."
        if since == "the last step"
        else f" Changed since {since}: {listed}."
    )
    return head + said * bool(names) + (f" {plain(vcpu.outlook)}" if vcpu.outlook else "")


def _insn(insn: Insn) -> str:
    return plain(f"{insn.mnemonic} {insn.op_str}".strip())


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
    return {"cls": "cur", "aria_current": "true"} if here else {}


def _source(vcpu: VcpuSnapshot) -> Html:
    rows: list[Row] = []
    for n, words in vcpu.source:
        gutter = _gutter("line", str(n), n in vcpu.breakpoint_lines, n == vcpu.line)
        rows.append(((gutter, ("n", str(n)), ("src", _c(words))), _now(n == vcpu.line)))
    where = (
        f"{plain(vcpu.file)}:{vcpu.line} is not on this machine"
        if vcpu.line
        else "this code has no line numbers"
    )
    where = "none: " + ("the instruction pointer is sealed" if vcpu.sealed else where)
    return label("Source", plain(vcpu.file or "", 80) if rows else where) + table(
        "source", rows, cls="code"
    )


def _c(words: str) -> Html:
    """C with bold keywords and dim comments: syntax is weight, not colour."""
    pieces = COMMENT.split(words.expandtabs(4)[:300])
    bold = [Html(KEYWORDS.sub(r"<b>\1</b>", esc(piece))) for piece in pieces]
    return cat(el("span", piece, cls="d") if i % 2 else bold[i] for i, piece in enumerate(pieces))


def _disassembly(vcpu: VcpuSnapshot) -> Html:
    rows: list[Row] = []
    for insn in vcpu.disassembly:
        gutter = _gutter("gva", hx(insn.gva), insn.breakpoint, insn.current)
        rows.append(
            (
                (
                    gutter,
                    ("a", f"{insn.gva:x}"),
                    ("o", f"+{insn.offset:x}"),
                    ("mn", insn.mnemonic),
                    ("op", insn.op_str),
                    ("cm", insn.comment),
                ),
                _now(insn.current),
            )
        )
    more = (
        plain(vcpu.symbol, 80) if rows else "none: sealed" if vcpu.sealed else "none: no code here"
    )
    return label("Disassembly", more) + table("disassembly", rows, cls="code")


def _value(value: int, changed: bool = False) -> Html:
    digits = f"{value:x}"
    return el("span", "0" * (16 - len(digits)), cls="z") + el(
        "span", digits, cls="ct" if changed else None
    )


def _note(words: str) -> Html:
    """A note; that a pointer leads into shared memory has its colour."""
    head, comma, tail = plain(words, 120).rpartition(", ")
    return esc(head + comma) + (el("span", tail, cls="st") if comma and tail == "shared" else tail)


def _sel(chosen: bool) -> str | None:
    return "sel" if chosen else None


def _dark(why: str) -> Html:
    """The registers that the host cannot see: a hatched pane that says why, as high as the registers were."""
    w, h = 380, 306
    hatch = "".join(
        f"M{max(at - h, 0)} {min(at, h)}L{min(at, w)} {max(at - w, 0)}" for at in range(0, w + h, 9)
    )
    lines = textwrap.wrap(plain(why, 160), 44)[:4]
    out = (
        rect(0, 0, w, h, "c-dark")
        + path(hatch, "c-hatch")
        + rect(36, h / 2 - 28, w - 72, 34 + 16 * len(lines), "c-bg")
    )
    out += text(w / 2, h / 2 - 10, "sealed: the host sees ciphertext", "b", "middle")
    out += cat(text(w / 2, h / 2 + 8 + 16 * i, line, "d", "middle") for i, line in enumerate(lines))
    return svg(w, h, out, f"Registers sealed: {plain(why, 160)}")


def _registers(vcpu: VcpuSnapshot, since: str, chosen: int | None) -> Html:
    """A click selects what a pointer points to."""
    if vcpu.sealed:
        return label("Registers", "sealed") + _dark(vcpu.sealed)
    rows: list[Row] = []
    for row in vcpu.registers:
        cells = (("nm", row.name), ("v", _value(row.value, row.changed)), ("cm", _note(row.note)))
        points = row.points_to is not None
        cls = (
            " ".join(["chg"] * row.changed + ["sel"] * (points and row.points_to == chosen)) or None
        )
        rows.append((cells, select("register", row.name, cls) if points else {"cls": cls}))
    more = (
        "bar: changed by the last step"
        if since == "the last step"
        else f"bar: changed since {since}"
    )
    return label("Registers", more) + table("registers", rows, cls="regs")


def _stack(vcpu: VcpuSnapshot, chosen: int | None) -> Html:
    rows: list[Row] = []
    for i, row in enumerate(vcpu.stack):
        note = _note(row.note) + ("" if i else el("b", " ← sp"))
        action = select("byte", hx(row.gva), _sel(row.gva == chosen))
        rows.append(((("nm", f"{row.gva:x}"), ("v", _value(row.value)), ("cm", note)), action))
    more = (
        "from the stack pointer up"
        if rows
        else "sealed"
        if vcpu.sealed
        else "none: the stack pointer leads nowhere"
    )
    return label("Stack", more) + table("stack", rows, cls="regs")


def _touches(vcpu: VcpuSnapshot, chosen: int | None) -> Html:
    rows: list[Row] = []
    for touch in vcpu.touches:
        said = (f"{touch.note} = " if touch.note else "") + hx(touch.before)
        said += "" if touch.after is None else f" → {hx(touch.after)}"
        note = el("span", said if touch.gpa is not None else "not mapped", cls="mono")
        action = select("byte", hx(touch.gva), _sel(touch.gva == chosen))
        rows.append(((("nm", touch.kind), ("v", hx(touch.gva)), ("cm", note)), action))
    for page in sorted({touch.gpa >> 12 for touch in vcpu.touches if touch.gpa is not None}):
        rows.append(((("nm", "page"), ("v", f"gpa {hx(page << 12)}"), ""), select("page", page)))
    return (
        label("This instruction touches") + table("touches", rows, cls="regs") if rows else Html()
    )


def _lines(vcpu: VcpuSnapshot) -> list[str]:
    def at(here: bool, stop: bool) -> str:
        return f"{'=>' if here else '  '} {'o' if stop else ' '}"

    out = [
        f"{at(n == vcpu.line, n in vcpu.breakpoint_lines)} {n:>5} {plain(words.expandtabs(4))}"
        for n, words in vcpu.source
    ]
    out += [
        f"{at(insn.current, insn.breakpoint)} {insn.gva:x} +{insn.offset:<4x} {_insn(insn):<32} {plain(insn.comment)}"
        for insn in vcpu.disassembly
    ]
    out += [f"  registers sealed: {plain(vcpu.sealed, 160)}"] * bool(vcpu.sealed)
    out += [
        f"{'*' if row.changed else ' '} {plain(row.name):<7}{row.value:016x} {plain(row.note)}"
        for row in vcpu.registers
    ]
    out += [
        f"  {touch.kind} {hx(touch.gva)} {plain(touch.note)}: {hx(touch.before)}"
        + ("" if touch.after is None else f" -> {hx(touch.after)}")
        for touch in vcpu.touches
    ]
    return [line.rstrip() for line in out]
