"""The walk of one address through page tables in guest memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from labkit.arch.desc import LAST, NONE, Level, PagingMode
from labkit.errors import MemoryFault, PageFault
from labkit.shown import Bundle, mimebundle, save

if TYPE_CHECKING:
    from labkit.paging.scan import PageTable

__all__ = ["Kind", "Read", "Walk", "WalkStep", "classify", "describe", "walk"]

Read = Callable[[int, int], bytes]  # read(gpa, n); raises MemoryFault outside the memslots
Kind = Literal["table", "leaf", "hole", "reserved", "outside"]
COUNT = ("No", "One", "Two", "Three", "Four", "Five", "Six")


@dataclass(frozen=True)
class WalkStep:
    """One entry read by a walk.

    next_gpa is the table or page that it points to, None when it points nowhere.
    """

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
    """How one gva is translated: the entries read, and the gpa or the problem that ended the walk.

    flags are the effective rights, all levels together, and empty without a translation; page_size
    is in bytes, 0 without one. page_table is the snapshot that was walked, when it was one.
    """

    mode: PagingMode
    root: int  # gpa of the root table
    gva: int
    steps: tuple[WalkStep, ...]
    gpa: int | None = None
    page_size: int = 0
    flags: dict[str, bool] = field(default_factory=dict)
    problem: str | None = None
    page_table: PageTable | None = field(default=None, compare=False)

    def require(self) -> int:
        """The gpa; raises PageFault with who, where and what was found when there is none."""
        if self.gpa is None:
            raise PageFault(str(self.problem), gva=self.gva, walk=self)
        return self.gpa

    @property
    def status(self) -> str:
        """The result in one sentence, and how many entries were read in another."""
        if self.gpa is None:
            return f"{self.problem}."
        rights = describe(self.mode, self.flags)
        return f"gva {self.gva:#x} is gpa {self.gpa:#x}: {rights}. {self._entries_read()}"

    def _entries_read(self) -> str:
        nr_steps = len(self.steps)
        if nr_steps == 1:
            return "One entry read, present."
        count = COUNT[nr_steps] if nr_steps < len(COUNT) else str(nr_steps)
        return f"{count} entries read, all present."

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
        flags = self.mode.letters(step.entry, is_table=step.kind != "leaf")
        line = f"{where}{step.next_gpa:#x} P {flags}".rstrip()
        if step.kind == "outside":
            line += "  outside guest memory"
        return line

    def __repr__(self) -> str:
        return f"<Walk {self.mode.name}: {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Bundle:
        return mimebundle(self)


def classify(mode: PagingMode, level: Level, entry: int) -> Kind:
    """What an entry of this level is, as far as the entry can tell ("outside" needs memory)."""
    if not mode.present_at(level)(entry):
        return "hole"
    if not level.must(entry) or (mode.bad is not None and mode.bad(entry)):
        return "reserved"
    if mode.table_at(level)(entry):
        if level.leaf is LAST or entry & (mode.reserved | mode.table_reserved):
            return "reserved"
        return "table"
    if level.leaf is NONE or entry & mode.leaf_reserved(level):
        return "reserved"
    return "leaf"


def walk(read: Read, mode: PagingMode, root_gpa: int, gva: int) -> Walk:
    """Translate gva as a CPU would, without setting any bit; never raises: a hole is a value.

    root_gpa may be the raw CR3: bits that are no frame number are masked out, a C-bit too.
    """
    root = mode.root(root_gpa)
    if not mode.canonical(gva):
        return Walk(mode, root, gva, (), problem=_not_canonical(mode, gva))

    steps: list[WalkStep] = []
    rights = mode.inherit
    table = root
    for level in mode.levels:
        index = level.index(gva)
        entry_gpa = table + index * mode.entry_size
        try:
            entry = int.from_bytes(read(entry_gpa, mode.entry_size), mode.byteorder)
        except MemoryFault:
            if steps:  # the one before points outside
                steps[-1] = replace(steps[-1], kind="outside")
            break
        kind = classify(mode, level, entry)
        if kind != "table":
            rights &= mode.grants(entry, False)
            steps.append(WalkStep(level, index, entry_gpa, entry, kind, None))
            break
        rights &= mode.grants(entry, True)
        table = mode.next_table(level).get(entry)
        steps.append(WalkStep(level, index, entry_gpa, entry, kind, table))
    return _finish(mode, root, gva, steps, rights)


def _finish(mode: PagingMode, root: int, gva: int, steps: list[WalkStep], rights: int) -> Walk:
    """The result of a walk that read these entries and was granted these rights on its way."""
    last = steps[-1] if steps else None
    if last is None or last.kind != "leaf":
        return Walk(mode, root, gva, tuple(steps), problem=_problem(mode, root, gva, last))
    frame = mode.frame(last.level, last.entry)
    steps[-1] = replace(last, next_gpa=frame)
    own = last.entry & ~mode.inherit
    inherited = rights ^ (mode.flip & mode.inherit)
    size = last.level.size
    return Walk(
        mode,
        root,
        gva,
        tuple(steps),
        gpa=frame + (gva & (size - 1)),
        page_size=size,
        flags=mode.rights(own | inherited),
    )


def _problem(mode: PagingMode, root: int, gva: int, last: WalkStep | None) -> str:
    """What ended a walk that found no page, in one sentence without its full stop."""
    if last is None:
        return f"gva {gva:#x}: the root table at gpa {root:#x} is outside guest memory"
    entry = f"(entry {last.entry:#x})"
    if last.kind == "hole":
        what = "is not present"
    elif last.kind == "outside":
        what = f"points to gpa {last.next_gpa:#x}, outside guest memory"
    elif last.level.leaf is NONE and not mode.table_at(last.level)(last.entry):
        what = f"is a leaf, which {last.level} may not hold"
    else:
        what = "has reserved bits set"
    return f"gva {gva:#x}: {last} at gpa {last.entry_gpa:#x} {what} {entry}"


def _not_canonical(mode: PagingMode, gva: int) -> str:
    if not 0 <= gva < 1 << 64:
        return f"gva {gva:#x} is not a 64-bit address"
    wants = f"be equal to bit {mode.va_bits - 1}" if mode.signed else "be clear"
    return f"gva {gva:#x} is not canonical: bits 63..{mode.va_bits} must {wants}"


def describe(mode: PagingMode, flags: Mapping[str, bool]) -> str:
    """Effective rights in words: "shared (C=0), writable, no execute"."""
    words = []
    if "c" in flags:
        state = "encrypted" if flags["c"] else "shared"
        words.append(f"{state} ({mode.c_word(flags['c'])})")
    words.append("writable" if flags.get("writable") else "read only")
    if "nx" in flags:
        words.append("no execute" if flags["nx"] else "executable")
    if flags.get("user"):
        words.append("user")
    return ", ".join(words)
