"""A guest's own debug registers on x86-64 (SDM vol. 3B 17.2).

Breakpoints on execution are Unicorn's. Data breakpoints are hooks on the memory that DR0 to DR3
name; while there is one, Unicorn counts every instruction, so that the trap comes behind the one
that hit, or behind the iteration of a REP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.isa.x86_events import DB, GP, UD
from labkit.engines.unicorn.native.lib import MemHook

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["DEBUG", "Watch"]

_DE = 1 << 3  # CR4
_BD, _DR6_ONES, _DR6_KNOWN = 1 << 13, 0xFFFF_0FF0, 0x0000_E00F
_GD = 1 << 13  # DR7
_WRITES, _IO, _ACCESSES = 1, 2, 3  # R/W fields of DR7
_SIZES = (1, 2, 8, 4)  # LEN fields
_LONGEST = 64  # bytes of an access


class Watch:
    """The data breakpoints of one vCPU."""

    def __init__(self, cpu: X86) -> None:
        self.cpu = cpu
        self._hooks: list[int] = []

    def arm(self) -> None:
        """Watch what the debug registers name now."""
        handle, read = self.cpu.handle, self.cpu.regs.read
        for hook in self._hooks:
            handle.unhook(hook)
        was_armed, self._hooks = bool(self._hooks), []
        dr7 = read("dr7")
        for i in range(4):
            kind, size = dr7 >> 16 + 4 * i & 3, _SIZES[dr7 >> 18 + 4 * i & 3]
            if dr7 >> 2 * i & 3 and kind in (_WRITES, _ACCESSES):
                self._watch(i, kind, read(f"dr{i}") & -size, size)
        if self._hooks or was_armed:
            handle.flush_code()
            self.cpu.core.counting.count_each(bool(self._hooks))

    def _watch(self, number: int, kind: int, gva: int, size: int) -> None:
        gpa = self.cpu.core.memory.translate(gva)
        if gpa is None:
            return
        what = uc.UC_HOOK_MEM_WRITE
        if kind == _ACCESSES:
            what |= uc.UC_HOOK_MEM_READ

        def seen(_h: int, _kind: int, at: int, length: int, _value: int, _d: int) -> bool:
            if at < gpa + size and gpa < at + length:
                self.cpu.owed |= 1 << number
                self.cpu.core.counting.end_behind_this()
            return True

        begin = max(gpa - _LONGEST, 0)
        self._hooks.append(self.cpu.handle.hook(what, MemHook(seen), begin, gpa + size - 1))

    def deliver(self) -> Exit | None:
        """The trap behind the instruction that hit."""
        regs = self.cpu.regs
        regs.write("dr6", regs.read("dr6") | self.cpu.owed)
        self.cpu.owed = 0
        return self.cpu.deliver(DB)


def _do_debug(cpu: X86, trap: Trap) -> Exit | None:
    """MOV to and from a debug register (SDM vol. 2B)."""
    target, _, source = trap.op_str.partition(", ")
    is_write = target.startswith("dr")
    name, register = (target, source) if is_write else (source, target)
    number = int(name.removeprefix("dr"))
    if number in (4, 5) and not cpu.regs.read("cr4") & _DE:
        number += 2
    if not cpu.privileged():
        return cpu.deliver(GP, 0)
    if number in (4, 5) or number > 7:
        return cpu.deliver(UD)
    dr7 = cpu.regs.read("dr7")
    if dr7 & _GD:
        cpu.regs.write_many({"dr6": cpu.regs.read("dr6") | _BD, "dr7": dr7 & ~_GD})
        return cpu.deliver(DB)
    if not is_write:
        return cpu.retire(trap, **{register: cpu.regs.read(f"dr{number}")})
    return _write(cpu, trap, number, cpu.regs.read(register))


def _write(cpu: X86, trap: Trap, number: int, value: int) -> Exit | None:
    if number >= 6 and value >> 32:
        return cpu.deliver(GP, 0)
    if number == 6:
        value = value & _DR6_KNOWN | _DR6_ONES
    elif number == 7:
        kinds = [value >> 16 + 4 * i & 3 for i in range(4) if value >> 2 * i & 3]
        if _IO in kinds and cpu.regs.read("cr4") & _DE:
            return cpu.core.refuse("breakpoints on I/O ports (DR7, CR4.DE) are not modelled")
    if number != 7:
        return cpu.retire(trap, **{f"dr{number}": value})
    # Unicorn sets its own breakpoints on execution only when the instruction itself runs
    exit = cpu.core.run_natively(trap)
    cpu.watch.arm()
    return exit


DEBUG: dict[str, Callable[[X86, Trap], Exit | None]] = {"debug": _do_debug}
"""By the kind of trap."""
