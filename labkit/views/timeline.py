"""Steps from left to right: one lane per vCPU with the exits that it made."""

from __future__ import annotations

from collections.abc import Iterable

from labkit.look.snapshots import EventMark, VmSnapshot
from labkit.views.draw import Html, cat, el, num, path, plain, svg, text

__all__ = ["draw"]

LEFT, LANE, TOP = 66, 20, 30
APART = 13  # pixels between two marks with a letter; what is nearer becomes a tick
MAX_MARKS = 4000  # the newest ones
SHAPES = {
    "S": "m-6.5 0a6.5 6.5 0 1 0 13 0a6.5 6.5 0 1 0 -13 0z",
    "P": "m-6.5 -6.5h13v13h-13z",
    "D": "m0 -8.5l8.5 8.5l-8.5 8.5l-8.5 -8.5z",
    "A": "m0 -8.5l8.5 15h-17z",
}  # a ucall; any other exit is an upright bar


def draw(vm: VmSnapshot, width: float) -> Html:
    """The lanes of all vCPUs up to now; the axis ends at a round number, so that nothing moves on a step."""
    step = max(vm.step, 100)
    end = next(
        end
        for end in (int(10 ** (len(str(step)) - 1) * times) for times in (1, 2, 3, 5, 7.5, 10))
        if end >= step
    )
    scale, bottom = (width - 12 - LEFT) / end, TOP + LANE * len(vm.vcpus)
    out, now = Html(), LEFT + vm.step * scale
    for at in (end * i // 5 for i in range(5)):
        x = LEFT + at * scale
        out += path(f"M{x:.1f} {TOP - 4}V{bottom}", "c-rule")
        out += text(x, 10, num(at) if at else "step 0", "s d", "middle" if at else "start")
    for lane, vcpu in enumerate(vm.vcpus):
        y = TOP + lane * LANE + LANE / 2
        out += text(0, y + 4, f"vCPU {vcpu.index}", "b" if vcpu.index == vm.vcpu else None)
        out += path(f"M{LEFT} {y}H{now:.1f}", "c-lane")
        out += _marks(
            (mark for mark in reversed(vm.events[-MAX_MARKS:]) if mark.vcpu == vcpu.index), y, scale
        )
    out += path(f"M{now:.1f} {TOP - 4}V{bottom}", "c-now")
    out += path(f"M{now - 5.5:.1f} {TOP - 15}h11v6l-5.5 5.5l-5.5 -5.5z", "c-flag")
    return svg(
        width,
        bottom + 2,
        out,
        f"Timeline up to step {vm.step}: {len(vm.events)} exits on {len(vm.vcpus)} vCPUs",
    )


def _marks(newest_first: Iterable[EventMark], y: float, scale: float) -> Html:
    out, last, ticks = list[Html](), float("inf"), set[int]()
    for mark in newest_first:
        x, letter = LEFT + mark.step * scale, plain(mark.kind, 3)[:1].upper()
        if last - x < APART:
            ticks.add(round(x))
            continue
        last, ucall = x, letter in SHAPES
        shape = path(f"M{x:.1f} {y:g}{SHAPES.get(letter, 'm-2 -8h4v16h-4z')}", "c-past")
        shape += text(x, y + 3.5, letter if ucall else "", "mk", "middle")
        out.append(
            el(
                "g",
                shape,
                data_say=f"Step {num(mark.step)}, vCPU {mark.vcpu}: {plain(mark.text, 80)}",
            )
        )
    return path("".join(f"M{x} {y - 4:g}v8" for x in sorted(ticks)), "c-exit") + cat(reversed(out))
