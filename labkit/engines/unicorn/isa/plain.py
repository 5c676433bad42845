"""What the quirks of architectures with plain instructions share.

No REP, no shadows, no modes that change how code is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from unicorn import unicorn_const as uc

from labkit.engines.base import Capability, GuestFault
from labkit.engines.exits import Exit, InternalErrorExit
from labkit.engines.unicorn.native.lib import LIB, Handle, IntrHook, RegBatch, check
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core
    from labkit.engines.unicorn.isa.quirks import FaultTrace, QuirksOf
    from labkit.engines.unicorn.isa.traps import Trap

__all__ = ["PlainQuirks", "Vector128", "common_words", "probe"]

MASK64 = (1 << 64) - 1


class Vector128(ctypes.Structure):
    """A 128-bit register."""

    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


def probe(
    quirks: QuirksOf,
    image: bytes,
    regs: Mapping[int, int],
    prepare: Callable[[Handle], None] = lambda handle: None,
) -> bytes:
    """The CPU state behind the first exception of a scratch engine.

    It has `image` at gpa 0 and begins there.

    What libunicorn does not show of an exception is found by running some whose facts are known.
    """
    memory = ctypes.create_string_buffer(len(image) + 3 * 4096)
    page = -(-ctypes.addressof(memory) // 4096) * 4096
    ctypes.memmove(page, image, len(image))
    handle = Handle(quirks.uc_arch, quirks.uc_mode, quirks.settings)
    handle.map(0, page, -(-len(image) // 4096) * 4096, uc.UC_PROT_ALL)
    prepare(handle)
    for register, value in regs.items():
        check(handle.write(register, value), "a scratch register")
    handle.hook(uc.UC_HOOK_INTR, IntrHook(lambda h, _v, _d: LIB.uc_emu_stop(h) and None))
    handle.run(0, 1)
    blob = handle.context()
    handle.close()
    return blob


def common_words(*runs: tuple[bytes, int]) -> list[int]:
    """Offsets at which each of these CPU states has the 64-bit word that goes with it."""
    return [
        at
        for at in range(0, len(runs[0][0]) - 8, 8)
        if all(blob[at : at + 8] == word.to_bytes(8, "little") for blob, word in runs)
    ]


class PlainQuirks:
    """The part of `Quirks` that needs no more than tables.

    Registers, the program counter, traps by kind. A subclass gives `plain` (name -> libunicorn's
    number), `vectors` (the same for 128-bit registers), `pc_name`, and methods `_do_KIND` for its
    traps; `special` names registers that it reads and writes itself.
    """

    pc_name = "pc"
    plain: Mapping[str, int]
    vectors: Mapping[str, int] = {}
    special: tuple[str, ...] = ()
    hot: tuple[str, ...] = ()  # of `plain`, what traps ask for
    first: tuple[str, ...] = ()  # registers to set before all others, in this order
    capabilities: ClassVar[tuple[Capability, ...]] = ()
    fault_trace: FaultTrace | None = None
    two_blocks_count = 0
    owed = 0
    longest = 4  # bytes of an instruction

    def __init__(self, core: Core) -> None:
        self.core, self.handle = core, core.handle
        self.awaits: list[int] | None = None  # [number of the register that `complete` sets]
        self._pc = -1  # as last read; -1 when it may have changed since
        self._pc_id = self.plain[self.pc_name]
        self._batch = RegBatch(core.handle, (self._pc_id, *(self.plain[name] for name in self.hot)))
        self.was: tuple[
            int, ...
        ] = ()  # the program counter and the hot registers, as the last run left them
        self._handlers: dict[str, Callable[[Trap], Exit | None]] = {
            name.removeprefix("_do_"): getattr(self, name)
            for name in dir(type(self))
            if name.startswith("_do_")
        }

    # --- the program counter

    def pc(self) -> int:
        """The program counter."""
        return self._pc if self._pc >= 0 else self.arrive()

    def arrive(self) -> int:
        """The program counter after a run."""
        self.was = self._batch.read()
        self._pc = self.was[0]
        return self._pc

    def leave(self) -> int:
        """The program counter, once more: from here on the CPU changes it."""
        pc, self._pc = self.pc(), -1
        return pc

    def set_pc(self, gva: int) -> None:
        """Set the program counter."""
        self._pc = gva & MASK64
        self.handle.write(self._pc_id, self._pc)

    # --- registers

    def read_all(self) -> dict[str, int]:
        """Every register by name."""
        return {name: self.read(name) for name in (*self.plain, *self.special, *self.vectors)}

    def read(self, name: str) -> int:
        """One register; raises InvalidState for a name that the architecture does not have."""
        if name == self.pc_name:
            return self.pc()
        if name in self.plain:
            return self.handle.read(self.plain[name])
        if name in self.vectors:
            value = self.handle.read_struct(self.vectors[name], Vector128())
            return int(value.high << 64 | value.low)
        return self._read_special(name)

    def write_many(self, regs: Mapping[str, int]) -> None:
        """Set several registers in an order that the CPU accepts."""
        order = {name: i for i, name in enumerate(self.first)}
        for name in sorted(regs, key=lambda name: order.get(name, len(order))):
            self.write(name, regs[name])

    def write(self, name: str, value: int) -> None:
        """Set one register; raises InvalidState for a name or a value that does not fit."""
        width = 128 if name in self.vectors else 64
        if not 0 <= value < 1 << width:
            raise InvalidState(f"{name} takes {width} bits, not {value:#x}", name=name, value=value)
        if name == self.pc_name:
            self.set_pc(value)
        elif name in self.plain:
            check(self.handle.write(self.plain[name], value), f"{name} = {value:#x}")
        elif name in self.vectors:
            check(
                self.handle.write_struct(
                    self.vectors[name], Vector128(value & MASK64, value >> 64)
                ),
                f"{name} = {value:#x}",
            )
        else:
            self._write_special(name, value)

    def _read_special(self, name: str) -> int:
        raise InvalidState(f"{self.core.vm.arch} has no register {name!r}", name=name)

    def _write_special(self, name: str, value: int) -> None:
        raise InvalidState(f"{self.core.vm.arch} has no register {name!r}", name=name)

    # --- traps

    def trap(self, trap: Trap) -> Exit | None:
        """Carry out one sensitive instruction; None when the run goes on."""
        return self._handlers[trap.kind](trap)

    def refuses(self, trap: Trap) -> bool:
        """Every instruction is carried out."""
        return False

    def refused(self) -> Exit | None:
        """See `refuses`."""
        return None

    def complete(self, value: int) -> bool:
        """Give the value that the last exit returns; False when it returns none."""
        if self.awaits is None:
            return False
        self.handle.write(self.awaits[0], value & MASK64)
        return True

    def retire(self, trap: Trap, **regs: int) -> None:
        """The instruction is done: set what it computed, and go on behind it."""
        self.core.retire()
        for name, value in regs.items():
            self.write(name, value & MASK64)
        self.set_pc(trap.gva + len(trap.data))

    def _do_pause(self, trap: Trap) -> None:
        """Let nothing happen: Unicorn would leave its loop there.

        At a place of our own choosing that can be told from other reasons.
        """
        self.retire(trap)

    def clock(self) -> int:
        """The VM's clock: one tick an instruction."""
        return self.core.vm.retired() & MASK64

    # --- exceptions

    def raised(self, vector: int, error: int, pc: int, handler: int) -> Exit | None:
        """Say that an exception has entered its handler.

        The run ends where no handler can be fetched.
        """
        self.core.retire()
        self.core.trace(
            "exception", {"vector": vector, "error": error, "pc": pc, "chain": (vector,)}
        )
        there = self.core.memory.fetch(handler, 2)
        if pc == handler or not there:
            what = (
                "a handler whose first instruction faults"
                if there
                else "no handler that can be fetched"
            )
            return InternalErrorExit(
                f"exception {vector:#x} (error code {error:#x}) has {what}: the guest would "
                f"fault there for ever; it came from pc {pc:#x}, its handler would be",
                handler,
            )
        self.set_pc(handler)
        return None

    def hole(self, pc: int) -> Exit | None:
        """Memory that is not there is a device's."""
        return self.core.meet_hole()

    def invalid(self) -> Exit | None:
        """An instruction that Unicorn does not have, as its status says."""
        return self.core.refuse("Unicorn does not have this instruction")

    def came_before(self, vector: int | None) -> bool:
        """No exception comes before its instruction."""
        return False

    def deliver_owed(self) -> Exit | None:
        """No trap comes behind its instruction."""
        return None

    def forget_exception(self) -> object:
        """Nothing stays behind."""
        return None

    def monitor_offset(self) -> int:
        """Where a CPU state has the address of the last load-exclusive."""
        return 0

    # --- what x86 has and others have not

    def is_drained(self) -> bool:
        """No instruction takes more than one count."""
        return False

    def wants_short_block(self) -> bool:
        """Blocks have the length that they have."""
        return False

    def shorten_block(self) -> None:
        """Blocks end at page boundaries."""

    def ring(self) -> int:
        """Only asked for where labkit's own walker looks after encrypted memory."""
        return 0

    def miss(self, error: int | None, gva: int) -> Exit | None:
        """See `ring`."""
        return self.core.refuse(f"a page fault at gva {gva:#x} that nobody expected")

    def not_yours(self, fault: GuestFault, gva: int, gpa: int, private: bool) -> Exit | None:
        """See `ring`."""
        return self.core.refuse(
            f"a page at gpa {gpa:#x} that is not the guest's, which nobody expected"
        )

    def drop_resume_flag(self) -> None:
        """There is none."""

    def restore_flags(self) -> None:
        """A hook changes no flags."""

    def strange_mode(self) -> str:
        """Code is always read in the same way."""
        return ""

    # --- snapshots

    def strange_state(self, context: bytes) -> str:
        """Any is taken: nothing in it was found that this architecture's code trips over."""
        return ""

    def extra_state(self) -> dict[str, object]:
        """What save() must keep beside Unicorn's own state."""
        return {"awaits": self.awaits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put `extra_state` back."""
        self.awaits = state["awaits"]
