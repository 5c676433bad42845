"""What KVM does with one command of KVM_MEMORY_ENCRYPT_OP, once the VM may give it.

Most commands it hands on to the secure processor after a look at their arguments. Source:
arch/x86/kvm/svm/sev.c of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EBUSY, EINVAL, EIO, ENOTTY

from labkit.errors import KvmError, PspError
from labkit.machine.memory import PAGE
from labkit.sev.commands import Value
from labkit.sev.kvm_host import KvmVm, VmType, kvm_error
from labkit.sev.policy import SnpPolicy
from labkit.sev.psp_bodies import Result
from labkit.sev.rmp import RmpEntry
from labkit.sev.snp import PageType, SnpGuest
from labkit.sev.vmsa import SNP_ACTIVE, VMSA_GPA

__all__ = ["carry_out"]

# What this host supports beside SNP: DEBUG_SWAP
VMSA_FEATURES = 1 << 5

# Least and greatest
GHCB_VERSIONS = (1, 2)

Fields = Mapping[str, Value]


def carry_out(vm: KvmVm, name: str, fields: Fields) -> Result:
    """Carry out a command.

    Gives what the firmware gives; raises KvmError where KVM refuses, PspError where the firmware
    does.
    """
    return _BODIES.get(name, _forward)(vm, name, fields)


def _number(fields: Fields, name: str, default: int = 0) -> int:
    value = fields.get(name, default)
    assert isinstance(value, int)
    return value


def _bytes(fields: Fields, name: str) -> bytes:
    value = fields.get(name, b"")
    assert isinstance(value, bytes)
    return value


def _forward(vm: KvmVm, name: str, fields: Fields) -> Result:
    spa = _number(fields, "spa")
    size = len(_bytes(fields, "data")) or _number(fields, "size")
    works_on_memory = "UPDATE_DATA" in name or name.startswith("DBG_") or name == "LAUNCH_SECRET"
    if works_on_memory:
        takes_one_page = name.startswith(("SEND", "RECEIVE"))
        if not size or (takes_one_page and spa % PAGE + size > PAGE):
            why = f"{size:#x} bytes at {spa:#x}: none, or more than one page"
            raise kvm_error(EINVAL, why, name)
    if name == "SEND_START" and not fields.get("pdh"):
        raise kvm_error(EINVAL, "no certificate of the target", name)
    return vm.host.psp.command(name, **{**fields, "handle": vm.handle})


# --- INIT, ES_INIT, INIT2


def _init2(vm: KvmVm, name: str, fields: Fields) -> None:
    is_type = vm.type in (VmType.SEV, VmType.SEV_ES, VmType.SNP)
    ghcb_version = _number(fields, "ghcb_version")
    _init(vm, name, fields, vm.type, is_type, ghcb_version)


def _init_old(vm: KvmVm, name: str, fields: Fields) -> None:
    """Before VMs had types, INIT and ES_INIT said which kind they are."""
    if name == "ES_INIT" and not vm.host.has_es:
        raise kvm_error(ENOTTY, "this host has no SEV-ES", name)
    is_type = vm.type == VmType.DEFAULT
    if name == "INIT":
        _init(vm, name, fields, VmType.SEV, is_type, 0)
    else:
        _init(vm, name, fields, VmType.SEV_ES, is_type, GHCB_VERSIONS[0])


def _init(
    vm: KvmVm, name: str, fields: Fields, kind: VmType, is_type: bool, ghcb_version: int
) -> None:
    es = kind != VmType.SEV
    flags, features = _number(fields, "flags"), _number(fields, "vmsa_features")
    known_features = VMSA_FEATURES if es else 0
    greatest_ghcb = GHCB_VERSIONS[1] if es else 0
    checks = (
        (not is_type, f"a VM of type {vm.type.name}"),
        (vm.vcpus, "vCPUs exist already"),
        (flags, f"flags {flags:#x}"),
        (features & ~known_features, f"vmsa_features {features:#x}"),
        (ghcb_version > greatest_ghcb, f"GHCB version {ghcb_version}"),
        (vm.active, "it is active already"),
    )
    for wrong, why in checks:
        if wrong:
            raise kvm_error(EINVAL, why, name)

    free = [asid for asid in vm.host.psp.asids(es) if asid not in vm.host.asids]
    if not free:
        raise kvm_error(EBUSY, "no ASID is free", name)

    vm.active = True
    vm.es = es
    vm.asid = free[0]
    vm.host.asids.add(vm.asid)
    vm.ghcb_version = ghcb_version or greatest_ghcb
    vm.features = features
    if kind == VmType.SNP:
        vm.features |= SNP_ACTIVE


# --- launches of SEV and SEV-ES


def _start(vm: KvmVm, name: str, fields: Fields) -> int:
    """LAUNCH_START and RECEIVE_START also activate the ASID; gives the firmware's handle."""
    if name == "RECEIVE_START" and not (fields.get("pdh") and fields.get("session")):
        raise kvm_error(EINVAL, "no session, or no key of the source", name)
    psp = vm.host.psp
    handle = psp.command(name, **fields)
    assert isinstance(handle, int)
    try:
        psp.command("ACTIVATE", handle=handle, asid=vm.asid)
    except PspError:
        psp.command("DECOMMISSION", handle=handle)
        raise
    vm.handle = handle
    return handle


