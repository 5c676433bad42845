"""One vCPU between two instructions: code, registers, stack, and what the next one touches."""

from __future__ import annotations

import textwrap

from labkit.look.snapshots import Insn, Selection, Touch, VcpuSnapshot
from labkit.outside import plain
from labkit.views import code, said
from labkit.views.drawing.markup import Attribute, Html, cat, el, esc, hx
from labkit.views.drawing.shapes import path, rect, svg, text
from labkit.views.drawing.tables import Row, classes, label, select, table
from labkit.views.show import View, columns, header, pane, status_line
from labkit.words import num

__all__ = ["render", "status"]

LAST_STEP = "the last step"
LAST_LOOK = "the last look"
LAYOUT = cat(
    [
        pane("title"),
        pane("transport"),
        columns(
            "c2e w4",
            pane("source"),
            pane("disassembly"),
            pane("registers"),
            el("div", pane("stack"), pane("touches"), pane("frames"), cls="stk"),
        ),
        pane("status"),
    ]
)
SEALED_WIDTH, SEALED_HEIGHT = 380, 56  # of the pane of sealed registers: three lines
HATCH = 9  # pixels between its lines


def render(
    vcpu: VcpuSnapshot,
    previous: VcpuSnapshot | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """One vCPU as a view (of any width).

    Registers are marked against previous where it has any, else as the snapshot says.
    """
    since = LAST_LOOK
    if previous is not None and (previous.registers or not vcpu.registers):
        is_next = vcpu.step - previous.step == 1
        since = LAST_STEP if is_next else f"step {num(previous.step)}"
        vcpu = vcpu.since(previous)

    sentence = status(vcpu, since)
    chosen = None if selection is None else selection.gva
    where = el("span", vcpu.where, cls="mono") if vcpu.where else ""
    facts = [fact for fact in (where, vcpu.mode, vcpu.state) if fact]
    panes = {
        "title": header(f"vCPU {vcpu.index}", facts, vcpu.step),
        "source": code.source(vcpu),
        "disassembly": code.disassembly(vcpu),
        "registers": _registers(vcpu, since, chosen),
        "stack": _stack(vcpu, chosen),
        "touches": _touches(vcpu, chosen),
        "frames": said.frames(vcpu),
        "status": status_line(sentence),
    }
    place = plain(vcpu.where) or "its registers sealed"
    title = f"vCPU {vcpu.index}, step {num(vcpu.step)}, {place}"
    return View(title, sentence, panes, LAYOUT, lambda: _lines(vcpu))


def status(vcpu: VcpuSnapshot, since: str = LAST_LOOK) -> str:
    """The status sentence.

    "Step 1 277, vCPU 1, next: lock bts [rdx], rax. The last step changed rax and rflags."
    """
    head = f"Step {num(vcpu.step)}, vCPU {vcpu.index}"
    if vcpu.sealed:
        return f"{head}: its registers are sealed. {plain(vcpu.sealed, 160).rstrip('.')}."

    if vcpu.state not in ("running", "not started"):
        head += f", {plain(vcpu.state)}"
    insn = next((insn for insn in vcpu.disassembly if insn.current), None)
    if insn is not None:
        said = f"{head}, next: {_insn(insn)}."
    else:
        said = f"{head}, at {plain(vcpu.where)}."

    changed = [plain(row.name) for row in vcpu.registers if row.changed]
    if changed and since == LAST_STEP:
        said += f" The last step changed {_listed(changed)}."
    elif changed:
        said += f" Changed since {since}: {_listed(changed)}."
    if vcpu.outlook:
        said += f" {plain(vcpu.outlook)}"
    return said


def _listed(names: list[str]) -> str:
    """Names as people list them: "rax, rbx and rflags"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _insn(insn: Insn) -> str:
    return plain(f"{insn.mnemonic} {insn.op_str}".strip())


def _registers(vcpu: VcpuSnapshot, since: str, chosen: int | None) -> Html:
    """A click selects what a pointer points to."""
    if vcpu.sealed:
        return label("Registers", "sealed") + _sealed(vcpu.sealed)

    rows: list[Row] = []
    for row in vcpu.registers:
        cells = (("nm", row.name), ("v", _value(row.value, row.changed)), ("cm", _note(row.note)))
        is_pointer = row.points_to is not None
        cls = classes(chg=row.changed, sel=is_pointer and row.points_to == chosen)
        rows.append((cells, select("register", row.name, cls) if is_pointer else {"cls": cls}))
    said = "changed by the last step" if since == LAST_STEP else f"changed since {since}"
    return label("Registers", f"bar: {said}") + table("registers", rows, cls="regs")


def _value(value: int, changed: bool = False) -> Html:
    """16 digits, the leading zeros dim."""
    digits = f"{value:x}"
    zeros = el("span", "0" * (16 - len(digits)), cls="z")
    return zeros + el("span", digits, cls="ct" if changed else None)


def _note(words: str) -> Html:
    """A note; that a pointer leads into shared memory has its colour."""
    head, comma, tail = plain(words, 120).rpartition(", ")
    if comma and tail == "shared":
        return esc(head + comma) + el("span", tail, cls="st")
    return esc(head + comma) + tail


def _sealed(why: str) -> Html:
    """The registers that the host cannot see: a hatched band that says why."""
    w, h = SEALED_WIDTH, SEALED_HEIGHT
    hatch = ""
    for at in range(0, w + h, HATCH):  # from the left and lower edge to the upper and right one
        hatch += f"M{max(at - h, 0)} {min(at, h)}L{min(at, w)} {max(at - w, 0)}"
    lines = textwrap.wrap(plain(why, 160), 50)[:2]

    out = rect(0, 0, w, h, "c-dark")
    out += path(hatch, "c-hatch")
    out += rect(12, 6, w - 24, h - 12, "c-bg")
    out += text(w / 2, 19, "sealed: the host sees ciphertext", "b", "middle")
    for i, line in enumerate(lines):
        out += text(w / 2, 33 + 14 * i, line, "d", "middle")
    return svg(w, h, out, f"Registers sealed: {plain(why, 160)}")


def _stack(vcpu: VcpuSnapshot, chosen: int | None) -> Html:
    rows: list[Row] = []
    for row in vcpu.stack:
        note = _note(row.note)
        if not rows:
            note += el("b", " ← sp")
        cells = (("nm", f"{row.gva:x}"), ("v", _value(row.value)), ("cm", note))
        rows.append((cells, _select_byte(row.gva, chosen)))

    if rows:
        said = "from the stack pointer up"
    else:
        said = "sealed" if vcpu.sealed else "none: the stack pointer leads nowhere"
    return label("Stack", said) + table("stack", rows, cls="regs")


def _select_byte(gva: int, chosen: int | None) -> dict[str, Attribute]:
    return select("byte", hx(gva), "sel" if gva == chosen else None)


def _touches(vcpu: VcpuSnapshot, chosen: int | None) -> Html:
    """The reads and writes of the next instruction, then the pages that they lie in."""
    rows: list[Row] = []
    for touch in vcpu.touches:
        said = _effect(touch) if touch.gpa is not None else "not mapped"
        note = el("span", said, cls="mono")
        cells = (("nm", touch.kind), ("v", hx(touch.gva)), ("cm", note))
        rows.append((cells, _select_byte(touch.gva, chosen)))
    if not rows:
        return Html()

    for page in sorted({touch.gpa >> 12 for touch in vcpu.touches if touch.gpa is not None}):
        where = ("v", f"gpa {hx(page << 12)}")
        rows.append(((("nm", "page"), where, ""), select("page", page)))
    return label("This instruction touches") + table("touches", rows, cls="regs")


def _effect(touch: Touch) -> str:
    """The value that lies there, and for a write what it will be."""
    said = f"{touch.note} = " if touch.note else ""
    said += hx(touch.before)
    if touch.after is not None:
        said += f" → {hx(touch.after)}"
    return said


def _lines(vcpu: VcpuSnapshot) -> list[str]:
    out = []
    if not vcpu.source and not vcpu.sealed:
        out.append(f"  no source: {code.why_no_source(vcpu)}")
    for n, words in vcpu.source:
        head = _margin(n == vcpu.line, n in vcpu.breakpoint_lines)
        out.append(f"{head} {n:>5} {plain(words.expandtabs(4))}")
    for insn in vcpu.disassembly:
        head = _margin(insn.current, insn.breakpoint)
        where = f"{insn.gva:x} +{insn.offset:<4x}"
        out.append(f"{head} {where} {_insn(insn):<32} {plain(insn.comment)}")
    if vcpu.sealed:
        out.append(f"  registers sealed: {plain(vcpu.sealed, 160)}")
    for row in vcpu.registers:
        mark = "*" if row.changed else " "
        out.append(f"{mark} {plain(row.name):<7}{row.value:016x} {plain(row.note)}")
    for touch in vcpu.touches:
        said = f"  {touch.kind} {hx(touch.gva)} {plain(touch.note)}: {hx(touch.before)}"
        if touch.after is not None:
            said += f" -> {hx(touch.after)}"
        out.append(said)
    for number, frame in enumerate(vcpu.frames):
        line = "" if frame.file is None else f"  {plain(frame.file)}:{frame.line}"
        out.append(f"  #{number} {plain(frame.where)}{line}")
    return [line.rstrip() for line in out]


def _margin(here: bool, stop: bool) -> str:
    """An arrow at the instruction, an o at a breakpoint."""
    return f"{'=>' if here else '  '} {'o' if stop else ' '}"
