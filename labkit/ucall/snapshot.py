"""What the ucall pool looked like at one step: facts that nobody's next look changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from labkit.checked import checked
from labkit.errors import InvalidState
from labkit.outside import printable
from labkit.shown import mimebundle, save
from labkit.ucall.abi import UCALL_MAX_ARGS, UCALL_SIZE, cmd_name, decode_text, has_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PoolSnapshot", "Slot", "SlotFacts", "SlotState", "UsedSlots"]

# "done": holds a DONE ucall, which by design is never given back;
# "leaked": its vCPU is at its DONE and forgot it
SlotState = Literal["free", "held", "done", "leaked"]


@dataclass(frozen=True)
class Slot:
    """One struct ucall of the pool, decoded by position and never by a pointer that a guest wrote.

    vcpu is its owner, None when the host never saw who took it; since is the step at which it was
    taken, None for a free one. cmd is SYNC, PRINTF, ... or "0x17?" for a number that is no command.
    args are seven u64. text is the buffer of a PRINTF, an ABORT, an UNHANDLED: for others it is
    stale, so None. hva is what the slot itself says, which a guest can overwrite, and hva_ok
    whether that is the slot's own.
    """

    index: int
    state: SlotState
    vcpu: int | None
    since: int | None
    cmd: str
    args: tuple[int, ...]
    text: str | None
    gva: int
    gpa: int
    hva: int
    hva_ok: bool


@dataclass(frozen=True)
class SlotFacts:
    """What the host knows of each slot beside its bytes: arrays with one element per slot."""

    in_use: NDArray[np.bool_]
    owner: NDArray[np.int16]
    since: NDArray[np.int64]
    uses: NDArray[np.int32]
    done: NDArray[np.bool_]
    leaked: NDArray[np.bool_]

    def state(self, index: int) -> SlotState:
        """The word for a slot's state."""
        if self.done[index]:
            return "done"
        if self.leaked[index]:
            return "leaked"
        return "held" if self.in_use[index] else "free"


class UsedSlots(Sequence[Slot]):
    """Slots copied out of memory at one moment, and decoded when somebody first reads one.

    Most looks at a pool ask for its bits only, and decoding 512 slots takes twenty times as long as
    all the rest. Raises IndexError as a tuple of slots would.
    """

    def __init__(
        self,
        indices: list[int],
        rows: NDArray[np.void],
        facts: SlotFacts,
        gva: int,
        gpa: int,
        hva: int,
    ) -> None:
        """rows has a struct ucall for each index; gva, gpa and hva are those of slot 0."""
        self._indices = indices
        self._rows = rows
        self._facts = facts
        self._gva = gva
        self._gpa = gpa
        self._hva = hva

    @cached_property
    def _slots(self) -> tuple[Slot, ...]:
        return tuple(map(self._decode, self._indices, self._rows))

    def _decode(self, index: int, row: np.void) -> Slot:
        facts = self._facts
        offset = UCALL_SIZE * index
        owner = int(facts.owner[index])
        cmd, hva = int(row["cmd"]), int(row["hva"])
        return Slot(
            index=index,
            state=facts.state(index),
            vcpu=owner if owner >= 0 else None,
            since=int(facts.since[index]) if facts.in_use[index] else None,
            cmd=cmd_name(cmd),
            args=tuple(row["args"].tolist()),
            text=decode_text(row["buffer"].tobytes()) if has_text(cmd) else None,
            gva=self._gva + offset,
            gpa=self._gpa + offset,
            hva=hva,
            hva_ok=hva == self._hva + offset,
        )

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> Slot: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Slot, ...]: ...
    def __getitem__(self, place: int | slice) -> Slot | tuple[Slot, ...]:
        return self._slots[place]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UsedSlots | tuple):
            return NotImplemented
        return self._slots == tuple(other)

    def __repr__(self) -> str:
        return repr(self._slots)


@checked
@dataclass(frozen=True, repr=False)
class PoolSnapshot:
    """What the pool looked like at one step; arrays have one element per slot.

    Changes are marked only against a snapshot that somebody names: `since(other)`. What the host
    knows beyond memory (owner, held_since, uses) is told in labkit.ucall.pool.
    """

    step: int
    nr_slots: int

    # Of struct ucall_header: where it lies, in bytes from there to slot 0, and from slot to slot
    gva: int
    gpa: int
    slot_size: int
    slots_offset: int
    nr_pages: int

    in_use: NDArray[np.bool_]

    # The vCPU, -1: none or not known
    owner: NDArray[np.int16]

    # Step at which the slot was taken, -1: it is free
    held_since: NDArray[np.int64]

    done: NDArray[np.bool_]
    leaked: NDArray[np.bool_]

    # in_use is not what it was at step changed_since; None: not marked against any other snapshot
    changed: NDArray[np.bool_]
    changed_since: int | None

    # How often the slot was taken so far
    uses: NDArray[np.int32]

    # Slots in use, and free ones that were ever used, by index
    held: Sequence[Slot]

    # Of struct ucall_header, as handed to the guest
    hva: int = 0

    # What the next instruction will take, if it is about to
    next_slot: int | None = None

    def since(self, other: PoolSnapshot) -> PoolSnapshot:
        """The same snapshot, with its changes marked against another one, an earlier one as a rule.

        changed says of each slot whether in_use differs, changed_since is the other's step; all
        else stays. Raises InvalidState for a snapshot of a pool with another number of slots.
        """
        if other.nr_slots != self.nr_slots:
            raise InvalidState(
                f"a pool of {self.nr_slots} slots cannot be compared with one of {other.nr_slots}"
            )
        return replace(self, changed=self.in_use ^ other.in_use, changed_since=other.step)

    @property
    def slots(self) -> pd.DataFrame:
        """One row a slot: state, vcpu, since (step), uses, cmd, args, text, gva, gpa, hva, hva_ok.

        The index is the slot's number; vcpu and since are <NA> where there is none.
        """
        from labkit.hexed import HexFrame

        used = {slot.index: slot for slot in self.held}
        rows = [used.get(index) or self._never_used(index) for index in range(self.nr_slots)]
        frame = HexFrame([vars(row) for row in rows], dtype=object).set_index("index")
        frame["text"] = [None if row.text is None else printable(row.text) for row in rows]
        frame.insert(3, "uses", self.uses)
        return frame.astype({"vcpu": "Int64", "since": "Int64"})

    def _never_used(self, index: int) -> Slot:
        offset = self.slots_offset + self.slot_size * index
        return Slot(
            index=index,
            state="free",
            vcpu=None,
            since=None,
            cmd="NONE",
            args=(0,) * UCALL_MAX_ARGS,
            text=None,
            gva=self.gva + offset,
            gpa=self.gpa + offset,
            hva=self.hva + offset,
            hva_ok=True,
        )

    def __repr__(self) -> str:
        in_use, leaked = int(self.in_use.sum()), int(self.leaked.sum())
        return (
            f"<PoolSnapshot step {self.step}: {in_use} of {self.nr_slots} slots in use, "
            f"{leaked} leaked>"
        )

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)
