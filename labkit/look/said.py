"""What guests said and why they stopped, for the card and the log of the dashboard."""

from __future__ import annotations

from labkit.engines.exits import Exit
from labkit.look.snapshots import EventMark, Said
from labkit.session.events import Happened
from labkit.session.running import goes_on
from labkit.session.vm import Vm
from labkit.ucall.calls import Ucall

__all__ = ["look_at_last", "mark"]

LETTERS = {"SYNC": "S", "PRINTF": "P", "DONE": "D", "ABORT": "A", "UNHANDLED": "A"}


def mark(happened: Happened) -> EventMark:
    """One thing that happened, as a mark on the time axis and a row of the log."""
    if isinstance(happened, Ucall):
        letter = LETTERS.get(happened.cmd, "N")
        return EventMark(
            happened.step, happened.vcpu, letter, happened.what, "ucall", happened.slot
        )
    pc = happened.facts.get("pc")
    gva = pc if isinstance(pc, int) else getattr(happened.facts.get("exit"), "pc", None)
    return EventMark(happened.step, happened.vcpu, "X", happened.what, happened.kind, gva=gva)


def look_at_last(vm: Vm) -> Said | None:
    """The last ucall or exit of any vCPU, with all that is known of it; None before the first."""
    last = next((one for one in reversed(vm.log.entries) if _is_said(one)), None)
    if last is None:
        return None
    is_now = last.step == vm.step
    if isinstance(last, Ucall):
        return _ucall(vm, last, is_now)

    exit = last.facts["exit"]
    assert isinstance(exit, Exit)
    is_end = not goes_on(exit) and exit.end != "debug"
    # Where the vCPU stands is part of the sentence, and true as long as it stands there.
    words = vm.explain(exit) if is_now else last.what
    return Said(last.step, last.vcpu, exit.end, (), None, None, words, is_end, is_now)


def _is_said(happened: Happened) -> bool:
    """Whether a run came back with it: exceptions and VMGEXITs that were answered are none."""
    return isinstance(happened, Ucall) or isinstance(happened.facts.get("exit"), Exit)


def _ucall(vm: Vm, last: Ucall, is_now: bool) -> Said:
    is_end = not goes_on(last)
    words = vm.explain(last) if is_end and is_now else ""
    return Said(
        step=last.step,
        vcpu=last.vcpu,
        kind=last.cmd,
        args=last.given_args,
        text=last.text,
        slot=last.slot,
        words=words,
        is_end=is_end,
        is_now=is_now,
    )
