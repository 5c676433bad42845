"""Page-table entries bit by bit, one under the other to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from labkit.arch.desc import LAST, Level, PagingMode, short
from labkit.paging.walk import WalkStep
from labkit.views.draw import Html, hx, path, plain, rect, svg, text

__all__ = ["Part", "draw", "parts"]


class Part(NamedTuple):
    """Neighbouring bits of one meaning."""

    name: str
    high: int
    low: int
    flag: bool  # one bit with a name of its own


def parts(mode: PagingMode, level: Level) -> list[Part]:
    """The bits of an entry of this level, from the highest down."""
    named = {
        mask.bit_length() - 1: mode.c_name if name == "c" else short(name)
        for name, mask in mode.flags.items()
    }
    named[mode.present_at(level).mask.bit_length() - 1] = "P"
    if level.leaf is not LAST and mode.huge:
        named[mode.huge.bit_length() - 1] = "PS"
    out: list[Part] = []
    for bit in range(mode.entry_size * 8 - 1, -1, -1):
        name = named.get(bit) or ("frame" if mode.pa.mask >> bit & 1 else "")
        joins = out and not out[-1].flag and bit not in named and out[-1].name == name
        if joins:
            out[-1] = out[-1]._replace(low=bit)
        else:
            out.append(Part(name, bit, bit, bit in named))
    return out


def draw(mode: PagingMode, rows: Sequence[tuple[WalkStep, str]], width: float) -> Html:
    """The ruler; set bits are filled and named bold, the C-bit has its own colour. A narrow one breaks each entry in two."""
    out, y, bits = Html(), 0.0, mode.entry_size * 8
    for step, note in rows:
        head = f"{step} = {hx(step.entry, bits // 4)}"
        out += text(0, y + 11, head, "m b") + text(
            len(head) * 6.9 + 14, y + 11, "" if width < 700 else plain(note, 100), "d"
        )
        y += 18
        for high, low in (
            [(bits - 1, bits // 2), (bits // 2 - 1, 0)] if width < 700 else [(bits - 1, 0)]
        ):
            shown = [
                part._replace(high=min(part.high, high), low=max(part.low, low))
                for part in parts(mode, step.level)
                if part.low <= high and part.high >= low
            ]
            out += _row(mode, shown, step.entry, y, width)
            y += 42
        y += 2
    return svg(
        width,
        max(y, 1),
        out,
        "Bit by bit: " + "; ".join(f"{step} = {hx(step.entry)}" for step, _ in rows),
    )


def _row(mode: PagingMode, shown: Sequence[Part], value: int, y: float, width: float) -> Html:
    """Flags wide, other bits narrow, so that a row fills the width."""
    flags, others = (
        sum(part.flag for part in shown),
        sum(part.high - part.low + 1 for part in shown if not part.flag),
    )
    wide = min(34 if width < 700 else 72, (width - others * max(8, width * 0.0112)) / max(flags, 1))
    thin = (width - flags * wide) / max(others, 1)
    x, out, names = 0.0, Html(), Html()
    where: dict[str, list[tuple[float, float]]] = {"c-one": [], "c-zero": []}
    for part in shown:
        start, w = x, wide if part.flag else thin
        for bit in range(part.high, part.low - 1, -1):
            on = value >> bit & 1
            if bit == mode.c_bit:
                secret = mode.rights(value)["c"]
                out += rect(x + 0.5, y + 0.5, w - 1, 17, "c-enc" if secret else "c-shr")
                out += text(
                    x + w / 2,
                    y + 13,
                    str(on),
                    "m one onc" if secret else "m one" if on else "m d",
                    "middle",
                )
            else:
                where["c-one" if on else "c-zero"].append((x, w))
            x += w
        names += _name(mode, part, start, x - start, value, y)
    for box, spots in where.items():
        out += path(
            "".join(f"M{x + 0.5:.1f} {y + 0.5:g}h{w - 1:.1f}v17h{1 - w:.1f}z" for x, w in spots),
            box,
        )
        digit, ink = ("1", "m one") if box == "c-one" else ("0", "m d")
        out += text(
            " ".join(f"{x + w / 2:.1f}" for x, w in spots),
            y + 13,
            digit * len(spots),
            ink,
            "middle",
        )
    return out + names


def _name(mode: PagingMode, part: Part, x: float, w: float, value: int, y: float) -> Html:
    on = part.flag and value >> part.low & 1
    cls = (
        ("enc b" if mode.rights(value)["c"] else "shr b")
        if part.flag and part.low == mode.c_bit
        else "b"
        if on
        else "d"
    )
    words = part.name or ("ignored" if w > 44 else "")
    if part.name == "frame":
        words = f"frame → gpa {hx(mode.pa.get(value))}" if w > 190 else "frame" if w > 34 else ""
    rule = "" if part.flag or w < 5 else f"M{x + 1.5:.1f} {y + 21:g}h{w - 3:.1f}"
    return path(rule, "c-brk") + text(x + w / 2, y + 33, words, f"s {cls}", "middle")
