"""One encrypted VM from its owner's side: set up, launched page by page, measured.

It is what the kernel's vm_sev_launch() does. Source: tools/testing/selftests/kvm/lib/x86_64/sev.c
of Linux 6.12. TDX is here only for its paging: its shared bit means the opposite of the C-bit. Its
module's own launch (TDH.MEM.PAGE.ADD) is not modelled: the secure processor stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.arch.desc import PagingMode
from labkit.arch.x86_cpu import CpuModel
from labkit.engines.interrupt import undivided
from labkit.errors import InvalidState, NotAvailable
from labkit.machine.memory import PAGE, Memory
from labkit.machine.sparsebit import Sparsebit
from labkit.machine.vm import Machine
from labkit.sev.commands import GuestState, Value
from labkit.sev.cpu import LEVELS, announce
from labkit.sev.dram import Dram
from labkit.sev.guest_commands import Done, issue
from labkit.sev.guest_owner import expected_measurement, wrapped_secret
from labkit.sev.guest_pages import GuestPages
from labkit.sev.guest_vcpus import GuestVcpus, place_ghcb
from labkit.sev.kvm import check_register_access
from labkit.sev.kvm_host import KvmHost, KvmVm, VmType
from labkit.sev.nested import NestedTable
from labkit.sev.policy import Policy, SnpPolicy
from labkit.sev.psp import Psp
from labkit.sev.psp_bodies import Result
from labkit.sev.psp_guest import MEASURE_SIZE, Guest, Measured
from labkit.sev.rmp import RmpFault
from labkit.sev.snp import SnpMeasured, SnpState
from labkit.sev.vmgexit_events import Awaited

if TYPE_CHECKING:
    from labkit.engines.base import ProtectingVm
    from labkit.guest.program import Program

__all__ = ["ProtectedGuest", "ProtectedState"]

_TYPES = {"sev": VmType.SEV, "sev-es": VmType.SEV_ES, "snp": VmType.SNP, "tdx": VmType.SEV}
_POLICIES = {
    "sev": 0,
    "sev-es": int(Policy.ES),
    "snp": int(SnpPolicy.SMT | SnpPolicy.RESERVED_ONE),
    "tdx": 0,
}

# Commands before which KVM writes VMSAs, those that give a guest its key, those that end a launch
_SEALS = ("LAUNCH_UPDATE_VMSA", "SNP_LAUNCH_FINISH")
_STARTS = ("LAUNCH_START", "SNP_LAUNCH_START", "RECEIVE_START")
_FINISHES = ("LAUNCH_FINISH", "SNP_LAUNCH_FINISH", "RECEIVE_FINISH")


@dataclass(frozen=True)
class ProtectedState:
    """All of a guest's encryption, for a snapshot of its VM."""

    vm: KvmVm
    policy: int
    measurement: bytes
    encrypted: bool
    launched: bool
    planned: tuple[tuple[int, int], ...]
    done: tuple[Done, ...]
    protected: Sparsebit
    nested: NestedTable
    vmsas: tuple[bytes, ...]
    ghcbs: int
    jump_table: int
    registered: dict[int, int]
    awaited: dict[int, Awaited]


