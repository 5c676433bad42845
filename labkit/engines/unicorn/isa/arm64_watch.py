"""A guest's own watchpoints on arm64 (Arm ARM D2.10): hooks on the memory that DBGWVRn names.

The exception comes before the access. Unicorn's hook cannot keep a store from memory, so what was
there is put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicorn import arm64_const as arm
from unicorn import unicorn_const as uc

from labkit.engines.unicorn.native.lib import MemHook

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.arm64 import Arm64

__all__ = ["Watch"]

NR_WATCHPOINTS = 4  # ID_AA64DFR0_EL1.WRPs + 1
_MDE, _KDE, _D = 1 << 15, 1 << 13, 1 << 9  # MDSCR_EL1, PSTATE
_ENABLED, _LOADS, _STORES = 1, 1 << 3, 1 << 4  # DBGWCRn_EL1
_LONGEST = 64  # bytes of an access


class Watch:
    """The watchpoints of one vCPU."""

    def __init__(self, cpu: Arm64) -> None:
        self.cpu = cpu
        self.hit: tuple[int, bool] | None = None  # (gva, is a store)
        self._undo: list[tuple[int, bytes]] = []  # (gpa, what was there)
        self._hooks: list[int] = []
        self._mdscr = 0

    def arm(self) -> None:
        """Watch what the debug registers name now."""
        handle, read = self.cpu.handle, self.cpu.read
        for hook in self._hooks:
            handle.unhook(hook)
        was_armed, self._hooks = bool(self._hooks), []
        self._mdscr = read("s2_0_c0_c2_2")
        for i in range(NR_WATCHPOINTS if self._mdscr & _MDE else 0):
            control = read(f"s2_0_c0_c{i}_7")
            if control & _ENABLED:
                self._watch(control, read(f"s2_0_c0_c{i}_6"))
        if self._hooks or was_armed:
            handle.flush_code()

    def _watch(self, control: int, value: int) -> None:
        mask, select = control >> 24 & 31, control >> 5 & 0xFF
        if mask:
            gva, size = value & -1 << mask, 1 << mask
        elif select:
            first = (select & -select).bit_length() - 1
            gva, size = (value & -8) + first, select.bit_length() - first
        else:
            return
        gpa = self.cpu.core.memory.translate(gva)
        if gpa is None:
            return

        what = 0
        if control & _LOADS:
            what |= uc.UC_HOOK_MEM_READ
        if control & _STORES:
            what |= uc.UC_HOOK_MEM_WRITE

        def seen(_h: int, kind: int, at: int, length: int, _value: int, _d: int) -> bool:
            if at < gpa + size and gpa < at + length and self._is_taken(control):
                self._note(gva + at - gpa, at, length, kind == uc.UC_MEM_WRITE)
            return True

        begin = max(gpa - _LONGEST, 0)
        if what:
            self._hooks.append(self.cpu.handle.hook(what, MemHook(seen), begin, gpa + size - 1))

    def _is_taken(self, control: int) -> bool:
        """Whether the watchpoint is for the present level, and debug exceptions are on there."""
        pstate = self.cpu.handle.read(arm.UC_ARM64_REG_PSTATE)
        level = pstate >> 2 & 3
        if not control >> 1 & 3 & (1 if level else 2):  # PAC: EL1, EL0
            return False
        return not level or bool(self._mdscr & _KDE and not pstate & _D)

    def _note(self, gva: int, gpa: int, size: int, is_store: bool) -> None:
        if is_store:
            self._undo.append((gpa, self.cpu.core.vm.read(gpa, size)))
        if self.hit is None:
            self.hit = gva, is_store
            self.cpu.core.end_refused()

    def take(self) -> tuple[int, bool] | None:
        """The access that hit, once: memory is as it was before."""
        for gpa, data in reversed(self._undo):
            self.cpu.core.vm.write(gpa, data)
        hit, self.hit, self._undo = self.hit, None, []
        return hit
