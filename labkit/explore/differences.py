"""All that two runs have otherwise, each with its cause where that is tolerated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labkit.explore.align import Aligned, align
from labkit.explore.comparison import Difference
from labkit.explore.findings import Finding, of_events, of_state
from labkit.explore.memory import of_memory, unlike_words
from labkit.explore.sides import Pair, Side, engine_names
from labkit.explore.tolerance import TIME, excuse

__all__ = ["Timed", "differences", "what_follows_the_clock"]


@dataclass(frozen=True)
class Timed:
    """What follows the clock: keys of findings, and gpas of words in memory."""

    keys: frozenset[tuple[object, ...]] = frozenset()
    gpas: frozenset[int] = frozenset()


def differences(
    sides: Sequence[Side], rows: Sequence[Aligned], timed: Timed
) -> Iterator[Difference]:
    """What every side has otherwise than the first; rows are their logs, aligned."""
    names = engine_names(sides)
    for column in range(1, len(sides)):
        pair = Pair(sides[0], sides[column], (names[0], names[column]))
        for finding in _findings(pair, rows, column):
            cause = excuse(pair, finding)
            if not cause and finding.key in timed.keys:
                cause = TIME
            yield Difference(
                kind=finding.kind,
                place=finding.place,
                vcpu=finding.vcpu,
                backends=pair.names,
                values=(_shown(finding.a), _shown(finding.b)),
                cause=cause,
                row=finding.row,
            )
        yield from of_memory(pair, timed.gpas)


def what_follows_the_clock(one: Side, again: Side) -> Timed:
    """What a run of the same engine with another clock has otherwise, for no reason but the clock.

    An event that only the second run has is left out: nothing of the first is known by it.
    """
    pair = Pair(one, again, (one.backend, again.backend))
    rows = align([one.log, again.log])
    keys = set()
    for finding in _findings(pair, rows, 1):
        is_new_event = finding.row is not None and finding.seq is None
        if not is_new_event and not excuse(pair, finding):
            keys.add(finding.key)

    gpas: set[int] = set()
    for words in unlike_words(pair):
        gpas.update(words.gpas[~words.is_host].tolist())
    return Timed(frozenset(keys), frozenset(gpas))


def _findings(pair: Pair, rows: Sequence[Aligned], column: int) -> Iterator[Finding]:
    yield from of_events(rows, column)
    yield from of_state(pair)


def _shown(value: object) -> str:
    """A value for a person: whole numbers in hex, and no character that moves the cursor."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)
    if type(value) is int:
        return f"{value:#x}"
    return str(value)
