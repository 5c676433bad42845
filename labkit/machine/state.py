"""The state of a machine as one value, and the log that makes going back to it cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labkit.engines.base import LoggingVm
from labkit.machine.memory import PAGE
from labkit.machine.space import SpaceState

__all__ = ["MachineState", "MachineTables", "SlotImage", "WriteLog"]

MOST_WRITES = 4096  # of the host between two snapshots, to be kept one by one


class SlotImage(NamedTuple):
    """What one memslot holds."""

    gpa: int
    data: bytes


@dataclass(frozen=True)
class MachineTables:
    """Where the machine's own tables lie (gvas, 0 for one that is not there)."""

    tables_gva: int  # the descriptor page
    idt_gva: int
    handlers_gva: int
    vectors_gva: int
    preset: Mapping[str, int]  # registers that every vCPU begins with


@dataclass(frozen=True)
class MachineState:
    """Everything that makes a machine what it is, bit for bit."""

    slots: tuple[SlotImage, ...]
    cpus: tuple[bytes, ...]  # what each engine vCPU saved
    space: SpaceState
    tables: MachineTables
    views: Sequence[tuple[bytes, bytes]]  # of an encrypted machine: ProtectingVm.views_state
    entries: tuple[int, ...]
    stacks: tuple[int, ...]  # these three by vCPU: see Machine
    areas: tuple[int, ...]
    tasks: tuple[int, ...]

    def pieces(self, pages: set[int] | None) -> Sequence[tuple[int, bytes]]:
        """(gpa, data) of the memory on these pages, given by their gpas; None: of all memory."""
        if pages is None:
            return self.slots
        return [
            (page, slot.data[page - slot.gpa : page - slot.gpa + PAGE])
            for slot in self.slots
            for page in pages
            if slot.gpa <= page < slot.gpa + len(slot.data)
        ]


class WriteLog:
    """Which pages differ from a state of the machine: those that guests and host wrote since.

    An engine that keeps no log of its guests' writes (LoggingVm) makes that unknown.
    """

    def __init__(self, engine: LoggingVm | None) -> None:
        self._engine = engine
        self._base: MachineState | None = None
        self._host_writes: list[tuple[int, int]] | None = None  # (gpa, bytes); None: not known

    def note(self, gpa: int, size: int) -> None:
        """The host wrote memory."""
        if self._host_writes is not None:
            self._host_writes.append((gpa, size))
            if len(self._host_writes) > MOST_WRITES:
                self._host_writes = None

    def restart(self, state: MachineState) -> set[int] | None:
        """The gpas of the pages that differ from a state so far, None when they are not known.

        From here on what differs from this state is logged: the machine is in it, or is about to be
        put into it.
        """
        if self._engine is None:
            return None
        pages: set[int] | None = None
        written = self._engine.pages_written()  # since the last call, so it begins anew too
        if state is self._base and self._host_writes is not None:
            pages = set(written)
            for gpa, size in self._host_writes:
                pages.update(range(gpa & -PAGE, gpa + size, PAGE))
        self._base = state
        self._host_writes = []
        return pages
