"""labkit: the guest framework of the Linux KVM selftests as a lab you can hold."""

from __future__ import annotations

from labkit.errors import (
    BudgetExceeded,
    CompileError,
    ElfError,
    GuestAssertFailed,
    GuestCrashed,
    InvalidState,
    LabError,
    MemoryFault,
    NotAvailable,
    OutOfMemory,
    PageFault,
    SymbolNotFound,
)
from labkit.guest.program import Program
from labkit.lab import Vcpu, Vm

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded", "CompileError", "ElfError", "GuestAssertFailed", "GuestCrashed", "InvalidState", "LabError", "MemoryFault",
    "NotAvailable", "OutOfMemory", "PageFault", "Program", "SymbolNotFound", "Vcpu", "Vm", "load_ipython_extension",
]


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext labkit` brings the %%guest cell magic."""
    from labkit.magics import load_ipython_extension as load

    load(ipython)
