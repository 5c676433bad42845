"""The page tables of a VM as one of its vCPUs has loaded them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from labkit.arch.translation import Translation
from labkit.paging.scan import PageTable, scan

if TYPE_CHECKING:
    from labkit.session.vcpu import Vcpu
    from labkit.session.vm import Vm

__all__ = ["page_table_of"]


def page_table_of(vm: Vm, vcpu: Vcpu | None, root: int | None) -> PageTable:
    """What `vm.page_table` gives: of a vCPU (None: the first), below its root or another one."""
    space = vm.machine.space
    found = vm.translation() if vcpu is None else vcpu.translation()
    if found is None:
        found = Translation(space.mode, space.root_gpa, "the VM has no vCPU")
    if root is not None:
        found = Translation(found.mode, found.mode.root(root), f"asked for; {found.said_by}")
    table = scan(space.eye, found.mode, found.root, vm.step, vm.names)
    return replace(table, found_by=found.said_by)
