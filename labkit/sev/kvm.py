"""KVM's own rules around the secure processor: which ioctl on which VM, and the errno otherwise.

Source: arch/x86/kvm/svm/sev.c of Linux 6.12 (sev_mem_enc_ioctl() and below), numbers from
arch/x86/include/uapi/asm/kvm.h. A command that the firmware refuses is EIO with the firmware's
status beside it. Addresses are system physical where KVM takes host virtual ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EINVAL, EIO, ENOTTY, EPERM
from typing import Literal, NamedTuple

from labkit.errors import InvalidState, KvmError, PspError
from labkit.sev.commands import Value
from labkit.sev.kvm_bodies import carry_out
from labkit.sev.kvm_host import KvmVm, VmType, kvm_error
from labkit.sev.psp_bodies import Result
from labkit.sev.vmsa import SNP_ACTIVE

__all__ = ["KVM_COMMANDS", "KvmRule", "check_register_access", "kvm_command"]


class KvmRule(NamedTuple):
    """One command: its number, the VM it needs, and the errno on any other.

    needs is "any", "sev", "es", "snp", or "absent" when KVM lacks the command. mirror: a VM that
    mirrors another's encryption may give it too.
    """

    id: int
    needs: Literal["any", "sev", "es", "snp", "absent"] = "sev"
    lacking: int = ENOTTY
    mirror: bool = False


KVM_COMMANDS = {
    "INIT": KvmRule(0, "any"),
    "ES_INIT": KvmRule(1, "any"),
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
    "INIT2": KvmRule(22, "any"),
    "SNP_LAUNCH_START": KvmRule(100, "snp"),
    "SNP_LAUNCH_UPDATE": KvmRule(101, "snp", EINVAL),
    "SNP_LAUNCH_FINISH": KvmRule(102, "snp"),
}

_UNKNOWN = KvmRule(-1, "absent", EINVAL)
_FIRST_SNP = 100

# Of the commands that KVM itself carries out; the secure processor knows its own
_INIT_FIELDS = ("flags", "vmsa_features", "ghcb_version")
_FIELDS: dict[str, tuple[str, ...]] = {
    "INIT": _INIT_FIELDS,
    "ES_INIT": _INIT_FIELDS,
    "INIT2": _INIT_FIELDS,
    "LAUNCH_UPDATE_VMSA": (),
    "SNP_LAUNCH_START": ("policy", "flags"),
    "SNP_LAUNCH_UPDATE": ("gpa", "size", "type", "flags"),
    "SNP_LAUNCH_FINISH": ("flags", "host_data"),
}

# Fields that hold bytes; all others hold 64 bits
_BYTES = ("header", "data", "pdh", "session", "host_data")


def kvm_command(vm: KvmVm, name: str, **fields: Value) -> Result:
    """KVM_MEMORY_ENCRYPT_OP: run a command and give what the firmware gives (`Psp.command`).

    Raises KvmError with errno (and the firmware's status, where that refused), InvalidState for
    fields that no program could put into the command's struct.
    """
    _check_fields(name, fields)
    for wrong, errno, why in _checks(vm, KVM_COMMANDS.get(name, _UNKNOWN)):
        if wrong:
            raise kvm_error(errno, why, name)
    try:
        return carry_out(vm, name, fields)
    except PspError as err:
        raise KvmError(
            f"{name}: EIO, the firmware says {err}", errno=EIO, command=name, status=err.status
        ) from err


def _check_fields(name: str, fields: dict[str, Value]) -> None:
    known = _FIELDS.get(name)
    for key, value in fields.items():
        if known is not None and key not in known:
            raise InvalidState(
                f"{name} has no field {key}, only {' '.join(known) or 'none at all'}",
                command=name,
                field=key,
            )
        if key in _BYTES:
            fits, wants = isinstance(value, bytes), "bytes"
        else:
            fits, wants = isinstance(value, int) and 0 <= value < 1 << 64, "64 bits"
        if not fits:
            raise InvalidState(
                f"{name}: {key} takes {wants}, not {str(value)[:40]!r}", command=name, field=key
            )


def _checks(vm: KvmVm, rule: KvmRule) -> Iterator[tuple[bool, int, str]]:
    """Rows of (wrong, errno, why), in the kernel's order."""
    is_snp = bool(vm.features & SNP_ACTIVE)
    yield vm.dead, EIO, "the VM's encryption was moved away, it is dead"
    yield not vm.host.has_sev, ENOTTY, "this host has no SEV"
    yield vm.owner is not None and not rule.mirror, EINVAL, "a mirror VM may not"
    yield is_snp and rule.id < _FIRST_SNP, EPERM, "an SNP VM takes SNP commands only"
    match rule.needs:
        case "absent":
            yield True, rule.lacking, "KVM has no such command"
        case "sev":
            yield not vm.active, rule.lacking, "the VM is not sev"
        case "es":
            yield not vm.es, rule.lacking, "the VM is not es"
        case "snp":
            yield not is_snp, rule.lacking, "the VM is not snp"


def check_register_access(vm: KvmVm, index: int) -> None:
    """KVM_GET_REGS and its like: whether the host may have the registers of a vCPU.

    Raises KvmError EINVAL once those of a SEV-ES or SNP vCPU are encrypted
    (kvm_arch_vcpu_ioctl()).
    """
    if vm.type in (VmType.SEV_ES, VmType.SNP) and vm.vcpus[index].protected:
        raise kvm_error(EINVAL, f"the registers of vCPU {index} are encrypted", "GET_REGS")
