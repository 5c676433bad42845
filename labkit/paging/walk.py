"""The walk of one address through page tables in guest memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from labkit.arch.desc import LAST, NONE, Level, PagingMode
from labkit.errors import MemoryFault, PageFault
from labkit.shown import mimebundle

__all__ = ["Kind", "Read", "Walk", "WalkStep", "classify", "describe", "walk"]

Read = Callable[[int, int], bytes]  # read(gpa, n); raises MemoryFault outside the memslots
Kind = Literal["table", "leaf", "hole", "reserved", "outside"]
COUNT = ("No", "One", "Two", "Three", "Four", "Five", "Six")


@dataclass(frozen=True)
class WalkStep:
    """One entry read by a walk; next_gpa is the table or page it points to, None when it points nowhere."""

    level: Level
    index: int
    entry_gpa: int
    entry: int
    kind: Kind
    next_gpa: int | None

    def __str__(self) -> str:
        return f"{self.level}[{self.index:#x}]"


@dataclass(frozen=True, repr=False)
class Walk:
    """How one gva is translated: the entries read, and the gpa or the problem that ended the walk."""

    mode: PagingMode
    root: int  # gpa of the root table
    gva: int
    steps: tuple[WalkStep, ...]
    gpa: int | None = None
    page_size: int = 0  # bytes, 0 without a translation
    flags: dict[str, bool] = field(
        default_factory=dict
    )  # effective rights: all levels together; empty without a translation
    problem: str | None = None
    page_table: Any = field(
        default=None, compare=False
    )  # the snapshot that was walked, when it was one

    def require(self) -> int:
        """The gpa; raises PageFault with who, where and what was found when there is none."""
        if self.gpa is None:
            raise PageFault(str(self.problem), gva=self.gva, walk=self)
        return self.gpa

    @property
    def status(self) -> str:
        """The result in one sentence."""
        if self.gpa is None:
            return f"{self.problem}."
        nr = COUNT[len(self.steps)] if len(self.steps) < len(COUNT) else str(len(self.steps))
        read = "entry read, present" if nr == "One" else "entries read, all present"
        return f"gva {self.gva:#x} is gpa {self.gpa:#x}: {describe(self.mode, self.flags)}. {nr} {read}."

    @property
    def text(self) -> str:
        """The walk for a terminal: one line per entry, then the result."""
        return "\n".join([*(self._line(step) for step in self.steps), self.status])

    def _line(self, step: WalkStep) -> str:
        where = f"{step.level}[{step.index:#05x}]".ljust(11) + f" {step.entry_gpa:#x} -> "
        if step.kind == "hole":
            return f"{where}not present (entry {step.entry:#x})"
        if step.kind == "reserved":
            return f"{where}reserved bits set (entry {step.entry:#x})"
        note = "  outside guest memory" if step.kind == "outside" else ""
        flags = self.mode.letters(step.entry, is_table=step.kind != "leaf")
        return f"{where}{step.next_gpa:#x} P {flags}".rstrip() + note

    def __repr__(self) -> str:
        return f"<Walk {self.mode.name}: {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


def classify(mode: PagingMode, level: Level, entry: int) -> Kind:
    """What an entry of this level is, as far as the entry itself can tell ("outside" needs memory)."""
    if not mode.present_at(level)(entry):
        return "hole"
    if not level.must(entry) or (mode.bad is not None and mode.bad(entry)):
        return "reserved"
    if mode.table_at(level)(entry):
        return (
            "reserved"
            if level.leaf is LAST or entry & (mode.reserved | mode.table_reserved)
            else "table"
        )
    return "reserved" if level.leaf is NONE or entry & mode.leaf_reserved(level) else "leaf"


def walk(read: Read, mode: PagingMode, root_gpa: int, gva: int) -> Walk:
    """Translate gva as a CPU would, without setting any bit; never raises: a hole is a value.

    root_gpa may be the raw CR3: bits that are no frame number are masked out, a C-bit too.
    """
    table = root = mode.root(root_gpa)
    steps: list[WalkStep] = []
    if not mode.canonical(gva):
        return Walk(mode, root, gva, (), problem=_not_canonical(mode, gva))
    rights = mode.inherit
    for level in mode.levels:
        index = level.index(gva)
        entry_gpa = table + index * mode.entry_size
        try:
            entry = int.from_bytes(read(entry_gpa, mode.entry_size), mode.byteorder)
        except MemoryFault:
            steps[-1:] = [replace(step, kind="outside") for step in steps[-1:]]
            break
        kind = classify(mode, level, entry)
        if kind == "table":
            table = mode.next_table(level).get(entry)
        steps.append(
            WalkStep(level, index, entry_gpa, entry, kind, table if kind == "table" else None)
        )
        rights &= mode.grants(entry, kind == "table")
        if kind != "table":
            break
    return _finish(mode, root, gva, steps, rights)


def _finish(mode: PagingMode, root: int, gva: int, steps: list[WalkStep], rights: int) -> Walk:
    last = steps[-1] if steps else None
    if last is None or last.kind != "leaf":
        return Walk(mode, root, gva, tuple(steps), problem=_problem(mode, root, gva, last))
    frame = mode.frame(last.level, last.entry)
    steps[-1] = replace(last, next_gpa=frame)
    effective = (last.entry & ~mode.inherit) | (rights ^ (mode.flip & mode.inherit))
    size = last.level.size
    return Walk(
        mode, root, gva, tuple(steps), frame + (gva & (size - 1)), size, mode.rights(effective)
    )


def _problem(mode: PagingMode, root: int, gva: int, last: WalkStep | None) -> str:
    if last is None:
        return f"gva {gva:#x}: the root table at gpa {root:#x} is outside guest memory"
    who = f"gva {gva:#x}: {last} at gpa {last.entry_gpa:#x}"
    if last.kind == "hole":
        return f"{who} is not present (entry {last.entry:#x})"
    if last.kind == "outside":
        return (
            f"{who} points to gpa {last.next_gpa:#x}, outside guest memory (entry {last.entry:#x})"
        )
    leaf = not mode.table_at(last.level)(last.entry)
    why = (
        f"is a leaf, which {last.level} may not hold"
        if leaf and last.level.leaf is NONE
        else "has reserved bits set"
    )
    return f"{who} {why} (entry {last.entry:#x})"


def _not_canonical(mode: PagingMode, gva: int) -> str:
    if not 0 <= gva < 1 << 64:
        return f"gva {gva:#x} is not a 64-bit address"
    wants = f"be equal to bit {mode.va_bits - 1}" if mode.signed else "be clear"
    return f"gva {gva:#x} is not canonical: bits 63..{mode.va_bits} must {wants}"


def describe(mode: PagingMode, flags: dict[str, bool]) -> str:
    """Effective rights in words: "shared (C=0), writable, no execute"."""
    words = (
        [f"{'encrypted' if flags['c'] else 'shared'} ({mode.c_word(flags['c'])})"]
        if "c" in flags
        else []
    )
    words.append("writable" if flags.get("writable") else "read only")
    if "nx" in flags:
        words.append("no execute" if flags["nx"] else "executable")
    return ", ".join(words + ["user"] * flags.get("user", False))
