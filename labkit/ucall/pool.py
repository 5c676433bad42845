"""The ucall pool as the host sees it: which slot is taken, by whom, since when, and what it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.engines.exits import Exit
from labkit.errors import MemoryFault
from labkit.machine.memory import Memory
from labkit.machine.space import AddressSpace
from labkit.shown import mimebundle
from labkit.ucall import abi
from labkit.ucall.abi import (
    BITMAP_BYTES,
    HEADER_SIZE,
    NR_SLOTS,
    UCALL_MAX_ARGS,
    UCALL_SIZE,
    UcallCmd,
    cmd_name,
    decode_text,
    has_text,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BadUcallExit",
    "Fields",
    "Pool",
    "PoolSnapshot",
    "Slot",
    "SlotState",
    "Strings",
    "Ucall",
]

SlotState = Literal["free", "held", "done", "leaked"]
Strings = Callable[
    [int], str | None
]  # gva of a string constant -> its text, from the program and not from the guest
_NAMES = {int(cmd): cmd.name for cmd in UcallCmd}
_WITH_TEXT = frozenset(int(cmd) for cmd in UcallCmd if has_text(cmd))
_SLOTS = {
    BITMAP_BYTES + UCALL_SIZE * index: index for index in range(NR_SLOTS)
}  # by offset from the header
_TUPLE = (
    tuple.__new__
)  # a NamedTuple's own constructor is a Python function, which costs more than the tuple
_SWAP, _WORDS = Struct(f"<{BITMAP_BYTES // 8}Q").pack, Struct(f">{BITMAP_BYTES // 8}Q").unpack


class Ucall(NamedTuple):
    """One call of a guest to its host, copied out of its slot."""

    cmd: str  # SYNC PRINTF ABORT DONE NONE UNHANDLED, or "0x17?" for a number that is no command
    args: tuple[int, ...]  # seven u64
    text: str | None  # of a PRINTF, an ABORT, an UNHANDLED
    vcpu: int
    slot: int | None
    step: int = 0
    file: str | None = None  # of an ABORT, as are line and expr
    line: int | None = None
    expr: str | None = None

    @property
    def kind(self) -> str:
        """What it is among events."""
        return "ucall"

    @property
    def what(self) -> str:
        """One line for a person, for a table that has a column for the vCPU."""
        return repr(self)[1:-1].split(" ", 3)[-1]

    def __repr__(self) -> str:
        args = list(self.args)
        while args and not args[-1]:
            args.pop()
        said = "" if self.text is None else f" {self.text!r}"
        where = f" at {self.file}:{self.line}: {self.expr}" if self.file else ""
        return f"<Ucall vCPU {self.vcpu} {self.cmd}{said}{where} args [{', '.join(map(hex, args))}] slot {self.slot}>"


class Fields:
    """How one struct ucall is read, in a guest's byte order; what is in it is believed by nobody yet."""

    def __init__(self, byteorder: Literal["little", "big"] = "little") -> None:
        self._unpack = Struct(
            f"{'>' if byteorder == 'big' else '<'}{1 + UCALL_MAX_ARGS}Q"
        ).unpack_from

    def ucall(
        self, data: Any, at: int, vcpu: int, slot: int | None, step: int, strings: Strings
    ) -> Ucall:
        """The ucall at an offset; strings finds the texts that an ABORT only points to."""
        fields = self._unpack(data, at)
        cmd, args = fields[0], fields[1:]
        name = _NAMES.get(cmd) or cmd_name(cmd)
        if cmd not in _WITH_TEXT:
            return _TUPLE(Ucall, (name, args, None, vcpu, slot, step, None, None, None))
        text = decode_text(
            data[at + abi.OFFSET_BUFFER : at + abi.OFFSET_BUFFER + abi.UCALL_BUFFER_LEN]
        )
        if cmd != UcallCmd.ABORT:
            return Ucall(name, args, text, vcpu, slot, step)
        file, line, expr = (
            args[i] for i in (abi.GUEST_FILE, abi.GUEST_LINE, abi.GUEST_ERROR_STRING)
        )
        return Ucall(name, args, text, vcpu, slot, step, strings(file), line, strings(expr))


