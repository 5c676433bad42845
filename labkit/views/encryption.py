"""Encryption: every page twice, above what the page tables say, below what memory holds, and where the two disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.look.encryption import EncryptionMap, EncryptionRange, PageState
from labkit.look.snapshots import Selection
from labkit.views.draw import (
    Html,
    aligned,
    cat,
    cross,
    el,
    grid,
    hx,
    key,
    label,
    num,
    path,
    plain,
    rect,
    select,
    svg,
    swatch,
    table,
    text,
)
from labkit.views.show import View, header, pane, rail, status_line
from labkit.views.strip import PAGE, Painter, Strip, lay

if TYPE_CHECKING:
    from labkit.views.draw import Cell, Row

__all__ = ["render", "status", "title"]

TRACK, SECOND = 9, 11  # height of a page in one track, and where the lower track begins
MAX_ROWS, MAX_PROBLEMS = 40, 6
ABOVE = {
    "encrypted": ((0, TRACK, "c-enc"),),
    "shared": ((0, TRACK, "c-shr"),),
    "both": ((0, 4, "c-enc"), (4.5, 4.5, "c-shr")),
}
BELOW = {
    PageState.PRIVATE: "c-enc",
    PageState.SHARED: "c-shr",
    PageState.UNLAUNCHED: "c-raw",
    PageState.UNVALIDATED: "c-epage",
    PageState.FOREIGN: "c-flt",
}
WORDS = {
    PageState.PRIVATE: "encrypted",
    PageState.SHARED: "plaintext",
    PageState.UNLAUNCHED: "plaintext, never launched",
    PageState.UNVALIDATED: "assigned, not validated",
    PageState.FOREIGN: "somebody else's",
}


def render(
    found: EncryptionMap,
    previous: object = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The map as a view; previous is not used: a change shows in the page tables and in the page itself."""
    bad, said = found.disagreements, status(found, selection)
    secret, shared = (
        el("b", num(found.nr_pages(state))) for state in (PageState.PRIVATE, PageState.SHARED)
    )
    counts = el(
        "span", secret, " pages encrypted, ", shared, " shared", ", " if bad else "", _count(bad)
    )
    panes = {
        "title": header("Encryption", map(plain, (found.protection, *found.facts)), counts=counts),
        "memory": label(
            "Memory", "each page twice: above what the page tables say, below what memory holds"
        )
        + _draw(found, width - 26, selection)
        + _key(found, selection),
        "problems": _problems(found),
        "ranges": _table(found, selection),
        "rail": rail(selection),
        "status": status_line(said),
    }
    return View(title(found), said, panes, cat(map(pane, panes)), lambda: _lines(found))


def title(found: EncryptionMap) -> str:
    """What the map is of, and when it was made."""
    return f"encryption, {plain(found.protection)}, {', '.join(map(plain, found.facts))}, step {num(found.step)}"


def status(found: EncryptionMap, selection: Selection | None = None) -> str:
    """The status sentence: of the selected page, or the first disagreement."""
    part = None if selection is None or selection.gpa is None else found.at(selection.gpa)
    if part is None or selection is None or selection.gpa is None:
        return plain(found.status, 600)
    head = f"Page {hx(selection.gpa & -PAGE)}{', ' if part.what else ''}{plain(part.what, 60)}: "
    return head + (
        f"{part.problem}. {part.why}"
        if part.problem
        else f"{_says(found, part)}, {WORDS[part.memory]}."
    )


def _count(bad: tuple[EncryptionRange, ...]) -> Html:
    return (
        el("span", "▲ ", el("b", num(sum(part.nr_pages for part in bad))), " disagree", cls="ft")
        if bad
        else Html()
    )


def _says(found: EncryptionMap, part: EncryptionRange) -> str:
    """What the page tables say, in words."""
    yes, no = found.words
    return {"encrypted": yes, "shared": no, "both": f"{yes} and {no}", "walked": "page table"}.get(
        part.tables, part.tables
    )


