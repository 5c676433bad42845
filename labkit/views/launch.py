"""The launch of an encrypted guest: states, pages, every command with the digest after it."""

from __future__ import annotations

from labkit.look.launch import LaunchProgress, LaunchStep, policy_text
from labkit.look.snapshots import Selection
from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.sev.snp import SnpState
from labkit.views.drawing.markup import Attribute, Html, cat, el, hx
from labkit.views.drawing.shapes import NARROW, WIDE
from labkit.views.drawing.tables import Cell, Row, aligned, boxed, label, select, table
from labkit.views.pictures.launch import draw_pages, draw_states, pages_key
from labkit.views.show import FRAME, View, header, pane, status_line
from labkit.words import num

__all__ = ["render"]

MAX_ROWS = 24  # of very many commands a quarter are the first ones, the others the last ones
FIRST, LAST = MAX_ROWS // 4, 3 * MAX_ROWS // 4


def render(
    launch: LaunchProgress,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The launch as a view.

    previous and selection are not used: the order of the commands is the time.
    """
    policy = policy_text(launch.policy, isinstance(launch.state, SnpState))
    protection = plain(launch.protection, 20)
    said = plain(launch.status, 400)
    was_refused = bool(launch.steps and launch.steps[-1].found)
    panes = {
        "title": header("Launch", [protection, f"policy {policy}"], counts=_counts(launch)),
        "states": draw_states(launch, width - FRAME),
        "pages": label("Pages", "solid: measured and encrypted")
        + draw_pages(launch, width - FRAME)
        + pages_key(launch),
        "steps": _steps(launch, width),
        "owner": _owner(launch),
        "status": status_line(said, "status hole" if was_refused else "status"),
    }
    title = f"launch of a {protection} guest, {launch.state.name}"
    return View(title, said, panes, cat(map(pane, panes)), lambda: _lines(launch, policy))


def _counts(launch: LaunchProgress) -> Html:
    """How many pages were measured and how many commands refused, for the header."""
    out = el("span", el("b", num(launch.nr_pages)), " pages measured")
    nr_refused = sum(bool(step.found) for step in launch.steps)
    if nr_refused:
        out += el("span", ", ", el("b", num(nr_refused)), " refused", cls="ft")
    return out


def _steps(launch: LaunchProgress, width: float) -> Html:
    """Every command; of very many the first and the last ones."""
    if width < NARROW:
        nr_bytes = 8
    else:
        nr_bytes = 16 if width < WIDE else 32
    steps = list(enumerate(launch.steps, 1))
    if len(steps) > MAX_ROWS:
        steps = steps[:FIRST] + steps[-LAST:]

    rows = list[Row]()
    last = 0
    for n, step in steps:
        if n > last + 1:
            rows.append((("", f"… {num(n - last - 1)} more", "", "", "", ""), {}))
        last = n
        rows.append((_cells(n, step, nr_bytes), _action(step)))
    head: list[Cell] = [("r", "#"), "command", ("hn", "kind"), "gpa", ("r", "pages")]
    head.append("launch digest after it")
    said = "every update adds its plaintext to the digest, in this order"
    return label("Commands", said) + boxed("commands of the launch", rows, head)


def _action(step: LaunchStep) -> dict[str, Attribute]:
    """What a click on a command selects: the first page that it measures."""
    bad = "bad" if step.found else None
    if step.gpa is None:
        return {"cls": bad}
    return select("page", step.gpa // PAGE, bad)


def _cells(n: int, step: LaunchStep, nr_bytes: int) -> list[Cell]:
    return [
        ("r", num(n)),
        plain(step.command, 40),
        ("hn", plain(step.kind, 20)),
        "" if step.gpa is None else hx(step.gpa),
        ("r", num(step.nr_pages) if step.nr_pages else ""),
        _outcome(step, nr_bytes),
    ]


def _outcome(step: LaunchStep, nr_bytes: int) -> Html:
    """Who refused a command and why, else the first bytes of the digest after it."""
    if step.found:
        who, code = "KVM", ""
        if step.refused is not None:
            who, code = step.refused.name, f" {step.refused:#04x}"
        return el("span", el("b", f"✕ {who}"), f"{code}: {plain(step.found, 80)}", cls="ft")
    if not step.digest:
        return Html()
    goes_on = "…" if len(step.digest) > nr_bytes else ""
    return _groups(step.digest[:nr_bytes]) + el("span", goes_on, cls="d")


def _groups(data: bytes) -> Html:
    """Bytes in hexadecimal, in groups of eight digits."""
    digits = data.hex()
    return Html(" ".join(digits[at : at + 8] for at in range(0, len(digits), 8)))


def _owner(launch: LaunchProgress) -> Html:
    """What the owner of the guest can check."""
    rows: list[Row] = [_field("launch digest", _groups(launch.digest) or "none yet")]
    if launch.measurement:
        rows.append(_field("measurement", _groups(launch.measurement)))
    if launch.expected:
        if launch.expected == launch.digest:
            verdict, bad = el("span", "✓ equal to the launch digest"), None
        else:
            verdict, bad = el("span", "▲ not the launch digest", cls="ft"), "bad"
        rows.append(_field("owner expects", _groups(launch.expected) + " " + verdict, bad))
    said = label("Digest", "what the owner of the guest can check")
    return said + table("digest and measurement", rows)


def _field(name: str, value: str, cls: str | None = None) -> Row:
    return (("nm", name), ("wr", value)), {"cls": cls}


def _lines(launch: LaunchProgress, policy: str) -> list[str]:
    now = launch.state.name
    states = " -> ".join(f"[{name}]" if name == now else name for name in launch.path)
    lines = [f"policy {policy}", states]

    rows = [["#", "command", "kind", "gpa", "pages", "digest after"]]
    for n, step in list(enumerate(launch.steps, 1))[-3 * MAX_ROWS :]:
        rows.append(
            [
                num(n),
                plain(step.command, 40),
                plain(step.kind, 20),
                "" if step.gpa is None else hx(step.gpa),
                num(step.nr_pages),
                _outcome_text(step),
            ]
        )
    lines += aligned(rows)
    if launch.measurement:
        lines.append(f"measurement {launch.measurement.hex()}")
    if launch.expected:
        lines.append(f"owner expects {launch.expected.hex()}")
    return lines


def _outcome_text(step: LaunchStep) -> str:
    if step.refused is not None:
        return f"refused: {step.refused.name} {step.refused:#04x}"
    if step.found:
        return f"refused by KVM: {plain(step.found, 80)}"
    return step.digest[:16].hex()
