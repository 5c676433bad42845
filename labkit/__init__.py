"""labkit: the guest framework of the Linux KVM selftests as a lab you can hold.

All that users need is here: `import labkit as lk`, then `lk.Program`, `lk.Vm`, `lk.compare`. The
exits that a run can end in are in `lk.exits`, what a host can do to an encrypted guest is in
`lk.attacks`, and every error that labkit raises is a `lk.LabError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from labkit.arch.x86_cpu import CpuModel
from labkit.checked import checked
from labkit.errors import (
    BudgetExceeded,
    Busy,
    CompileError,
    ElfError,
    GuestAssertFailed,
    GuestCrashed,
    InvalidState,
    KvmError,
    LabError,
    MemoryFault,
    NotAvailable,
    OutOfMemory,
    PageFault,
    PspError,
    Stopped,
    SymbolNotFound,
)
from labkit.explore import attacks
from labkit.explore.compare import compare as _compare
from labkit.explore.comparison import Comparison
from labkit.guest.program import Program
from labkit.lab import Vcpu, Vm
from labkit.session import exits
from labkit.session.make import as_program
from labkit.session.running import Came, drive
from labkit.ucall.calls import Ucall

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded",
    "Busy",
    "Comparison",
    "CompileError",
    "CpuModel",
    "ElfError",
    "GuestAssertFailed",
    "GuestCrashed",
    "InvalidState",
    "KvmError",
    "LabError",
    "MemoryFault",
    "NotAvailable",
    "OutOfMemory",
    "PageFault",
    "Program",
    "PspError",
    "Stopped",
    "SymbolNotFound",
    "Ucall",
    "Vcpu",
    "Vm",
    "attacks",
    "compare",
    "exits",
    "load_ipython_extension",
]


@checked
def compare(
    program: Program | str | Path | None,
    backends: Sequence[str | Callable[[], Vm]] = ("unicorn", "kvm"),
    entry: str | int = "guest_code",
    nr_vcpus: int = 1,
    max_insns: int | None = None,
    host: Callable[[Vm], Came | None] | None = None,
    **create: Any,
) -> Comparison:
    """Run the same guest on several engines and compare everything that can be seen of it.

    Each difference that is tolerated comes with the reason.

    program: a Program, the path of a C or an ELF file, or C source; None when all backends are
    functions.
    backends: names, or functions that make the VM.
    max_insns: the most that each run may take; without it the guest runs to its end.
    host: `host(vm)` plays the host until the guest's end and returns what came last.
    create: for `Vm.create`; privilege is "kernel" unless it says otherwise.

    Raises InvalidState for less than two backends, and for a name without a program; and what
    `Vm.create` raises.
    """
    guest = None if program is None else as_program(program)

    def make(backend: str) -> Vm:
        if guest is None:
            raise InvalidState(f"a comparison on {backend!r} needs a program")
        options = {"privilege": "kernel", **create}
        return Vm.create(guest, entry, nr_vcpus, backend, **options)

    makers: list[Callable[[], Vm]] = []
    for backend in backends:
        makers.append(partial(make, backend) if isinstance(backend, str) else backend)
    if host is None:
        host = partial(drive, max_insns=max_insns)
    return _compare(makers, host)


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext labkit` brings the %%guest cell magic."""
    from labkit.magics import load_ipython_extension as load

    load(ipython)


def __dir__() -> list[str]:
    """What is public, and nothing else."""
    return list(__all__)
