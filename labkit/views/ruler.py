"""Page-table entries bit by bit, one under the other to compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labkit.arch.desc import LAST, Level, PagingMode, short
from labkit.paging.walk import WalkStep
from labkit.views.draw import Html, hx, path, plain, rect, svg, text

__all__ = ["draw", "parts"]

Spot = tuple[int, float, float]  # bit, x, width


@dataclass(frozen=True)
class Part:
    """Neighbouring bits of one meaning."""

    name: str
    high: int
    low: int
    flag: bool  # one bit with a name of its own


def parts(mode: PagingMode, level: Level) -> list[Part]:
    """The bits of an entry of this level, from the highest down."""
    named = {mask.bit_length() - 1: short(name) for name, mask in mode.flags.items()} | {mode.present.mask.bit_length() - 1: "P"}
    if level.leaf is not LAST and mode.huge:
        named[mode.huge.bit_length() - 1] = "PS"
    out: list[Part] = []
    for bit in range(mode.entry_size * 8 - 1, -1, -1):
        name = named.get(bit) or ("frame" if mode.pa.mask >> bit & 1 else "")
        if out and not out[-1].flag and bit not in named and out[-1].name == name:
            out[-1] = Part(name, out[-1].high, bit, False)
        else:
            out.append(Part(name, bit, bit, bit in named))
    return out


def draw(mode: PagingMode, rows: Sequence[tuple[WalkStep, str]], width: float) -> Html:
    """The ruler; set bits are filled and named bold, the C-bit has its own colour. A narrow one breaks each entry in two."""
    out, y, bits = Html(), 0.0, mode.entry_size * 8
    for step, note in rows:
        head = f"{step} = {hx(step.entry, bits // 4)}"
        out += text(0, y + 11, head, "m b") + (Html() if width < 700 else text(len(head) * 6.9 + 14, y + 11, plain(note, 100), "d"))
        y += 18
        for high, low in [(bits - 1, bits // 2), (bits // 2 - 1, 0)] if width < 700 else [(bits - 1, 0)]:
            out += _row(mode, [part for part in parts(mode, step.level) if part.low <= high and part.high >= low], high, low, step.entry, y, width)
            y += 42
        y += 2
    return svg(width, max(y, 1), out, "Bit by bit: " + "; ".join(f"{step} = {hx(step.entry)}" for step, _ in rows))


def _row(mode: PagingMode, shown: Sequence[Part], high: int, low: int, value: int, y: float, width: float) -> Html:
    flags = sum(part.flag for part in shown)
    others = high - low + 1 - flags
    thin = (11.0 if low else 8.0) if width < 700 else width * 0.0112
    wide = min(34.0 if width < 700 else 72.0, (width - others * thin) / max(flags, 1))
    thin = min((width - flags * wide) / max(others, 1), 2 * thin)
    spots: list[Spot] = []
    names, x = Html(), 0.0
    for part in shown:
        start, w = x, wide if part.flag else thin
        for bit in range(min(part.high, high), max(part.low, low) - 1, -1):
            spots.append((bit, x, w))
            x += w
        names += _name(mode, part, start, x - start, value, y)
    return _digits([spot for spot in spots if spot[0] != mode.c_bit], value, y) + _secret([spot for spot in spots if spot[0] == mode.c_bit], value, y) + names


def _digits(spots: Iterable[Spot], value: int, y: float) -> Html:
    out = Html()
    ones = [spot for spot in spots if value >> spot[0] & 1]
    zeros = [spot for spot in spots if spot not in ones]
    for which, digit, box, ink in ((ones, "1", "c-one", "m one"), (zeros, "0", "c-zero", "m d")):
        out += path("".join(f"M{x + .5:.1f} {y + .5:g}h{w - 1:.1f}v17h{1 - w:.1f}z" for _, x, w in which), box)
        if which:
            out += text(" ".join(f"{x + w / 2:.1f}" for _, x, w in which), y + 13, digit * len(which), ink, "middle")
    return out


def _secret(spots: Iterable[Spot], value: int, y: float) -> Html:
    out = Html()
    for bit, x, w in spots:
        on = value >> bit & 1
        out += rect(x + .5, y + .5, w - 1, 17, "c-enc" if on else "c-shr") + text(x + w / 2, y + 13, str(on), "m one onc" if on else "m d", "middle")
    return out


def _name(mode: PagingMode, part: Part, x: float, w: float, value: int, y: float) -> Html:
    on = part.flag and value >> part.low & 1
    cls = ("enc b" if on else "shr b") if part.flag and part.low == mode.c_bit else "b" if on else "d"
    words = part.name or ("ignored" if w > 44 else "")
    if part.name == "frame":
        words = f"frame → gpa {hx(mode.pa.get(value))}" if w > 190 else "frame" if w > 34 else ""
    rule = Html() if part.flag or w < 5 else path(f"M{x + 1.5:.1f} {y + 21:g}h{w - 3:.1f}", "c-brk")
    return rule + (text(x + w / 2, y + 33, words, f"s {cls}", "middle") if words else Html())
