"""Who runs next: named, deterministic schedules over the vCPUs of one VM."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.errors import InvalidState

__all__ = ["Schedule", "ScheduleState"]

DEFAULT_QUANTUM = 1000  # instructions

# How many numbers may follow a kind: of a quantum, or of a seed and a quantum.
NR_NUMBERS = {"round_robin": 1, "sequential": 0, "parallel": 0, "random": 2}


@dataclass(frozen=True)
class ScheduleState:
    """Where a schedule stands."""

    name: str
    random: tuple[Any, ...]  # random.Random.getstate()
    turn: int
    left: int


@dataclass
class Schedule:
    """Picks a vCPU and how many instructions it may run; same name, same guest: the same run.

    `round_robin:N` gives each vCPU N instructions in turn, `random:SEED:N` draws vCPU and up to N
    instructions, `sequential` runs a vCPU until it is done, `parallel` runs all at once, on an
    engine that can (and is not deterministic). A vCPU that exits keeps its turn, as a thread of the
    kernel's tests does.

    `turn` is the vCPU that was picked last (-1: none yet), `left` the instructions left to it.
    """

    name: str
    kind: str
    quantum: int
    state: random.Random
    turn: int = -1
    left: int = 0

    @classmethod
    def named(cls, name: str) -> Schedule:
        """The schedule of that name; raises InvalidState for one that does not exist."""
        kind, *numbers = name.split(":")
        try:
            values = [int(number, 0) for number in numbers]
        except ValueError:
            raise InvalidState(
                f"schedule {name!r}: {':'.join(numbers)!r} should be numbers", name=name
            ) from None
        if kind not in NR_NUMBERS or len(values) > NR_NUMBERS[kind]:
            raise InvalidState(
                f"schedule {name!r}: there are round_robin:QUANTUM, random:SEED:QUANTUM, "
                "sequential and parallel",
                name=name,
            )

        quantum = DEFAULT_QUANTUM
        if values and len(values) == NR_NUMBERS[kind]:
            quantum = values[-1]
        if quantum < 1:
            raise InvalidState(
                f"schedule {name!r}: a quantum has at least one instruction", name=name
            )
        seed = 0
        if kind == "random" and values:
            seed = values[0]
        return cls(name, kind, quantum, random.Random(seed))

    def pick(self, runnable: Sequence[int]) -> tuple[int, int | None]:
        """(vCPU, instructions) for the next turn; None means as many as it likes."""
        if self.kind == "sequential" or len(runnable) == 1:
            self.turn = runnable[0]
            self.left = 0
            return self.turn, None
        if self.left <= 0 or self.turn not in runnable:
            self._next_turn(runnable)
        return self.turn, self.left

    def _next_turn(self, runnable: Sequence[int]) -> None:
        if self.kind == "random":
            self.turn = self.state.choice(runnable)
            self.left = self.state.randint(1, self.quantum)
        else:
            self.turn = next((index for index in runnable if index > self.turn), runnable[0])
            self.left = self.quantum

    def ran(self, insns: int) -> None:
        """The picked vCPU retired that many instructions."""
        self.left -= insns

    def save(self) -> ScheduleState:
        """Where the schedule stands."""
        return ScheduleState(self.name, self.state.getstate(), self.turn, self.left)

    @classmethod
    def restored(cls, saved: ScheduleState) -> Schedule:
        """A schedule that goes on where `save` was called."""
        schedule = cls.named(saved.name)
        schedule.state.setstate(saved.random)
        schedule.turn = saved.turn
        schedule.left = saved.left
        return schedule
