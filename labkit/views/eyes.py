"""One page through two eyes: the host's hexdump beside the guest's, a row is a cipher block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from labkit.look.eyes import BLOCK, Eye, PageEyes
from labkit.look.snapshots import Selection
from labkit.outside import plain
from labkit.views.drawing.markup import Html, cat, el, hx
from labkit.views.drawing.shapes import NARROW, WIDE
from labkit.views.drawing.tables import Cell, Row, boxed, label, select, swatch
from labkit.views.pictures.blocks import about, draw_maps, map_key
from labkit.views.show import View, columns, header, pane, rail, status_line
from labkit.words import num, plural

__all__ = ["ROWS", "SIDES", "render"]

ROWS = 14  # of the dump; the rest is a click on the map away
SIDES = columns("eyes", pane("dump"), el("div", pane("blocks"), pane("words"), cls="side"))
LAYOUT = cat([pane("title"), SIDES, pane("rail"), pane("status")])


def render(
    page: PageEyes,
    previous: PageEyes | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The page as a view; rows follow the selection.

    Changes are marked against previous where that is the same page, else against the bytes that
    the page brings along.
    """
    page = _marked(page, previous)
    chosen = _chosen_block(page, selection)
    rows = _rows(page, chosen)
    said = plain(page.status, 300)
    what = f", {plain(page.what, 40)}" if page.what else ""
    since = "" if page.since_step is None else f", since step {num(page.since_step)}"
    nr_blocks = len(page.host) // BLOCK
    panes = {
        "title": header("One page, two eyes", _facts(page), page.step),
        "dump": label(f"Page {hx(page.gpa)}{what}", f"each row is one 16-byte cipher block{since}")
        + _dump(page, rows, chosen, narrow=width < NARROW),
        "blocks": label("The page", f"{num(nr_blocks)} blocks, to choose from")
        + draw_maps(page, rows, chosen, 6 if width < WIDE else 9)
        + map_key(page),
        "words": _words(page),
        "rail": rail(selection, page.private),
        "status": status_line(said),
    }
    title = f"page {hx(page.gpa)} through two eyes, step {num(page.step)}"
    return View(title, said, panes, LAYOUT, lambda: _lines(page, rows))


def _marked(page: PageEyes, previous: PageEyes | None) -> PageEyes:
    """The page with previous as what either eye saw before, where that is the same page."""
    if previous is None:
        return page
    is_same_page = (previous.gpa, len(previous.host)) == (page.gpa, len(page.host))
    return page.since(previous) if is_same_page else page


def _chosen_block(page: PageEyes, selection: Selection | None) -> int | None:
    """The number of the selected block, None where the selection lies in another page."""
    if selection is None or selection.gpa is None:
        return None
    offset = selection.gpa - page.gpa
    if not 0 <= offset < len(page.host):
        return None
    return offset // BLOCK


def _facts(page: PageEyes) -> list[str]:
    """For the header: what lies there, where, what memory is, how the guest looks."""
    facts: list[str] = []
    if page.what:
        facts.append(plain(page.what))
    if page.gva is not None:
        facts.append(el("span", f"gva {hx(page.gva)}", cls="mono"))
    facts.append(el("span", f"gpa {hx(page.gpa)}", cls="mono"))
    facts.append(swatch(page.private, clear="plaintext"))
    if page.word:
        facts.append(f"the guest looks with {plain(page.word, 12)}")
    return facts


def _rows(page: PageEyes, chosen: int | None) -> list[int]:
    """The blocks to show.

    Around the chosen one; without one every changed block with its neighbours; without any of
    those from the first block on that is not zero for the guest.
    """
    host, guest = page.eyes
    nr = len(host.blocks)
    changed = np.flatnonzero(host.changed.any(axis=1) | guest.changed.any(axis=1)).tolist()
    if chosen is None and changed:
        return _rows_around(changed, nr)

    if chosen is not None:
        first = chosen - ROWS // 2
    else:
        first = int(guest.blocks.any(axis=1).argmax())
    first = max(min(first, nr - ROWS), 0)
    return list(range(first, min(first + ROWS, nr)))


def _rows_around(changed: list[int], nr: int) -> list[int]:
    """The changed blocks with as many neighbours as there is room for."""
    near = next((near for near in (3, 2, 1) if len(_around(changed, near, nr)) <= ROWS), 0)
    rows = _around(changed, near, nr)[:ROWS]
    while len(rows) < min(ROWS, nr) and rows[-1] - rows[0] < nr - 1:
        # There is room left: more of the page around them.
        if rows[-1] + 1 < nr:
            rows.append(rows[-1] + 1)
        else:
            rows.insert(0, rows[0] - 1)
    return rows


def _around(blocks: list[int], near: int, nr: int) -> list[int]:
    """Blocks with their neighbours up to `near` away, in order."""
    out = set[int]()
    for block in blocks:
        out.update(range(max(block - near, 0), min(block + near, nr - 1) + 1))
    return sorted(out)


