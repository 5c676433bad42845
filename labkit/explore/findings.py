"""What two runs have otherwise in their events, ends, states and registers.

Whether it is tolerated is another question, and another file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from labkit.explore.align import Aligned, first
from labkit.explore.sides import Pair
from labkit.session.events import Happened
from labkit.ucall.calls import Ucall

__all__ = ["Finding", "of_events", "of_state"]


class Finding(NamedTuple):
    """A difference before anybody asked whether it is tolerated.

    kind and place are those of a Difference; a and b are the two values, None where there is none.
    For an event, row is its row of the comparison, and seq its number in the first log (None when
    it is not in there).
    """

    kind: str
    place: str
    vcpu: int | None
    a: object
    b: object
    row: int | None = None
    seq: int | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What it has in common with the same difference between another pair of runs."""
        return self.kind, self.place, self.vcpu, self.seq


def of_events(rows: Sequence[Aligned], column: int) -> Iterator[Finding]:
    """What the events of one column have otherwise than those of the first."""
    nr_seen = 0
    for number, row in enumerate(rows):
        one, other = row[0], row[column]
        seq = None
        if one is not None:
            seq = nr_seen
            nr_seen += 1
        if one is None and other is None:
            continue

        event = first(row)
        if one is None or other is None or one.kind != other.kind:
            yield Finding("event", event.kind, event.vcpu, _what(one), _what(other), number, seq)
            continue
        old, new = _facts(one), _facts(other)
        for name in _unlike(old, new):
            place = f"{one.kind}.{name}"
            yield Finding("event", place, one.vcpu, old.get(name), new.get(name), number, seq)


def _what(event: Happened | None) -> str | None:
    return None if event is None else event.what


def _facts(event: Happened) -> dict[str, object]:
    """All that an event says, by name: each argument of a ucall, each field of an exit."""
    if isinstance(event, Ucall):
        facts = event._asdict()
        for number, value in enumerate(facts.pop("args")):
            facts[f"args[{number}]"] = value
        return facts

    facts = dict(event.facts)
    exit = facts.pop("exit", None)
    if exit is not None:
        facts.update(vars(exit))
    facts["step"] = event.step
    return facts


def _unlike(old: Mapping[str, object], new: Mapping[str, object]) -> Sequence[str]:
    """The names that do not stand for the same in both, in alphabetical order."""
    names = sorted(old.keys() | new.keys())
    return [name for name in names if old.get(name) != new.get(name)]


def of_state(pair: Pair) -> Iterator[Finding]:
    """What two runs have otherwise when they are over: ends, states of vCPUs, registers."""
    one, other = pair.one, pair.other
    if one.end != other.end:
        yield Finding("end", "end", None, one.why or one.end, other.why or other.end)
    if len(one.states) != len(other.states):
        yield Finding("state", "number of vCPUs", None, len(one.states), len(other.states))

    for vcpu, (mine, its) in enumerate(zip(one.states, other.states, strict=False)):
        if mine != its:
            yield Finding("state", "state", vcpu, mine, its)
    for vcpu, (regs, other_regs) in enumerate(zip(one.regs, other.regs, strict=False)):
        for name in {**regs, **other_regs}:  # in the order of the engine's own table
            a, b = regs.get(name), other_regs.get(name)
            if a != b:
                yield Finding("register", name, vcpu, a, b)
