"""Page-table entries bit by bit, one under the other to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from labkit.arch.desc import LAST, Level, PagingMode, short
from labkit.outside import plain
from labkit.paging.walk import WalkStep
from labkit.views.drawing.markup import Html, hx
from labkit.views.drawing.shapes import NARROW, path, rect, svg, text

__all__ = ["Part", "draw", "parts"]

HEAD = 18  # height of the line over an entry
ROW = 42  # height of a row of bits with their names
BIT = 17  # height of a bit
LETTER = 6.9  # width of a letter of the line over an entry

Spot = tuple[float, float]  # x and width of a bit


class Part(NamedTuple):
    """Neighbouring bits of one meaning."""

    name: str
    high: int
    low: int
    flag: bool  # one bit with a name of its own


def parts(mode: PagingMode, level: Level) -> list[Part]:
    """The bits of an entry of this level, from the highest down."""
    flags = _flags(mode, level)
    out: list[Part] = []
    for bit in range(mode.entry_size * 8 - 1, -1, -1):
        in_frame = mode.pa.mask >> bit & 1
        name = flags.get(bit) or ("frame" if in_frame else "")
        if out and not out[-1].flag and bit not in flags and out[-1].name == name:
            out[-1] = out[-1]._replace(low=bit)
        else:
            out.append(Part(name, bit, bit, bit in flags))
    return out


def _flags(mode: PagingMode, level: Level) -> dict[int, str]:
    """Bit -> name of those that have one of their own."""
    named = {}
    for name, mask in mode.flags.items():
        named[mask.bit_length() - 1] = mode.c_name if name == "c" else short(name)
    named[mode.present_at(level).mask.bit_length() - 1] = "P"
    if level.leaf is not LAST and mode.huge:
        named[mode.huge.bit_length() - 1] = "PS"
    return named


def draw(mode: PagingMode, rows: Sequence[tuple[WalkStep, str]], width: float) -> Html:
    """The ruler of entries, each with a note.

    Set bits are filled and named bold, the C-bit has its own colour. A narrow ruler breaks each
    entry in two.
    """
    bits = mode.entry_size * 8
    halves = [(bits - 1, 0)]
    if width < NARROW:
        halves = [(bits - 1, bits // 2), (bits // 2 - 1, 0)]

    out = Html()
    y = 0.0
    for step, note in rows:
        head = f"{step} = {hx(step.entry, bits // 4)}"
        out += text(0, y + 11, head, "m b")
        if width >= NARROW:
            out += text(len(head) * LETTER + 14, y + 11, plain(note, 100), "d")
        y += HEAD
        every = parts(mode, step.level)
        for high, low in halves:
            out += _row(mode, _between(every, high, low), step.entry, y, width)
            y += ROW
        y += 2
    words = "Bit by bit: " + "; ".join(f"{step} = {hx(step.entry)}" for step, _ in rows)
    return svg(width, max(y, 1), out, words)


def _between(every: Sequence[Part], high: int, low: int) -> list[Part]:
    """The parts that lie between two bits, cut where they reach over them."""
    return [
        part._replace(high=min(part.high, high), low=max(part.low, low))
        for part in every
        if part.low <= high and part.high >= low
    ]


def _row(mode: PagingMode, shown: Sequence[Part], value: int, y: float, width: float) -> Html:
    """Flags wide, other bits narrow, so that a row fills the width."""
    wide, thin = _widths(shown, width)
    drawn = Html()
    names = Html()
    ones = list[Spot]()
    zeros = list[Spot]()
    x = 0.0
    for part in shown:
        start = x
        w = wide if part.flag else thin
        for bit in range(part.high, part.low - 1, -1):
            if bit == mode.c_bit:
                drawn += _c_bit(mode, value, x, y, w)
            elif value >> bit & 1:
                ones.append((x, w))
            else:
                zeros.append((x, w))
            x += w
        names += _name(mode, part, start, x - start, value, y)

    drawn += _bits(ones, "1", y, "c-one", "m one")
    drawn += _bits(zeros, "0", y, "c-zero", "m d")
    return drawn + names


def _widths(shown: Sequence[Part], width: float) -> tuple[float, float]:
    """How wide a flag is, and how wide any other bit."""
    nr_flags = sum(part.flag for part in shown)
    nr_others = sum(part.high - part.low + 1 for part in shown if not part.flag)
    left_for_flags = width - nr_others * max(8, width * 0.0112)
    wide = min(34 if width < NARROW else 72, left_for_flags / max(nr_flags, 1))
    thin = (width - nr_flags * wide) / max(nr_others, 1)
    return wide, thin


def _c_bit(mode: PagingMode, value: int, x: float, y: float, w: float) -> Html:
    """The bit that says whether a page is encrypted, in the colour of what it says."""
    on = value >> (mode.c_bit or 0) & 1
    secret = mode.rights(value)["c"]
    if secret:
        ink = "m one onc"
    else:
        ink = "m one" if on else "m d"
    cell = rect(x + 0.5, y + 0.5, w - 1, BIT, "c-enc" if secret else "c-shr")
    return cell + text(x + w / 2, y + 13, str(on), ink, "middle")


def _bits(spots: Sequence[Spot], digit: str, y: float, box: str, ink: str) -> Html:
    """All bits of a row that say the same: one path, one text."""
    edges = [f"M{x + 0.5:.1f} {y + 0.5:g}h{w - 1:.1f}v{BIT}h{1 - w:.1f}z" for x, w in spots]
    middles = " ".join(f"{x + w / 2:.1f}" for x, w in spots)
    digits = text(middles, y + 13, digit * len(spots), ink, "middle")
    return path("".join(edges), box) + digits


def _name(mode: PagingMode, part: Part, x: float, w: float, value: int, y: float) -> Html:
    """The name under a part, with a rule over it where it has many bits."""
    if part.flag and part.low == mode.c_bit:
        cls = "enc b" if mode.rights(value)["c"] else "shr b"
    elif part.flag and value >> part.low & 1:
        cls = "b"
    else:
        cls = "d"

    rule = ""
    if not part.flag and w >= 5:
        rule = f"M{x + 1.5:.1f} {y + 21:g}h{w - 3:.1f}"
    words = text(x + w / 2, y + 33, _words(mode, part, w, value), f"s {cls}", "middle")
    return path(rule, "c-brk") + words


def _words(mode: PagingMode, part: Part, w: float, value: int) -> str:
    """What a part is called where it has this much room."""
    if part.name == "frame":
        if w > 190:
            return f"frame → gpa {hx(mode.pa.get(value))}"
        return "frame" if w > 34 else ""
    if not part.name:
        return "ignored" if w > 44 else ""
    return part.name
