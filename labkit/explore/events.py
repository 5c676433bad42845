"""What happened in a VM, in order, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from labkit.ucall.pool import Ucall

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Event", "events_frame"]


class Event(NamedTuple):
    """One event; `ucall` for a ucall, `facts` for anything else."""

    step: int
    vcpu: int
    kind: str
    ucall: Ucall | None
    facts: dict[str, object] | None

    @property
    def what(self) -> str:
        """One line for a person."""
        if self.ucall is not None:
            return repr(self.ucall)[1:-1].split(" ", 3)[-1]
        facts = dict(self.facts or {})
        where = f" at {facts.pop('where')}" if "where" in facts else ""
        if "exit" in facts:
            return f"{facts['exit']}{where}"
        shown = (f"{k} {v:#x}" if type(v) is int else f"{k} {v}" for k, v in facts.items() if v is not None)
        return ", ".join(shown) + where


def events_frame(events: Sequence[Event]) -> pd.DataFrame:
    """One row an event: step, vcpu, kind, what, and for a ucall cmd, args, text and slot (None elsewhere)."""
    import pandas as pd

    rows = [(e.step, e.vcpu, e.kind, e.what, *((u.cmd, u.args, u.text, u.slot) if (u := e.ucall) else (None,) * 4)) for e in events]
    frame = pd.DataFrame(rows, columns=["step", "vcpu", "kind", "what", "cmd", "args", "text", "slot"], dtype=object)
    frame = frame.astype({"step": "int64", "vcpu": "int64", "slot": "Int64"})
    return frame.rename_axis("seq")
