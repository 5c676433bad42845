"""What a comparison of engines found: events side by side, differences, and which of them are tolerated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.shown import mimebundle

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Difference", "Row"]


@dataclass(frozen=True)
class Difference:
    """Something that two engines do not agree on; `cause` is why that is tolerated, "" when it is not."""

    kind: str  # "event", "end", "state", "register", "memory", "page table"
    place: str  # "ucall.text", "rax", "gpa 0x18010 = gva 0x408010 counter+0x10", "PT[0x8] of gva 0x408000 data"
    vcpu: int | None
    backends: tuple[str, str]
    values: tuple[str, str]
    cause: str = ""
    row: int | None = None  # of an event

    def __str__(self) -> str:
        who = "" if self.vcpu is None else f"vCPU {self.vcpu} "
        where = f"{self.kind} " + ("" if self.row is None else f"{self.row} ")
        both = ", ".join(
            f"{name} {value}" for name, value in zip(self.backends, self.values, strict=True)
        )
        return f"{who}{where}{self.place}: {both}" + (
            f" (tolerated: {self.cause})" if self.cause else ""
        )


class Row(NamedTuple):
    """One event on every engine: steps and words, None where it did not happen."""

    vcpu: int
    kind: str
    steps: tuple[int | None, ...]
    whats: tuple[str | None, ...]
    equal: bool
    why: str  # the causes of what is tolerated in it


@dataclass(frozen=True, repr=False)
class Comparison:
    """What several engines made of one guest; `differences` are those without an excuse, `tolerated` those with one."""

    name: str
    backends: tuple[str, ...]
    ends: tuple[str, ...]  # "done", "abort", "shutdown", ...
    whys: tuple[str, ...]  # a sentence for each end, "" when it is good
    rows: tuple[Row, ...]
    found: tuple[Difference, ...]
    compared: Mapping[str, int]  # how many registers, pages, page tables

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
        """One row an aligned event: vcpu, kind, what it was and at which step on each engine, equal, and why that is tolerated."""
        import pandas as pd

        rows = [
            (row.vcpu, row.kind, *row.whats, *row.steps, row.equal, row.why) for row in self.rows
        ]
        steps = [f"step_{name}" for name in self.backends]
        frame = pd.DataFrame(
            rows,
            columns=["vcpu", "kind", *self.backends, *steps, "equal", "tolerated"],
            dtype=object,
        )
        return frame.astype(dict.fromkeys(steps, "Int64") | {"equal": bool}).rename_axis("row")

    @property
    def status(self) -> str:
        """The verdict in one sentence."""
        sizes = ", ".join(f"{count} {what}" for what, count in self.compared.items())
        verdict = (
            "equal"
            if self.equal
            else f"{len(self.differences)} differences, the first: {self.differences[0]}"
        )
        more = f"; {len(self.tolerated)} tolerated" if self.tolerated else ""
        return f"{self.name} on {' and '.join(self.backends)}: {verdict} ({sizes} compared{more})."

    @property
    def text(self) -> str:
        """The comparison for a terminal: verdict, events side by side, differences, what was tolerated."""
        return str(mimebundle(self)[0]["text/plain"])

    def __repr__(self) -> str:
        return f"<Comparison {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)
