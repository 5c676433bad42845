"""The host's side of the ucall pool: which slot is taken, by whom, since when.

in_use lies in guest memory and says only which slots are taken. Who took one, and when, the host
concludes from the bits that changed until a vCPU came back: guests change them with locked
instructions, and the engine knows the step of a vCPU's last one. Bits that the host itself writes
are nobody's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from labkit.errors import MemoryFault
from labkit.machine.memory import PAGE, Memory
from labkit.machine.space import AddressSpace
from labkit.ucall import abi
from labkit.ucall.abi import BITMAP_BYTES, HEADER_SIZE, NR_SLOTS, UCALL_SIZE
from labkit.ucall.calls import BadUcallExit, Byteorder, Fields, Strings, Ucall
from labkit.ucall.history import AGAIN, MAX_HISTORY, PoolEvent
from labkit.ucall.snapshot import PoolSnapshot, SlotFacts, UsedSlots

__all__ = ["Pool", "PoolState"]

# Offset from the header -> slot
_SLOTS = {BITMAP_BYTES + UCALL_SIZE * index: index for index in range(NR_SLOTS)}

# in_use as u64 words of a big-endian guest, and the same words little-endian
_big_words = Struct(f">{BITMAP_BYTES // 8}Q").unpack
_little_words = Struct(f"<{BITMAP_BYTES // 8}Q").pack


@dataclass(frozen=True)
class PoolState:
    """What the host knows of a pool beyond guest memory, for a VM's snapshot."""

    hva: int
    step: int
    seen: bytes
    heard: dict[int, int]
    owner: tuple[int, ...]
    since: tuple[int, ...]
    uses: tuple[int, ...]
    done: tuple[bool, ...]
    history: tuple[PoolEvent, ...]


