"""What KVM keeps of one machine's encrypted VMs, and the errors that it refuses with.

Source: struct kvm_sev_info and around it in arch/x86/kvm/svm/ of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from errno import errorcode

from labkit.errors import KvmError
from labkit.sev.cipher import MemoryCipher
from labkit.sev.psp import Psp
from labkit.sev.rmp import Rmp
from labkit.sev.snp import SnpGuest

__all__ = ["KvmHost", "KvmVcpu", "KvmVm", "VmType", "kvm_error"]


class VmType(IntEnum):
    """The type given to KVM_CREATE_VM."""

    DEFAULT = 0
    SW_PROTECTED = 1
    SEV = 2
    SEV_ES = 3
    SNP = 4


@dataclass
class KvmHost:
    """One machine: its secure processor, its RMP and the ASIDs that KVM has handed out."""

    psp: Psp
    rmp: Rmp = field(default_factory=Rmp)
    has_sev: bool = True
    has_es: bool = True
    asids: set[int] = field(default_factory=set)


@dataclass
class KvmVcpu:
    """What KVM keeps of one vCPU: where its VMSA lies, and whether that is encrypted."""

    vmsa_spa: int = 0
    protected: bool = False


def _same(gpa: int) -> int:
    return gpa


@dataclass
class KvmVm:
    """What KVM keeps of one VM's encryption (struct kvm_sev_info).

    owner is the VM whose encryption a mirror uses; a VM is dead once its encryption was moved away.
    spa is the nested page table: gpa -> system physical address.
    """

    host: KvmHost
    type: VmType = VmType.DEFAULT
    vcpus: list[KvmVcpu] = field(default_factory=list)
    active: bool = False
    es: bool = False
    features: int = 0
    ghcb_version: int = 0
    asid: int = 0
    handle: int = 0
    owner: KvmVm | None = None
    snp: SnpGuest | None = None
    dead: bool = False
    spa: Callable[[int], int] = _same

    @property
    def cipher(self) -> MemoryCipher | None:
        """The key that private memory is under; None before LAUNCH_START."""
        guest = self.snp or self.host.psp.guests.get(self.handle)
        return guest.cipher if guest else None

    def close(self) -> None:
        """Give up the guest and its ASID, as the last close of the VM does."""
        psp = self.host.psp
        if self.active and self.owner is None and not self.dead:
            if self.snp:
                self.snp.decommission()
            if self.handle in psp.guests:
                psp.command("DEACTIVATE", handle=self.handle)
                psp.command("DECOMMISSION", handle=self.handle)
            # DF_FLUSH
            psp.used_asids.clear()
            self.host.asids.discard(self.asid)
        self.active = False
        self.dead = True


def kvm_error(errno: int, why: str, command: str) -> KvmError:
    """The error to raise where KVM itself refuses a command (facts: errno, command)."""
    return KvmError(f"{command}: {errorcode[errno]}, {why}", errno=errno, command=command)
