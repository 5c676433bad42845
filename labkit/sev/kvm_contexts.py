"""One VM's encryption given to another VM of the same host: shared, or moved away.

Source: arch/x86/kvm/svm/sev.c of Linux 6.12, the functions named below.
"""

from __future__ import annotations

from errno import EINVAL

from labkit.sev.kvm_host import KvmVcpu, KvmVm, kvm_error
from labkit.sev.vmsa import SNP_ACTIVE

__all__ = ["copy_context", "move_context"]


def copy_context(mirror: KvmVm, source: KvmVm) -> None:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: let a second VM run under the first one's key.

    As sev_vm_copy_enc_context_from() does; raises KvmError EINVAL for VMs that do not fit.
    """
    is_source = source.active and not source.features & SNP_ACTIVE and not source.owner
    if mirror is source or mirror.active or mirror.vcpus or not is_source:
        raise kvm_error(
            EINVAL,
            "wants a VM without encryption and vCPUs, and a SEV or SEV-ES source that is no mirror",
            "COPY_ENC_CONTEXT",
        )
    mirror.owner = source
    mirror.active = True
    mirror.es = source.es
    mirror.asid = source.asid
    mirror.handle = source.handle


def move_context(target: KvmVm, source: KvmVm) -> None:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: migrate inside the host; the source is dead afterwards.

    As sev_vm_move_enc_context_from() does; raises KvmError EINVAL for VMs that do not fit.
    """
    is_source = source.active and not source.features & SNP_ACTIVE
    if target is source or target.type != source.type or target.active or not is_source:
        raise kvm_error(
            EINVAL,
            "wants two VMs of one type, the source active, the target not, and no SNP",
            "MOVE_ENC_CONTEXT",
        )
    if source.es and not _vcpus_match(target, source):
        raise kvm_error(
            EINVAL,
            "wants as many vCPUs on both sides, and every VMSA of the source encrypted",
            "MOVE_ENC_CONTEXT",
        )

    for name in ("active", "es", "features", "ghcb_version", "asid", "handle", "owner"):
        setattr(target, name, getattr(source, name))
    if source.es:
        target.vcpus = [KvmVcpu(vcpu.vmsa_spa, True) for vcpu in source.vcpus]
    source.dead = True


def _vcpus_match(target: KvmVm, source: KvmVm) -> bool:
    are_encrypted = all(vcpu.protected for vcpu in source.vcpus)
    return are_encrypted and len(target.vcpus) == len(source.vcpus)