def _update_vmsa(vm: KvmVm, name: str, fields: Fields) -> None:
    for index, vcpu in enumerate(vm.vcpus):
        if vcpu.protected:
            raise kvm_error(EINVAL, f"the VMSA of vCPU {index} is encrypted already", name)
        vm.host.psp.command(name, handle=vm.handle, spa=vcpu.vmsa_spa, size=PAGE)
        vcpu.protected = True


# --- launches of SNP


def _snp_start(vm: KvmVm, name: str, fields: Fields) -> None:
    policy, flags = _number(fields, "policy"), _number(fields, "flags")
    must = SnpPolicy.RESERVED_ONE | SnpPolicy.SMT
    is_known = not policy >> 21 and not policy & SnpPolicy.SINGLE_SOCKET
    if vm.snp or flags or not is_known or policy & must != must:
        why = f"policy {policy:#x}, flags {flags:#x}, or a second start"
        raise kvm_error(EINVAL, why, name)
    vm.snp = SnpGuest(vm.host.psp, vm.host.rmp, policy, vm.asid)


def _snp_update(vm: KvmVm, name: str, fields: Fields) -> None:
    gpa, size = _number(fields, "gpa"), _number(fields, "size")
    kind = _number(fields, "type", PageType.NORMAL)
    # A VMSA is no page of memory: KVM brings those in at the finish
    is_type = kind in PageType.__members__.values() and kind != PageType.VMSA
    has_pages = not gpa % PAGE and not size % PAGE
    if vm.snp is None or not is_type or not has_pages or fields.get("flags"):
        why = f"no launch, or {size:#x} bytes at gpa {gpa:#x} of type {kind}"
        raise kvm_error(EINVAL, why, name)

    done: list[int] = []
    for page in range(gpa, gpa + size, PAGE):
        spa = vm.spa(page)
        try:
            _check_snp_page(vm, name, spa, page)
            _add_snp_page(vm, vm.snp, spa, page, kind)
        except (KvmError, PspError):
            # The kernel shares what it had made private
            for made in done:
                vm.host.rmp.update(made)
            raise
        done.append(spa)


def _check_snp_page(vm: KvmVm, name: str, spa: int, gpa: int) -> None:
    missing = vm.host.psp.hole(spa, PAGE)
    if missing:
        raise kvm_error(EINVAL, missing, name)
    if vm.host.rmp.entry(spa).assigned:
        raise kvm_error(EIO, f"gpa {gpa:#x} is private already", name)


def _add_snp_page(vm: KvmVm, guest: SnpGuest, spa: int, gpa: int, kind: int) -> None:
    rmp = vm.host.rmp
    rmp.update(spa, RmpEntry(assigned=True, asid=vm.asid, gpa=gpa, immutable=True))
    try:
        guest.update(spa, kind)
    except PspError:
        # SNP_PAGE_RECLAIM
        rmp.set(spa, RmpEntry())
        raise


def _snp_finish(vm: KvmVm, name: str, fields: Fields) -> None:
    if vm.snp is None or fields.get("flags"):
        raise kvm_error(EINVAL, "no SNP_LAUNCH_START, or flags", name)
    for vcpu in vm.vcpus:
        if vcpu.protected:
            raise kvm_error(EINVAL, "a VMSA is encrypted already", name)
        _add_snp_page(vm, vm.snp, vcpu.vmsa_spa, VMSA_GPA, PageType.VMSA)
        vcpu.protected = True
    if "host_data" in fields:
        vm.snp.finish(_bytes(fields, "host_data"))
    else:
        vm.snp.finish()


_BODIES: dict[str, Callable[[KvmVm, str, Fields], Result]] = {
    "INIT": _init_old,
    "ES_INIT": _init_old,
    "INIT2": _init2,
    "LAUNCH_START": _start,
    "RECEIVE_START": _start,
    "LAUNCH_UPDATE_VMSA": _update_vmsa,
    "SNP_LAUNCH_START": _snp_start,
    "SNP_LAUNCH_UPDATE": _snp_update,
    "SNP_LAUNCH_FINISH": _snp_finish,
}
