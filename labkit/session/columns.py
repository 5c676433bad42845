"""The table of a VM's events, to which a row is added for what is new, and none made twice.

Texts that come again and again are kept once, numbers as numbers: a row takes some 60 bytes, and
what is different in its text.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from labkit.outside import printable
from labkit.ucall.calls import Ucall

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EventColumns", "Row"]

NUMBERS = ("step", "vcpu", "slot")
OBJECTS = ("kind", "what", "cmd", "args", "text")
ORDER = ("step", "vcpu", "kind", "what", "cmd", "args", "text", "slot")
NO_SLOT = -1
BLOCK = 1 << 14  # events that are taken at once
MAX_KNOWN = 1 << 14  # different sentences that are kept to be used again


Columns = Sequence[Sequence[Any]]


class Row(Protocol):
    """What every event has."""

    @property
    def step(self) -> int: ...
    @property
    def vcpu(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def what(self) -> str: ...


class EventColumns:
    """The events of one list, which only grows, as columns."""

    def __init__(self, entries: Sequence[Row]) -> None:
        self._entries = entries
        self._count = 0
        self._numbers = {name: np.zeros(0, np.int64) for name in NUMBERS}
        self._objects: dict[str, NDArray[np.object_]] = {
            name: np.zeros(0, object) for name in OBJECTS
        }
        # What a ucall says, by all that it depends on.
        self._known: dict[Hashable, tuple[str, str | None]] = {}

    def is_of(self, entries: Sequence[Row]) -> bool:
        """Whether these are the events of that list, to which more may have been added."""
        return entries is self._entries and len(entries) >= self._count

    def frame(self) -> pd.DataFrame:
        """All of them as a table of its own."""
        import pandas as pd

        with _uncollected():
            self._add_new()
        count = self._count
        columns: dict[str, Any] = {}
        for name in ORDER:
            kept = self._numbers[name] if name in self._numbers else self._objects[name]
            columns[name] = kept[:count].copy()
        slots = columns["slot"]
        columns["slot"] = pd.arrays.IntegerArray(slots, slots == NO_SLOT)
        index = pd.RangeIndex(count, name="seq")
        return pd.DataFrame(
            {name: pd.Series(data, index, dtype=data.dtype) for name, data in columns.items()}
        )

    def _add_new(self) -> None:
        while self._count < len(self._entries):
            block = self._entries[self._count : self._count + BLOCK]
            ucalls = [happened for happened in block if type(happened) is Ucall]
            if len(ucalls) == len(block):
                self._add(self._of_ucalls(ucalls))
            else:
                self._add(tuple(zip(*map(self._row, block), strict=True)))

    def _of_ucalls(self, ucalls: Sequence[Ucall]) -> Columns:
        """The columns of ucalls alone, in the order of NUMBERS and OBJECTS, and fast."""
        cmds, args, texts, vcpus, slots, steps, *abort = zip(*ucalls, strict=True)
        keys = zip(cmds, args, texts, slots, *abort, strict=True)
        known = self._known
        said = [known.get(key) or self._said(key, at) for key, at in zip(keys, ucalls, strict=True)]
        whats, shown = zip(*said, strict=True)
        kept = [NO_SLOT if slot is None else slot for slot in slots]
        return steps, vcpus, kept, ("ucall",) * len(ucalls), whats, cmds, args, shown

    def _row(self, happened: Row) -> tuple[object, ...]:
        """The values of one event, in the same order."""
        if isinstance(happened, Ucall):
            return tuple(column[0] for column in self._of_ucalls([happened]))
        what = printable(happened.what)
        return happened.step, happened.vcpu, NO_SLOT, happened.kind, what, None, None, None

    def _add(self, columns: Columns) -> None:
        start = self._count
        end = start + len(columns[0])
        for name, values in zip((*NUMBERS, *OBJECTS), columns, strict=True):
            if name in self._numbers:
                self._numbers[name] = _room(self._numbers[name], end)
                self._numbers[name][start:end] = values
            else:
                self._objects[name] = _room(self._objects[name], end)
                # One by one: numpy would take a tuple for a row.
                self._objects[name][start:end] = np.fromiter(values, object, len(values))
        self._count = end

    def _said(self, key: Hashable, ucall: Ucall) -> tuple[str, str | None]:
        text = None if ucall.text is None else printable(ucall.text)
        said = printable(ucall.what), text
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[key] = said
        return said


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for circles, of which events make none.

    It looks at all of a million events again and again, and takes three times as long as the work.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _room(kept: NDArray[Any], count: int) -> NDArray[Any]:
    """The same array with room for so many; it doubles, so that growing costs no more than is new.

    It is a fresh one, which nobody who has a part of the old one sees change.
    """
    if count <= len(kept):
        return kept
    larger = np.zeros(max(count, 2 * len(kept)), kept.dtype)
    larger[: len(kept)] = kept
    return larger
