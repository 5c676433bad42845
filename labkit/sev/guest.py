"""One encrypted VM from its owner's side: set up, launched page by page, measured; what the kernel's vm_sev_launch() does.

Source: tools/testing/selftests/kvm/lib/x86_64/sev.c of Linux 6.12. TDX is here only for its paging: its shared bit means the
opposite of the C-bit. Its module's own launch (TDH.MEM.PAGE.ADD) is not modelled: the secure processor stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.arch.desc import PagingMode
from labkit.arch.x86_cpu import CpuModel
from labkit.errors import InvalidState, KvmError, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.machine.sparsebit import Sparsebit
from labkit.machine.vm import MAX_VCPUS, Machine
from labkit.sev.commands import GuestState
from labkit.sev.cpu import GHCB_MSR, LEAF, LEVELS, SEV_STATUS_MSR, encryption_leaf, sev_status
from labkit.sev.dram import Dram
from labkit.sev.ghcb import msr_response
from labkit.sev.kvm import KvmHost, KvmVcpu, KvmVm, VmType, check_register_access, kvm_command
from labkit.sev.policy import Policy, SnpPolicy, Status
from labkit.sev.psp import MEASURE_SIZE, Measured, Psp, measurement
from labkit.sev.rmp import NestedTable, RmpEntry, RmpFault, guest_access, host_access
from labkit.sev.snp import SnpMeasured, SnpState
from labkit.sev.transport import LAUNCH_SECRET, wrap
from labkit.sev.vmgexit import Awaited
from labkit.sev.vmsa import vmsa_page

if TYPE_CHECKING:
    from labkit.engines.base import ProtectingVm
    from labkit.guest.program import Program

__all__ = ["Done", "ProtectedGuest"]

C_BIT, TDX_SHARED_BIT = 51, 47  # Milan and later; a TD with 48 guest-physical address bits
_TYPES = {"sev": VmType.SEV, "sev-es": VmType.SEV_ES, "snp": VmType.SNP, "tdx": VmType.SEV}
_FACTS = ("policy", "measurement", "encrypted", "launched", "planned", "ghcbs", "jump_table")
_SEALS = ("LAUNCH_UPDATE_VMSA", "SNP_LAUNCH_FINISH")  # commands before which KVM writes VMSAs
_STARTS, _FINISHES = (
    ("LAUNCH_START", "SNP_LAUNCH_START", "RECEIVE_START"),
    ("LAUNCH_FINISH", "SNP_LAUNCH_FINISH", "RECEIVE_FINISH"),
)
_SVME, _PAT, TSC_AUX = 1 << 12, 0x277, 0xC000_0103
_POLICIES = {
    "sev": 0,
    "sev-es": int(Policy.ES),
    "snp": int(SnpPolicy.SMT | SnpPolicy.RESERVED_ONE),
    "tdx": 0,
}


@dataclass(frozen=True)
class Done:
    """One command of the launch, as it went: how many pages were measured by then, or why it was refused."""

    command: str
    nr_measured: int
    refused: str = ""  # what was found
    status: Status | None = None  # the firmware's; None where KVM itself refused


class ProtectedGuest:
    """The encryption of one VM: its key, which pages are under it, and how far its launch is.

    It is the engine's cipher too: before LAUNCH_START there is no key, and private pages read as what lies in DRAM.
    """

    def __init__(
        self,
        kind: str,
        memory: Memory,
        cpu: CpuModel,
        policy: int | None = None,
        c_bit: int | None = None,
    ) -> None:
        if kind not in _TYPES:
            raise NotAvailable(f"protect={kind!r}: there are {', '.join(_TYPES)}", protect=kind)
        self.kind, self.memory, self.cpu, self.policy = (
            kind,
            memory,
            cpu,
            _POLICIES[kind] if policy is None else policy,
        )
        self.inverted = kind == "tdx"
        self.dram = Dram(memory, self._sealed_vmsa, lambda: self.nested)
        self.host = KvmHost(Psp(self.dram))
        self.vm = KvmVm(self.host, _TYPES[kind])
        self.protected = Sparsebit()  # pfns
        self.planned: tuple[
            tuple[int, int], ...
        ] = ()  # its ranges when the launch ended: a guest changes pages later
        self.done: list[Done] = []
        self.measurement = b""
        self.encrypted = self.launched = False
        self.on_encrypted: list[Callable[[str], None]] = []
        self.on_command: list[Callable[[], object]] = []  # called behind each one, refused or not
        self._registers = list[
            Callable[[], Mapping[str, int]]
        ]()  # of each vCPU, as only the CPU itself can tell
        self._engine: ProtectingVm | None = None
        self.ghcbs = 0  # gva of the guest library's table of GHCBs
        self.registered: dict[int, int] = {}  # vCPU -> gpa of the GHCB that it registered (SNP)
        self.awaited: dict[int, Awaited] = {}  # vCPU -> where its answer from user space goes
        self.jump_table = 0
        self.nested = NestedTable()
        self.c_bit = self._announce(cpu, c_bit)
        self.host.psp.command("INIT", **({"es": True} if kind == "sev-es" else {}))
        self.command("INIT2")

    def _announce(self, cpu: CpuModel, asked: int | None) -> int:
        """Let CPUID and the MSRs say what this VM is; a leaf that is there already says where the bit is."""
        if asked is not None and not 32 <= asked < 52:
            raise InvalidState(
                f"c_bit={asked}: the encryption bit is one of the bits 32 to 51 of an entry",
                c_bit=asked,
            )
        if self.kind == "tdx":
            return TDX_SHARED_BIT if asked is None else asked
        psp = self.host.psp
        cpu.cpuid.setdefault(
            (LEAF, 0),
            encryption_leaf(
                self.kind, C_BIT if asked is None else asked, 0, psp.nr_asids, psp.min_sev_asid
            ),
        )
        highest = cpu.cpuid[0x8000_0000, 0]
        cpu.cpuid[0x8000_0000, 0] = (max(highest[0], LEAF), *highest[1:])
        cpu.msrs |= {SEV_STATUS_MSR: sev_status(self.kind), GHCB_MSR: 0}
        cpu.read_only_msrs |= {SEV_STATUS_MSR}
        c_bit = cpu.cpuid[LEAF, 0][1] & 0x3F
        if asked not in (None, c_bit):
            raise InvalidState(
                f"c_bit={asked}, but CPUID {LEAF:#x} of the CPU model says {c_bit}", c_bit=asked
            )
        if self.level > 1:  # what KVM leaves there at reset
            cpu.msrs[GHCB_MSR] = msr_response("SEV_INFO", min=1, max=2, c_bit=c_bit)
        return c_bit

    def mode(self, mode: PagingMode) -> PagingMode:
        """The VM's page-table format: with its encryption bit, or TDX's shared bit, which means private when it is clear."""
        try:
            return mode.with_c_bit(self.c_bit, inverted=self.inverted)
        except InvalidState as err:
            raise NotAvailable(
                f"protect={self.kind!r}: only x86-64 has it; {err}", protect=self.kind
            ) from err

    @property
    def why_sealed(self) -> str:
        """Why the host follows no page table of the guest any longer; "" before they are encrypted (is_pt_protected)."""
        return (
            f"its guest is encrypted ({self.kind}) since its launch, and its page tables are ciphertext"
            if self.encrypted
            else ""
        )

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
        if name in _STARTS:
            self._forget_views()
        try:
            result = self._issue(name, fields)
            self._after(name, result, fields)
            return result
        finally:
            for tell in self.on_command:
                tell()

    def _forget_views(self) -> None:
        """There is a key now or will be: what was private until then was so without one."""
        for slot in self.memory.slots:
            self.memory.looked_at(slot.gpa, slot.size, False)
            self.memory.was_written(slot.gpa, slot.size)

    def _issue(self, name: str, fields: dict[str, Any]) -> Any:
        try:
            if name in _SEALS:
                self._save_registers()
            self.vm.spa = lambda gpa: self.nested.spa(
                gpa
            )  # of this guest now: a snapshot may be another's
            result = kvm_command(self.vm, name, **fields)
        except KvmError as err:
            status = err.facts.get("status")
            found = getattr(err.__cause__, "facts", {}).get("found") or str(err).removeprefix(
                f"{name}: "
            )
            self.done.append(
                Done(
                    name, len(self.measured), found, status if isinstance(status, Status) else None
                )
            )
            raise
        self.done.append(Done(name, len(self.measured)))
        return result

    def _after(self, name: str, result: Any, fields: dict[str, Any]) -> None:
        if name in _STARTS:
            self.policy = fields.get("policy", 0)
            self._forget_views()
        elif name == "LAUNCH_MEASURE":
            self.measurement = result
        elif name in _FINISHES:
            self.launched, self.planned = True, tuple(self.protected.ranges())
            self._seal()
            self.publish_owners()

    def _seal(self) -> None:
        self.encrypted = True
        for tell in self.on_encrypted:
            tell(self.why_sealed)

    def save(self) -> dict[str, Any]:
        """All of it, for a snapshot."""
        facts = {name: getattr(self, name) for name in _FACTS}
        return {
            **facts,
            "vm": deepcopy(self.vm),
            "protected": self.protected.copy(),
            "done": list(self.done),
            "nested": copy(self.nested),
            "vmsas": list(self.dram.pages),
            "registered": dict(self.registered),
            "awaited": dict(self.awaited),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put `save` back; the key comes back with it, so memory has to be put back too."""
        for name in _FACTS:
            setattr(self, name, state[name])
        self.vm, self.done = deepcopy(state["vm"]), list(state["done"])
        self.host = self.vm.host
        self.host.psp.memory, self.nested = self.dram, copy(state["nested"])
        self.protected.assign(state["protected"])
        self.dram.pages, self.registered, self.awaited = (
            list(state["vmsas"]),
            dict(state["registered"]),
            dict(state["awaited"]),
        )
        self.publish_owners()

    # --- vCPUs

    def add_ghcb(self, machine: Machine, index: int, program: Program | None) -> None:
        """A new vCPU: where registers are encrypted it shares a page with its host, for its ucalls.

        The guest library finds that page by the vCPU's number, which is in TSC_AUX, in the table at its global `sev_ghcbs`.
        """
        if self.level < 2:
            return
        machine.vcpus[index].set_regs({f"msr_{TSC_AUX:#x}": index})
        symbol = program.symbols.get("sev_ghcbs") if program is not None else None
        if symbol is None:
            return
        if not self.ghcbs:
            self.ghcbs = machine.space.alloc(16 * MAX_VCPUS, "tables")
            machine.space.write(symbol.gva, self.ghcbs.to_bytes(8, "little"))
        gva = machine.space.alloc(PAGE, "GHCB", protected=False)
        place = gva.to_bytes(8, "little") + machine.space.walk(gva).require().to_bytes(8, "little")
        machine.space.write(self.ghcbs + 16 * index, place)

    def adopt_vcpu(self, registers: Callable[[], Mapping[str, int]]) -> None:
        """A new vCPU: where registers are encrypted it has a VMSA."""
        self._registers.append(registers)
        if self.level > 1:
            self.vm.vcpus.append(KvmVcpu(self.dram.add_vmsa()))

    def check_ready(self, index: int) -> None:
        """KVM_RUN: raises InvalidState for a vCPU whose guest is not launched: it is LAUNCH_FINISH that makes it ready to run.

        Until then the firmware keeps the ASID invalid on every core, so that hardware's VMRUN fails and KVM says KVM_EXIT_FAIL_ENTRY
        (Documentation/virt/kvm/x86/amd-memory-encryption.rst; activate_common() and sev_mcmd_launch_finish() of AMD's firmware).
        """
        if not self.launched:
            raise InvalidState(
                f"KVM_RUN of vCPU {index}: this {self.kind} guest is in state {self.state.name}, and no core runs its ASID "
                f"before {'SNP_' * (self.kind == 'snp')}LAUNCH_FINISH (VMRUN fails, KVM_EXIT_FAIL_ENTRY)"
            )

    def check_registers(self, index: int) -> None:
        """KVM_GET_REGS, KVM_SET_REGS: raises KvmError EINVAL once a vCPU's registers are encrypted."""
        if self.level > 1:
            check_register_access(self.vm, index)

    def sealed(self, index: int) -> str:
        """Why the host cannot see a vCPU's registers; "" when it can."""
        return (
            f"{self.kind.upper()} keeps them in an encrypted VMSA"
            if self.level > 1 and self.vm.vcpus[index].protected
            else ""
        )

    def _save_registers(self) -> None:
        """Write what is not encrypted yet into the VMSAs (sev_es_sync_vmsa())."""
        for index, vcpu in enumerate(self.vm.vcpus):
            if not vcpu.protected:
                self.dram.write(vcpu.vmsa_spa, self._vmsa(index))

    def _vmsa(self, index: int) -> bytes:
        regs = dict(self._registers[index]())
        return vmsa_page(
            regs
            | {
                "efer": regs["efer"] | _SVME,
                "g_pat": self.cpu.msrs.get(_PAT, 0),
                "sev_features": self.vm.features,
            }
        )

    def _sealed_vmsa(self, index: int) -> bytes | None:
        vcpu, cipher = self.vm.vcpus[index], self.vm.cipher
        return (
            cipher.encrypt(vcpu.vmsa_spa, self._vmsa(index))
            if vcpu.protected and cipher is not None
            else None
        )

    # --- who owns which page

    def connect(self, engine: ProtectingVm) -> None:
        """The engine that runs the guest, which must be told when a page changes hands."""
        self._engine = engine

    def publish_owners(self) -> None:
        """Tell the engine of every page: after the launch, and when the RMP was put back."""
        if self.kind == "snp" and self.launched:
            self.host.rmp.on_change = lambda spa: self._tell_owners(self.nested.gpa(spa))
            for slot in self.memory.slots:
                self._tell_owners(slot.gpa, slot.size)

    def _tell_owners(self, gpa: int, size: int = PAGE) -> None:
        if self._engine is not None:
            entries = [self._entry(page) for page in range(gpa, gpa + size, PAGE)]
            usable = [
                guest_access(entry, self.vm.asid, page, True, False) is None
                for entry, page in zip(entries, range(gpa, gpa + size, PAGE), strict=True)
            ]
            self._engine.own_pages(
                gpa, np.array([entry.assigned for entry in entries]), np.array(usable)
            )

    def _entry(self, gpa: int) -> RmpEntry:
        return self.host.rmp.entry(self.nested.spa(gpa))

    def remap(self, gpa: int, other: int) -> None:
        """The host has exchanged two pages in the nested page table."""
        self.nested.exchange(gpa, other)
        self.publish_owners()

    def guest_fault(self, gpa: int, private: bool, is_write: bool) -> RmpFault | None:
        """What an access of the guest to its page meets."""
        return guest_access(self._entry(gpa), self.vm.asid, gpa, private, is_write)

    def pvalidate(self, gpa: int, size: int, validate: bool) -> tuple[int, bool] | RmpFault:
        """The guest's PVALIDATE on a page of its own: (EAX, CF), or what it meets."""
        return self.host.rmp.pvalidate(self.nested.spa(gpa), self.vm.asid, gpa, validate, size)

    def page_state_change(self, gfn: int, op: int) -> int:
        """The guest wants a page private (1) or shared (2): 0, or the error that it is told."""
        gpa = gfn * PAGE
        if self.memory.slot(gpa) is None or self.host.rmp.page_state_change(
            self.nested.spa(gpa), self.vm.asid, gpa, op
        ):
            return 1
        (self.protected.set if op == 1 else self.protected.clear)(gfn)
        return 0

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
            if (fault := host_access(self._entry(page), True)) is not None:
                raise InvalidState(
                    f"host write to gpa {max(page, gpa):#x}: {fault.why}",
                    gpa=max(page, gpa),
                    fault=fault,
                )

    # --- launch

    def set_private(self, gpa: int, size: int, private: bool = True) -> None:
        """Which pages the launch will encrypt (vm_mem_set_private, vm_mem_set_shared); raises InvalidState after it."""
        if self.launched:
            raise InvalidState(
                f"gpa {gpa:#x}: after the launch only the guest changes what is private"
            )
        if gpa % PAGE or size % PAGE or size <= 0:
            raise InvalidState(
                f"gpa {gpa:#x}, {size:#x} bytes: private memory comes in whole pages"
            )
        if not all(map(self.memory.slot, range(gpa, gpa + size, PAGE))):
            raise InvalidState(
                f"gpa {gpa:#x}, {size:#x} bytes: no memslot holds all of it, so nothing can be private there"
            )
        (self.protected.set if private else self.protected.clear)(gpa // PAGE, size // PAGE)

    def start(self) -> None:
        """LAUNCH_START: the guest gets its key and its ASID."""
        self.command(
            "SNP_LAUNCH_START" if self.kind == "snp" else "LAUNCH_START", policy=self.policy
        )

    def update(self) -> None:
        """Encrypt and measure every protected range, lowest first; the host follows no page table from then on (sev_vm_launch)."""
        for pfn, count in list(self.protected.ranges()):
            if self.kind == "snp":
                self.command("SNP_LAUNCH_UPDATE", gpa=pfn * PAGE, size=count * PAGE)
            else:
                self.command("LAUNCH_UPDATE_DATA", spa=pfn * PAGE, size=count * PAGE)
        self._seal()

    def finish(self) -> bytes:
        """Measure, and let the guest run; returns the measurement (SNP: the launch digest)."""
        if self.kind == "snp":
            self.command("SNP_LAUNCH_FINISH")
            assert self.vm.snp is not None
            self.measurement = self.vm.snp.digest
        else:
            if self.kind == "sev-es":
                self.command("LAUNCH_UPDATE_VMSA")
            if (
                self.state is not GuestState.LAUNCH_SECRET
            ):  # its owner may have had it measured, to bring a secret in
                self.command("LAUNCH_MEASURE", size=MEASURE_SIZE)
            self.command("LAUNCH_FINISH")
        return self.measurement

    def expected(self, digest: bytes, policy: int | None = None) -> bytes:
        """What `measurement` must be if the host launched what the owner thinks, and under which policy: the owner has the key TIK.

        Raises InvalidState before LAUNCH_MEASURE; SNP has no such key, its digest stands for itself.
        """
        guest = self.host.psp.guests.get(self.vm.handle)
        if guest is None or not self.measurement:
            raise InvalidState(
                f"a {self.kind} guest in state {self.state.name} has no measurement to compare with"
            )
        psp, nonce = self.host.psp, self.measurement[32:]
        return measurement(
            guest.keys.tik,
            psp.api,
            psp.build,
            self.policy if policy is None else policy,
            digest,
            nonce,
        )

    def wrap_secret(self, secret: bytes, iv: bytes = bytes(16)) -> dict[str, bytes]:
        """The owner's packet for LAUNCH_SECRET, as its fields `header` and `data`: nobody without the owner's keys can read or make it.

        Raises InvalidState before LAUNCH_MEASURE: the packet is for the launch that was measured, and for no other.
        """
        guest = self.host.psp.guests.get(self.vm.handle)
        if guest is None or not guest.measure:
            raise InvalidState(
                f"a {self.kind} guest in state {self.state.name} has no measurement that a secret could be for"
            )
        header, data = wrap(guest.keys, LAUNCH_SECRET, secret, iv, guest.measure)
        return {"header": header, "data": data}

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
