"""labkit: the guest framework of the Linux KVM selftests as a lab you can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from labkit.explore.compare import compare as _compare
from labkit.explore.comparison import Comparison
from labkit.guest.program import Program
from labkit.lab import Vcpu, Vm
from labkit.session.running import drive

# isort: off
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

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded",
    "Comparison",
    "CompileError",
    "ElfError",
    "GuestAssertFailed",
    "GuestCrashed",
    "InvalidState",
    "LabError",
    "MemoryFault",
    "NotAvailable",
    "OutOfMemory",
    "PageFault",
    "Program",
    "SymbolNotFound",
    "Vcpu",
    "Vm",
    "compare",
    "load_ipython_extension",
]


def compare(
    program: Program | None,
    backends: Sequence[str | Callable[[], Vm]] = ("unicorn", "kvm"),
    entry: str | int = "guest_code",
    nr_vcpus: int = 1,
    max_insns: int | None = None,
    host: Callable[[Vm], Any] | None = None,
    **create: Any,
) -> Comparison:
    """Run the same guest on several engines and compare everything that can be seen of it, with the reason for what is tolerated.

    A backend is a name, or a function that makes the VM (program is None when all are). `host(vm)` plays the host until the
    guest's end and returns what came last; without it the guest runs to its end, at most max_insns. The rest is for `Vm.create`,
    which also says what this raises.
    """

    def make(backend: str) -> Vm:
        if program is None:
            raise InvalidState(f"a comparison on {backend!r} needs a program")
        return Vm.create(program, entry, nr_vcpus, backend, **{"privilege": "kernel", **create})

    makers = [
        partial(make, backend) if isinstance(backend, str) else backend for backend in backends
    ]
    return _compare(makers, host or partial(drive, max_insns=max_insns))


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext labkit` brings the %%guest cell magic."""
    from labkit.magics import load_ipython_extension as load

    load(ipython)
