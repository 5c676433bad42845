"""KVM's own rules around the secure processor: which ioctl on which VM, and the errno where it refuses.

Source: arch/x86/kvm/svm/sev.c of Linux 6.12 (sev_mem_enc_ioctl() and below), numbers from arch/x86/include/uapi/asm/kvm.h. A command
that the firmware refuses is EIO with the firmware's status beside it. Addresses are system physical where KVM takes host virtual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from errno import EBUSY, EINVAL, EIO, ENOTTY, EPERM
from typing import Any, NamedTuple

from labkit.errors import InvalidState, KvmError, PspError
from labkit.sev.cipher import PAGE, MemoryCipher
from labkit.sev.policy import SnpPolicy
from labkit.sev.psp import Psp
from labkit.sev.rmp import Rmp, RmpEntry
from labkit.sev.snp import PageType, SnpGuest
from labkit.sev.vmsa import SNP_ACTIVE, VMSA_GPA

__all__ = [
    "KVM_COMMANDS",
    "KvmHost",
    "KvmRule",
    "KvmVcpu",
    "KvmVm",
    "VmType",
    "check_register_access",
    "copy_context",
    "kvm_command",
    "move_context",
]

VMSA_FEATURES = 1 << 5  # what this host supports beside SNP: DEBUG_SWAP
GHCB_VERSIONS = (1, 2)


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


@dataclass
class KvmVm:
    """What KVM keeps of one VM's encryption (struct kvm_sev_info)."""

    host: KvmHost
    type: VmType = VmType.DEFAULT
    vcpus: list[KvmVcpu] = field(default_factory=list)
    active: bool = False
    es: bool = False
    features: int = 0
    ghcb_version: int = 0
    asid: int = 0
    handle: int = 0
    owner: KvmVm | None = None  # of a mirror
    snp: SnpGuest | None = None
    dead: bool = False
    spa: Callable[[int], int] = lambda gpa: gpa  # the nested table

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
            for command in ("DEACTIVATE", "DECOMMISSION") if self.handle in psp.guests else ():
                psp.command(command, handle=self.handle)
            psp.used_asids.clear()  # DF_FLUSH
            self.host.asids.discard(self.asid)
        self.active, self.dead = False, True


class KvmRule(NamedTuple):
    """One command: its number, the VM it needs ("", "sev", "es", "snp", or "absent" when KVM lacks it), the errno otherwise."""

    id: int
    needs: str = "sev"
    lacking: int = ENOTTY
    mirror: bool = False  # allowed from a VM that mirrors another's encryption


KVM_COMMANDS = {
    "INIT": KvmRule(0, ""),
    "ES_INIT": KvmRule(1, ""),
    "LAUNCH_START": KvmRule(2),
    "LAUNCH_UPDATE_DATA": KvmRule(3),
    "LAUNCH_UPDATE_VMSA": KvmRule(4, "es", mirror=True),
    "LAUNCH_SECRET": KvmRule(5),
    "LAUNCH_MEASURE": KvmRule(6),
    "LAUNCH_FINISH": KvmRule(7),
    "SEND_START": KvmRule(8),
    "SEND_UPDATE_DATA": KvmRule(9),
    "SEND_UPDATE_VMSA": KvmRule(10, "absent", EINVAL),
    "SEND_FINISH": KvmRule(11),
    "RECEIVE_START": KvmRule(12),
    "RECEIVE_UPDATE_DATA": KvmRule(13, "sev", EINVAL),
    "RECEIVE_UPDATE_VMSA": KvmRule(14, "absent", EINVAL),
    "RECEIVE_FINISH": KvmRule(15),
    "GUEST_STATUS": KvmRule(16, mirror=True),
    "DBG_DECRYPT": KvmRule(17, mirror=True),
    "DBG_ENCRYPT": KvmRule(18, mirror=True),
    "CERT_EXPORT": KvmRule(19, "absent", EINVAL),
    "SEND_CANCEL": KvmRule(21),
    "INIT2": KvmRule(22, ""),
    "SNP_LAUNCH_START": KvmRule(100, "snp"),
    "SNP_LAUNCH_UPDATE": KvmRule(101, "snp", EINVAL),
    "SNP_LAUNCH_FINISH": KvmRule(102, "snp"),
}


