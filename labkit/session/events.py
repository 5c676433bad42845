"""What happened in a VM, in order, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from labkit.ucall.pool import Ucall

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Event", "events_frame"]


class Event(NamedTuple):
    """Something that happened and is no ucall; a Ucall is its own event."""

    step: int
    vcpu: int
    kind: str
    facts: dict[str, object]

    @property
    def what(self) -> str:
        """One line for a person."""
        facts = dict(self.facts)
        where = f" at {facts.pop('where')}" if "where" in facts else ""
        if "exit" in facts:
            return f"{facts['exit']}{where}"
        shown = (
            f"{k} {v:#x}" if type(v) is int else f"{k} {v}"
            for k, v in facts.items()
            if v is not None
        )
        return ", ".join(shown) + where


def events_frame(events: Sequence[Event | Ucall]) -> pd.DataFrame:
    """One row an event: step, vcpu, kind, what, and for a ucall cmd, args, text and slot (None elsewhere)."""
    import pandas as pd

    rows = [
        (
            e.step,
            e.vcpu,
            e.kind,
            e.what,
            *((e.cmd, e.args, e.text, e.slot) if isinstance(e, Ucall) else (None,) * 4),
        )
        for e in events
    ]
    frame = pd.DataFrame(
        rows, columns=["step", "vcpu", "kind", "what", "cmd", "args", "text", "slot"], dtype=object
    )
    frame = frame.astype({"step": "int64", "vcpu": "int64", "slot": "Int64"})
    return frame.rename_axis("seq")
