"""Engines run vCPUs. They are chosen by name here and nowhere else; others ask for capabilities."""

from __future__ import annotations

from importlib.util import find_spec

from labkit.arch.x86_cpu import CpuModel
from labkit.engines.base import Capability, EngineVm
from labkit.errors import NotAvailable

__all__ = ["BACKENDS", "Capability", "need", "open_engine"]

BACKENDS = ("unicorn", "kvm")


def open_engine(backend: str, arch: str, cpu: CpuModel) -> EngineVm:
    """A new VM of the engine called backend; raises NotAvailable, with what to do, without it."""
    if backend not in BACKENDS:
        raise NotAvailable(
            f"backend {backend!r} is not part of this labkit, only {', '.join(BACKENDS)}",
            backend=backend,
        )
    if backend == "kvm":
        from labkit.engines.kvm import KvmVm

        return KvmVm(arch, cpu)
    if find_spec("unicorn") is None:
        raise NotAvailable(
            "the unicorn package is not installed: run `make setup`", backend=backend
        )
    from labkit.engines.unicorn import UnicornVm

    return UnicornVm(arch, cpu)


def need(engine: EngineVm, name: str) -> None:
    """Raise NotAvailable, with the engine's own reason, for what it says that it cannot do."""
    for capability in engine.capabilities:
        if capability.name == name and not capability.have:
            raise NotAvailable(f"{engine.name}: no {name}: {capability.why}", capability=name)
