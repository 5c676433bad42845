"""One page through two eyes: the host's hexdump beside the guest's, a row is a cipher block, and the page as a map of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from labkit.look.eyes import BLOCK, Eye, PageEyes
from labkit.look.snapshots import Selection
from labkit.views.show import View, columns, header, pane, rail, status_line

# isort: off
from labkit.views.draw import (
    Cell,
    Html,
    Lattice,
    Row,
    bar,
    cat,
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
    squares,
    svg,
    swatch,
    table,
    text,
)

__all__ = ["SIDES", "render"]

ROWS = 14  # of the dump; the rest is a click on the map away
COLS = 16  # blocks a row of the map
SIDES = columns("eyes", pane("dump"), el("div", pane("blocks"), pane("words"), cls="side"))
LAYOUT = cat([pane("title"), SIDES, pane("rail"), pane("status")])


def render(
    page: PageEyes,
    previous: PageEyes | None = None,
    *,
    width: float = 940,
    selection: Selection | None = None,
) -> View:
    """The page as a view; changes are marked against previous, else against the bytes that it brings along; rows follow the selection."""
    if previous is not None and (previous.gpa, len(previous.host)) == (page.gpa, len(page.host)):
        page = replace(
            page,
            previous_host=previous.host,
            previous_guest=previous.guest,
            since_step=previous.step,
        )
    host, guest = page.eyes
    offset = None if selection is None or selection.gpa is None else selection.gpa - page.gpa
    chosen = None if offset is None or not 0 <= offset < len(page.host) else offset // BLOCK
    since = "" if page.since_step is None else f", since step {num(page.since_step)}"
    said, marked = plain(page.status, 300), bool(host.changed.any() or guest.changed.any())
    facts = [*map(plain, filter(None, (page.what,))), el("span", f"gpa {hx(page.gpa)}", cls="mono")]
    facts += [swatch(page.private, clear="plaintext")] + [
        f"the guest looks with {plain(page.word, 12)}"
    ] * bool(page.word)
    if page.gva is not None:
        facts.insert(len(page.what) > 0, el("span", f"gva {hx(page.gva)}", cls="mono"))
    rows, narrow = _rows(host, guest, chosen), width < 700
    name = f"Page {hx(page.gpa)}{', ' * bool(page.what)}{plain(page.what, 40)}"
    panes = {
        "title": header("One page, two eyes", facts, page.step),
        "dump": label(name, f"each row is one 16-byte cipher block{since}")
        + _dump(page, rows, chosen, narrow),
        "blocks": label("The page", f"{num(len(host.blocks))} blocks, to choose from")
        + _maps(page, rows, chosen, 6 if width < 1100 else 9)
        + key(
            ("k-enc", "not zero") if page.private else ("k-shr", "not zero"),
            ("k-tint", "all zero"),
            ("k-chg", "changed") if marked else None,
            ("k-sel", "shown"),
        ),
        "words": _words(page),
        "rail": rail(selection, page.private),
        "status": status_line(said),
    }
    return View(
        f"page {hx(page.gpa)} through two eyes, step {num(page.step)}",
        said,
        panes,
        LAYOUT,
        lambda: _lines(page, rows),
    )


def _rows(host: Eye, guest: Eye, chosen: int | None) -> list[int]:
    """The blocks to show: around the chosen one, else every changed one with its neighbours, else from the first that is not zero."""
    nr = len(host.blocks)
    changed = np.flatnonzero(host.changed.any(axis=1) | guest.changed.any(axis=1)).tolist()
    if chosen is not None or not changed:
        first = chosen - ROWS // 2 if chosen is not None else int(guest.blocks.any(axis=1).argmax())
        first = max(min(first, nr - ROWS), 0)
        return list(range(first, min(first + ROWS, nr)))
    near = next((near for near in (3, 2, 1) if len(_around(changed, near, nr)) <= ROWS), 0)
    rows = _around(changed, near, nr)[:ROWS]
    while (
        len(rows) < min(ROWS, nr) and rows[-1] - rows[0] < nr - 1
    ):  # room left: more of the page around them
        rows = sorted({*rows, *([rows[-1] + 1] if rows[-1] + 1 < nr else [rows[0] - 1])})
    return rows


def _around(blocks: list[int], near: int, nr: int) -> list[int]:
    return sorted(
        {
            at
            for block in blocks
            for at in range(max(block - near, 0), min(block + near, nr - 1) + 1)
        }
    )


def _dump(page: PageEyes, rows: list[int], chosen: int | None, narrow: bool) -> Html:
    host, guest = page.eyes
    tint = "eh" if page.private else "es"
    out, last = list[Row](), None
    for at in rows:
        if last is not None and at != last + 1:
            out.append((("", ("d", f"… {num(at - last - 1)} blocks as before"), "", ""), {}))
        last = at
        cells = [
            ("ad", f"{page.gpa + at * BLOCK & 0xFFF:03x}"),
            (_mark(host, at, tint), _hex(host, at, narrow)),
            (_mark(guest, at, "eg"), _hex(guest, at, narrow)),
            ("hn", _ascii(guest, at)),
        ]
        kind, value = (
            ("page", str(page.gpa >> 12))
            if page.gva is None
            else ("byte", hx(page.gva + at * BLOCK))
        )
        out.append((cells, select(kind, value, "sel" if at == chosen else None)))
    head: list[Cell] = [
        "",
        ("et" if page.private else "st", plain(host.name, 40)),
        plain(guest.name, 40),
        ("hn", "as text"),
    ]
    return el("div", table("bytes as host and guest see them", out, head, cls="hex"), cls="tbx")


def _mark(eye: Eye, at: int, cls: str) -> str:
    """A row that changed has a bar at its left."""
    return f"{cls} cc" if eye.changed[at].any() else cls


def _runs(eye: Eye, at: int) -> Iterator[tuple[str, int, int]]:
    """Neighbouring bytes that look the same: (class, first, end)."""
    data, changed, start = eye.blocks[at], eye.changed[at], 0
    kinds = ["cb" if changed[i] else "" if data[i] else "d" for i in range(BLOCK)]
    for i in range(1, BLOCK + 1):
        if i == BLOCK or kinds[i] != kinds[start]:
            yield kinds[start], start, i
            start = i


def _hex(eye: Eye, at: int, narrow: bool) -> Html:
    def digits(first: int, end: int) -> str:
        return "".join(
            f"{eye.blocks[at][i]:02x}" + " " * (i % 4 == 3 and i < BLOCK - 1 and not narrow)
            for i in range(first, end)
        )

    if eye.changed[at].all():  # a whole block: one mark, not sixteen
        return el("span", digits(0, BLOCK), cls="cb")
    return cat(
        el("span", digits(first, end), cls=cls or None) for cls, first, end in _runs(eye, at)
    )


def _ascii(eye: Eye, at: int) -> Html:
    words = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in eye.blocks[at].tolist())
    return cat(el("span", words[first:end], cls=cls or None) for cls, first, end in _runs(eye, at))


def _maps(page: PageEyes, rows: list[int], chosen: int | None, pitch: float) -> Html:
    """All blocks for either eye: filled where anything is not zero, a bar where something changed, an outline around what is shown."""
    nr, out, apart = len(page.host) // BLOCK, Html(), COLS * pitch + 18
    tall = 16 + -(-nr // COLS) * pitch
    for column, eye in enumerate(page.eyes):
        lattice = Lattice(column * apart, 16, COLS, pitch, pitch)
        full = eye.blocks.any(axis=1)
        inset, side = (0, pitch - 1) if page.private else (0.6, pitch - 2.2)
        cells = path(
            squares((lattice.at(i) for i in np.flatnonzero(~full).tolist()), pitch - 1, pitch - 1),
            "c-pale",
        )
        cells += path(
            squares((lattice.at(i, inset) for i in np.flatnonzero(full).tolist()), side, side),
            "c-enc" if page.private else "c-shr thin",
        )
        spots = [lattice.at(i) for i in np.flatnonzero(eye.changed.any(axis=1)).tolist()]
        cells += bar(((x, y + pitch - 1) for x, y in spots), pitch - 1, 2)
        cells += path(
            "".join(_outline(lattice, first, count, pitch) for first, count in _spans(rows)),
            "c-sel",
        )
        if chosen is not None:
            cells += rect(*lattice.at(chosen, -1.5), pitch + 2, pitch + 2, "c-sel")
        out += text(lattice.x, 9, "host" if not column else "guest", "s d") + grid(
            "block",
            f"Blocks for the {('host', 'guest')[column]}",
            cells,
            column,
            rows=lattice.rows(nr),
            x=lattice.x,
            pitch=pitch,
            h=pitch - 1,
            at=chosen,
            each="Block {i}",
            none="Block {i} at {a}",
            values=[],
            base=page.gpa,
            size=BLOCK,
        )
    return svg(
        2 * apart - 18,
        tall + 2,
        out,
        "The page as cipher blocks: " + "; ".join(_about(eye) for eye in page.eyes),
    )


def _spans(rows: list[int]) -> Iterator[tuple[int, int]]:
    start = rows[0]
    for at, after in zip(rows, [*rows[1:], -1], strict=True):
        if after != at + 1:
            yield start, at - start + 1
            start = after


def _outline(lattice: Lattice, first: int, count: int, pitch: float) -> str:
    """Boxes around a run of cells, one per row of the map."""
    out, end = "", first + count
    while first < end:
        x, y = lattice.at(first, -1)
        here = min(end - first, COLS - first % COLS)
        out += f"M{x:g} {y:g}h{here * pitch + 1:g}v{pitch + 1:g}h{-here * pitch - 1:g}z"
        first += here
    return out


def _about(eye: Eye) -> str:
    """An eye's hint of noise or sense."""
    return f"{plain(eye.name, 40)}: {eye.entropy:.2f} bits a byte, {num(eye.nr_different)} different blocks of {num(len(eye.blocks))}"


