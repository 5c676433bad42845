"""What a person looks at, as frozen facts: one vCPU, guest memory, the whole VM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from labkit.checked import checked
from labkit.paging.scan import PageTable
from labkit.shown import mimebundle, save
from labkit.ucall.snapshot import PoolSnapshot

if TYPE_CHECKING:
    from labkit.look.encryption import EncryptionMap
    from labkit.look.eyes import PageEyes
    from labkit.look.launch import LaunchProgress

__all__ = [
    "EventMark",
    "FrameRow",
    "Hold",
    "Insn",
    "Marks",
    "MemoryMap",
    "MemoryRange",
    "RegisterRow",
    "Said",
    "Selection",
    "StackRow",
    "Touch",
    "VcpuBrief",
    "VcpuSnapshot",
    "VmSnapshot",
]


@dataclass(frozen=True)
class Insn:
    """One line of the disassembly pane."""

    gva: int
    offset: int  # bytes from the start of the symbol
    data: bytes
    mnemonic: str
    op_str: str
    comment: str  # what the operands point to, now; "" for most
    current: bool
    breakpoint: bool


@dataclass(frozen=True)
class RegisterRow:
    """One register with what its value means.

    note: "ucall_pool", "stack of vCPU 1", a string in quotes, the names of flags.
    """

    name: str
    value: int
    note: str
    changed: bool = False  # since the snapshot that this one was compared with
    points_to: int | None = None  # gva, when it is a pointer that the page tables map


@dataclass(frozen=True)
class StackRow:
    """One 8-byte word from the stack pointer up."""

    gva: int
    value: int
    note: str


@dataclass(frozen=True)
class FrameRow:
    """One function that has not returned yet: the innermost first, for others the call in it."""

    where: str  # "ucall+0x19f"
    file: str | None
    line: int | None


@dataclass(frozen=True)
class Touch:
    """A memory access of the instruction about to run."""

    kind: str  # "reads" or "writes"
    gva: int
    gpa: int | None
    size: int
    before: int
    after: int | None  # for writes, when it can be known
    note: str  # "in_use[0]", a symbol, or ""


@dataclass(frozen=True)
class VcpuBrief:
    """What is said of a vCPU that is not in front: enough for its tab and its lane."""

    index: int
    step: int
    state: str  # "running", "done", "aborted", "halted", "shutdown", "not started"


@checked
@dataclass(frozen=True)
class VcpuSnapshot(VcpuBrief):
    """One vCPU between two instructions."""

    mode: str  # "ring 0, long mode"
    pc: int
    where: str  # "ucall_alloc+0x2c"
    symbol: str
    file: str | None
    line: int | None
    source: tuple[tuple[int, str], ...]  # (line number, text) around the line, () without source
    breakpoint_lines: frozenset[int]
    disassembly: tuple[Insn, ...]
    registers: tuple[RegisterRow, ...]
    stack: tuple[StackRow, ...]
    touches: tuple[Touch, ...]
    outlook: str  # what the next instruction will do, one sentence or ""
    sealed: str = ""  # why the host cannot see registers, stack and code; "" when it can
    next_slot: int | None = None  # the pool slot that the next instruction will take, if any
    pc_name: str = "rip"
    frames: tuple[FrameRow, ...] = ()
    frames_end: str = ""  # why the frames end before the entry function; "" when they do not
    frame: int = 0  # the one whose source is shown
    why_no_source: str = ""  # why the lines of `file` are not shown; "" when they are

    def since(self, other: VcpuSnapshot) -> VcpuSnapshot:
        """The same, with the registers marked that are not what they were in another snapshot.

        The program counter is never marked: it always changes.
        """
        before = {row.name: row.value for row in other.registers}
        rows = []
        for row in self.registers:
            same = before.get(row.name) == row.value or row.name == self.pc_name
            rows.append(replace(row, changed=not same))
        return replace(self, registers=tuple(rows))

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


@dataclass(frozen=True)
class MemoryRange:
    """Neighbouring guest-physical pages of one use."""

    gpa: int
    nr_pages: int
    kind: str  # "code", "data", "stacks", "page tables", "ucall pool", "alloc", ...
    protected: bool = False

    @property
    def end(self) -> int:
        """The gpa behind it."""
        return self.gpa + 4096 * self.nr_pages


@dataclass(frozen=True)
class MemoryMap:
    """The memslots and what lies in them; pages in no range are free."""

    slots: tuple[tuple[int, int], ...]  # (gpa, size in bytes)
    ranges: tuple[MemoryRange, ...]
    step: int

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


@dataclass(frozen=True)
class Selection:
    """The one selected address range that all views of a VM share, spelled out as a path."""

    kind: str  # "slot", "entry", "register", "byte", "page"
    label: str  # "slot 2", "vCPU 2, PRINTF"
    gva: int | None
    gpa: int | None
    hva: int | None
    size: int
    path: tuple[str, ...]  # "PML4[0x1]", "PDPT[0x41]", ...
    slot: int | None = None


@dataclass(frozen=True)
class EventMark:
    """One thing that happened, as a mark on a time axis and as a row of the log."""

    step: int
    vcpu: int
    letter: str  # "S" "P" "D" "A" "N", or "X" for what is no ucall
    text: str
    kind: str = ""  # "ucall", "exception", "shutdown", ...
    slot: int | None = None  # that it came through
    gva: int | None = None  # of the instruction, where that is known


@dataclass(frozen=True)
class Hold:
    """One stay of a pool slot with a vCPU, in steps of the VM."""

    slot: int
    vcpu: int  # -1: nobody knows
    start: int
    end: int | None  # None: it is still held


@dataclass(frozen=True)
class Said:
    """The last ucall or exit of any vCPU, in full."""

    step: int
    vcpu: int
    kind: str  # "SYNC", "PRINTF", ...; for another exit its word: "shutdown", "mmio"
    args: tuple[int, ...]  # without the zeros at their end
    text: str | None
    slot: int | None
    words: str  # the sentence that a terminal would show; "" for a ucall that says all
    is_end: bool  # a guest does not go on after this
    is_now: bool  # nothing ran since


T = TypeVar("T")


class Marks(Sequence[EventMark], Generic[T]):
    """The first so many of a log that only grows, as marks, each made when somebody asks for it.

    A look costs the same after a million events as after ten.
    """

    def __init__(self, log: Sequence[T], count: int, mark: Callable[[T], EventMark]) -> None:
        self._log = log
        self._count = count
        self._mark = mark

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> EventMark: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[EventMark, ...]: ...

    def __getitem__(self, index: int | slice) -> EventMark | tuple[EventMark, ...]:
        which = range(self._count)[index]
        if isinstance(which, range):
            return tuple(self._mark(self._log[one]) for one in which)
        return self._mark(self._log[which])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    def __hash__(self) -> int:
        return hash(self[:])

    def __repr__(self) -> str:
        return f"<{self._count} marks>"


@checked
@dataclass(frozen=True)
class VmSnapshot:
    """Everything that the dashboard draws, taken at one step."""

    name: str
    arch: str
    engine: str
    protection: str  # "no encryption", "SEV, C-bit 51, running"
    state: str
    schedule: str
    step: int
    vcpu: int  # index of the one in front
    vcpus: tuple[VcpuBrief, ...]  # all of them, by index
    pool: PoolSnapshot | None
    page_table: PageTable
    memory: MemoryMap
    selection: Selection | None
    events: Sequence[EventMark] = ()
    status: str = ""
    front: VcpuSnapshot | None = None  # the vCPU in front; None for a VM without vCPUs
    encryption: EncryptionMap | None = None  # of a protected VM, as are the next two
    eyes: PageEyes | None = None  # the page of the selection
    launch: LaunchProgress | None = None
    said: Said | None = None  # the last ucall or exit
    shifts: NDArray[np.int64] | None = None  # rows of vCPU, first step, step behind the last
    log_of: int | None = None  # the vCPU whose events the log shows; None for all
    holds: tuple[Hold, ...] = ()  # of pool slots, the newest ones

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)
