"""The vCPUs of a guest whose registers are encrypted: their VMSAs, and their pages for VMGEXIT.

Source: sev_es_sync_vmsa() and snp_launch_update_vmsa() in arch/x86/kvm/svm/sev.c of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from labkit.arch.x86_cpu import CpuModel
from labkit.machine.memory import PAGE
from labkit.machine.vm import MAX_VCPUS, Machine
from labkit.sev.dram import Dram
from labkit.sev.kvm_host import KvmVcpu, KvmVm
from labkit.sev.vmsa import vmsa_page

if TYPE_CHECKING:
    from labkit.guest.program import Program

__all__ = ["GuestVcpus", "place_ghcb"]

# Bit of EFER, which VMRUN wants set in a guest's save area
_SVME = 1 << 12

# MSRs
_PAT, TSC_AUX = 0x277, 0xC000_0103

# A row of the guest library's table: two u64, gva and gpa of a vCPU's GHCB
_GHCB_ROW = 16


class GuestVcpus:
    """The save areas of one VM's vCPUs; without encrypted registers it keeps nothing.

    As long as a VMSA is not encrypted, hypervisor and firmware write it. Behind that only the CPU
    does, and its page is made from the registers as they are whenever somebody looks.
    """

    def __init__(self, vm: KvmVm, cpu: CpuModel, dram: Dram) -> None:
        self.vm = vm
        self.cpu = cpu
        self.dram = dram

        # Of each vCPU, as only the CPU itself can tell
        self._registers: list[Callable[[], Mapping[str, int]]] = []

    def adopt(self, registers: Callable[[], Mapping[str, int]]) -> None:
        """A new vCPU gets a VMSA; `registers()` are its registers of now."""
        self._registers.append(registers)
        self.vm.vcpus.append(KvmVcpu(self.dram.add_vmsa()))

    def sync(self) -> None:
        """Write what is not encrypted yet into the VMSAs (sev_es_sync_vmsa())."""
        for index, vcpu in enumerate(self.vm.vcpus):
            if not vcpu.protected:
                self.dram.write(vcpu.vmsa_spa, self._vmsa(index))

    def sealed(self, index: int) -> bytes | None:
        """A vCPU's VMSA as DRAM holds it; None as long as it is not encrypted."""
        vcpu = self.vm.vcpus[index]
        cipher = self.vm.cipher
        if not vcpu.protected or cipher is None:
            return None
        return cipher.encrypt(vcpu.vmsa_spa, self._vmsa(index))

    def _vmsa(self, index: int) -> bytes:
        regs = dict(self._registers[index]())
        regs["efer"] |= _SVME
        regs["g_pat"] = self.cpu.msrs.get(_PAT, 0)
        regs["sev_features"] = self.vm.features
        return vmsa_page(regs)


def place_ghcb(machine: Machine, index: int, program: Program | None, table: int) -> int:
    """Give a vCPU a page that it shares with its host, and tell the guest library where.

    The library finds that page by the vCPU's number, which is in TSC_AUX, in the table at its
    global `sev_ghcbs`. `table` is the table's gva, 0: there is none yet. Returns it; a program
    without that global gets no page.
    """
    machine.vcpus[index].set_regs({f"msr_{TSC_AUX:#x}": index})
    symbol = None if program is None else program.symbols.get("sev_ghcbs")
    if symbol is None:
        return table

    space = machine.space
    if not table:
        table = space.alloc(_GHCB_ROW * MAX_VCPUS, "tables")
        space.write(symbol.gva, table.to_bytes(8, "little"))
    gva = space.alloc(PAGE, "GHCB", protected=False)
    gpa = space.walk(gva).require()
    row = gva.to_bytes(8, "little") + gpa.to_bytes(8, "little")
    space.write(table + _GHCB_ROW * index, row)
    return table
