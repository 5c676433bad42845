"""Event logs of several engines side by side: what belongs together stands in one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest

from labkit.session.events import Happened

__all__ = ["Aligned", "align", "first"]

Aligned = tuple[Happened | None, ...]
"""One row: what happened on each engine, None where it did not."""

Key = Callable[[Happened], object]
Pair = tuple[Aligned | None, Aligned | None]

MOST = 2000
"""So many events are aligned by content; where more are left, they are paired one by one."""


def _all_of_it(event: Happened) -> object:
    return event.vcpu, event.kind, event.what


def _kind(event: Happened) -> object:
    return event.vcpu, event.kind, getattr(event, "cmd", "")


def _vcpu(event: Happened) -> object:
    return event.vcpu


# What two events must have in common to stand in one row, the strictest first.
KEYS: tuple[Key, ...] = (_all_of_it, _kind, _vcpu)


def align(logs: Sequence[Sequence[Happened]]) -> list[Aligned]:
    """Rows of events that belong together, in an order that no log contradicts.

    Equal events are found first; what lies between those is paired by kind, then by vCPU. Each log
    after the first is aligned with all those before it.
    """
    rows: list[Aligned] = [(event,) for event in logs[0]]
    for nr_done, log in enumerate(logs[1:], 1):
        nobody: Aligned = (None,) * nr_done
        joined = []
        for row, event in _pairs(rows, [(event,) for event in log], KEYS):
            left = nobody if row is None else row
            right = (None,) if event is None else event
            joined.append(left + right)
        rows = joined
    return rows


def first(row: Aligned) -> Happened:
    """The event of a row on the first engine that has it."""
    return next(event for event in row if event is not None)


def _pairs(one: Sequence[Aligned], other: Sequence[Aligned], keys: Sequence[Key]) -> Iterator[Pair]:
    """Rows of two lists that belong together by the first of the keys, the rest by those after it.

    What both begin and end with is taken off first: in most comparisons nothing is left.
    """
    if not keys or not one or not other:
        for row in one:
            yield row, None
        for row in other:
            yield None, row
        return

    a = [keys[0](first(row)) for row in one]
    b = [keys[0](first(row)) for row in other]
    head = _common(a, b)
    tail = _common(a[head:][::-1], b[head:][::-1])
    mine, its = slice(head, len(a) - tail), slice(head, len(b) - tail)

    yield from zip(one[:head], other[:head], strict=True)
    if max(len(a), len(b)) - head - tail > MOST:
        yield from zip_longest(one[mine], other[its])
    else:
        yield from _matched(one[mine], other[its], a[mine], b[its], keys[1:])
    yield from zip(one[mine.stop :], other[its.stop :], strict=True)


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many elements at the start of two lists are equal."""
    count = 0
    for mine, its in zip(a, b, strict=False):
        if mine != its:
            break
        count += 1
    return count


def _matched(
    one: Sequence[Aligned],
    other: Sequence[Aligned],
    a: Sequence[object],
    b: Sequence[object],
    keys: Sequence[Key],
) -> Iterator[Pair]:
    """Pair rows whose keys a and b are equal, and what lies between those by the next keys."""
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(one[i:i_end], other[j:j_end], strict=True)
        else:
            yield from _pairs(one[i:i_end], other[j:j_end], keys)
