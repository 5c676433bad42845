"""The launch of an encrypted guest: the state machine, the pages as they are measured, every command with the digest after it."""

from __future__ import annotations

from labkit.look.launch import LaunchProgress, LaunchStep, policy_text
from labkit.look.snapshots import Selection
from labkit.sev.snp import SnpState
from labkit.views.draw import (
    Cell,
    Html,
    Row,
    aligned,
    cat,
    el,
    grid,
    hx,
    key,
    label,
    num,
    path,
    plain,
    select,
    svg,
    table,
    text,
)
from labkit.views.show import View, header, pane, status_line
from labkit.views.strip import PAGE, Named, Painter, lay

__all__ = ["render"]

TRACK, MAX_ROWS = 12, 24
HIGH = 22  # of a chevron
LETTERS = {
    "VMSA": "V",
    "ZERO": "0",
    "UNMEASURED": "U",
    "SECRETS": "S",
    "CPUID": "C",
}  # kinds other than plain contents


def render(
    launch: LaunchProgress,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The launch as a view; previous and selection are not used: the order of the commands is the time."""
    refused = sum(bool(step.found) for step in launch.steps)
    counts = el("span", el("b", num(launch.nr_pages)), " pages measured") + (
        el("span", ", ", el("b", num(refused)), " refused", cls="ft") if refused else ""
    )
    policy, said = (
        policy_text(launch.policy, isinstance(launch.state, SnpState)),
        plain(launch.status, 400),
    )
    panes = {
        "title": header(
            "Launch", [plain(launch.protection, 20), f"policy {policy}"], counts=counts
        ),
        "states": _chevrons(launch, width - 26),
        "pages": label("Pages", "solid: measured and encrypted")
        + _pages(launch, width - 26)
        + _key(launch),
        "steps": _steps(launch, width),
        "owner": _owner(launch),
        "status": status_line(said, "status hole" if _refused(launch) else "status"),
    }
    title = f"launch of a {plain(launch.protection, 20)} guest, {launch.state.name}"
    return View(title, said, panes, cat(map(pane, panes)), lambda: _lines(launch, policy))


def _refused(launch: LaunchProgress) -> bool:
    return bool(launch.steps and launch.steps[-1].found)


def _chevrons(launch: LaunchProgress, width: float) -> Html:
    """The states in a row: dark the present one, tinted those behind it, hollow those to come."""
    now, out, x = launch.path.index(launch.state.name), Html(), 0.5
    for i, name in enumerate(launch.path):
        w, half = (7.6 if width > 640 else 6.6) * len(name) + 30, HIGH / 2
        shape = f"M{x:g} .5h{w - 9:g}l9 {half:g}l-9 {half:g}h{9 - w:g}" + (
            f"l9 {-half:g}z" if i else "z"
        )
        out += path(shape, "c-ink" if i == now else "c-cell2" if i < now else "c-off")
        out += text(
            round(x + w / 2 + (2 if i else -2), 1),
            15.5,
            name,
            "on b" if i == now else "d" if i > now else None,
            "middle",
        )
        x += w + 1
    return svg(x + 2, HIGH + 1, out, f"States: {' to '.join(launch.path)}; now {launch.state.name}")


def _pages(launch: LaunchProgress, width: float) -> Html:
    """Guest-physical memory filling up; what lies in no memslot (SNP's VMSA) is in the table only."""
    done = [
        step
        for step in launch.steps
        if step.refused is None and step.gpa is not None and step.nr_pages
    ]
    planned = [(gpa // PAGE, nr, "") for gpa, nr in launch.planned]
    slots = launch.slots or tuple((gpa, nr * PAGE) for gpa, nr in launch.planned)
    strip = lay(slots, planned + _kinds(done), width, TRACK)
    painter, letters = Painter(strip), Html()
    for page, nr, _ in planned:
        painter.pages(page, nr, 0, TRACK, "c-plan")
    for step in done:
        painter.pages((step.gpa or 0) // PAGE, step.nr_pages, 0, TRACK, "c-enc")
        for x, y, _, _ in (
            strip.parts((step.gpa or 0) // PAGE, 1)
            if step.kind in LETTERS and strip.pitch >= 6
            else ()
        ):
            letters += text(
                round(x + strip.pitch / 2 - 0.5, 1),
                y + 9.5,
                LETTERS[step.kind],
                "one onc",
                "middle",
            )
    last = next(((step.gpa or 0) // PAGE for step in reversed(done)), None)
    values = [
        (
            (step.gpa or 0) // PAGE,
            step.nr_pages,
            f"{step.kind}, digest after it {step.digest[:8].hex()}…",
        )
        for step in done
    ]
    out = strip.frame + grid(
        "page",
        "Pages of the launch",
        strip.dots(TRACK / 2) + painter.drawn() + letters,
        rows=strip.rows,
        x=strip.left,
        pitch=strip.pitch,
        h=TRACK,
        at=last,
        each="Page {a}: {v}",
        none="Page {a}: not measured",
        size=PAGE,
        values=values,
    )
    return svg(width, strip.height, out, f"Launch: {plain(launch.status, 300)}")


def _kinds(done: list[LaunchStep]) -> list[Named]:
    """The measured ranges, neighbours of one kind joined."""
    out: list[Named] = []
    for page, nr, kind in sorted(
        ((step.gpa or 0) // PAGE, step.nr_pages, step.kind) for step in done
    ):
        joins = bool(out) and out[-1][2] == kind and out[-1][0] + out[-1][1] == page
        out[-1:] = [(out[-1][0], out[-1][1] + nr, kind)] if joins else [*out[-1:], (page, nr, kind)]
    return out


def _key(launch: LaunchProgress) -> Html:
    kinds = {step.kind for step in launch.steps if step.refused is None}
    return key(
        ("k-enc", "measured"),
        ("k-plan", "still to come") if launch.planned else None,
        ("k-dot", "not part of the launch"),
        *(
            (("k-enc", f"{letter}: {kind}") if kind in kinds else None)
            for kind, letter in LETTERS.items()
        ),
    )


def _steps(launch: LaunchProgress, width: float) -> Html:
    """Every command; of very many the first and the last ones."""
    steps = list(enumerate(launch.steps, 1))
    shown = (
        steps if len(steps) <= MAX_ROWS else steps[: MAX_ROWS // 4] + steps[-3 * MAX_ROWS // 4 :]
    )
    kept = 8 if width < 700 else 16 if width < 1100 else 32
    rows, last = list[Row](), 0
    for n, step in shown:
        if n > last + 1:
            rows.append((("", f"… {num(n - last - 1)} more", "", "", "", ""), {}))
        last = n
        bad = "bad" if step.found else None
        rows.append(
            (
                _cells(n, step, kept),
                {"cls": bad} if step.gpa is None else select("page", step.gpa // PAGE, bad),
            )
        )
    head: list[Cell] = [
        ("r", "#"),
        "command",
        ("hn", "kind"),
        "gpa",
        ("r", "pages"),
        "launch digest after it",
    ]
    return label("Commands", "every update adds its plaintext to the digest, in this order") + el(
        "div", table("commands of the launch", rows, head), cls="tbx"
    )


def _cells(n: int, step: LaunchStep, kept: int) -> list[Cell]:
    digest = Html()
    if step.found:
        who, code = (
            ("KVM", "") if step.refused is None else (step.refused.name, f" {step.refused:#04x}")
        )
        digest = el("span", el("b", f"✕ {who}"), f"{code}: {plain(step.found, 80)}", cls="ft")
    elif step.digest:
        digits = step.digest.hex()
        digest = _groups(digits[: 2 * kept]) + el(
            "span", "…" if len(digits) > 2 * kept else "", cls="d"
        )
    return [
        ("r", num(n)),
        plain(step.command, 40),
        ("hn", plain(step.kind, 20)),
        "" if step.gpa is None else hx(step.gpa),
        ("r", num(step.nr_pages) if step.nr_pages else ""),
        digest,
    ]


def _groups(digits: str) -> Html:
    """Hexadecimal in groups of eight digits."""
    return Html(" ".join(digits[at : at + 8] for at in range(0, len(digits), 8)))


def _owner(launch: LaunchProgress) -> Html:
    """What the owner of the guest can check."""
    rows: list[Row] = [
        ((("nm", "launch digest"), ("wr", _groups(launch.digest.hex()) or "none yet")), {})
    ]
    if launch.measurement:
        rows.append(((("nm", "measurement"), ("wr", _groups(launch.measurement.hex()))), {}))
    if launch.expected:
        same = launch.expected == launch.digest
        words = el(
            "span",
            "✓ equal to the launch digest" if same else "▲ not the launch digest",
            cls=None if same else "ft",
        )
        rows.append(
            (
                (("nm", "owner expects"), ("wr", _groups(launch.expected.hex()) + " " + words)),
                {"cls": None if same else "bad"},
            )
        )
    return label("Digest", "what the owner of the guest can check") + table(
        "digest and measurement", rows
    )


def _lines(launch: LaunchProgress, policy: str) -> list[str]:
    now = launch.path.index(launch.state.name)
    states = " -> ".join(f"[{name}]" if i == now else name for i, name in enumerate(launch.path))
    rows = [
        [
            num(n),
            plain(step.command, 40),
            plain(step.kind, 20),
            "" if step.gpa is None else hx(step.gpa),
            num(step.nr_pages),
            f"refused: {step.refused.name} {step.refused:#04x}"
            if step.refused is not None
            else f"refused by KVM: {plain(step.found, 80)}"
            if step.found
            else step.digest[:16].hex(),
        ]
        for n, step in enumerate(launch.steps, 1)
    ]
    lines = [
        f"policy {policy}",
        states,
        *aligned(
            [["#", "command", "kind", "gpa", "pages", "digest after"], *rows[-3 * MAX_ROWS :]]
        ),
    ]
    lines += [f"measurement {launch.measurement.hex()}"] * bool(launch.measurement)
    return lines + [f"owner expects {launch.expected.hex()}"] * bool(launch.expected)
