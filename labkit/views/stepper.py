"""One vCPU between two instructions: source, disassembly, registers, stack, and what the next instruction touches."""

from __future__ import annotations

import re
from dataclasses import replace

from labkit.explore.inspect import Insn, Selection, VcpuSnapshot
from labkit.views.draw import Attribute, Html, Row, cat, el, esc, hx, label, num, plain, table
from labkit.views.show import View, columns, header, pane, status_line

__all__ = ["render", "status"]

KEYWORDS = re.compile(r"\b(auto|break|case|char|const|continue|default|do|double|else|enum|extern|float|for|goto|if|inline|int|long|register|"
                      r"return|short|signed|sizeof|static|struct|switch|typedef|union|unsigned|void|volatile|while)\b")
COMMENT = re.compile(r"(//.*|/\*.*?(?:\*/|$))")
PC = ("rip", "pc", "psw")  # never marked: it always changes
LAYOUT = cat([pane("title"), pane("transport"), columns(
    "c2e w4", pane("source"), pane("disassembly"), pane("registers"), el("div", pane("stack"), pane("touches"), cls="stk")), pane("status")])


def render(vcpu: VcpuSnapshot, previous: VcpuSnapshot | None = None, *, width: float = 940, selection: Selection | None = None) -> View:
    """One vCPU as a view; registers are marked against previous when it is given, else as the snapshot says. Width is the style sheet's work."""
    if previous is not None:
        before = {row.name: row.value for row in previous.registers}
        vcpu = replace(vcpu, registers=tuple(
            replace(row, changed=row.name not in PC and before.get(row.name, row.value) != row.value) for row in vcpu.registers))
    said, facts = status(vcpu), [el("span", plain(vcpu.where), cls="mono"), plain(vcpu.mode), plain(vcpu.state)]
    panes = {
        "title": header(f"vCPU {vcpu.index}", facts, Html("step ") + el("b", num(vcpu.step))), "source": _source(vcpu), "disassembly": _disassembly(vcpu),
        "registers": _registers(vcpu, selection), "stack": _stack(vcpu), "touches": _touches(vcpu), "status": status_line(said),
    }
    return View(f"vCPU {vcpu.index}, step {num(vcpu.step)}, {plain(vcpu.where)}", said, panes, LAYOUT, lambda: _lines(vcpu))


def status(vcpu: VcpuSnapshot) -> str:
    """The status sentence: "Step 1 277, vCPU 1, next: lock bts [rdx], rax. The last step changed rax and rflags."."""
    insn = next((insn for insn in vcpu.disassembly if insn.current), None)
    ended = "" if vcpu.state in ("running", "not started") else f"{plain(vcpu.state)}, "
    coming = f"next: {_insn(insn)}" if insn else f"at {plain(vcpu.where)}"
    names = [plain(row.name) for row in vcpu.registers if row.changed]
    said = f" The last step changed {' and '.join([', '.join(names[:-1])] * (len(names) > 1) + names[-1:])}." if names else ""
    return f"Step {num(vcpu.step)}, vCPU {vcpu.index}, {ended}{coming}.{said}" + (f" {plain(vcpu.outlook)}" if vcpu.outlook else "")


def _insn(insn: Insn) -> str:
    return plain(f"{insn.mnemonic} {insn.op_str}".strip())


def _gutter(kind: str, value: str, stop: bool, here: bool) -> tuple[str, str]:
    """The place to click for a breakpoint, and the arrow at the instruction."""
    spot = el("span", "●" if stop else "", cls="bp", data_act="toggle_breakpoint", data_kind=kind, data_value=value)
    return "g", spot + el("span", "▶" if here else "", cls="pc")


def _now(here: bool) -> dict[str, Attribute]:
    return {"cls": "cur", "aria_current": "true"} if here else {}


def _source(vcpu: VcpuSnapshot) -> Html:
    if not vcpu.source:
        return label("Source", "none: this code has no line numbers" if vcpu.line is None else f"{plain(vcpu.file)}:{vcpu.line} is not on this machine")
    rows: list[Row] = [((_gutter("line", str(n), n in vcpu.breakpoint_lines, n == vcpu.line), ("n", str(n)), ("t", _c(words))), _now(n == vcpu.line))
                       for n, words in vcpu.source]
    return label("Source", plain(vcpu.file or "", 80)) + table("source", rows, cls="code")