class ProtectedGuest:
    """The encryption of one VM: its key, which pages are under it, and how far its launch is.

    It is the engine's cipher too: before LAUNCH_START there is no key, and private pages read as
    what lies in DRAM.

    protected has the pfns under the key, planned its ranges (pfn, count) when the launch ended,
    because a guest changes pages later. done has the commands as they went. on_encrypted is told
    why once the page tables become ciphertext, on_command behind each command, refused or not.

    Of vCPUs whose registers are encrypted: ghcbs is the gva of the guest library's table of GHCBs,
    registered the gpa of the GHCB that each vCPU registered (SNP), awaited where its answer from
    user space goes; jump_table is the gpa of the AP jump table.
    """

    def __init__(
        self,
        kind: str,
        memory: Memory,
        cpu: CpuModel,
        policy: int | None = None,
        c_bit: int | None = None,
    ) -> None:
        """kind is one of labkit.sev.PROTECTIONS; c_bit is a bit's number; None: what is usual.

        Raises NotAvailable for another kind, InvalidState for a c_bit that cannot be had.
        """
        if kind not in _TYPES:
            raise NotAvailable(f"protect={kind!r}: there are {', '.join(_TYPES)}", protect=kind)
        self.kind = kind
        self.memory = memory
        self.cpu = cpu
        self.policy = _POLICIES[kind] if policy is None else policy
        self.inverted = kind == "tdx"

        self.dram = Dram(memory, self._sealed_vmsa, lambda: self.nested)
        self.host = KvmHost(Psp(self.dram))
        self.vm = KvmVm(self.host, _TYPES[kind])
        self.protected = Sparsebit()
        self._pages = GuestPages(memory, self.vm, self.protected)
        self._vcpus = GuestVcpus(self.vm, cpu, self.dram)

        self.planned: tuple[tuple[int, int], ...] = ()
        self.done: list[Done] = []
        self.measurement = b""
        self.encrypted = False
        self.launched = False
        self.on_encrypted: list[Callable[[str], None]] = []
        self.on_command: list[Callable[[], object]] = []

        self.ghcbs = 0
        self.registered: dict[int, int] = {}
        self.awaited: dict[int, Awaited] = {}
        self.jump_table = 0

        psp = self.host.psp
        self.c_bit = announce(cpu, kind, c_bit, psp.nr_asids, psp.min_sev_asid)
        psp.command("INIT")
        self.command("INIT2")

    # --- what it is now

    @property
    def level(self) -> int:
        """1 memory, 2 registers too, 3 with ownership of pages; 0 for TDX."""
        return LEVELS.get(self.kind, 0)

    @property
    def state(self) -> GuestState | SnpState:
        """Where the secure processor has the guest."""
        if self.kind == "snp":
            return self.vm.snp.state if self.vm.snp else SnpState.LAUNCH
        guest = self._known
        return guest.state if guest else GuestState.UNINIT

    @property
    def _known(self) -> Guest | None:
        """The guest as the secure processor keeps it; None before LAUNCH_START, and for SNP."""
        return self.host.psp.guests.get(self.vm.handle)

    @property
    def measured(self) -> list[Measured | SnpMeasured]:
        """Every update so far with the digest after it."""
        guest = self.vm.snp or self._known
        return [*guest.measured] if guest else []

    @property
    def nested(self) -> NestedTable:
        """Which page of DRAM stands behind each gpa."""
        return self._pages.nested

    @property
    def why_sealed(self) -> str:
        """Why the host follows no page table of the guest any longer (is_pt_protected).

        It is "" before they are encrypted.
        """
        if not self.encrypted:
            return ""
        return (
            f"its guest is encrypted ({self.kind}) since its launch, "
            f"and its page tables are ciphertext"
        )

    def mode(self, mode: PagingMode) -> PagingMode:
        """The VM's page-table format: with its encryption bit, or TDX's shared bit.

        The latter means private when it is clear. Raises NotAvailable for a format without such a
        bit.
        """
        try:
            return mode.with_c_bit(self.c_bit, inverted=self.inverted)
        except InvalidState as err:
            raise NotAvailable(
                f"protect={self.kind!r}: only x86-64 has it; {err}", protect=self.kind
            ) from err

    # --- commands

    @undivided
    def command(self, name: str, **fields: Value) -> Result:
        """KVM_MEMORY_ENCRYPT_OP: run a command and give what the firmware gives (`Psp.command`).

        Keeps a record of it, refused or not. Raises KvmError where it is refused, InvalidState for
        fields that it cannot have.
        """
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

    def _issue(self, name: str, fields: dict[str, Value]) -> Result:
        # Of this guest now: a snapshot may be another's
        self.vm.spa = lambda gpa: self.nested.spa(gpa)
        if name in _SEALS:
            self._vcpus.sync()
        return issue(self.vm, name, fields, self.done, lambda: len(self.measured))

    def _after(self, name: str, result: Result, fields: dict[str, Value]) -> None:
        if name in _STARTS:
            policy = fields.get("policy", 0)
            assert isinstance(policy, int)
            self.policy = policy
            self._forget_views()
        elif name == "LAUNCH_MEASURE":
            assert isinstance(result, bytes)
            self.measurement = result
        elif name in _FINISHES:
            self.launched = True
            self.planned = tuple(self.protected.ranges())
            self._seal()
            self._pages.publish()

    def _seal(self) -> None:
        self.encrypted = True
        for tell in self.on_encrypted:
            tell(self.why_sealed)

    # --- launch

    @undivided
    def set_private(self, gpa: int, size: int, private: bool = True) -> None:
        """Which pages the launch will encrypt (vm_mem_set_private, vm_mem_set_shared).

        size is in bytes. Raises InvalidState after the launch, and for what is no run of whole
        pages of memory.
        """
        if self.launched:
            raise InvalidState(
                f"gpa {gpa:#x}: after the launch only the guest changes what is private"
            )
        self._pages.set_private(gpa, size, private)

    @undivided
    def launch(self) -> bytes:
        """All of it (vm_sev_launch); returns the measurement."""
        self.start()
        self.update()
        return self.finish()

    @undivided
    def start(self) -> None:
        """LAUNCH_START: the guest gets its key and its ASID."""
        name = "SNP_LAUNCH_START" if self.kind == "snp" else "LAUNCH_START"
        self.command(name, policy=self.policy)

    @undivided
    def update(self) -> None:
        """Encrypt and measure every protected range, lowest first (sev_vm_launch).

        The host follows no page table from then on.
        """
        for pfn, count in list(self.protected.ranges()):
            gpa, size = pfn * PAGE, count * PAGE
            if self.kind == "snp":
                self.command("SNP_LAUNCH_UPDATE", gpa=gpa, size=size)
            else:
                self.command("LAUNCH_UPDATE_DATA", spa=gpa, size=size)
        self._seal()

    @undivided
    def finish(self) -> bytes:
        """Measure, and let the guest run; returns the measurement (SNP: the launch digest)."""
        if self.kind == "snp":
            self.command("SNP_LAUNCH_FINISH")
            assert self.vm.snp is not None
            self.measurement = self.vm.snp.digest
            return self.measurement

        if self.kind == "sev-es":
            self.command("LAUNCH_UPDATE_VMSA")
        # Its owner may have had it measured, to bring a secret in
        if self.state is not GuestState.LAUNCH_SECRET:
            self.command("LAUNCH_MEASURE", size=MEASURE_SIZE)
        self.command("LAUNCH_FINISH")
        return self.measurement

    # --- what the owner does, who has the keys

    def expected(self, digest: bytes, policy: int | None = None) -> bytes:
        """What `measurement` must be if the host launched what the owner thinks.

        That is, with this launch digest and policy (None: the guest's own); the owner has the key
        TIK. Raises InvalidState before LAUNCH_MEASURE; SNP has no such key, its digest stands for
        itself.
        """
        guest = self._known
        if guest is None or not self.measurement:
            raise InvalidState(
                f"a {self.kind} guest in state {self.state.name} has no measurement to compare with"
            )
        policy = self.policy if policy is None else policy
        return expected_measurement(self.host.psp, guest, policy, digest, self.measurement)

    def wrap_secret(self, secret: bytes, iv: bytes = bytes(16)) -> dict[str, Value]:
        """The owner's packet for LAUNCH_SECRET, as its fields `header` and `data`.

        Nobody without the owner's keys can read or make it. Raises InvalidState for an iv that has
        not 16 bytes, and before LAUNCH_MEASURE: the packet is for the launch that was measured, and
        for no other.
        """
        guest = self._known
        if guest is None or not guest.measure:
            raise InvalidState(
                f"a {self.kind} guest in state {self.state.name} "
                f"has no measurement that a secret could be for"
            )
        return wrapped_secret(guest, secret, iv)

    # --- vCPUs

    def add_ghcb(self, machine: Machine, index: int, program: Program | None) -> None:
        """A new vCPU: where registers are encrypted it shares a page with its host."""
        if self.level > 1:
            self.ghcbs = place_ghcb(machine, index, program, self.ghcbs)

    def adopt_vcpu(self, registers: Callable[[], Mapping[str, int]]) -> None:
        """A new vCPU: where registers are encrypted it has a VMSA."""
        if self.level > 1:
            self._vcpus.adopt(registers)

    def check_ready(self, index: int) -> None:
        """KVM_RUN: raises InvalidState for a vCPU whose guest is not launched.

        It is LAUNCH_FINISH that makes it ready to run. Until then the firmware keeps the ASID
        invalid on every core, so that hardware's VMRUN fails and KVM says KVM_EXIT_FAIL_ENTRY
        (Documentation/virt/kvm/x86/amd-memory-encryption.rst; activate_common() and
        sev_mcmd_launch_finish() of AMD's firmware).
        """
        if self.launched:
            return
        finish = "SNP_LAUNCH_FINISH" if self.kind == "snp" else "LAUNCH_FINISH"
        raise InvalidState(
            f"KVM_RUN of vCPU {index}: this {self.kind} guest is in state {self.state.name}, "
            f"and no core runs its ASID before {finish} (VMRUN fails, KVM_EXIT_FAIL_ENTRY)"
        )

    def check_registers(self, index: int) -> None:
        """KVM_GET_REGS, KVM_SET_REGS: raises KvmError EINVAL once registers are encrypted."""
        if self.level > 1:
            check_register_access(self.vm, index)

    def sealed(self, index: int) -> str:
        """Why the host cannot see a vCPU's registers; "" when it can."""
        if self.level > 1 and self.vm.vcpus[index].protected:
            return f"{self.kind.upper()} keeps them in an encrypted VMSA"
        return ""

    def _sealed_vmsa(self, index: int) -> bytes | None:
        return self._vcpus.sealed(index)

    # --- pages

    def connect(self, engine: ProtectingVm) -> None:
        """The engine that runs the guest, which must be told when a page changes hands."""
        self._pages.connect(engine)

    @undivided
    def remap(self, gpa: int, other: int) -> None:
        """The host has exchanged two pages in the nested page table."""
        self._pages.remap(gpa, other)

    def guest_fault(self, gpa: int, private: bool, is_write: bool) -> RmpFault | None:
        """What an access of the guest to its page meets, None: nothing."""
        return self._pages.guest_fault(gpa, private, is_write)

    def pvalidate(self, gpa: int, size: int, validate: bool) -> tuple[int, bool] | RmpFault:
        """The guest's PVALIDATE on a page of its own: (EAX, CF), or what it meets."""
        return self._pages.pvalidate(gpa, size, validate)

    def page_state_change(self, gfn: int, op: int) -> int:
        """The guest wants a page private (1) or shared (2): 0, or the error that it is told."""
        return self._pages.change_state(gfn, op)

    def look(self, gpa: int, size: int, is_write: bool) -> None:
        """The host is about to access memory.

        Raises InvalidState where the RMP gives a page that it writes to the guest (APM vol. 2
        15.36).
        """
        if is_write:
            self._pages.check_host_write(gpa, size)

    # --- the engine's cipher

    def encrypt_into(self, spa: int, data: memoryview, out: memoryview) -> None:
        """Encrypt with the guest's key, as the memory controller does on a private write."""
        cipher = self.vm.cipher
        if cipher is None:
            out[:] = data
        else:
            cipher.encrypt_into(spa, data, out)

    def decrypt_into(self, spa: int, data: memoryview, out: memoryview) -> None:
        """Decrypt with the guest's key, as the memory controller does on a private read."""
        cipher = self.vm.cipher
        if cipher is None:
            out[:] = data
        else:
            cipher.decrypt_into(spa, data, out)

    # --- a VM's snapshot

    def save(self) -> ProtectedState:
        """All of it, for a snapshot."""
        return ProtectedState(
            vm=deepcopy(self.vm),
            policy=self.policy,
            measurement=self.measurement,
            encrypted=self.encrypted,
            launched=self.launched,
            planned=self.planned,
            done=tuple(self.done),
            protected=self.protected.copy(),
            nested=copy(self.nested),
            vmsas=tuple(self.dram.pages),
            ghcbs=self.ghcbs,
            jump_table=self.jump_table,
            registered=dict(self.registered),
            awaited=dict(self.awaited),
        )

    def restore(self, state: ProtectedState) -> None:
        """Put `save` back; the key comes back with it, so memory has to be put back too."""
        self.vm = deepcopy(state.vm)
        self.host = self.vm.host
        self.host.psp.memory = self.dram
        self._pages.vm = self.vm
        self._pages.nested = copy(state.nested)
        self._vcpus.vm = self.vm
        self.dram.pages = list(state.vmsas)

        self.policy = state.policy
        self.measurement = state.measurement
        self.encrypted = state.encrypted
        self.launched = state.launched
        self.planned = state.planned
        self.done = list(state.done)
        self.protected.assign(state.protected)

        self.ghcbs = state.ghcbs
        self.jump_table = state.jump_table
        self.registered = dict(state.registered)
        self.awaited = dict(state.awaited)
        self._pages.publish()