@dataclass(frozen=True)
class BadUcallExit(Exit):
    """A ucall exit with a value that is no slot in use: nothing was read through it."""

    value: int
    kind: str  # "exhausted" "stale" "unaligned" "foreign" "no pool" "unreadable"
    why: str
    vcpu: int
    end = "bad-ucall"

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}: {self.kind} ucall: {self.why}"


@dataclass(frozen=True)
class Slot:
    """One struct ucall of the pool, decoded by position and never by a pointer that the guest wrote."""

    index: int
    state: SlotState  # "done": holds a DONE ucall, never freed by design; "leaked": its vCPU is done and forgot it
    vcpu: int | None  # owner, None when the host never saw who took it
    since: int | None  # step at which the slot was taken
    cmd: str  # SYNC, PRINTF, ... or "0x17?" for a number that is no command
    args: tuple[int, ...]  # seven u64
    text: str | None  # buffer, only for PRINTF and ABORT: it is stale otherwise
    gva: int
    gpa: int
    hva: int  # as stored in the guest
    hva_ok: bool  # the stored hva is this slot's


@dataclass(frozen=True, repr=False)
class PoolSnapshot:
    """What the pool looked like at one step; arrays have one element per slot."""

    step: int
    nr_slots: int
    gva: int  # of struct ucall_header
    gpa: int
    slot_size: int  # bytes
    slots_offset: int  # bytes from gva to slot 0
    nr_pages: int
    in_use: NDArray[np.bool_]
    owner: NDArray[np.int16]  # -1: none or not known
    since: NDArray[np.int64]  # step, -1: none
    done: NDArray[np.bool_]
    leaked: NDArray[np.bool_]
    changed: NDArray[np.bool_]  # bit differs from the last state the user looked at
    changed_since: int | None  # the step of that state
    uses: NDArray[np.int32]  # how often the slot was taken so far
    held: tuple[Slot, ...]  # slots in use, and free ones that were ever used, by index
    hva: int = 0  # of struct ucall_header, as handed to the guest
    next_slot: int | None = None  # what the next instruction will take, if it is about to

    @property
    def slots(self) -> pd.DataFrame:
        """One row a slot: state, vcpu, since (step), uses, cmd, args, text, gva, gpa, hva, hva_ok."""
        import pandas as pd

        held = {slot.index: slot for slot in self.held}
        rows = [held[i] if i in held else self._never_used(i) for i in range(self.nr_slots)]
        frame = pd.DataFrame([vars(row) for row in rows], dtype=object).set_index("index")
        frame.insert(3, "uses", self.uses)
        return frame.astype({"vcpu": "Int64", "since": "Int64"})

    def _never_used(self, index: int) -> Slot:
        offset = self.slots_offset + self.slot_size * index
        return Slot(
            index,
            "free",
            None,
            None,
            "NONE",
            (0,) * UCALL_MAX_ARGS,
            None,
            self.gva + offset,
            self.gpa + offset,
            self.hva + offset,
            True,
        )

    def __repr__(self) -> str:
        return (
            f"<PoolSnapshot step {self.step}: {int(self.in_use.sum())} of {self.nr_slots} slots in use, "
            f"{int(self.leaked.sum())} leaked>"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


class Pool:
    """The host's side of one VM's pool: makes it, looks up what a guest hands over, and keeps the history of its bits."""

    def __init__(
        self, memory: Memory, gpa: int, gva: int, byteorder: Literal["little", "big"] = "little"
    ) -> None:
        self._big = byteorder == "big"
        self._fields = Fields(byteorder)
        self._header = abi.HEADER.newbyteorder(">" if self._big else "<")
        self.memory, self.gpa, self.gva = memory, gpa, gva
        self.hva = memory.hva(
            gpa
        )  # of the header, as written into the guest; a forked VM keeps its parent's
        slot = memory.slot(gpa)
        assert slot is not None
        self._data, self._offset = slot.data, gpa - slot.gpa
        self._in_use = slice(self._offset, self._offset + BITMAP_BYTES)
        self.owner = [-1] * NR_SLOTS
        self.since = [-1] * NR_SLOTS  # step
        self.uses = [0] * NR_SLOTS
        self.done = [False] * NR_SLOTS
        self._seen = bytes(BITMAP_BYTES)  # the bitmap when the host last looked
        self._heard: dict[
            int, int
        ] = {}  # vCPU -> slot of its last ucall, as long as it has not given it back

    @classmethod
    def make(cls, space: AddressSpace) -> Pool:
        """Allocate a VM's pool, in memory that is never encrypted, and tell every slot its own address (ucall_init() in C)."""
        gva = space.alloc(HEADER_SIZE, "ucall pool", protected=False)
        pool = cls(space.memory, space.walk(gva).require(), gva, space.mode.byteorder)
        with space.memory.view(
            pool.gpa, HEADER_SIZE
        ) as raw:  # in place: a copy of half a megabyte of zeros takes longer than the VM
            header = np.frombuffer(raw, pool._header)
            header["ucalls"]["hva"] = (
                pool.hva + BITMAP_BYTES + UCALL_SIZE * np.arange(NR_SLOTS, dtype=np.uint64)
            )
            del header
        return pool

    def twin(self, space: AddressSpace) -> Pool:
        """The same pool in a forked VM's memory, known by the addresses that its parent handed out."""
        return Pool(space.memory, self.gpa, self.gva, space.mode.byteorder)

    def saw(self, vcpu: int, locked: int, step: int) -> bytes:
        """A vCPU came back at `step`: slots that it took and gave back meanwhile. Returns in_use as it is now.

        `locked` is the step of its last locked instruction, which for a test-and-set is the taking itself; without one (-1)
        slots were taken at `step`.
        """
        if self.memory.on_look:
            self.memory.looked_at(self.gpa, HEADER_SIZE, False)
        now = self._bitmap()
        if (
            locked >= 0
            and (index := self._heard.pop(vcpu, -1)) >= 0
            and now[index >> 3] >> (index & 7) & 1
            and self.owner[index] == vcpu
            and not self.done[index]
        ):
            self._taken(
                index, vcpu, locked
            )  # it gave the slot back with a locked instruction, and has it again
        if now == self._seen:
            return now
        step = locked if locked >= 0 else step
        changed = int.from_bytes(now, "little") ^ int.from_bytes(self._seen, "little")
        self._seen = now
        while changed:
            index = (changed & -changed).bit_length() - 1
            changed &= changed - 1
            if now[index >> 3] >> (index & 7) & 1:
                self._taken(index, vcpu, step)
            else:
                self.owner[index] = self.since[index] = -1
                self.done[index] = False
        return now

    def _bitmap(self) -> bytes:
        """in_use as it lies in memory, bit n at byte n / 8: the guest's words are its own byte order's."""
        now = self._data[self._in_use]
        return _SWAP(*_WORDS(now)) if self._big else now

    def begins(self, vcpu: int) -> None:
        """A vCPU begins anew: what it held it will not give back."""
        self._heard.pop(vcpu, None)

    def _taken(self, index: int, vcpu: int, step: int) -> None:
        self.owner[index], self.since[index], self.done[index] = vcpu, step, False
        self.uses[index] += 1

    def take(
        self, value: int, vcpu: int, step: int, locked: int, strings: Strings
    ) -> Ucall | BadUcallExit:
        """The ucall behind the value that a guest left in its register at `step`, or what is wrong with that value.

        `locked` is the step of the vCPU's last locked instruction, -1 when it ran none since it last came back.

        The value is only ever compared with the addresses that the host gave out, never used as one.
        """
        index = _SLOTS.get(value - self.hva, -1)
        if index < 0:
            return self._refuse(value, vcpu)
        if not self.saw(vcpu, locked, step)[index >> 3] >> (index & 7) & 1:
            return BadUcallExit(
                value, "stale", f"slot {index} is not in use: its bit in in_use is clear", vcpu
            )
        self._heard[vcpu], self.owner[index] = (
            index,
            vcpu,
        )  # the owner: where vCPUs run at once, another one may have come back first
        found = self._fields.ucall(
            self._data, self._offset + BITMAP_BYTES + UCALL_SIZE * index, vcpu, index, step, strings
        )
        if found.cmd == "DONE":
            self.done[index] = True
        return found

    def _refuse(self, value: int, vcpu: int) -> Ucall | BadUcallExit:
        if value == abi.GUEST_UCALL_FAILED:
            taken = int(self.bits().sum())
            return BadUcallExit(
                value,
                "exhausted",
                f"the guest found no free slot ({taken} of {NR_SLOTS} are in use) "
                f"and handed over the kernel's magic -1",
                vcpu,
            )
        index, rest = divmod(value - self.hva - BITMAP_BYTES, UCALL_SIZE)
        if 0 <= index < NR_SLOTS:
            return BadUcallExit(
                value,
                "unaligned",
                f"{value:#x} lies {rest} bytes behind the start of slot {index}",
                vcpu,
            )
        try:
            where = f"this VM's guest memory (gpa {self.memory.gpa(value):#x}), but not a slot"
        except MemoryFault:
            where = "no memory of this VM: forged, or another VM's"
        end = self.hva + HEADER_SIZE - 1
        return BadUcallExit(
            value,
            "foreign",
            f"{value:#x} is {where}; this VM's pool is at hva {self.hva:#x} to {end:#x}",
            vcpu,
        )

    def bits(self) -> NDArray[np.bool_]:
        """in_use, one bool a slot, as it lies in memory now."""
        raw = np.frombuffer(self._bitmap(), np.uint8)
        return np.unpackbits(raw, bitorder="little").astype(np.bool_)

    def snapshot(
        self, step: int, finished: frozenset[int], seen: PoolSnapshot | None = None
    ) -> PoolSnapshot:
        """The pool now; `finished` are the vCPUs at their DONE, `seen` the state that changes are marked against."""
        self.saw(-1, -1, step)  # what nobody came back with was written by the host
        in_use, owner, uses = (
            self.bits(),
            np.array(self.owner, np.int16),
            np.array(self.uses, np.int32),
        )
        done = np.array(self.done, np.bool_) & in_use
        leaked = in_use & ~done & np.isin(owner, list(finished))
        indices = np.flatnonzero(in_use | (uses > 0)).tolist()
        header = np.frombuffer(self.memory.read(self.gpa, HEADER_SIZE), self._header)[0]
        slots = tuple(
            self._slot(i, header["ucalls"][i], bool(in_use[i]), bool(done[i]), bool(leaked[i]))
            for i in indices
        )
        changed = np.zeros(NR_SLOTS, np.bool_) if seen is None else in_use ^ seen.in_use
        return PoolSnapshot(
            step,
            NR_SLOTS,
            self.gva,
            self.gpa,
            UCALL_SIZE,
            BITMAP_BYTES,
            -(-HEADER_SIZE // 4096),
            in_use,
            owner,
            np.array(self.since, np.int64),
            done,
            leaked,
            changed,
            None if seen is None else seen.step,
            uses,
            slots,
            self.hva,
        )

    def _slot(self, index: int, raw: np.void, in_use: bool, done: bool, leaked: bool) -> Slot:
        offset = BITMAP_BYTES + UCALL_SIZE * index
        cmd, hva, owner = int(raw["cmd"]), int(raw["hva"]), int(self.owner[index])
        state: SlotState = "done" if done else "leaked" if leaked else "held" if in_use else "free"
        return Slot(
            index,
            state,
            owner if owner >= 0 else None,
            int(self.since[index]) if in_use else None,
            cmd_name(cmd),
            tuple(int(a) for a in raw["args"]),
            decode_text(raw["buffer"].tobytes()) if has_text(cmd) else None,
            self.gva + offset,
            self.gpa + offset,
            hva,
            hva == self.hva + offset,
        )

    def state(self) -> dict[str, object]:
        """What the host knows beyond guest memory, for a snapshot."""
        slots = [list(column) for column in (self.owner, self.since, self.uses, self.done)]
        return {"hva": self.hva, "seen": self._seen, "heard": dict(self._heard), "slots": slots}

    def set_state(self, state: dict[str, object]) -> None:
        """Put `state` back."""
        facts: dict[str, Any] = dict(state)
        self.hva, self._seen, self._heard = facts["hva"], facts["seen"], dict(facts["heard"])
        self.owner, self.since, self.uses, self.done = (list(column) for column in facts["slots"])
