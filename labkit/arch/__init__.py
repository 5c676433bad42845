"""Architectures as data: one vocabulary (desc, model), one set of tables each."""

from __future__ import annotations

from labkit.arch.model import Arch
from labkit.arch.x86_boot import X86_64
from labkit.errors import NotAvailable

__all__ = ["ARCHES", "find_arch"]

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (X86_64,)}


def find_arch(name: str) -> Arch:
    """The architecture of that name; raises NotAvailable, naming those there are."""
    try:
        return ARCHES[name]
    except KeyError:
        raise NotAvailable(f"no architecture {name!r} in this labkit, only {', '.join(ARCHES)}", arch=name) from None
