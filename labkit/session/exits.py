"""Why a run came back to its host: every exit by name, to match on.

`vm.run()` and `vcpu.run()` return a Ucall, or one of these; each is a frozen dataclass with the
facts as fields. A `match` takes them apart: `case lk.exits.MmioExit(gpa=gpa, is_write=False): ...`.
A run that Ctrl-C ends returns none of them: it raises KeyboardInterrupt.
"""

from __future__ import annotations

from labkit.engines.exits import (
    BudgetExit,
    DeadlineExit,
    DebugExit,
    DiagExit,
    Exit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    MemoryFaultExit,
    MmioExit,
    PioExit,
    SbiExit,
    ShutdownExit,
    StopExit,
    SystemEventExit,
    VmgexitExit,
)
from labkit.ucall.calls import BadUcallExit

__all__ = [
    "BadUcallExit",
    "BudgetExit",
    "DeadlineExit",
    "DebugExit",
    "DiagExit",
    "Exit",
    "HaltExit",
    "HypercallExit",
    "InternalErrorExit",
    "MemoryFaultExit",
    "MmioExit",
    "PioExit",
    "SbiExit",
    "ShutdownExit",
    "StopExit",
    "SystemEventExit",
    "VmgexitExit",
]