def _words(page: PageEyes) -> Html:
    host, guest = page.eyes
    lines = [
        el(
            "div",
            el("b", f"{eye.entropy:.2f}"),
            f" of 8 bits a byte for the {who}, ",
            el("b", num(eye.nr_different)),
            f" different block{'s' * (eye.nr_different != 1)}",
        )
        for who, eye in (("host", host), ("guest", guest))
    ]
    if guest.changed.any() or host.changed.any():
        lines += [
            el(
                "div",
                "The guest sees ",
                el("b", num(nr := int(guest.changed.sum())), cls="ct"),
                f" byte{'s' * (nr != 1)} changed,",
            ),
            el(
                "div",
                "the host ",
                el("b", num(seen := int(host.changed.sum())), cls="ct"),
                ": the same."
                if (host.changed == guest.changed).all()
                else ": whole blocks."
                if seen > nr
                else ".",
            ),
        ]
    return el("div", *lines, cls="say")


def _lines(page: PageEyes, rows: list[int]) -> list[str]:
    host, guest = page.eyes
    out, last = [f"      {plain(host.name, 34):<36}{plain(guest.name, 34)}"], None
    for at in rows:
        if last is not None and at != last + 1:
            out.append(f"      ... {num(at - last - 1)} blocks as before")
        last = at
        mark = "*" if host.changed[at].any() or guest.changed[at].any() else " "
        both = "  ".join(
            " ".join(eye.blocks[at][i : i + 4].tobytes().hex() for i in range(0, BLOCK, 4))
            for eye in (host, guest)
        )
        words = "".join(
            chr(byte) if 32 <= byte < 127 else "." for byte in guest.blocks[at].tolist()
        )
        out.append(f"{mark} {page.gpa + at * BLOCK & 0xFFF:03x} {both}  {words}")
    return [*out, *map(_about, (host, guest))]
