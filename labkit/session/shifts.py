"""Which vCPU ran when: one shift from each change of vCPU to the next."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shifts", "ShiftsState"]


@dataclass(frozen=True)
class ShiftsState:
    """The shifts of a snapshot."""

    vcpus: bytes
    starts: bytes


class Shifts:
    """The shifts of one VM, the oldest first: 12 bytes each, and none while one vCPU goes on.

    Attributes: vcpu, who ran last (-1: nobody yet). Only where vCPUs take turns: of those that run
    at once nobody knows.
    """

    def __init__(self) -> None:
        self.vcpu = -1
        self._vcpus = array("i")
        self._starts = array("q")

    def change(self, vcpu: int, step: int) -> None:
        """From this step of the VM on, another vCPU runs."""
        self.vcpu = vcpu
        self._vcpus.append(vcpu)
        self._starts.append(step)

    def __len__(self) -> int:
        return len(self._vcpus)

    def until(self, step: int) -> NDArray[np.int64]:
        """A row for each shift up to a step of the VM: vCPU, first step, step behind the last."""
        rows = np.empty((len(self), 3), np.int64)
        rows[:, 0] = self._vcpus
        rows[:, 1] = self._starts
        if len(self):
            rows[:-1, 2] = rows[1:, 1]
            rows[-1, 2] = step
        return rows[rows[:, 2] > rows[:, 1]]

    def state(self) -> ShiftsState:
        """All of them, for a snapshot."""
        return ShiftsState(self._vcpus.tobytes(), self._starts.tobytes())

    def set_state(self, state: ShiftsState) -> None:
        """Those of a snapshot that is put back; whoever runs next begins a shift."""
        self.vcpu = -1
        self._vcpus = array("i", state.vcpus)
        self._starts = array("q", state.starts)
