"""What an address space maps, as a table of ranges, and what changed since an earlier snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from labkit.machine.memory import PAGE
from labkit.outside import plain
from labkit.paging.scan import PageTable
from labkit.views.drawing.markup import Html, hx
from labkit.views.drawing.tables import Cell, Row, boxed, label, select, swatch
from labkit.views.pictures.walk_plan import size_name
from labkit.words import num

__all__ = ["MAX_ROWS", "Change", "change_table", "changes_between", "range_table", "summary"]

MAX_ROWS = 40
TRACES = ("accessed", "dirty")  # flags that the CPU sets: they split no range

# sign -> (what it says, class of the row)
SIGNS = {"+": ("added", "chg"), "-": ("removed", "del"), "~": ("changed", "chg")}


class Change(NamedTuple):
    """A range that is mapped otherwise than before."""

    sign: str  # one of SIGNS
    gva: int
    gva_end: int
    nr_pages: int
    before: str  # "" when nothing was mapped
    after: str


def range_table(found: PageTable, here: int | None = None) -> Html:
    """The mapped ranges, the one that holds gva `here` outlined; a click walks to a first page."""
    first, last = found.ranges(tuple(name for name in TRACES if name in found.mode.flags))
    nr_ranges = len(first)
    shown = zip(first[:MAX_ROWS].tolist(), last[:MAX_ROWS].tolist(), strict=True)
    rows = [_range_row(found, low, high, here) for low, high in shown]

    head: list[Cell] = ["gva", ("r", "pages"), ("hn", "gpa"), "access"]
    head += [*_bit_head(found), "what lies there"]
    said = (
        f"{num(len(found))} pages in {num(nr_ranges)} ranges, neighbours with equal access merged"
    )
    if nr_ranges > MAX_ROWS:
        said += f"; the first {MAX_ROWS} ranges"
    return label("Mapped ranges", said) + boxed("mapped ranges", rows, head)


def _range_row(found: PageTable, low: int, high: int, here: int | None) -> Row:
    """The leaves from low to high as one row."""
    gva = int(found.gva[low])
    size = int(found.size[low])
    end = int(found.gva[high]) + size - 1
    flags = found.mode.rights(int(found.rights[low]))
    count = num(high - low + 1)
    if size != PAGE:
        count += f" × {size_name(size)}"

    cells: list[Cell] = [
        f"{hx(gva)} – {hx(end)}",
        ("r", count),
        ("hn", hx(int(found.gpa[low]))),
        _access(flags),
    ]
    if found.mode.c_bit is not None:
        cells.append(swatch(flags["c"], found.mode.c_word(flags["c"])))
    cells.append(_what(found, gva, end))
    is_here = here is not None and gva <= here <= end
    return cells, select("byte", hx(gva), "sel" if is_here else None)


def _access(flags: dict[str, bool]) -> str:
    """Rights as letters: "rw-u"."""
    out = "r"
    out += "w" if flags.get("writable", False) else "-"
    out += "-" if flags.get("nx", False) else "x"
    if flags.get("user", False):
        out += "u"
    return out


def _what(found: PageTable, gva: int, end: int) -> str:
    """What lies in a range, by its first and its last byte."""
    low = plain(found.label(gva), 60)
    high = plain(found.label(end), 60)
    if low == high or not high:
        return low
    return f"{low} .. {high}"


def changes_between(previous: PageTable | None, found: PageTable) -> list[Change]:
    """What differs between two snapshots of one format, by gva."""
    if previous is None or previous.mode != found.mode or previous.tables == found.tables:
        return []
    return [
        Change(
            str(row.sign),
            int(row.gva),
            int(row.gva_end),
            int(row.nr_pages),
            str(row.before),
            str(row.after),
        )
        for row in found.diff(previous).itertuples()
    ]


def summary(changes: Sequence[Change], previous: PageTable | None) -> str:
    """How many pages were added, removed and changed, and since which step."""
    counts = []
    for sign, (word, _) in SIGNS.items():
        nr_pages = sum(change.nr_pages for change in changes if change.sign == sign)
        if nr_pages:
            counts.append(f"{num(nr_pages)} {word}")
    said = ", ".join(counts) or "none"
    if previous is None or previous.step is None:
        return said
    return f"{said} since step {num(previous.step)}"


def change_table(changes: Sequence[Change], found: PageTable, previous: PageTable | None) -> Html:
    """What changed, as rows of + - ~ with the removed ones struck out."""
    if previous is None:
        return Html()
    more = ""
    if len(changes) > MAX_ROWS:
        more = f"; the first {MAX_ROWS} of {num(len(changes))} ranges"
    head = label("Changes", f"pages: {summary(changes, previous)}{more}")
    if not changes:
        return head
    rows = [_change_row(change, found, previous) for change in changes[:MAX_ROWS]]
    names = ["", "gva", ("r", "pages"), *_bit_head(found), "before", "after"]
    return head + boxed("changes", rows, names)


def _change_row(change: Change, found: PageTable, previous: PageTable) -> Row:
    cells: list[Cell] = [
        ("sg", change.sign.replace("-", "−")),
        f"{hx(change.gva)} – {hx(change.gva_end)}",
        ("r", num(change.nr_pages)),
    ]
    if found.mode.c_bit is not None:
        was = Html() if change.sign == "+" else _bit(previous, change.gva)
        now = Html() if change.sign == "-" else _bit(found, change.gva)
        bits = [now] if was == now else [was, now]
        cells.append(Html(" → ".join(bit for bit in bits if bit)))
    cells += [change.before, change.after]
    _, cls = SIGNS[change.sign]
    return cells, select("byte", hx(change.gva), cls)


def _bit_head(found: PageTable) -> list[Cell]:
    """The head of the column that says whether pages are encrypted, where there is one."""
    return [] if found.mode.c_bit is None else [f"{found.mode.c_name}-bit"]


def _bit(found: PageTable, gva: int) -> Html:
    """What a snapshot says of one page's encryption."""
    flags = found.walk(gva).flags
    if "c" not in flags:
        return Html()
    return swatch(flags["c"], found.mode.c_word(flags["c"]))
