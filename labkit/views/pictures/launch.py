"""A launch in two pictures: the states on its way, and guest memory filling up."""

from __future__ import annotations

from typing import NamedTuple

from labkit.look.launch import LaunchProgress
from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.views.drawing.cells import grid
from labkit.views.drawing.markup import Html
from labkit.views.drawing.shapes import path, svg, text
from labkit.views.drawing.strip import Painter, Strip, joined, lay
from labkit.views.drawing.tables import key

__all__ = ["draw_pages", "draw_states", "pages_key"]

TRACK = 12  # height of a page
HIGH = 22  # of a chevron
TIP = 9  # how far a chevron reaches into the next one

# Kinds of pages other than plain contents.
LETTERS = {"VMSA": "V", "ZERO": "0", "UNMEASURED": "U", "SECRETS": "S", "CPUID": "C"}


class _Measured(NamedTuple):
    """A range of pages in guest memory that a command measured."""

    page: int
    nr_pages: int
    kind: str
    digest: bytes


def draw_states(launch: LaunchProgress, width: float) -> Html:
    """The states in a row: dark the present one, tinted those behind it, hollow those to come."""
    now = launch.path.index(launch.state.name)
    letter = 7.6 if width > 640 else 6.6
    half = HIGH / 2
    out = Html()
    x = 0.5
    for i, name in enumerate(launch.path):
        if i == now:
            fill, ink = "c-ink", "on b"
        elif i < now:
            fill, ink = "c-cell2", None
        else:
            fill, ink = "c-off", "d"

        w = letter * len(name) + 30
        tail = f"l{TIP} {-half:g}z" if i else "z"  # the first one has a straight left edge
        shape = f"M{x:g} .5h{w - TIP:g}l{TIP} {half:g}l-{TIP} {half:g}h{TIP - w:g}{tail}"
        middle = x + w / 2 + (2 if i else -2)
        out += path(shape, fill)
        out += text(round(middle, 1), 15.5, name, ink, "middle")
        x += w + 1
    words = f"States: {' to '.join(launch.path)}; now {launch.state.name}"
    return svg(x + 2, HIGH + 1, out, words)


def draw_pages(launch: LaunchProgress, width: float) -> Html:
    """Guest-physical memory filling up.

    What lies in no memslot (SNP's VMSA) is in the table of the commands only.
    """
    done = _measured(launch)
    planned = [(gpa // PAGE, nr, "") for gpa, nr in launch.planned]
    kinds = joined(sorted((part.page, part.nr_pages, part.kind) for part in done))
    slots = launch.slots or tuple((gpa, nr * PAGE) for gpa, nr in launch.planned)
    strip = lay(slots, planned + kinds, width, TRACK)

    painter = Painter(strip)
    for page, nr_pages, _ in planned:
        painter.pages(page, nr_pages, 0, TRACK, "c-plan")
    letters = Html()
    for part in done:
        painter.pages(part.page, part.nr_pages, 0, TRACK, "c-enc")
        letters += _letter(strip, part)

    out = strip.frame + grid(
        "page",
        "Pages of the launch",
        strip.dots(TRACK / 2) + painter.drawn() + letters,
        rows=strip.rows,
        x=strip.left,
        pitch=strip.pitch,
        h=TRACK,
        at=done[-1].page if done else None,
        each="Page {a}: {v}",
        none="Page {a}: not measured",
        size=PAGE,
        values=[(part.page, part.nr_pages, _sentence(part)) for part in done],
    )
    return svg(width, strip.height, out, f"Launch: {plain(launch.status, 300)}")


def _measured(launch: LaunchProgress) -> list[_Measured]:
    """What the commands so far measured, in their order."""
    return [
        _Measured(step.gpa // PAGE, step.nr_pages, step.kind, step.digest)
        for step in launch.steps
        if step.refused is None and step.gpa is not None and step.nr_pages
    ]


def _letter(strip: Strip, part: _Measured) -> Html:
    """The letter of a kind in the first page, where there is room for it."""
    out = Html()
    if part.kind in LETTERS and strip.pitch >= 6:
        for x, y, _, _ in strip.parts(part.page, 1):
            middle = round(x + strip.pitch / 2 - 0.5, 1)
            out += text(middle, y + 9.5, LETTERS[part.kind], "one onc", "middle")
    return out


def _sentence(part: _Measured) -> str:
    """What hovering over a page says."""
    return f"{part.kind}, digest after it {part.digest[:8].hex()}…"


def pages_key(launch: LaunchProgress) -> Html:
    """The key of the pages, with the letters that occur."""
    kinds = {step.kind for step in launch.steps if step.refused is None}
    letters = [("k-enc", f"{LETTERS[kind]}: {kind}") for kind in LETTERS if kind in kinds]
    return key(
        ("k-enc", "measured"),
        ("k-plan", "still to come") if launch.planned else None,
        ("k-dot", "not part of the launch"),
        *letters,
    )
