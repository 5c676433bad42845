"""Steps from left to right: one lane per vCPU with the exits that it made."""

from __future__ import annotations

from labkit.explore.inspect import EventMark, VmSnapshot
from labkit.views.draw import Html, cat, el, line, num, path, plain, rect, svg, text

__all__ = ["draw"]

LEFT, LANE, TOP = 66, 20, 30
APART = 13  # pixels between two marks with a letter; what is nearer becomes a tick
MAX_MARKS = 4000  # the newest ones


def draw(vm: VmSnapshot, width: float) -> Html:
    """The lanes of all vCPUs up to now; the axis ends at a round number, so that nothing moves on a step."""
    end = _round_up(max(vm.step, 100))
    scale = (width - 12 - LEFT) / end
    bottom = TOP + LANE * len(vm.vcpus)
    ticks = [end * i // 5 for i in range(5)]
    out = cat(line(LEFT + at * scale, TOP - 4, LEFT + at * scale, bottom) + text(LEFT + at * scale, 10, num(at) if at else "step 0", "s d", "middle" if at else "start")
              for at in ticks)
    now = LEFT + vm.step * scale
    for lane, vcpu in enumerate(vm.vcpus):
        y = TOP + lane * LANE + LANE / 2
        name = text(0, y + 4, f"vCPU {vcpu.index}", "b" if vcpu.index == vm.vcpu else None)
        mine = [mark for mark in vm.events[-MAX_MARKS:] if mark.vcpu == vcpu.index]
        out += name + line(LEFT, y, now, y, "c-lane") + _marks(mine, y, scale)
    flag = f"M{now - 5.5:.1f} {TOP - 15}h11v6l-5.5 5.5l-5.5 -5.5z"
    out += line(now, TOP - 4, now, bottom, "c-now") + path(flag, "c-flag")
    return svg(width, bottom + 2, out, f"Timeline up to step {vm.step}: {len(vm.events)} exits on {len(vm.vcpus)} vCPUs")


def _round_up(step: int) -> int:
    size = 10 ** (len(str(step)) - 1)
    return next(size * times // 2 for times in (2, 4, 6, 10, 15, 20) if size * times // 2 >= step)


def _marks(marks: list[EventMark], y: float, scale: float) -> Html:
    out, last, ticks = Html(), float("inf"), set[int]()
    for mark in reversed(marks):  # the newest keep their letter
        x = LEFT + mark.step * scale
        if last - x < APART:
            ticks.add(round(x))
            continue
        last = x
        out = _mark(mark, x, y) + out
    return path("".join(f"M{x} {y - 4:g}v8" for x in sorted(ticks)), "c-exit") + out


def _mark(mark: EventMark, x: float, y: float) -> Html:
    letter = plain(mark.kind, 3)[:1].upper()
    shape = {
        "S": lambda: el("circle", cx=x, cy=y, r=6.5, cls="c-past"),
        "P": lambda: rect(x - 6.5, y - 6.5, 13, 13, "c-past"),
        "D": lambda: path(f"M{x:.1f} {y - 8.5:g}l8.5 8.5l-8.5 8.5l-8.5 -8.5z", "c-past"),
        "A": lambda: path(f"M{x:.1f} {y - 8.5:g}l8.5 15h-17z", "c-past"),
    }.get(letter)
    said = f"Step {num(mark.step)}, vCPU {mark.vcpu}: {plain(mark.text, 80)}"
    if shape is None:  # an exit that is no ucall: an upright bar
        return el("g", rect(x - 2, y - 8, 4, 16, "c-past"), data_say=said)
    return el("g", shape(), text(x, y + 3.5, letter, "mk", "middle"), data_say=said)
