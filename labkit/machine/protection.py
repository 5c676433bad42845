"""What a machine needs to know of its encryption, which a room above makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from labkit.arch.desc import PagingMode
from labkit.engines.base import Ownership, ProtectingVm
from labkit.machine.sparsebit import Sparsebit

__all__ = ["Protection"]


class Protection(Ownership, Protocol):
    """What makes a machine an encrypted one: its key, and which page frames are under it."""

    protected: Sparsebit  # pfns
    inverted: bool  # a page is encrypted where its entry's bit is clear

    # Called with the reason when the page tables become ciphertext.
    on_encrypted: list[Callable[[str], None]]

    @property
    def level(self) -> int:
        """1 memory, 2 registers too, 3 with ownership of pages."""

    def adopt_vcpu(self, registers: Callable[[], Mapping[str, int]]) -> None:
        """There is one vCPU more, and this reads its registers."""

    def connect(self, engine: ProtectingVm) -> None:
        """The engine that must be told when a page changes hands."""

    def mode(self, mode: PagingMode) -> PagingMode:
        """The page-table format with its encryption bit."""

    def look(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to access memory; raises what hardware would."""
