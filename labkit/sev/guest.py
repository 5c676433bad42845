"""One encrypted VM from its owner's side: set up, launched page by page, measured; what the kernel's vm_sev_launch() does.

Source: tools/testing/selftests/kvm/lib/x86_64/sev.c of Linux 6.12. TDX is here only for its paging: its shared bit means the
opposite of the C-bit. Its module's own launch (TDH.MEM.PAGE.ADD) is not modelled: the secure processor stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.arch.desc import PagingMode
from labkit.arch.x86_cpu import CpuModel
from labkit.errors import InvalidState, KvmError, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.machine.sparsebit import Sparsebit
from labkit.sev.commands import GuestState
from labkit.sev.cpu import GHCB_MSR, LEAF, LEVELS, SEV_STATUS_MSR, encryption_leaf, sev_status
from labkit.sev.kvm import KvmHost, KvmVm, VmType, kvm_command
from labkit.sev.policy import Policy, SnpPolicy, Status
from labkit.sev.psp import Measured, Psp
from labkit.sev.rmp import host_access
from labkit.sev.snp import SnpMeasured, SnpState

__all__ = ["KINDS", "Done", "ProtectedGuest"]

KINDS = ("sev", "sev-es", "snp", "tdx")
C_BIT, TDX_SHARED_BIT = 51, 47  # Milan and later; a TD with 48 guest-physical address bits
_TYPES = {"sev": VmType.SEV, "sev-es": VmType.SEV_ES, "snp": VmType.SNP, "tdx": VmType.SEV}
_POLICIES = {"sev": 0, "sev-es": int(Policy.ES), "snp": int(SnpPolicy.SMT | SnpPolicy.RESERVED_ONE), "tdx": 0}


@dataclass(frozen=True)
class Done:
    """One command of the launch, as it went: how many pages were measured by then, or why it was refused."""

    command: str
    nr_measured: int
    refused: str = ""
    status: Status | None = None  # the firmware's; None where KVM itself refused


class ProtectedGuest:
    """The encryption of one VM: its key, which pages are under it, and how far its launch is.

    It is the engine's cipher too: before LAUNCH_START there is no key, and private pages read as what lies in DRAM.
    """

    def __init__(self, kind: str, memory: Memory, cpu: CpuModel, policy: int | None = None) -> None:
        if kind not in KINDS:
            raise NotAvailable(f"protect={kind!r}: there are {', '.join(KINDS)}", protect=kind)
        self.kind, self.memory, self.policy = kind, memory, _POLICIES[kind] if policy is None else policy
        self.inverted = kind == "tdx"
        self.host = KvmHost(Psp(memory))
        self.vm = KvmVm(self.host, _TYPES[kind])
        self.protected = Sparsebit()  # pfns
        self.done: list[Done] = []
        self.measurement = b""
        self.launched = False
        self.c_bit = self._announce(cpu)
        self.host.psp.command("INIT", **({"es": True} if kind == "sev-es" else {}))
        self.command("INIT2")

    def _announce(self, cpu: CpuModel) -> int:
        """Let CPUID and the MSRs say what this VM is; a leaf that is there already says where the bit is."""
        if self.kind == "tdx":
            return TDX_SHARED_BIT
        psp = self.host.psp
        cpu.cpuid.setdefault((LEAF, 0), encryption_leaf(self.kind, C_BIT, 0, psp.nr_asids, psp.min_sev_asid))
        highest = cpu.cpuid[0x8000_0000, 0]
        cpu.cpuid[0x8000_0000, 0] = (max(highest[0], LEAF), *highest[1:])
        cpu.msrs |= {SEV_STATUS_MSR: sev_status(self.kind), GHCB_MSR: 0}
        cpu.read_only_msrs |= {SEV_STATUS_MSR}
        return cpu.cpuid[LEAF, 0][1] & 0x3F

    def mode(self, mode: PagingMode) -> PagingMode:
        """The VM's page-table format: with its encryption bit, or TDX's shared bit, which means private when it is clear."""
        return mode.with_c_bit(self.c_bit, inverted=self.inverted)

    @property
    def why_sealed(self) -> str:
        """Why the host follows no page table of the guest any longer; "" before the launch."""
        return f"this is a {self.kind} guest since its launch, and its page tables are ciphertext" if self.launched else ""

    @property
    def state(self) -> GuestState | SnpState:
        """Where the secure processor has the guest."""
        if self.kind == "snp":
            return self.vm.snp.state if self.vm.snp else SnpState.LAUNCH
        guest = self.host.psp.guests.get(self.vm.handle)
        return guest.state if guest else GuestState.UNINIT

    @property
    def level(self) -> int:
        """1 memory, 2 registers too, 3 with ownership of pages; 0 for TDX."""
        return LEVELS.get(self.kind, 0)

    def command(self, name: str, **fields: Any) -> Any:
        """KVM_MEMORY_ENCRYPT_OP; raises KvmError, and keeps a record of what was refused."""
        try:
            result = kvm_command(self.vm, name, **fields)
        except KvmError as err:
            status = err.facts.get("status")
            self.done.append(Done(name, len(self.measured), str(err), status if isinstance(status, Status) else None))
            raise
        self.done.append(Done(name, len(self.measured)))
        return result

    def save(self) -> dict[str, Any]:
        """All of it, for a snapshot."""
        facts = {name: getattr(self, name) for name in ("policy", "measurement", "launched")}
        return {**facts, "vm": deepcopy(self.vm), "protected": self.protected.copy(), "done": list(self.done)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put `save` back; the key comes back with it, so memory has to be put back too."""
        for name in ("policy", "measurement", "launched"):
            setattr(self, name, state[name])
        self.vm, self.done = deepcopy(state["vm"]), list(state["done"])
        self.host = self.vm.host
        self.host.psp.memory = self.memory
        self.protected.assign(state["protected"])

    # --- the engine's cipher

    def encrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Encrypt with the guest's key, as the memory controller does on a private write."""
        if self.vm.cipher is None:
            out[:] = data
        else:
            self.vm.cipher.encrypt_into(spa, data, out)

    def decrypt_into(self, spa: int, data: Any, out: Any) -> None:
        """Decrypt with the guest's key, as the memory controller does on a private read."""
        if self.vm.cipher is None:
            out[:] = data
        else:
            self.vm.cipher.decrypt_into(spa, data, out)

    def look(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to access memory; raises InvalidState where the RMP gives a page to the guest (APM vol. 2 15.36)."""
        if not is_write or self.kind != "snp" or not self.launched:
            return
        for page in range(gpa & -PAGE, gpa + size, PAGE):
            if (fault := host_access(self.host.rmp.entry(page), True)) is not None:
                raise InvalidState(f"host write to gpa {max(page, gpa):#x}: {fault.why}", gpa=max(page, gpa), fault=fault)

    # --- launch

    def set_private(self, gpa: int, size: int, private: bool = True) -> None:
        """Which pages the launch will encrypt (vm_mem_set_private, vm_mem_set_shared); raises InvalidState after it."""
        if self.launched:
            raise InvalidState(f"gpa {gpa:#x}: after the launch only the guest changes what is private")
        if gpa % PAGE or size % PAGE or size <= 0:
            raise InvalidState(f"gpa {gpa:#x}, {size:#x} bytes: private memory comes in whole pages")
        (self.protected.set if private else self.protected.clear)(gpa // PAGE, size // PAGE)

    def pages(self, slots: Iterable[tuple[int, NDArray[np.bool_], NDArray[np.bool_]]]) -> list[tuple[int, dict[str, Any]]]:
        """What memory really is: for each memslot its gpa, and by name arrays of one element a page.

        private: DRAM holds ciphertext of the guest's key; protected: the host meant it to; with SNP owner (ASID) and validated.
        `slots` are (gpa, the guest wrote the page last through its key, last without it).
        """
        measured = {m.spa + at for m in self.measured for at in range(0, getattr(m, "size", PAGE), PAGE)}
        found = []
        for gpa, through, without in slots:
            frames = range(gpa, gpa + PAGE * len(through), PAGE)
            launched = np.array([page in measured for page in frames], np.bool_)
            facts = {"private": (launched | through) & ~without, "protected": np.array([page // PAGE in self.protected for page in frames])}
            if self.kind == "snp":
                entries = [self.host.rmp.entry(page) for page in frames]
                facts["owner"] = np.array([entry.asid for entry in entries])
                facts["validated"] = np.array([entry.validated for entry in entries])
            found.append((gpa, facts))
        return found

    def start(self) -> None:
        """LAUNCH_START: the guest gets its key and its ASID; what was private until now was so without a key."""
        for slot in self.memory.slots:
            self.memory.looked_at(slot.gpa, slot.size, False)
        self.command("SNP_LAUNCH_START" if self.kind == "snp" else "LAUNCH_START", policy=self.policy)
        for slot in self.memory.slots:
            self.memory.was_written(slot.gpa, slot.size)

    def update(self) -> None:
        """Encrypt and measure every protected range, lowest first."""
        for pfn, count in list(self.protected.ranges()):
            if self.kind == "snp":
                self.command("SNP_LAUNCH_UPDATE", gpa=pfn * PAGE, size=count * PAGE)
            else:
                self.command("LAUNCH_UPDATE_DATA", spa=pfn * PAGE, size=count * PAGE)

    def finish(self) -> bytes:
        """Measure, and let the guest run; returns the measurement (SNP: the launch digest)."""
        if self.kind == "snp":
            self.command("SNP_LAUNCH_FINISH")
            assert self.vm.snp is not None
            self.measurement = self.vm.snp.digest
        else:
            if self.kind == "sev-es":
                self.command("LAUNCH_UPDATE_VMSA")
            self.measurement = self.command("LAUNCH_MEASURE", size=48)
            self.command("LAUNCH_FINISH")
        self.launched = True
        return self.measurement

    def launch(self) -> bytes:
        """All of it (vm_sev_launch); returns the measurement."""
        self.start()
        self.update()
        return self.finish()

    @property
    def measured(self) -> list[Measured | SnpMeasured]:
        """Every update so far with the digest after it."""
        guest = self.vm.snp or self.host.psp.guests.get(self.vm.handle)
        return [*guest.measured] if guest else []
