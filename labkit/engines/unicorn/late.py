"""A vCPU whose engine is made when it is first needed: one that never runs costs nothing.

An engine of libunicorn takes 3 MiB and 3 ms. A VM of 512 vCPUs, of which most wait for a turn that
does not come, would take 1.3 GB and as many seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from labkit.engines.base import Trace
from labkit.engines.unicorn.vcpu import UnicornVcpu

if TYPE_CHECKING:
    from labkit.engines.unicorn.vm import UnicornVm

__all__ = ["LateVcpu"]


class LateVcpu(UnicornVcpu):
    """A UnicornVcpu with what nobody has to ask an engine for, until somebody asks for more.

    Then it becomes a UnicornVcpu for good. It has to: Python reads every attribute of a class with
    __getattr__ in a slower way, which would cost each step a fifth.
    """

    def __init__(self, vm: UnicornVm, index: int, trace: Trace) -> None:
        self.vm = vm
        self.index = index
        self.trace = trace
        self.insns = 0
        self.is_made = False
        self._is_being_made = False
        self._first: dict[str, int] = {}  # registers

    def begin_with(self, regs: Mapping[str, int]) -> None:
        """`set_regs` with values that are known to fit, which may wait for the engine."""
        self._first.update(regs)

    def set_regs(self, regs: Mapping[str, int]) -> None:
        """Set the named registers of an engine, which is made for it."""
        self._make()
        self.set_regs(regs)

    def close(self) -> None:
        """There is no engine yet, and none is made of a closed VM."""

    def __getattr__(self, name: str) -> object:
        """An attribute that only a vCPU with an engine has."""
        if name.startswith("__") or self._is_being_made:
            raise AttributeError(name)
        self._make()
        value: object = getattr(self, name)
        return value

    def _make(self) -> None:
        self.vm.check_open()
        self._is_being_made = True
        try:
            super().__init__(self.vm, self.index, self.trace)
            if self._first:
                UnicornVcpu.set_regs(self, self._first)
        finally:
            self._is_being_made = False
        del self.is_made, self._first, self._is_being_made
        self.__class__ = UnicornVcpu  # type: ignore[assignment]