def _dump(page: PageEyes, rows: list[int], chosen: int | None, narrow: bool) -> Html:
    """The hexdump; blocks left out are counted."""
    out = list[Row]()
    for at, nr_skipped in _with_gaps(rows):
        if nr_skipped:
            out.append((("", ("d", f"… {num(nr_skipped)} blocks as before"), "", ""), {}))
        if page.gva is None:
            kind, value = "page", str(page.gpa >> 12)
        else:
            kind, value = "byte", hx(page.gva + at * BLOCK)
        action = select(kind, value, "sel" if at == chosen else None)
        out.append((_dump_row(page, at, narrow), action))

    host, guest = page.eyes
    head: list[Cell] = [
        "",
        ("et" if page.private else "st", plain(host.name, 40)),
        plain(guest.name, 40),
        ("hn", "as text"),
    ]
    return boxed("bytes as host and guest see them", out, head, cls="hex")


def _with_gaps(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Each block with how many were left out before it, after the first that is shown."""
    last = None
    for at in rows:
        yield at, 0 if last is None else at - last - 1
        last = at


def _dump_row(page: PageEyes, at: int, narrow: bool) -> list[Cell]:
    host, guest = page.eyes
    tint = "eh" if page.private else "es"
    return [
        ("ad", f"{_offset(page, at):03x}"),
        (_mark(host, at, tint), _hex(host, at, narrow)),
        (_mark(guest, at, "eg"), _hex(guest, at, narrow)),
        ("hn", _ascii(guest, at)),
    ]


def _offset(page: PageEyes, at: int) -> int:
    """Where a block lies in its 4 KiB page."""
    return page.gpa + at * BLOCK & 0xFFF


def _mark(eye: Eye, at: int, cls: str) -> str:
    """A row that changed has a bar at its left."""
    return f"{cls} cc" if eye.changed[at].any() else cls


def _runs(eye: Eye, at: int) -> Iterator[tuple[str | None, int, int]]:
    """Neighbouring bytes that look the same: (class, first, end)."""
    kinds: list[str | None] = []
    for byte, is_changed in zip(eye.blocks[at].tolist(), eye.changed[at].tolist(), strict=True):
        if is_changed:
            kinds.append("cb")
        else:
            kinds.append(None if byte else "d")

    start = 0
    for i in range(1, BLOCK + 1):
        if i == BLOCK or kinds[i] != kinds[start]:
            yield kinds[start], start, i
            start = i


def _hex(eye: Eye, at: int, narrow: bool) -> Html:
    """The bytes of a block in hexadecimal, in groups of four where there is room."""
    digits = [f"{byte:02x}" for byte in eye.blocks[at].tolist()]
    if not narrow:
        for i in range(3, BLOCK - 1, 4):
            digits[i] += " "
    if eye.changed[at].all():  # a whole block: one mark, not sixteen
        return el("span", "".join(digits), cls="cb")
    return cat(el("span", "".join(digits[low:end]), cls=cls) for cls, low, end in _runs(eye, at))


def _ascii(eye: Eye, at: int) -> Html:
    words = _characters(eye, at, "·")
    return cat(el("span", words[low:end], cls=cls) for cls, low, end in _runs(eye, at))


def _characters(eye: Eye, at: int, other: str) -> str:
    """The bytes of a block as text, `other` for what ASCII does not print."""
    return "".join(chr(byte) if 32 <= byte < 127 else other for byte in eye.blocks[at].tolist())


def _words(page: PageEyes) -> Html:
    """The figures: how much like noise either eye's bytes are, and how much changed for it."""
    host, guest = page.eyes
    lines = [_noise("host", host), _noise("guest", guest)]
    nr_guest = int(guest.changed.sum())
    nr_host = int(host.changed.sum())
    if nr_guest or nr_host:
        if (host.changed == guest.changed).all():
            end = ": the same."
        else:
            end = ": whole blocks." if nr_host > nr_guest else "."
        nr = el("b", num(nr_guest), cls="ct")
        lines.append(el("div", "The guest sees ", nr, f" {plural('byte', nr_guest)} changed,"))
        lines.append(el("div", "the host ", el("b", num(nr_host), cls="ct"), end))
    return el("div", *lines, cls="say")


def _noise(who: str, eye: Eye) -> Html:
    return el(
        "div",
        el("b", f"{eye.entropy:.2f}"),
        f" of 8 bits a byte for the {who}, ",
        el("b", num(eye.nr_different)),
        f" different {plural('block', eye.nr_different)}",
    )


def _lines(page: PageEyes, rows: list[int]) -> list[str]:
    host, guest = page.eyes
    out = [f"      {plain(host.name, 34):<36}{plain(guest.name, 34)}"]
    for at, nr_skipped in _with_gaps(rows):
        if nr_skipped:
            out.append(f"      ... {num(nr_skipped)} blocks as before")
        mark = "*" if host.changed[at].any() or guest.changed[at].any() else " "
        both = f"{_words_of_four(host, at)}  {_words_of_four(guest, at)}"
        out.append(f"{mark} {_offset(page, at):03x} {both}  {_characters(guest, at, '.')}")
    return [*out, about(host), about(guest)]


def _words_of_four(eye: Eye, at: int) -> str:
    """The bytes of a block in hexadecimal, in groups of four."""
    data: bytes = eye.blocks[at].tobytes()
    return data.hex(" ", 4)
