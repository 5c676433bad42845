"""One vCPU between two instructions: source, disassembly, registers, stack, and what the next instruction touches."""

from __future__ import annotations

import re
from dataclasses import replace

from labkit.explore.inspect import Insn, RegisterRow, Selection, StackRow, Touch, VcpuSnapshot
from labkit.views.draw import Cell, Html, Row, cat, el, esc, hx, label, num, plain, table
from labkit.views.show import View, columns, header, pane, status_line

__all__ = ["compare", "disassembly", "panes", "registers", "render", "source", "stack", "status", "touches"]

KEYWORDS = re.compile(r"\b(auto|break|case|char|const|continue|default|do|double|else|enum|extern|float|for|goto|if|inline|int|long|register|"
                      r"return|short|signed|sizeof|static|struct|switch|typedef|union|unsigned|void|volatile|while)\b")
COMMENT = re.compile(r"(//.*|/\*.*?(?:\*/|$))")
PC = ("rip", "pc", "psw")  # never marked: it always changes


def render(vcpu: VcpuSnapshot, previous: VcpuSnapshot | None = None, *, width: int = 940, selection: Selection | None = None) -> View:
    """One vCPU as a view; registers are marked against previous when it is given, else as the snapshot says."""
    vcpu = compare(vcpu, previous)
    said = status(vcpu)
    parts = {
        "title": header(f"vCPU {vcpu.index}", [el("span", plain(vcpu.where), cls="mono"), vcpu.mode, vcpu.state], Html("step ") + el("b", num(vcpu.step))),
        **panes(vcpu, selection), "status": status_line(said),
    }
    layout = cat([
        pane("title"), pane("transport"),
        columns("c2e w4", pane("source"), pane("disassembly"), pane("registers"), el("div", pane("stack"), pane("touches"), cls="stk")), pane("status"),
    ])
    return View(f"vCPU {vcpu.index}, step {num(vcpu.step)}, {plain(vcpu.where)}", said, parts, layout, lambda: _lines(vcpu))


def panes(vcpu: VcpuSnapshot, selection: Selection | None = None) -> dict[str, Html]:
    """The panes of the stepper by name."""
    return {"source": source(vcpu), "disassembly": disassembly(vcpu), "registers": registers(vcpu, selection), "stack": stack(vcpu),
            "touches": touches(vcpu)}


def compare(vcpu: VcpuSnapshot, previous: VcpuSnapshot | None) -> VcpuSnapshot:
    """The same vCPU with its registers marked against previous; the program counter is never marked."""
    if previous is None:
        return vcpu
    before = {row.name: row.value for row in previous.registers}
    rows = (replace(row, changed=row.name not in PC and before.get(row.name, row.value) != row.value) for row in vcpu.registers)
    return replace(vcpu, registers=tuple(rows))


def status(vcpu: VcpuSnapshot) -> str:
    """The status sentence: "Step 1 277, vCPU 1, next: lock bts [rdx], rax. The last step changed rax and rflags."."""
    insn = next((insn for insn in vcpu.disassembly if insn.current), None)
    coming = f"next: {_insn(insn)}" if insn else f"at {plain(vcpu.where)}"
    head = f"Step {num(vcpu.step)}, vCPU {vcpu.index}, " + (coming if vcpu.state in ("running", "not started") else f"{plain(vcpu.state)}, {coming}")
    names = [plain(row.name) for row in vcpu.registers if row.changed]
    said = f" The last step changed {_list(names)}." if names else ""
    return f"{head}.{said}" + (f" {plain(vcpu.outlook)}" if vcpu.outlook else "")


def _insn(insn: Insn) -> str:
    return plain(f"{insn.mnemonic} {insn.op_str}".strip())


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def source(vcpu: VcpuSnapshot) -> Html:
    """The source around the instruction; a click in the gutter toggles a breakpoint."""
    if not vcpu.source:
        return label("Source", "none: this code has no line numbers") if vcpu.line is None else label("Source", f"{plain(vcpu.file)}:{vcpu.line} is not here")
    rows: list[Row] = []
    for number, words in vcpu.source:
        here = number == vcpu.line
        gutter = el("span", "●" if number in vcpu.breakpoint_lines else "", cls="bp", data_act="toggle_breakpoint", data_kind="line", data_value=number)
        rows.append(([("g", gutter + el("span", "▶" if here else "", cls="pc")), ("n", str(number)), ("t", _c(words))],
                     {"cls": "cur" if here else None, "aria_current": "true" if here else None}))
    return label("Source", plain(vcpu.file or "", 80)) + table("source", rows, cls="code")


def _c(words: str) -> Html:
    """C with bold keywords and dim comments: syntax is weight, not colour."""
    out = Html()
    for i, piece in enumerate(COMMENT.split(words.expandtabs(4)[:300])):
        out += el("span", piece, cls="d") if i % 2 else Html(KEYWORDS.sub(r"<b>\1</b>", esc(piece)))
    return out


