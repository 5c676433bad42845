"""What a comparison of engines found.

Events side by side, differences, and which of them are tolerated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.shown import mimebundle, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Difference", "Row"]


@dataclass(frozen=True)
class Difference:
    """Something that two engines do not agree on.

    kind: "event", "end", "state", "register", "memory" or "page table".
    place: "ucall.text", "rax", "gpa 0x18010 = gva 0x408010 counter+0x10", "PT[0x8] of gva 0x408000
    data".
    backends and values: the two engines, and what each has.
    cause: why that is tolerated, "" when it is not.
    row: of an event, its number among the comparison's rows.
    """

    kind: str
    place: str
    vcpu: int | None
    backends: tuple[str, str]
    values: tuple[str, str]
    cause: str = ""
    row: int | None = None

    def __str__(self) -> str:
        who = "" if self.vcpu is None else f"vCPU {self.vcpu} "
        number = "" if self.row is None else f"{self.row} "
        said = []
        for name, value in zip(self.backends, self.values, strict=True):
            said.append(f"{name} {value}")
        excuse = f" (tolerated: {self.cause})" if self.cause else ""
        return f"{who}{self.kind} {number}{self.place}: {', '.join(said)}{excuse}"


class Row(NamedTuple):
    """One event on every engine.

    steps and whats have an element per engine, None where it did not happen. equal is whether
    nothing but what is tolerated differs in it, and why says what that is.
    """

    vcpu: int
    kind: str
    steps: tuple[int | None, ...]
    whats: tuple[str | None, ...]
    equal: bool
    why: str


@dataclass(frozen=True, repr=False)
class Comparison:
    """What several engines made of one guest.

    backends, ends ("done", "abort", "shutdown", ...) and whys (a sentence for each end, "" when it
    is good) have an element per engine. found has every difference: `differences` are those without
    an excuse, `tolerated` those with one. compared says how many events, registers, pages and page
    tables that was.
    """

    name: str
    backends: tuple[str, ...]
    ends: tuple[str, ...]
    whys: tuple[str, ...]
    rows: tuple[Row, ...]
    found: tuple[Difference, ...]
    compared: Mapping[str, int]

    @property
    def equal(self) -> bool:
        """Whether nothing but tolerated differences was found."""
        return not self.differences

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """What differs and is not tolerated."""
        return tuple(difference for difference in self.found if not difference.cause)

    @cached_property
    def tolerated(self) -> tuple[Difference, ...]:
        """What differs for a known cause that says nothing about the guest."""
        return tuple(difference for difference in self.found if difference.cause)

    @cached_property
    def causes(self) -> Mapping[str, int]:
        """The causes of what is tolerated, and how often each occurs."""
        return Counter(difference.cause for difference in self.tolerated)

    @property
    def df(self) -> pd.DataFrame:
        """One row an aligned event.

        vcpu and kind; a column per engine with what it was, and one with its step there; equal, and
        why that is tolerated.
        """
        import pandas as pd

        rows = [
            (row.vcpu, row.kind, *row.whats, *row.steps, row.equal, row.why) for row in self.rows
        ]
        steps = [f"step_{name}" for name in self.backends]
        columns = ["vcpu", "kind", *self.backends, *steps, "equal", "tolerated"]
        frame = pd.DataFrame(rows, columns=columns, dtype=object)
        types = dict.fromkeys(steps, "Int64") | {"equal": "bool"}
        return frame.astype(types).rename_axis("row")

    @property
    def status(self) -> str:
        """The verdict in one sentence."""
        verdict = "equal"
        if not self.equal:
            count, first = len(self.differences), self.differences[0]
            verdict = f"{count} differences, the first: {first}"
        sizes = ", ".join(f"{count} {what}" for what, count in self.compared.items())
        more = f"; {len(self.tolerated)} tolerated" if self.tolerated else ""
        return f"{self.name} on {' and '.join(self.backends)}: {verdict} ({sizes} compared{more})."

    @property
    def text(self) -> str:
        """The comparison for a terminal.

        Verdict, events side by side, differences, what was tolerated.
        """
        return str(mimebundle(self)[0]["text/plain"])

    def __repr__(self) -> str:
        return f"<Comparison {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)