def _draw(found: EncryptionMap, width: float, selection: Selection | None) -> Html:
    used = [part for part in found.ranges if not part.is_free]
    noted = {part.gpa // PAGE: part.problem for part in found.disagreements}
    strip = lay(
        found.slots,
        [(part.gpa // PAGE, part.nr_pages, name) for part, name in _named(used)],
        width,
        SECOND + TRACK,
        noted,
    )
    painter = Painter(strip)
    for part in used:
        at = part.gpa // PAGE, part.nr_pages
        for down, tall, fill in ABOVE.get(part.tables, ()):
            painter.pages(*at, down, tall, fill)
        if part.what or part.tables != "not mapped" or part.memory is not PageState.SHARED:
            painter.pages(*at, SECOND, TRACK, BELOW[part.memory])
    chosen = None if selection is None or selection.gpa is None else selection.gpa // PAGE
    values = [(part.gpa // PAGE, part.nr_pages, _cell(found, part)) for part in used]
    out = strip.frame + grid(
        "page",
        "Encryption of guest memory",
        strip.dots(TRACK / 2) + strip.dots(SECOND + TRACK / 2) + painter.drawn(),
        rows=strip.rows,
        x=strip.left,
        pitch=strip.pitch,
        h=SECOND + TRACK,
        at=chosen,
        each="Page {a}: {v}",
        none="Page {a}: free",
        size=PAGE,
        values=values,
    )
    if chosen is not None:
        out += cat(
            rect(x - 1.5, y - 1.5, max(strip.pitch, 5) + 2, SECOND + TRACK + 3, "c-sel")
            for x, y, _, _ in strip.parts(chosen, 1)
        )
    crosses = [
        (x + i * strip.pitch, y + SECOND)
        for part in used
        if part.memory is PageState.FOREIGN and strip.pitch > 5
        for x, y, _, nr in strip.parts(part.gpa // PAGE, part.nr_pages)
        for i in range(nr)
    ]
    out += cross([(x + (strip.pitch - 6) / 2, y + 2) for x, y in crosses], 5) + _triangles(
        strip, noted, width
    )
    return svg(width, strip.height, out, f"Encryption: {status(found)}")


def _named(used: list[EncryptionRange]) -> list[tuple[EncryptionRange, str]]:
    """Every range with its name where a new use begins: neighbours of one use share a bracket's name."""
    out: list[tuple[EncryptionRange, str]] = []
    for part in used:
        last = out[-1][0] if out else None
        if (
            last is not None
            and last.what == part.what
            and last.gpa + last.nr_pages * PAGE == part.gpa
        ):
            joined = EncryptionRange(
                last.gpa, last.nr_pages + part.nr_pages, "", part.memory, (), 0, part.what
            )
            out[-1] = joined, out[-1][1]
        else:
            out.append((part, part.what))
    return out


def _cell(found: EncryptionMap, part: EncryptionRange) -> str:
    said = (
        plain(part.what, 60),
        _says(found, part),
        f"memory {WORDS[part.memory]}",
        "these disagree" * bool(part.problem),
    )
    return ", ".join(filter(None, said))


def _triangles(strip: Strip, noted: dict[int, str], width: float) -> Html:
    """A triangle under every disagreement; its words where there is room before the next one."""
    spots = [(x, y, noted[page]) for page in sorted(noted) for x, y, _, _ in strip.parts(page, 1)]
    out, tips, last = Html(), "", (0.0, -99.0)
    for i, (x, y, words) in enumerate(spots):
        middle, foot = x + min(strip.pitch, 9) / 2 - 0.5, y + SECOND + TRACK + 2
        end = next((other for other, below, _ in spots[i + 1 : i + 2] if below == y), width)
        if (y, middle) < (last[0], last[1] + 9) and y == last[0]:
            continue
        last = y, middle
        tips += f"M{middle:.1f} {foot:g}l4.5 7h-9z"
        long = 5.7 * len(words) + 12
        if middle + long <= end:
            out += text(round(middle + 8, 1), foot + 8, words, "s flt")
        elif end == width and (
            i == 0 or spots[i - 1][1] != y or spots[i - 1][0] + 2 * long < middle
        ):
            out += text(round(middle - 8, 1), foot + 8, words, "s flt", "end")
    return path(tips, "c-flt") + out


def _key(found: EncryptionMap, selection: Selection | None) -> Html:
    """Only the marks that occur."""
    tables, memory = (
        {part.tables for part in found.ranges},
        {part.memory for part in found.ranges if not part.is_free},
    )
    return key(
        ("k-enc", "encrypted (solid)"),
        ("k-shr", "shared (hollow)"),
        ("k-dot", "not mapped, free"),
        ("k-twice", "mapped both ways") if "both" in tables else None,
        ("k-raw", "plaintext, never launched") if PageState.UNLAUNCHED in memory else None,
        ("k-epage", "assigned, not validated") if PageState.UNVALIDATED in memory else None,
        ("k-flt", "somebody else's") if PageState.FOREIGN in memory else None,
        ("k-up", "page tables and memory disagree") if found.disagreements else None,
        ("k-sel", "selected page") if selection is not None and selection.gpa is not None else None,
    )


def _problems(found: EncryptionMap) -> Html:
    """The disagreements in sentences, equal ones once."""
    said: dict[str, list[str]] = {}
    for part in found.disagreements:
        said.setdefault(f"{part.problem}. {part.why}", []).append(part.place)
    rows = []
    for words, places in list(said.items())[:MAX_PROBLEMS]:
        more = f" and {num(len(places) - 3)} more" if len(places) > 3 else ""
        rows.append(
            el("div", el("b", f"▲ {', '.join(places[:3])}{more}: "), plain(words, 400), cls="hole")
        )
    more = (
        el("div", f"and {num(len(said) - MAX_PROBLEMS)} more kinds", cls="d")
        if len(said) > MAX_PROBLEMS
        else Html()
    )
    return cat(rows) + more


def _table(found: EncryptionMap, selection: Selection | None) -> Html:
    """The ranges in use; disagreements are never among those left out."""
    used = [part for part in found.ranges if not part.is_free]
    shown = sorted(
        (
            used
            if len(used) <= MAX_ROWS
            else [*found.disagreements, *(part for part in used if not part.problem)]
        )[:MAX_ROWS],
        key=lambda part: part.gpa,
    )
    here = None if selection is None or selection.gpa is None else found.at(selection.gpa)
    rows: list[Row] = [
        (
            _cells(found, part),
            select(
                "page",
                part.gpa // PAGE,
                " ".join(["bad"] * bool(part.problem) + ["sel"] * (part == here)) or None,
            ),
        )
        for part in shown
    ]
    more = f"; {num(len(shown))} of {num(len(used))} ranges" if len(used) > len(shown) else ""
    head: list[Cell] = [
        "",
        "gpa",
        ("r", "pages"),
        "page tables",
        "memory",
        ("hn", "gva"),
        "what lies there",
    ]
    return label(
        "Ranges", f"neighbours of which all is equal merged, free ones left out{more}"
    ) + el("div", table("encryption ranges", rows, head), cls="tbx")


def _cells(found: EncryptionMap, part: EncryptionRange) -> list[Cell]:
    both = part.tables == "both"
    tables = cat(
        [
            swatch(True, found.words[0]) if part.tables == "encrypted" or both else "",
            Html("<br>") if both else "",
            swatch(False, found.words[1]) if part.tables == "shared" or both else "",
            el("span", _says(found, part), cls="d")
            if part.tables in ("walked", "not mapped")
            else "",
        ]
    )
    private = part.memory is PageState.PRIVATE
    memory = el("span", cls=f"sw {'e' if private else 's'}") + el(
        "span", WORDS[part.memory], cls="et" if private else "st"
    )
    if part.memory in (PageState.UNVALIDATED, PageState.FOREIGN):
        memory = el("span", WORDS[part.memory], cls="ft")
    gvas = Html("<br>".join(map(hx, part.gvas)))
    more = (
        f" + {num(part.nr_mappings - len(part.gvas))}" if part.nr_mappings > len(part.gvas) else ""
    )
    where = cat(
        [hx(part.gpa), el("span", f" – {hx(part.gpa + part.nr_pages * PAGE - 1)}", cls="hn")]
    )
    mark: Cell = ("sg", "▲") if part.problem else ""
    return [
        mark,
        where,
        ("r", num(part.nr_pages)),
        tables,
        memory,
        ("hn", gvas + more),
        plain(part.what, 60),
    ]


def _lines(found: EncryptionMap) -> list[str]:
    used = [part for part in found.ranges if not part.is_free]
    rows = [
        [
            "!" if part.problem else " ",
            hx(part.gpa),
            num(part.nr_pages),
            f"{_says(found, part)}/{WORDS[part.memory]}",
            plain(part.what, 60),
        ]
        for part in used[: 2 * MAX_ROWS]
    ]
    lines = aligned([["", "gpa", "pages", "tables/memory", "what"], *rows])
    lines += [f"... {num(len(used) - len(rows))} more ranges"] * (len(used) > len(rows))
    return lines + [
        f"! {part.place}: {plain(part.problem)}. {plain(part.why, 400)}"
        for part in found.disagreements[: 2 * MAX_ROWS]
    ]