class Pool:
    """The host's side of one VM's pool: makes it, and looks up what a guest hands over.

    It keeps the history of the bits, one element per slot: owner (vCPU, -1: nobody or not known),
    since (step, -1: free), uses, and done (it holds a DONE ucall). `history` has the last events of
    all slots.
    """

    def __init__(self, memory: Memory, gpa: int, gva: int, byteorder: Byteorder = "little") -> None:
        """A pool that lies at gpa, inside one memslot, and is mapped at gva."""
        self.memory = memory
        self.gpa = gpa
        self.gva = gva

        # Of the header, as written into the guest; a forked VM keeps its parent's
        self.hva = memory.hva(gpa)

        self.owner = [-1] * NR_SLOTS
        self.since = [-1] * NR_SLOTS
        self.uses = [0] * NR_SLOTS
        self.done = [False] * NR_SLOTS
        self.history: deque[PoolEvent] = deque(maxlen=MAX_HISTORY)

        slot = memory.slot(gpa)
        assert slot is not None
        self._data = slot.data
        self._offset = gpa - slot.gpa
        self._in_use = slice(self._offset, self._offset + BITMAP_BYTES)

        self._is_big = byteorder == "big"
        self._fields = Fields(byteorder)
        self._header = abi.HEADER.newbyteorder(">" if self._is_big else "<")

        # The bitmap when a vCPU last came back or the host last wrote, and the clock then
        self._seen = bytes(BITMAP_BYTES)
        self._step = 0

        # vCPU -> slot of its last ucall, as long as it has not given it back
        self._heard: dict[int, int] = {}
        memory.on_write.append(self._host_wrote)

    @classmethod
    def make(cls, space: AddressSpace) -> Pool:
        """Allocate a VM's pool, never encrypted, and tell every slot its own hva (ucall_init())."""
        gva = space.alloc(HEADER_SIZE, "ucall pool", protected=False)
        pool = cls(space.memory, space.walk(gva).require(), gva, space.mode.byteorder)
        hvas = pool.hva + BITMAP_BYTES + UCALL_SIZE * np.arange(NR_SLOTS, dtype=np.uint64)

        # In place: a copy of half a megabyte of zeros takes longer than the VM
        with space.memory.view(pool.gpa, HEADER_SIZE) as raw:
            header = np.frombuffer(raw, pool._header)
            header["ucalls"]["hva"] = hvas
            del header
        return pool

    def twin(self, space: AddressSpace) -> Pool:
        """The same pool in a forked VM's memory, known by the addresses its parent gave out."""
        return Pool(space.memory, self.gpa, self.gva, space.mode.byteorder)

    # --- the history of the bits

    def begins(self, vcpu: int) -> None:
        """A vCPU begins anew: what it held it will not give back."""
        self._heard.pop(vcpu, None)

    def saw(self, vcpu: int, locked: int, step: int) -> bytes:
        """A vCPU came back at `step`: slots that it took and gave back meanwhile.

        `locked` is the step of its last locked instruction, which for a test-and-set is the taking
        itself; without one (-1) slots were taken at `step`. Returns in_use as it is now, bit n at
        byte n / 8.
        """
        if self.memory.on_look:
            self.memory.looked_at(self.gpa, HEADER_SIZE, False)
        now = self._bitmap()
        self._step = step

        if locked >= 0:
            step = locked
            index = self._heard.pop(vcpu, -1)
            is_taken = index >= 0 and now[index >> 3] >> (index & 7) & 1
            if is_taken and self.owner[index] == vcpu and not self.done[index]:
                # It gave its last ucall's slot back with a locked instruction, and has it again
                self._taken(index, vcpu, step, AGAIN)

        if now != self._seen:
            self._changed(now, vcpu, step)
        return now

    def _host_wrote(self, gpa: int, size: int) -> None:
        """The host wrote memory: slots that it takes or frees are not the next vCPU's doing."""
        if gpa < self.gpa + BITMAP_BYTES and self.gpa < gpa + size:
            self._changed(self._bitmap(), -1, self._step)

    def _changed(self, now: bytes, vcpu: int, step: int) -> None:
        changed = int.from_bytes(now, "little") ^ int.from_bytes(self._seen, "little")
        self._seen = now
        while changed:
            # The lowest bit that is set
            index = (changed & -changed).bit_length() - 1
            changed &= changed - 1
            if now[index >> 3] >> (index & 7) & 1:
                self._taken(index, vcpu, step)
            else:
                self.history.append((step, vcpu, index, "given back"))
                self.owner[index] = -1
                self.since[index] = -1
                self.done[index] = False

    def _taken(self, index: int, vcpu: int, step: int, what: str = "taken") -> None:
        self.history.append((step, vcpu, index, what))
        self.owner[index] = vcpu
        self.since[index] = step
        self.uses[index] += 1
        self.done[index] = False

    def _bitmap(self) -> bytes:
        """in_use as it lies in memory now, bit n at byte n / 8."""
        return self._little(self._data[self._in_use])

    def _little(self, bitmap: bytes) -> bytes:
        """A bitmap from memory, bit n at byte n / 8: the guest's words are its own byte order's."""
        return _little_words(*_big_words(bitmap)) if self._is_big else bitmap

    def bits(self) -> NDArray[np.bool_]:
        """in_use, one bool a slot, as it lies in memory now."""
        return _unpacked(self._bitmap())

    # --- what a guest hands over

    def take(
        self, value: int, vcpu: int, step: int, locked: int, strings: Strings
    ) -> Ucall | BadUcallExit:
        """The ucall behind the value that a guest left in its register, or what is wrong with it.

        `step` is the VM's clock; `locked` the step of the vCPU's last locked instruction, -1 when
        it ran none since it last came back. The value is only ever compared with the addresses that
        the host gave out, never used as one.
        """
        index = _SLOTS.get(value - self.hva, -1)
        if index < 0:
            return self._refuse(value, vcpu)
        if not self.saw(vcpu, locked, step)[index >> 3] >> (index & 7) & 1:
            return BadUcallExit(
                value, "stale", f"slot {index} is not in use: its bit in in_use is clear", vcpu
            )
        self._heard[vcpu] = index

        # Where vCPUs run at once, another one may have come back first and be thought the owner
        self.owner[index] = vcpu

        at = self._offset + BITMAP_BYTES + UCALL_SIZE * index
        found = self._fields.ucall(self._data, at, vcpu, index, step, strings)
        self.history.append(found)
        if found.cmd == "DONE":
            self.done[index] = True
        return found

    def _refuse(self, value: int, vcpu: int) -> BadUcallExit:
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
            why = f"{value:#x} lies {rest} bytes behind the start of slot {index}"
            return BadUcallExit(value, "unaligned", why, vcpu)
        return BadUcallExit(value, "foreign", self._why_foreign(value), vcpu)

    def _why_foreign(self, value: int) -> str:
        try:
            where = f"this VM's guest memory (gpa {self.memory.gpa(value):#x}), but not a slot"
        except MemoryFault:
            where = "no memory of this VM: forged, or another VM's"
        end = self.hva + HEADER_SIZE - 1
        return f"{value:#x} is {where}; this VM's pool is at hva {self.hva:#x} to {end:#x}"

    # --- looking

    def snapshot(self, step: int, finished: frozenset[int]) -> PoolSnapshot:
        """The pool as it is now, at `step`; `finished` are the vCPUs at their DONE.

        What a finished vCPU holds is leaked, except for its DONE. Looking changes nothing that the
        host knows, and nothing is marked as changed: `PoolSnapshot.since` does that.
        """
        header = np.frombuffer(self.memory.read(self.gpa, HEADER_SIZE), self._header)[0]
        in_use = _unpacked(self._little(header["in_use"].tobytes()))
        facts = self._facts(in_use, step, finished)
        used = np.flatnonzero(in_use | (facts.uses > 0))
        held = UsedSlots(
            used.tolist(),
            header["ucalls"][used],
            facts,
            self.gva + BITMAP_BYTES,
            self.gpa + BITMAP_BYTES,
            self.hva + BITMAP_BYTES,
        )
        return PoolSnapshot(
            step=step,
            nr_slots=NR_SLOTS,
            gva=self.gva,
            gpa=self.gpa,
            slot_size=UCALL_SIZE,
            slots_offset=BITMAP_BYTES,
            nr_pages=-(-HEADER_SIZE // PAGE),
            in_use=in_use,
            owner=facts.owner,
            held_since=facts.since,
            done=facts.done,
            leaked=facts.leaked,
            changed=np.zeros(NR_SLOTS, np.bool_),
            changed_since=None,
            uses=facts.uses,
            held=held,
            hva=self.hva,
        )

    def _facts(self, in_use: NDArray[np.bool_], step: int, finished: frozenset[int]) -> SlotFacts:
        """What the host knows; a bit that changed since a vCPU last came back is nobody's yet."""
        owner = np.array(self.owner, np.int16)
        since = np.array(self.since, np.int64)
        uses = np.array(self.uses, np.int32)
        done = np.array(self.done, np.bool_)

        changed = in_use ^ _unpacked(self._seen)
        if changed.any():
            owner[changed] = -1
            since[changed] = np.where(in_use[changed], step, -1)
            uses[changed & in_use] += 1
            done[changed] = False

        leaked = np.zeros(NR_SLOTS, np.bool_)
        if finished:
            leaked = in_use & ~done & np.isin(owner, list(finished))
        return SlotFacts(in_use, owner, since, uses, done, leaked)

    # --- a VM's snapshot

    def state(self) -> PoolState:
        """What the host knows beyond guest memory."""
        return PoolState(
            hva=self.hva,
            step=self._step,
            seen=self._seen,
            heard=dict(self._heard),
            owner=tuple(self.owner),
            since=tuple(self.since),
            uses=tuple(self.uses),
            done=tuple(self.done),
            history=tuple(self.history),
        )

    def set_state(self, state: PoolState) -> None:
        """Put `state` back; memory has to be put back too."""
        self.hva = state.hva
        self._step = state.step
        self._seen = state.seen
        self._heard = dict(state.heard)
        self.owner = list(state.owner)
        self.since = list(state.since)
        self.uses = list(state.uses)
        self.done = list(state.done)
        self.history = deque(state.history, MAX_HISTORY)


def _unpacked(bitmap: bytes) -> NDArray[np.bool_]:
    """A bitmap as one bool a slot."""
    packed = np.frombuffer(bitmap, np.uint8)
    return np.unpackbits(packed, bitorder="little").astype(np.bool_)
