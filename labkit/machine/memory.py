"""Guest-physical memory: memslots, an anonymous mmap each, which the engine has without a copy."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labkit.bits import is_aligned
from labkit.checked import checked, checks_itself, whole
from labkit.errors import InvalidState, MemoryFault
from labkit.machine.turns import Alone, Turns

__all__ = ["LIMIT", "PAGE", "Memory", "Memslot"]

PAGE = 4096  # bytes
LIMIT = 1 << 40  # MAXPHYADDR of the default machine


@dataclass(frozen=True)
class Memslot:
    """One region of guest memory (struct kvm_userspace_memory_region)."""

    gpa: int
    size: int  # bytes
    hva: int
    data: mmap.mmap

    @property
    def end(self) -> int:
        """The first gpa behind it."""
        return self.gpa + self.size

    def __repr__(self) -> str:
        where = f"gpa {self.gpa:#x}-{self.end - 1:#x}"
        return f"<Memslot {where}, {self.size >> 10} KiB at hva {self.hva:#x}>"


@checked
class Memory:
    """The memslots of one VM; gpas and sizes are in bytes.

    `on_write(gpa, size)` is told of every write that the host made. `on_look(gpa, size, is_write)`
    is told before every access of the host: what lies there may have to be made first, or be none
    of the host's business. `turn` says when another thread may write, or look at what must be made.
    """

    def __init__(self) -> None:
        self.slots: list[Memslot] = []
        self.on_write: list[Callable[[int, int], None]] = []
        self.on_look: list[Callable[[int, int, bool], None]] = []
        self.turn: Turns = Alone()

    def add(self, gpa: int, size: int) -> Memslot:
        """Add a zeroed memslot.

        Raises InvalidState when it is not page aligned, too high, or overlaps another.
        """
        self._check_slot(gpa, size)
        try:
            data = mmap.mmap(-1, size)
        except (OSError, ValueError) as error:
            raise InvalidState(
                f"this machine cannot give a memslot of {size:#x} bytes: {error}"
            ) from error
        hva = ctypes.addressof(ctypes.c_char.from_buffer(data))
        slot = Memslot(gpa, size, hva, data)
        self.slots.append(slot)
        return slot

    def _check_slot(self, gpa: int, size: int) -> None:
        what = f"memslot of {size:#x} bytes at gpa {gpa:#x}"
        is_whole = is_aligned(gpa, PAGE) and is_aligned(size, PAGE)
        if gpa < 0 or size <= 0 or not is_whole or gpa + size > LIMIT:
            raise InvalidState(f"{what}: it must be page aligned and end below {LIMIT:#x}")
        for slot in self.slots:
            if gpa < slot.end and slot.gpa < gpa + size:
                raise InvalidState(f"{what} overlaps {slot!r}")

    @checks_itself
    def slot(self, gpa: int) -> Memslot | None:
        """The memslot that holds gpa."""
        if type(gpa) is not int:
            gpa = whole(gpa, "Memory.slot: gpa")
        for slot in self.slots:
            if slot.gpa <= gpa < slot.gpa + slot.size:
                return slot
        return None

    @checks_itself
    def read(self, gpa: int, size: int) -> bytes:
        """size bytes from gpa on; raises MemoryFault at the first byte that no memslot holds."""
        # A walk reads an entry a level here, a scan every table.
        if type(gpa) is not int or type(size) is not int:
            gpa, size = whole(gpa, "Memory.read: gpa"), whole(size, "Memory.read: size")
        if not self.on_look:
            return self._read(gpa, size)
        with self.turn.looking:
            return self._read(gpa, size)

    def _read(self, gpa: int, size: int) -> bytes:
        slot = self.slot(gpa)
        if slot is None or size < 0:
            raise self._fault("read", gpa, size)
        self.looked_at(gpa, size, False)
        offset = gpa - slot.gpa
        if offset + size <= slot.size:
            return slot.data[offset : offset + size]
        head = slot.size - offset
        return slot.data[offset:] + self._read(gpa + head, size - head)

    def write(self, gpa: int, data: bytes) -> None:
        """Write data at gpa.

        Raises MemoryFault, with nothing written, when it does not fit into memslots, and what the
        turn raises while another thread runs the guest.
        """
        with self.turn.act("a write of memory"):
            parts = self._parts(gpa, len(data))
            self.looked_at(gpa, len(data), True)
            _copy(data, parts)
            self.was_written(gpa, len(data))

    def put(self, gpa: int, data: bytes) -> None:
        """Put whole pages of a snapshot back, as `write`, but nobody is asked or told.

        No host looks here, and none writes.
        """
        _copy(data, self._parts(gpa, len(data)))

    def _parts(self, gpa: int, size: int) -> list[tuple[Memslot, int, int]]:
        """(memslot, offset in it, bytes) of a range; raises MemoryFault at the first hole."""
        parts = []
        end = gpa + size
        while gpa < end:
            slot = self.slot(gpa)
            if slot is None:
                raise self._fault("write", gpa, end - gpa)
            count = min(end, slot.gpa + slot.size) - gpa
            parts.append((slot, gpa - slot.gpa, count))
            gpa += count
        return parts

    @checks_itself
    def looked_at(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to look at these bytes, or to write a part of them."""
        for tell in self.on_look:
            tell(gpa, size, is_write)

    @checks_itself
    def was_written(self, gpa: int, size: int) -> None:
        """These bytes are others now, or mean something else."""
        if type(gpa) is not int or type(size) is not int:
            gpa, size = whole(gpa, "Memory.was_written: gpa"), whole(size, "size")
        for tell in self.on_write:
            tell(gpa, size)

    def view(self, gpa: int, size: int) -> memoryview:
        """Memory inside one memslot, to be written in place and at once; raises MemoryFault."""
        slot = self.slot(gpa)
        if slot is None or not 0 <= size <= slot.gpa + slot.size - gpa:
            raise self._fault("view", gpa, size)
        self.looked_at(gpa, size, True)
        self.was_written(gpa, size)
        offset = gpa - slot.gpa
        return memoryview(slot.data)[offset : offset + size]

    def zero(self, gpa: int, size: int) -> None:
        """Clear memory inside one memslot; raises MemoryFault."""
        with self.view(gpa, size):
            ctypes.memset(self.hva(gpa), 0, size)

    def hva(self, gpa: int) -> int:
        """The host address of gpa (addr_gpa2hva); raises MemoryFault for a hole."""
        slot = self.slot(gpa)
        if slot is None:
            raise self._fault("hva", gpa, 1)
        return slot.hva + gpa - slot.gpa

    def gpa(self, hva: int) -> int:
        """The gpa of a host address (addr_hva2gpa); raises MemoryFault outside every memslot."""
        for slot in self.slots:
            if slot.hva <= hva < slot.hva + slot.size:
                return slot.gpa + hva - slot.hva
        raise MemoryFault(f"hva {hva:#x} lies in no memslot of this VM", hva=hva)

    def _fault(self, what: str, gpa: int, size: int) -> MemoryFault:
        slots = ", ".join(f"{slot.gpa:#x}-{slot.end - 1:#x}" for slot in self.slots) or "none"
        return MemoryFault(
            f"{what} of {size} bytes at gpa {gpa:#x}: no memslot there (memslots: {slots})",
            gpa=gpa,
            size=size,
        )

    def __repr__(self) -> str:
        size = sum(slot.size for slot in self.slots)
        return f"<Memory {len(self.slots)} memslots, {size >> 10} KiB>"


def _copy(data: bytes, parts: Sequence[tuple[Memslot, int, int]]) -> None:
    """Copy data into parts of memslots, one after the other."""
    done = 0
    for slot, offset, count in parts:
        slot.data[offset : offset + count] = data[done : done + count]
        done += count