def disassembly(vcpu: VcpuSnapshot) -> Html:
    """The instructions around the next one, with what their operands point to now."""
    rows: list[Row] = []
    for insn in vcpu.disassembly:
        gutter = el("span", "●" if insn.breakpoint else "", cls="bp", data_act="toggle_breakpoint", data_kind="gva", data_value=hx(insn.gva))
        cells: list[Cell] = [("g", gutter + el("span", "▶" if insn.current else "", cls="pc")), ("a", f"{insn.gva:x}"), ("o", f"+{insn.offset:x}"),
                             ("mn", plain(insn.mnemonic, 20)), ("op", plain(insn.op_str, 80)), ("cm", plain(insn.comment, 120))]
        rows.append((cells, {"cls": "cur" if insn.current else None, "aria_current": "true" if insn.current else None}))
    return label("Disassembly", plain(vcpu.symbol, 80)) + (table("disassembly", rows, cls="code") if rows else el("div", "no memory here", cls="d"))


def _value(value: int, changed: bool = False) -> Html:
    digits = f"{value:x}"
    return el("span", "0" * (16 - len(digits)), cls="z") + el("span", digits, cls="ct" if changed else None)


def _note(words: str) -> Html:
    """A note; that a pointer leads into shared memory has its colour."""
    shown = plain(words, 120)
    head, comma, tail = shown.rpartition(", ")
    return esc(head + comma) + el("span", tail, cls="st") if comma and tail == "shared" else esc(shown)


def registers(vcpu: VcpuSnapshot, selection: Selection | None = None) -> Html:
    """The registers: leading zeros dim, what the value means after it, a bar where the last step changed it."""
    chosen = selection.label.split(",")[0] if selection is not None and selection.kind == "register" else None
    rows = [_register(row, row.name == chosen) for row in vcpu.registers]
    return label("Registers", "bar: changed by the last step") + table("registers", rows, cls="regs")


def _register(row: RegisterRow, chosen: bool) -> Row:
    cls = " ".join(["chg"] * row.changed + ["sel"] * chosen)
    action = {} if row.points_to is None else {"data_act": "select", "data_kind": "register", "data_value": plain(row.name)}
    return [("nm", plain(row.name)), ("v", _value(row.value, row.changed)), ("cm", _note(row.note))], {"cls": cls or None, **action}


def stack(vcpu: VcpuSnapshot) -> Html:
    """The words from the stack pointer up."""
    if not vcpu.stack:
        return label("Stack", "the stack pointer leads nowhere")
    return label("Stack", "from the stack pointer up") + table("stack", [_stack(row, not i) for i, row in enumerate(vcpu.stack)], cls="regs")


def _stack(row: StackRow, top: bool) -> Row:
    return ([("nm", f"{row.gva:x}"), ("v", _value(row.value)), ("cm", _note(row.note) + (el("b", " ← sp") if top else Html()))],
            {"data_act": "select", "data_kind": "byte", "data_value": hx(row.gva)})


def touches(vcpu: VcpuSnapshot) -> Html:
    """The memory that the next instruction reads and writes, with before and after."""
    if not vcpu.touches:
        return Html()
    pages = sorted({touch.gpa & -4096 for touch in vcpu.touches if touch.gpa is not None})
    where: list[Row] = [([("nm", "page"), ("v", f"gpa {hx(gpa)}"), ""], {"data_act": "select", "data_kind": "page", "data_value": hx(gpa)}) for gpa in pages]
    return label("This instruction touches") + table("touches", [*map(_touch, vcpu.touches), *where], cls="regs")


def _touch(touch: Touch) -> Row:
    values = hx(touch.before) + ("" if touch.after is None else f" → {hx(touch.after)}")
    note = plain(touch.note, 80) + " = " if touch.note else ""
    hole = el("span", " not mapped", cls="ft") if touch.gpa is None else Html()
    return ([("nm", touch.kind), ("v", hx(touch.gva)), ("cm", el("span", note + values, cls="mono") + hole)],
            {"data_act": "select", "data_kind": "byte", "data_value": hx(touch.gva)})


def _lines(vcpu: VcpuSnapshot) -> list[str]:
    out = [f"{'=>' if number == vcpu.line else '':2} {'o' if number in vcpu.breakpoint_lines else ' '} {number:>5} {plain(words.expandtabs(4))}"
           for number, words in vcpu.source]
    out += [f"{'=>' if insn.current else '':2} {'o' if insn.breakpoint else ' '} {insn.gva:x} +{insn.offset:<4x} {_insn(insn):<32} {plain(insn.comment)}".rstrip()
            for insn in vcpu.disassembly]
    out += [f"{'*' if row.changed else ' '} {plain(row.name):<7}{row.value:016x} {plain(row.note)}".rstrip() for row in vcpu.registers]
    return out + [f"  {touch.kind} {hx(touch.gva)} {plain(touch.note)}: {hx(touch.before)}" + ("" if touch.after is None else f" -> {hx(touch.after)}")
                  for touch in vcpu.touches]