_BYTES = ("header", "data", "pdh", "session", "host_data")
_FIELDS = {  # of the commands that KVM itself carries out; the secure processor knows its own
    **dict.fromkeys(("INIT", "ES_INIT", "INIT2"), ("flags", "vmsa_features", "ghcb_version")),
    "LAUNCH_UPDATE_VMSA": (),
    "SNP_LAUNCH_START": ("policy", "flags"),
    "SNP_LAUNCH_UPDATE": ("gpa", "size", "type", "flags"),
    "SNP_LAUNCH_FINISH": ("flags", "host_data"),
}


def kvm_command(vm: KvmVm, name: str, **fields: Any) -> Any:
    """KVM_MEMORY_ENCRYPT_OP: run a command and give what the firmware gives; raises KvmError with errno (and status).

    Raises InvalidState for fields that no program could put into the command's struct.
    """
    _check_fields(name, fields)
    rule = KVM_COMMANDS.get(name, KvmRule(-1, "absent", EINVAL))
    have = {
        "": True,
        "sev": vm.active,
        "es": vm.es,
        "snp": bool(vm.features & SNP_ACTIVE),
        "absent": False,
    }
    for wrong, errno, why in (
        (vm.dead, EIO, "the VM's encryption was moved away, it is dead"),
        (not vm.host.has_sev, ENOTTY, "this host has no SEV"),
        (vm.owner and not rule.mirror, EINVAL, "a mirror VM may not"),
        (have["snp"] and rule.id < 100, EPERM, "an SNP VM takes SNP commands only"),
        (
            not have[rule.needs],
            rule.lacking,
            f"the VM is not {rule.needs}" if rule.needs != "absent" else "KVM has no such command",
        ),
    ):
        if wrong:
            raise _error(errno, why, name)
    try:
        return _BODIES.get(name, _forward)(vm, name, fields)
    except PspError as err:
        raise KvmError(
            f"{name}: EIO, the firmware says {err}", errno=EIO, command=name, status=err.status
        ) from err


