"""What happened in a VM, in order, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from labkit.outside import plain
from labkit.session.columns import EventColumns
from labkit.ucall.calls import Ucall

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Event", "EventLog", "Happened"]


class Event(NamedTuple):
    """Something that happened and is no ucall; a Ucall is its own event."""

    step: int
    vcpu: int
    kind: str
    facts: dict[str, object]

    @property
    def what(self) -> str:
        """One line for a person."""
        return plain(self._said(), 4000)

    def _said(self) -> str:
        facts = dict(self.facts)
        where = f" at {facts.pop('where')}" if "where" in facts else ""
        if "exit" in facts:
            return f"{facts['exit']}{where}"

        words = []
        for name, value in facts.items():
            if type(value) is int:
                words.append(f"{name} {value:#x}")
            elif value is not None:
                words.append(f"{name} {value}")
        return ", ".join(words) + where


Happened = Event | Ucall


@dataclass
class EventLog:
    """Everything that happened in one VM, the oldest first."""

    entries: list[Happened] = field(default_factory=list)
    _columns: EventColumns | None = None

    def append(self, happened: Happened) -> None:
        """Note one thing more."""
        self.entries.append(happened)

    def replace(self, entries: Iterable[Happened]) -> None:
        """Forget all, and begin with these: the log of a snapshot that is put back."""
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Happened]:
        return iter(self.entries)

    def frame(self) -> pd.DataFrame:
        """One row an event: step, vcpu, kind, what, and for a ucall cmd, args, text and slot.

        The last four are None for what is no ucall. The index is called seq. What was in the table
        before is not made again.
        """
        columns = self._columns
        if columns is None or not columns.is_of(self.entries):
            columns = self._columns = EventColumns(self.entries)
        return columns.frame()
