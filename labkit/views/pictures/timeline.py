"""Steps from left to right: one lane per vCPU with the exits that it made."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from labkit.look.snapshots import EventMark, VmSnapshot
from labkit.outside import plain
from labkit.views.drawing.markup import Html, cat, el
from labkit.views.drawing.shapes import path, svg, text
from labkit.views.pictures.slots import LEFT, draw_slot, slot_rows
from labkit.words import num, plural

__all__ = ["APART", "LANE", "SHAPES", "draw", "exit_mark"]

LANE = 20  # height of one
TOP = 30  # where the lanes begin, under the numbers of the axis
SLOT = 12  # height of the row of a slot
APART_RAN = 0.5  # pixels between two stays of a vCPU that are drawn apart
APART = 13  # pixels between two marks with a letter; what is nearer becomes a tick
MAX_MARKS = 4000  # the newest ones
ROUND = (1, 2, 3, 5, 7.5, 10)  # where an axis may end, times a power of ten
NR_LABELS = 5  # on the axis

# A ucall is a shape with its letter; any other exit is an upright bar.
SHAPES = {
    "S": "m-6.5 0a6.5 6.5 0 1 0 13 0a6.5 6.5 0 1 0 -13 0z",
    "P": "m-6.5 -6.5h13v13h-13z",
    "D": "m0 -8.5l8.5 8.5l-8.5 8.5l-8.5 -8.5z",
    "A": "m0 -8.5l8.5 15h-17z",
}
EXIT = "m-2 -8h4v16h-4z"


def draw(vm: VmSnapshot, width: float) -> Html:
    """The lanes of all vCPUs up to now."""
    end = _end_of_axis(vm.step)
    scale = (width - 12 - LEFT) / end
    lanes_end = TOP + LANE * len(vm.vcpus)
    rows = slot_rows(vm)
    bottom = lanes_end + SLOT * len(rows)
    now = LEFT + vm.step * scale
    newest = vm.events[-MAX_MARKS:]

    out = _axis(end, scale, bottom)
    for lane, vcpu in enumerate(vm.vcpus):
        y = TOP + lane * LANE + LANE / 2
        out += text(0, y + 4, f"vCPU {vcpu.index}", "b" if vcpu.index == vm.vcpu else None)
        out += path(f"M{LEFT} {y}H{now:.1f}", "c-lane")
        out += path(_ran(vm, vcpu.index, y, scale), "c-ran")
        out += _hit(vcpu.index, y, width)
        out += _marks((mark for mark in reversed(newest) if mark.vcpu == vcpu.index), y, scale)
    for row, slot in enumerate(rows):
        out += draw_slot(vm, slot, lanes_end + SLOT * (row + 0.5), scale, width)
    out += path(f"M{now:.1f} {TOP - 4}V{bottom}", "c-now")
    out += path(f"M{now - 5.5:.1f} {TOP - 15}h11v6l-5.5 5.5l-5.5 -5.5z", "c-flag")

    nr_exits, nr_vcpus = len(vm.events), len(vm.vcpus)
    words = f"Timeline up to step {num(vm.step)}: {num(nr_exits)} {plural('exit', nr_exits)}"
    words += f" on {nr_vcpus} {plural('vCPU', nr_vcpus)}"
    return svg(width, bottom + 2, out, words)


def _ran(vm: VmSnapshot, vcpu: int, y: float, scale: float) -> str:
    """Where a vCPU ran, as a path: what is nearer than half a pixel becomes one line."""
    if vm.shifts is None:
        return ""
    mine = vm.shifts[vm.shifts[:, 0] == vcpu]
    if not len(mine):
        return ""
    starts = LEFT + mine[:, 1] * scale
    ends = np.maximum(LEFT + mine[:, 2] * scale, starts + 1)
    is_apart = starts[1:] - np.maximum.accumulate(ends)[:-1] > APART_RAN
    firsts = np.concatenate(([0], np.flatnonzero(is_apart) + 1))
    lasts = np.concatenate((firsts[1:] - 1, [len(mine) - 1]))
    return "".join(
        f"M{starts[first]:.1f} {y:g}H{ends[last]:.1f}"
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    )


def _hit(vcpu: int, y: float, width: float) -> Html:
    """The lane takes clicks over its whole height."""
    return el(
        "rect",
        x=0,
        y=y - LANE / 2,
        width=width,
        height=LANE,
        cls="c-hit",
        data_act="vcpu",
        data_value=vcpu,
        data_say=f"vCPU {vcpu}: a click brings it to the front",
    )


def _end_of_axis(step: int) -> int:
    """A round number that is not below step, so that nothing moves on a step."""
    step = max(step, 100)
    decade = 10 ** (len(str(step)) - 1)
    return next(end for end in (int(decade * times) for times in ROUND) if end >= step)


def _axis(end: int, scale: float, bottom: float) -> Html:
    out = Html()
    for i in range(NR_LABELS):
        at = end * i // NR_LABELS
        x = LEFT + at * scale
        out += path(f"M{x:.1f} {TOP - 4}V{bottom}", "c-rule")
        if at:
            out += text(x, 10, num(at), "s d", "middle")
        else:
            out += text(x, 10, "step 0", "s d", "start")
    return out


def _marks(newest_first: Iterable[EventMark], y: float, scale: float) -> Html:
    """The exits of a lane; where they are crowded, the newest keep their letter."""
    out = list[Html]()
    ticks = set[int]()
    last = float("inf")
    for mark in newest_first:
        x = LEFT + mark.step * scale
        if last - x < APART:
            ticks.add(round(x))
            continue
        last = x
        letter = plain(mark.letter, 3)[:1].upper()
        said = f"Step {num(mark.step)}, vCPU {mark.vcpu}: {plain(mark.text, 80)}"
        out.append(exit_mark(letter, x, y, said))

    drawn = "".join(f"M{x} {y - 4:g}v8" for x in sorted(ticks))
    return path(drawn, "c-exit") + cat(reversed(out))


def exit_mark(letter: str, x: float, y: float, said: str) -> Html:
    """One exit at (x, y), a ucall by its letter; said is the sentence that hovering shows."""
    shape = path(f"M{x:.1f} {y:g}{SHAPES.get(letter, EXIT)}", "c-past")
    shown = text(x, y + 3.5, letter if letter in SHAPES else "", "mk", "middle")
    return el("g", shape, shown, data_say=said)