def _check_fields(name: str, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if key not in _FIELDS.get(name, fields):
            raise InvalidState(
                f"{name} has no field {key}, only {' '.join(_FIELDS[name]) or 'none at all'}",
                command=name,
                field=key,
            )
        fits = (
            isinstance(value, bytes)
            if key in _BYTES
            else isinstance(value, int) and 0 <= value < 1 << 64
        )
        if not fits:
            wants = "bytes" if key in _BYTES else "64 bits"
            raise InvalidState(
                f"{name}: {key} takes {wants}, not {str(value)[:40]!r}", command=name, field=key
            )


def check_register_access(vm: KvmVm, index: int) -> None:
    """KVM_GET_REGS and its like: raises KvmError EINVAL once a SEV-ES or SNP vCPU's registers are encrypted (kvm_arch_vcpu_ioctl())."""
    if vm.type in (VmType.SEV_ES, VmType.SNP) and vm.vcpus[index].protected:
        raise _error(EINVAL, f"the registers of vCPU {index} are encrypted", "GET_REGS")


def copy_context(mirror: KvmVm, source: KvmVm) -> None:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: let a second VM run under the first one's key (sev_vm_copy_enc_context_from())."""
    if (
        mirror is source
        or mirror.active
        or not source.active
        or source.features & SNP_ACTIVE
        or source.owner
        or mirror.vcpus
    ):
        raise _error(
            EINVAL,
            "wants a VM without encryption and vCPUs, and a SEV or SEV-ES source that is no mirror",
            "COPY_ENC_CONTEXT",
        )
    mirror.owner, mirror.active, mirror.es = source, True, source.es
    mirror.asid, mirror.handle = source.asid, source.handle


def move_context(target: KvmVm, source: KvmVm) -> None:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: migrate inside the host; the source is dead afterwards (sev_vm_move_enc_context_from())."""
    if (
        target is source
        or target.type != source.type
        or target.active
        or not source.active
        or source.features & SNP_ACTIVE
    ):
        raise _error(
            EINVAL,
            "wants two VMs of one type, the source active, the target not, and no SNP",
            "MOVE_ENC_CONTEXT",
        )
    if source.es and (
        len(target.vcpus) != len(source.vcpus) or not all(vcpu.protected for vcpu in source.vcpus)
    ):
        raise _error(
            EINVAL,
            "wants as many vCPUs on both sides, and every VMSA of the source encrypted",
            "MOVE_ENC_CONTEXT",
        )
    for name in ("active", "es", "features", "ghcb_version", "asid", "handle", "owner"):
        setattr(target, name, getattr(source, name))
    if source.es:
        target.vcpus = [KvmVcpu(vcpu.vmsa_spa, True) for vcpu in source.vcpus]
    source.dead = True


def _error(errno: int, why: str, command: str) -> KvmError:
    name = {EBUSY: "EBUSY", EINVAL: "EINVAL", EIO: "EIO", ENOTTY: "ENOTTY", EPERM: "EPERM"}[errno]
    return KvmError(f"{command}: {name}, {why}", errno=errno, command=command)


def _forward(vm: KvmVm, name: str, fields: dict[str, Any]) -> Any:
    spa, size = fields.get("spa", 0), len(fields.get("data", b"")) or fields.get("size", 0)
    if "UPDATE_DATA" in name or name.startswith("DBG_") or name == "LAUNCH_SECRET":
        one_page = name.startswith(("SEND", "RECEIVE"))
        if not size or (one_page and spa % PAGE + size > PAGE):
            raise _error(EINVAL, f"{size:#x} bytes at {spa:#x}: none, or more than one page", name)
    if name == "SEND_START" and not fields.get("pdh"):
        raise _error(EINVAL, "no certificate of the target", name)
    return vm.host.psp.command(name, **{**fields, "handle": vm.handle})


def _init(vm: KvmVm, name: str, fields: dict[str, Any]) -> None:
    old, kind = name != "INIT2", vm.type
    if name == "ES_INIT" and not vm.host.has_es:
        raise _error(ENOTTY, "this host has no SEV-ES", name)
    flags, features, ghcb = (
        fields.get(key, 0) for key in ("flags", "vmsa_features", "ghcb_version")
    )
    if old:
        kind, ghcb = (VmType.SEV, 0) if name == "INIT" else (VmType.SEV_ES, GHCB_VERSIONS[0])
    es = kind != VmType.SEV
    for wrong, why in (
        (
            (vm.type != VmType.DEFAULT)
            if old
            else vm.type not in (VmType.SEV, VmType.SEV_ES, VmType.SNP),
            f"a VM of type {vm.type.name}",
        ),
        (vm.vcpus, "vCPUs exist already"),
        (flags, f"flags {flags:#x}"),
        (features & ~(VMSA_FEATURES if es else 0), f"vmsa_features {features:#x}"),
        (ghcb > GHCB_VERSIONS[1] or (not es and ghcb), f"GHCB version {ghcb}"),
        (vm.active, "it is active already"),
    ):
        if wrong:
            raise _error(EINVAL, why, name)
    free = [asid for asid in vm.host.psp.asids(es) if asid not in vm.host.asids]
    if not free:
        raise _error(EBUSY, "no ASID is free", name)
    vm.active, vm.es, vm.asid, vm.ghcb_version = True, es, free[0], ghcb or GHCB_VERSIONS[1] * es
    vm.features = features | SNP_ACTIVE * (kind == VmType.SNP)
    vm.host.asids.add(vm.asid)


def _start(vm: KvmVm, name: str, fields: dict[str, Any]) -> int:
    if name == "RECEIVE_START" and not (fields.get("pdh") and fields.get("session")):
        raise _error(EINVAL, "no session, or no key of the source", name)
    psp = vm.host.psp
    handle = int(psp.command(name, **fields))
    try:
        psp.command("ACTIVATE", handle=handle, asid=vm.asid)
    except PspError:
        psp.command("DECOMMISSION", handle=handle)
        raise
    vm.handle = handle
    return handle


def _update_vmsa(vm: KvmVm, name: str, fields: dict[str, Any]) -> None:
    for index, vcpu in enumerate(vm.vcpus):
        if vcpu.protected:
            raise _error(EINVAL, f"the VMSA of vCPU {index} is encrypted already", name)
        vm.host.psp.command(name, handle=vm.handle, spa=vcpu.vmsa_spa, size=PAGE)
        vcpu.protected = True


def _snp_start(vm: KvmVm, name: str, fields: dict[str, Any]) -> None:
    policy, must = fields.get("policy", 0), SnpPolicy.RESERVED_ONE | SnpPolicy.SMT
    if (
        vm.snp
        or fields.get("flags")
        or policy >> 21
        or policy & must != must
        or policy & SnpPolicy.SINGLE_SOCKET
    ):
        raise _error(
            EINVAL,
            f"policy {policy:#x}, flags {fields.get('flags', 0):#x}, or a second start",
            name,
        )
    vm.snp = SnpGuest(vm.host.psp, vm.host.rmp, policy, vm.asid)


def _snp_update(vm: KvmVm, name: str, fields: dict[str, Any]) -> None:
    gpa, size, kind = (
        fields.get("gpa", 0),
        fields.get("size", 0),
        fields.get("type", PageType.NORMAL),
    )
    if (
        vm.snp is None
        or gpa % PAGE
        or size % PAGE
        or kind not in (1, 3, 4, 5, 6)
        or fields.get("flags")
    ):
        raise _error(EINVAL, f"no launch, or {size:#x} bytes at gpa {gpa:#x} of type {kind}", name)
    done: list[int] = []
    for at in range(gpa, gpa + size, PAGE):
        spa = vm.spa(at)
        try:
            if missing := vm.host.psp.hole(spa, PAGE):
                raise _error(EINVAL, missing, name)
            if vm.host.rmp.entry(spa).assigned:
                raise _error(EIO, f"gpa {at:#x} is private already", name)
            _snp_page(vm, vm.snp, spa, at, kind)
        except (KvmError, PspError):
            for made in done:  # the kernel shares what it had made private
                vm.host.rmp.update(made)
            raise
        done.append(spa)


def _snp_page(vm: KvmVm, guest: SnpGuest, spa: int, gpa: int, kind: int) -> None:
    vm.host.rmp.update(spa, RmpEntry(True, vm.asid, gpa, immutable=True))
    try:
        guest.update(spa, kind)
    except PspError:
        vm.host.rmp.set(spa, RmpEntry())  # SNP_PAGE_RECLAIM
        raise


def _snp_finish(vm: KvmVm, name: str, fields: dict[str, Any]) -> None:
    if vm.snp is None or fields.get("flags"):
        raise _error(EINVAL, "no SNP_LAUNCH_START, or flags", name)
    for vcpu in vm.vcpus:
        if vcpu.protected:
            raise _error(EINVAL, "a VMSA is encrypted already", name)
        _snp_page(vm, vm.snp, vcpu.vmsa_spa, VMSA_GPA, PageType.VMSA)
        vcpu.protected = True
    vm.snp.finish(fields.get("host_data", bytes(32)))


_BODIES: dict[str, Callable[[KvmVm, str, dict[str, Any]], Any]] = {
    "INIT": _init,
    "ES_INIT": _init,
    "INIT2": _init,
    "LAUNCH_START": _start,
    "RECEIVE_START": _start,
    "LAUNCH_UPDATE_VMSA": _update_vmsa,
    "SNP_LAUNCH_START": _snp_start,
    "SNP_LAUNCH_UPDATE": _snp_update,
    "SNP_LAUNCH_FINISH": _snp_finish,
}
