"""Exclusive monitors as hardware has them.

A store-exclusive fails after any write by another, be it of the same value. Unicorn keeps the
address and the value of a load-exclusive and compares values, so it misses a write of what was
there before. A monitor that is open when another vCPU begins to run is watched for writes until its
own vCPU is back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from labkit.engines.unicorn.native.lib import MemHook

if TYPE_CHECKING:
    from labkit.engines.unicorn.vcpu import UnicornVcpu

__all__ = ["GRANULE", "Monitors", "clear"]

GRANULE = 64  # bytes: CTR_EL0.ERG may be anything from 16 to 2048; RISC-V leaves it open
CLEAR = (1 << 64) - 1


def _reserved(vcpu: UnicornVcpu) -> int | None:
    """The gpa of the granule that a vCPU's monitor watches, None when it is not set."""
    at = vcpu.quirks.monitor_offset()
    if not at:
        return None
    gva = int.from_bytes(vcpu.handle.context()[at : at + 8], "little")
    if gva == CLEAR:
        return None
    gpa = vcpu.memory.translate(gva)
    return None if gpa is None else gpa & -GRANULE


def clear(vcpu: UnicornVcpu) -> None:
    """What CLREX and an exception return do."""
    at = vcpu.quirks.monitor_offset()
    if not at:
        return

    def patch(context: int) -> None:
        ctypes.c_uint64.from_address(context + at).value = CLEAR

    vcpu.handle.patch_context(patch)


def _overlap(granule: int, gpa: int, size: int) -> bool:
    """Whether a write touches a granule."""
    return gpa < granule + GRANULE and granule < gpa + size


class Monitors:
    """The open monitors of one VM's vCPUs that are not running."""

    def __init__(self) -> None:
        self.open: dict[UnicornVcpu, int] = {}
        # Their state came from a snapshot, and none has run since
        self._restored: set[UnicornVcpu] = set()
        self._hooks: list[int] = []
        self._watcher: UnicornVcpu | None = None

    def change_over(self, before: UnicornVcpu | None, vcpu: UnicornVcpu) -> None:
        """Another vCPU runs from here on.

        What it writes is watched as long as somebody's monitor is open.
        """
        self._unwatch()
        self._reopen([before] if before is not None else [])
        self.open.pop(vcpu, None)
        if self.open:
            self._watcher = vcpu
            self._hooks = [
                vcpu.handle.hook(
                    uc.UC_HOOK_MEM_WRITE, MemHook(self._written), granule, granule + GRANULE - 1
                )
                for granule in set(self.open.values())
            ]
            vcpu.handle.flush_code()

    def restored(self, vcpu: UnicornVcpu) -> None:
        """A vCPU was put back to a state in which its monitor may be open, or not."""
        self._unwatch()
        self.open.pop(vcpu, None)
        self._restored.add(vcpu)

    def _reopen(self, vcpus: Iterable[UnicornVcpu]) -> None:
        """Note whose monitors are open: of these, and of those that were put back."""
        for vcpu in {*vcpus, *self._restored}:
            if vcpu in self._restored:
                vcpu.handle.flush_tlb()  # it is that of another time
            granule = _reserved(vcpu)
            if granule is not None:
                self.open[vcpu] = granule
        self._restored.clear()

    def _unwatch(self) -> None:
        if self._watcher is not None and self._hooks:
            for hook in self._hooks:
                self._watcher.handle.unhook(hook)
            self._watcher.handle.flush_code()
        self._watcher, self._hooks = None, []

    def _written(self, _h: int, _kind: int, gpa: int, size: int, _value: int, _d: int) -> bool:
        self.break_at(gpa, size)
        return True

    def break_at(self, gpa: int, size: int) -> None:
        """Memory was written: monitors that watch it are clear."""
        for vcpu, granule in list(self.open.items()):
            if _overlap(granule, gpa, size):
                del self.open[vcpu]
                clear(vcpu)

    def host_wrote(self, vcpu: UnicornVcpu | None, gpa: int, size: int) -> None:
        """The host wrote memory, while the last vCPU that ran may have an open monitor too."""
        self._reopen([])
        self.break_at(gpa, size)
        if vcpu is None:
            return
        granule = _reserved(vcpu)
        if granule is not None and _overlap(granule, gpa, size):
            clear(vcpu)
