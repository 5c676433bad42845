"""Guest memory with every page twice: above what the page tables say, below what memory holds."""

from __future__ import annotations

from labkit.look.encryption import EncryptionMap, EncryptionRange, PageState
from labkit.look.snapshots import Selection
from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.views.drawing.cells import grid
from labkit.views.drawing.markup import Html
from labkit.views.drawing.shapes import cross, path, svg, text
from labkit.views.drawing.strip import Painter, Strip, joined, lay, outline
from labkit.views.drawing.tables import key
from labkit.views.show import selected_gpa

__all__ = ["MEMORY_WORDS", "draw_strip", "says", "strip_key"]

TRACK = 9  # height of a page in one track
SECOND = 11  # where the lower track begins
BOTH = SECOND + TRACK

# What page tables say: (pixels from the top of the track, height, fill) of each piece of a page.
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
MEMORY_WORDS = {
    PageState.PRIVATE: "encrypted",
    PageState.SHARED: "plaintext",
    PageState.UNLAUNCHED: "plaintext, never launched",
    PageState.UNVALIDATED: "assigned, not validated",
    PageState.FOREIGN: "somebody else's",
}


def says(found: EncryptionMap, part: EncryptionRange) -> str:
    """What the page tables say, in words."""
    yes, no = found.words
    words = {
        "encrypted": yes,
        "shared": no,
        "both": f"{yes} and {no}",
        "walked": "page table",
    }
    return words.get(part.tables, part.tables)


def draw_strip(found: EncryptionMap, width: float, selection: Selection | None) -> Html:
    """The strip; where the colours of the two tracks differ a triangle says which way."""
    used = [part for part in found.ranges if not part.is_free]
    named = joined((_page(part), part.nr_pages, part.what) for part in used)
    noted = {_page(part): part.problem for part in found.disagreements}
    strip = lay(found.slots, named, width, BOTH, noted)
    gpa = selected_gpa(selection)
    chosen = None if gpa is None else gpa // PAGE

    pages = strip.dots(TRACK / 2) + strip.dots(SECOND + TRACK / 2) + _painted(strip, used)
    out = strip.frame + grid(
        "page",
        "Encryption of guest memory",
        pages,
        rows=strip.rows,
        x=strip.left,
        pitch=strip.pitch,
        h=BOTH,
        at=chosen,
        each="Page {a}: {v}",
        none="Page {a}: free",
        size=PAGE,
        values=[(_page(part), part.nr_pages, _sentence(found, part)) for part in used],
    )
    out += outline(strip, chosen, BOTH)
    out += _crosses(strip, used)
    out += _triangles(strip, noted, width)
    return svg(width, strip.height, out, f"Encryption: {plain(found.status, 600)}")


def _page(part: EncryptionRange) -> int:
    return part.gpa // PAGE


def _painted(strip: Strip, used: list[EncryptionRange]) -> Html:
    """Both tracks; memory that nobody maps and that is plaintext says nothing."""
    painter = Painter(strip)
    for part in used:
        page, nr_pages = _page(part), part.nr_pages
        for down, tall, fill in ABOVE.get(part.tables, ()):
            painter.pages(page, nr_pages, down, tall, fill)
        if part.what or part.tables != "not mapped" or part.memory is not PageState.SHARED:
            painter.pages(page, nr_pages, SECOND, TRACK, BELOW[part.memory])
    return painter.drawn()


def _sentence(found: EncryptionMap, part: EncryptionRange) -> str:
    """What hovering over a page says."""
    words = [says(found, part), f"memory {MEMORY_WORDS[part.memory]}"]
    if part.what:
        words.insert(0, plain(part.what, 60))
    if part.problem:
        words.append("these disagree")
    return ", ".join(words)


def _crosses(strip: Strip, used: list[EncryptionRange]) -> Html:
    """A cross in every page that belongs to somebody else, where there is room for one."""
    if strip.pitch <= 5:
        return Html()
    places = []
    for part in used:
        if part.memory is not PageState.FOREIGN:
            continue
        for x, y, _, nr in strip.parts(_page(part), part.nr_pages):
            for i in range(nr):
                left = x + i * strip.pitch
                places.append((left + (strip.pitch - 6) / 2, y + SECOND + 2))
    return cross(places, 5)


def _triangles(strip: Strip, noted: dict[int, str], width: float) -> Html:
    """A triangle under every disagreement; its words where there is room before the next one."""
    spots = [(x, y, noted[page]) for page in sorted(noted) for x, y, _, _ in strip.parts(page, 1)]
    tips = ""
    notes = Html()
    last: tuple[float, float] | None = None  # y and middle of the triangle drawn last
    for i, (x, y, _) in enumerate(spots):
        middle = x + min(strip.pitch, 9) / 2 - 0.5
        if last is not None and last[0] == y and middle < last[1] + 9:
            continue
        last = y, middle
        foot = y + BOTH + 2
        tips += f"M{middle:.1f} {foot:g}l4.5 7h-9z"
        notes += _note(spots, i, middle, foot + 8, width)
    return path(tips, "c-flt") + notes


def _note(
    spots: list[tuple[float, float, str]], i: int, middle: float, y: float, width: float
) -> Html:
    """The words beside a triangle: at its right if they fit, else at its left, else nowhere."""
    _, row, words = spots[i]
    long = 5.7 * len(words) + 12
    before = [x for x, other, _ in spots[max(i - 1, 0) : i] if other == row]
    after = [x for x, other, _ in spots[i + 1 : i + 2] if other == row]
    if middle + long <= min([width, *after]):
        return text(round(middle + 8, 1), y, words, "s flt")

    # At the left half of the room belongs to the neighbour's words.
    if not after and all(x + 2 * long < middle for x in before):
        return text(round(middle - 8, 1), y, words, "s flt", "end")
    return Html()


def strip_key(found: EncryptionMap, selection: Selection | None) -> Html:
    """Only the marks that occur."""
    tables = {part.tables for part in found.ranges}
    memory = {part.memory for part in found.ranges if not part.is_free}
    marks = [
        ("k-enc", "encrypted (solid)"),
        ("k-shr", "shared (hollow)"),
        ("k-dot", "not mapped, free"),
    ]
    if "both" in tables:
        marks.append(("k-twice", "mapped both ways"))
    if PageState.UNLAUNCHED in memory:
        marks.append(("k-raw", "plaintext, never launched"))
    if PageState.UNVALIDATED in memory:
        marks.append(("k-epage", "assigned, not validated"))
    if PageState.FOREIGN in memory:
        marks.append(("k-flt", "somebody else's"))
    if found.disagreements:
        marks.append(("k-up", "page tables and memory disagree"))
    if selected_gpa(selection) is not None:
        marks.append(("k-sel", "selected page"))
    return key(*marks)
