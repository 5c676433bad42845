"""Who runs next: named, deterministic schedules over the vCPUs of one VM."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.errors import InvalidState

__all__ = ["Schedule"]

DEFAULT_QUANTUM = 1000  # instructions


@dataclass
class Schedule:
    """Picks a vCPU and how many instructions it may run; the same name and the same guest give the same run.

    `round_robin:N` gives each vCPU N instructions in turn, `random:SEED:N` draws vCPU and up to N instructions,
    `sequential` runs a vCPU until it is done, `parallel` runs all at once, on an engine that can (and is not deterministic).
    A vCPU that exits keeps its turn, as a thread of the kernel's tests does.
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
        most = {"round_robin": 1, "sequential": 0, "parallel": 0, "random": 2}
        if kind not in most or len(values) > most[kind]:
            raise InvalidState(
                f"schedule {name!r}: there are round_robin:QUANTUM, random:SEED:QUANTUM, sequential and parallel",
                name=name,
            )
        quantum = values[-1] if len(values) == most[kind] and values else DEFAULT_QUANTUM
        if quantum < 1:
            raise InvalidState(
                f"schedule {name!r}: a quantum has at least one instruction", name=name
            )
        return cls(
            name, kind, quantum, random.Random(values[0] if kind == "random" and values else 0)
        )

    def pick(self, runnable: Sequence[int]) -> tuple[int, int | None]:
        """(vCPU, instructions) for the next turn; None means as many as it likes."""
        if self.kind == "sequential" or len(runnable) == 1:
            self.turn, self.left = runnable[0], 0
            return self.turn, None
        if self.left <= 0 or self.turn not in runnable:
            self.left = self.quantum
            if self.kind == "random":
                self.turn, self.left = (
                    self.state.choice(runnable),
                    self.state.randint(1, self.quantum),
                )
            else:
                self.turn = next((i for i in runnable if i > self.turn), runnable[0])
        return self.turn, self.left

    def ran(self, insns: int) -> None:
        """The picked vCPU retired that many instructions."""
        self.left -= insns

    def save(self) -> tuple[Any, ...]:
        """Where the schedule stands."""
        return self.name, self.state.getstate(), self.turn, self.left

    @classmethod
    def restored(cls, saved: tuple[Any, ...]) -> Schedule:
        """A schedule that goes on where `save` was called."""
        schedule = cls.named(saved[0])
        schedule.state.setstate(saved[1])
        schedule.turn, schedule.left = saved[2], saved[3]
        return schedule