def _c(words: str) -> Html:
    """C with bold keywords and dim comments: syntax is weight, not colour."""
    pieces = COMMENT.split(words.expandtabs(4)[:300])
    return cat(el("span", piece, cls="d") if i % 2 else Html(KEYWORDS.sub(r"<b>\1</b>", esc(piece))) for i, piece in enumerate(pieces))


def _disassembly(vcpu: VcpuSnapshot) -> Html:
    rows: list[Row] = [((_gutter("gva", hx(insn.gva), insn.breakpoint, insn.current), ("a", f"{insn.gva:x}"), ("o", f"+{insn.offset:x}"),
                         ("mn", plain(insn.mnemonic, 20)), ("op", plain(insn.op_str, 80)), ("cm", plain(insn.comment, 120))), _now(insn.current))
                       for insn in vcpu.disassembly]
    return label("Disassembly", plain(vcpu.symbol, 80)) + (table("disassembly", rows, cls="code") if rows else el("div", "no code here", cls="d"))


def _value(value: int, changed: bool = False) -> Html:
    digits = f"{value:x}"
    return el("span", "0" * (16 - len(digits)), cls="z") + el("span", digits, cls="ct" if changed else None)


def _note(words: str) -> Html:
    """A note; that a pointer leads into shared memory has its colour."""
    head, comma, tail = plain(words, 120).rpartition(", ")
    return esc(head + comma) + (el("span", tail, cls="st") if comma and tail == "shared" else tail)


def _select(kind: str, value: object) -> dict[str, Attribute]:
    return {"data_act": "select", "data_kind": kind, "data_value": plain(value)}


def _registers(vcpu: VcpuSnapshot, selection: Selection | None) -> Html:
    chosen = selection.label.split(",")[0] if selection is not None and selection.kind == "register" else None
    rows: list[Row] = [
        ((("nm", plain(row.name)), ("v", _value(row.value, row.changed)), ("cm", _note(row.note))),
         {"cls": " ".join(["chg"] * row.changed + ["sel"] * (row.name == chosen)) or None} | (_select("register", row.name) if row.points_to is not None else {}))
        for row in vcpu.registers]
    return label("Registers", "bar: changed by the last step") + table("registers", rows, cls="regs")


def _stack(vcpu: VcpuSnapshot) -> Html:
    rows: list[Row] = [((("nm", f"{row.gva:x}"), ("v", _value(row.value)), ("cm", _note(row.note) + (el("b", " ← sp") if not i else ""))),
                        _select("byte", hx(row.gva))) for i, row in enumerate(vcpu.stack)]
    return label("Stack", "from the stack pointer up" if rows else "the stack pointer leads nowhere") + table("stack", rows, cls="regs")


def _touches(vcpu: VcpuSnapshot) -> Html:
    rows: list[Row] = []
    for touch in vcpu.touches:
        said = (f"{plain(touch.note, 80)} = " if touch.note else "") + hx(touch.before) + ("" if touch.after is None else f" → {hx(touch.after)}")
        hole = el("span", " not mapped", cls="ft") if touch.gpa is None else ""
        rows.append(((("nm", touch.kind), ("v", hx(touch.gva)), ("cm", el("span", said, cls="mono") + hole)), _select("byte", hx(touch.gva))))
    pages = sorted({touch.gpa >> 12 for touch in vcpu.touches if touch.gpa is not None})
    rows += [((("nm", "page"), ("v", f"gpa {hx(page << 12)}"), ""), _select("page", page)) for page in pages]
    return label("This instruction touches") + table("touches", rows, cls="regs") if rows else Html()


def _lines(vcpu: VcpuSnapshot) -> list[str]:
    def at(here: bool, stop: bool) -> str:
        return f"{'=>' if here else '  '} {'o' if stop else ' '}"
    out = [f"{at(n == vcpu.line, n in vcpu.breakpoint_lines)} {n:>5} {plain(words.expandtabs(4))}" for n, words in vcpu.source]
    out += [f"{at(insn.current, insn.breakpoint)} {insn.gva:x} +{insn.offset:<4x} {_insn(insn):<32} {plain(insn.comment)}".rstrip() for insn in vcpu.disassembly]
    out += [f"{'*' if row.changed else ' '} {plain(row.name):<7}{row.value:016x} {plain(row.note)}".rstrip() for row in vcpu.registers]
    return out + [f"  {touch.kind} {hx(touch.gva)} {plain(touch.note)}: {hx(touch.before)}" + ("" if touch.after is None else f" -> {hx(touch.after)}")
                  for touch in vcpu.touches]
