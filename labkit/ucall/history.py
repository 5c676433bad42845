"""What happened to the slots of a pool, in the order in which the host saw it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from labkit.outside import printable
from labkit.ucall.calls import Ucall

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AGAIN", "MAX_HISTORY", "PoolEvent", "SlotChange", "history_frame"]

MAX_HISTORY = 1 << 16  # events that a pool remembers, the last ones

COLUMNS = ("step", "vcpu", "slot", "event", "cmd", "args", "text")


SlotChange = tuple[int, int, int, str]
"""(step, vCPU, slot, "taken" | "given back" | AGAIN); vCPU -1 is the host."""

AGAIN = "given back and taken"

PoolEvent = SlotChange | Ucall
"""Plain tuples, and as few as can be: each ucall of a guest makes them."""


def history_frame(events: Iterable[PoolEvent]) -> pd.DataFrame:
    """One row an event: step, vcpu (<NA>: the host), slot, event, and of a ucall cmd, args, text.

    The index is called seq. A vCPU that gives a slot back is seen doing so when it next comes out;
    that it gave one back and took it again in between is seen only on engines that tell of locked
    instructions (KVM does not).
    """
    import pandas as pd

    rows = [row for event in events for row in _rows(event)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    frame = frame.astype({"step": "int64", "vcpu": "Int64", "slot": "int64"})
    return frame.rename_axis("seq")


def _rows(event: PoolEvent) -> Iterator[tuple[object, ...]]:
    if isinstance(event, Ucall):
        text = None if event.text is None else printable(event.text)
        said = (event.cmd, event.args, text)
        yield event.step, event.vcpu, event.slot, "ucall", *said
        return
    step, vcpu, slot, what = event
    who = None if vcpu < 0 else vcpu
    for word in ("given back", "taken") if what == AGAIN else (what,):
        yield step, who, slot, word, None, None, None
