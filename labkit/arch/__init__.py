"""Architectures as data: one vocabulary (desc, model), one set of tables each."""

from __future__ import annotations

from labkit.arch.arm64 import ARM64
from labkit.arch.model import Arch
from labkit.arch.riscv import RISCV64
from labkit.arch.s390 import S390X
from labkit.arch.x86_boot import X86_64
from labkit.errors import NotAvailable

__all__ = ["ARCHES", "find_arch"]

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (X86_64, ARM64, RISCV64, S390X)}


def find_arch(name: str, paging: str | None = None) -> Arch:
    """The architecture of that name, with a page-table format other than its first if wanted.

    Raises NotAvailable for an architecture, and InvalidState for a format, that there is not.
    """
    if name not in ARCHES:
        raise NotAvailable(
            f"no architecture {name!r} in this labkit, only {', '.join(ARCHES)}", arch=name
        )
    arch = ARCHES[name]
    return arch.with_paging(paging) if paging else arch
