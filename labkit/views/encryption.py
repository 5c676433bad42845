"""Encryption: what the page tables say of every page, what memory holds, where the two disagree."""

from __future__ import annotations

from labkit.look.encryption import EncryptionMap, EncryptionRange, PageState
from labkit.look.snapshots import Selection
from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.views.drawing.markup import Html, cat, el, hx
from labkit.views.drawing.tables import (
    Cell,
    Row,
    aligned,
    boxed,
    classes,
    label,
    select,
    swatch,
)
from labkit.views.pictures.encryption import MEMORY_WORDS, draw_strip, says, strip_key
from labkit.views.show import FRAME, View, header, pane, rail, selected_gpa, status_line
from labkit.words import num

__all__ = ["render", "status", "title"]

MAX_ROWS = 40
MAX_PROBLEMS = 6
MAX_PLACES = 3  # named of one problem
LINE = Html("<br>")


def render(
    found: EncryptionMap,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The map as a view.

    previous is not used: a change shows in the page tables and in the page itself.
    """
    said = status(found, selection)
    facts = map(plain, (found.protection, *found.facts))
    explained = "each page twice: above what the page tables say, below what memory holds"
    panes = {
        "title": header("Encryption", facts, counts=_counts(found)),
        "memory": label("Memory", explained)
        + draw_strip(found, width - FRAME, selection)
        + strip_key(found, selection),
        "problems": _problems(found),
        "ranges": _table(found, selection),
        "rail": rail(selection),
        "status": status_line(said),
    }
    return View(title(found), said, panes, cat(map(pane, panes)), lambda: _lines(found))


def title(found: EncryptionMap) -> str:
    """What the map is of, and when it was made."""
    facts = ", ".join(map(plain, found.facts))
    return f"encryption, {plain(found.protection)}, {facts}, step {num(found.step)}"


def status(found: EncryptionMap, selection: Selection | None = None) -> str:
    """The status sentence: of the selected page, or the first disagreement."""
    gpa = selected_gpa(selection)
    part = None if gpa is None else found.at(gpa)
    if gpa is None or part is None:
        return plain(found.status, 600)

    what = f", {plain(part.what, 60)}" if part.what else ""
    head = f"Page {hx(gpa & -PAGE)}{what}: "
    if part.problem:
        return f"{head}{part.problem}. {part.why}"
    return f"{head}{says(found, part)}, {MEMORY_WORDS[part.memory]}."


def _counts(found: EncryptionMap) -> Html:
    """How many pages are what, for the header."""
    parts = [
        el("b", num(found.nr_pages(PageState.PRIVATE))),
        " pages encrypted, ",
        el("b", num(found.nr_pages(PageState.SHARED))),
        " shared",
    ]
    if found.disagreements:
        nr_bad = sum(part.nr_pages for part in found.disagreements)
        parts += [", ", el("span", "▲ ", el("b", num(nr_bad)), " disagree", cls="ft")]
    return el("span", *parts)


def _problems(found: EncryptionMap) -> Html:
    """The disagreements in sentences, equal ones once."""
    places_of: dict[str, list[str]] = {}
    for part in found.disagreements:
        places_of.setdefault(f"{part.problem}. {part.why}", []).append(part.place)

    out = []
    for words, places in list(places_of.items())[:MAX_PROBLEMS]:
        named = ", ".join(places[:MAX_PLACES])
        if len(places) > MAX_PLACES:
            named += f" and {num(len(places) - MAX_PLACES)} more"
        out.append(el("div", el("b", f"▲ {named}: "), plain(words, 400), cls="hole"))
    nr_more = len(places_of) - MAX_PROBLEMS
    if nr_more > 0:
        out.append(el("div", f"and {num(nr_more)} more kinds", cls="d"))
    return cat(out)


def _table(found: EncryptionMap, selection: Selection | None) -> Html:
    """The ranges in use; disagreements are never among those left out."""
    used = [part for part in found.ranges if not part.is_free]
    shown = _worth_showing(found, used)
    gpa = selected_gpa(selection)
    here = None if gpa is None else found.at(gpa)
    rows: list[Row] = []
    for part in shown:
        cls = classes(bad=bool(part.problem), sel=part == here)
        rows.append((_cells(found, part), select("page", part.gpa // PAGE, cls)))

    head: list[Cell] = ["", "gpa", ("r", "pages"), "page tables", "memory"]
    head += [("hn", "gva"), "what lies there"]
    said = "neighbours of which all is equal merged, free ones left out"
    if len(used) > len(shown):
        said += f"; {num(len(shown))} of {num(len(used))} ranges"
    return label("Ranges", said) + boxed("encryption ranges", rows, head)


def _worth_showing(found: EncryptionMap, used: list[EncryptionRange]) -> list[EncryptionRange]:
    """At most MAX_ROWS ranges, by gpa: the disagreements first of all, then from the lowest."""
    if len(used) <= MAX_ROWS:
        chosen = used
    else:
        fine = [part for part in used if not part.problem]
        chosen = [*found.disagreements, *fine][:MAX_ROWS]
    return sorted(chosen, key=lambda part: part.gpa)


def _cells(found: EncryptionMap, part: EncryptionRange) -> list[Cell]:
    last = part.gpa + part.nr_pages * PAGE - 1
    gvas = Html(LINE.join(map(hx, part.gvas)))
    nr_more = part.nr_mappings - len(part.gvas)
    if nr_more > 0:
        gvas += f" + {num(nr_more)}"
    return [
        ("sg", "▲") if part.problem else "",
        cat([hx(part.gpa), el("span", f" – {hx(last)}", cls="hn")]),
        ("r", num(part.nr_pages)),
        _tables_cell(found, part),
        _memory_cell(part),
        ("hn", gvas),
        plain(part.what, 60),
    ]


def _tables_cell(found: EncryptionMap, part: EncryptionRange) -> Html:
    """What the page tables say, with a swatch for each way in which they map the range."""
    yes, no = found.words
    match part.tables:
        case "encrypted":
            return swatch(True, yes)
        case "shared":
            return swatch(False, no)
        case "both":
            return swatch(True, yes) + LINE + swatch(False, no)
        case "walked" | "not mapped":
            return el("span", says(found, part), cls="d")
    return Html()


def _memory_cell(part: EncryptionRange) -> Html:
    """What memory holds."""
    words = MEMORY_WORDS[part.memory]
    if part.memory in (PageState.UNVALIDATED, PageState.FOREIGN):
        return el("span", words, cls="ft")
    if part.memory is PageState.PRIVATE:
        return el("span", cls="sw e") + el("span", words, cls="et")
    return el("span", cls="sw s") + el("span", words, cls="st")


def _lines(found: EncryptionMap) -> list[str]:
    used = [part for part in found.ranges if not part.is_free]
    rows = [["", "gpa", "pages", "tables/memory", "what"]]
    for part in used[: 2 * MAX_ROWS]:
        rows.append(
            [
                "!" if part.problem else " ",
                hx(part.gpa),
                num(part.nr_pages),
                f"{says(found, part)}/{MEMORY_WORDS[part.memory]}",
                plain(part.what, 60),
            ]
        )

    lines = aligned(rows)
    nr_more = len(used) - 2 * MAX_ROWS
    if nr_more > 0:
        lines.append(f"... {num(nr_more)} more ranges")
    for part in found.disagreements[: 2 * MAX_ROWS]:
        lines.append(f"! {part.place}: {plain(part.problem)}. {plain(part.why, 400)}")
    return lines
