"""KVM's own rules: which command on which VM, mirrors, migration inside a host.

The kernel's headers are the witness of the numbers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from copy import deepcopy
from errno import EBUSY, EINVAL, EIO, ENOTTY, EPERM
from pathlib import Path
from typing import Any

import pytest
from conftest import lacking
from sev_sample import PLAIN, SPA, good_fields, make_psp

from labkit.errors import InvalidState, KvmError
from labkit.sev import ghcb
from labkit.sev.commands import GuestState
from labkit.sev.kvm import KVM_COMMANDS, check_register_access, kvm_command
from labkit.sev.kvm_contexts import copy_context, move_context
from labkit.sev.kvm_host import KvmHost, KvmVcpu, KvmVm, VmType
from labkit.sev.policy import SnpPolicy, Status

SNP_POLICY = SnpPolicy.SMT | SnpPolicy.RESERVED_ONE


def make_vm(
    kind: VmType = VmType.SEV_ES, host: KvmHost | None = None, nr_vcpus: int = 2, init: bool = True
) -> KvmVm:
    vm = KvmVm(host or KvmHost(make_psp()), kind)
    if init:
        kvm_command(vm, "INIT2")
    vm.vcpus = [KvmVcpu(0x20000 + 4096 * i) for i in range(nr_vcpus)]
    return vm


def launched(kind: VmType = VmType.SEV_ES, host: KvmHost | None = None) -> KvmVm:
    vm = make_vm(kind, host)
    kvm_command(vm, "LAUNCH_START", policy=4 if kind == VmType.SEV_ES else 0)
    kvm_command(vm, "LAUNCH_UPDATE_DATA", spa=SPA, size=4096)
    if kind == VmType.SEV_ES:
        kvm_command(vm, "LAUNCH_UPDATE_VMSA")
    kvm_command(vm, "LAUNCH_MEASURE", size=48)
    kvm_command(vm, "LAUNCH_FINISH")
    return vm


def errno_of(vm: KvmVm, name: str, **fields: Any) -> tuple[int, int]:
    try:
        kvm_command(vm, name, **fields)
    except KvmError as err:
        return int(err.errno), int(err.facts.get("status", 0))  # type: ignore[call-overload]
    return 0, 0


@pytest.mark.parametrize(
    ("kind", "fields", "errno"),
    [
        (VmType.SEV, {}, 0),
        (VmType.SEV_ES, {}, 0),
        (VmType.SNP, {}, 0),
        (VmType.DEFAULT, {}, EINVAL),
        (VmType.SW_PROTECTED, {}, EINVAL),
        (VmType.SEV_ES, {"flags": 1}, EINVAL),
        (VmType.SEV_ES, {"vmsa_features": 1 << 5}, 0),
        (VmType.SEV_ES, {"vmsa_features": 1}, EINVAL),
        (VmType.SEV, {"vmsa_features": 1 << 5}, EINVAL),
        (VmType.SEV_ES, {"ghcb_version": 2}, 0),
        (VmType.SEV_ES, {"ghcb_version": 3}, EINVAL),
        (VmType.SEV, {"ghcb_version": 1}, EINVAL),
    ],
)
def test_that_init2_checks_its_arguments(kind: VmType, fields: dict[str, int], errno: int) -> None:
    assert errno_of(make_vm(kind, nr_vcpus=0, init=False), "INIT2", **fields) == (errno, 0)


@pytest.mark.parametrize(
    ("kind", "errno"), [(VmType.SEV, EINVAL), (VmType.SEV_ES, EINVAL), (VmType.SNP, EPERM)]
)
def test_that_init2_comes_once_and_before_vcpus(kind: VmType, errno: int) -> None:
    assert errno_of(make_vm(kind, nr_vcpus=0), "INIT2") == (errno, 0)
    assert errno_of(make_vm(kind, init=False), "INIT2") == (EINVAL, 0)


@pytest.mark.parametrize(
    ("name", "kind", "has_es", "errno", "is_es"),
    [
        ("INIT", VmType.DEFAULT, True, 0, False),
        ("ES_INIT", VmType.DEFAULT, True, 0, True),
        ("ES_INIT", VmType.DEFAULT, False, ENOTTY, False),
        ("INIT", VmType.SEV, True, EINVAL, False),
        ("ES_INIT", VmType.SEV_ES, True, EINVAL, False),
    ],
)
def test_that_the_old_inits_are_for_old_vms(
    name: str, kind: VmType, has_es: bool, errno: int, is_es: bool
) -> None:
    vm = make_vm(kind, KvmHost(make_psp(), has_es=has_es), 0, init=False)
    assert errno_of(vm, name) == (errno, 0) and vm.es == is_es


# errno of each command on: a plain VM, a SEV VM, an SNP VM, a mirror of a SEV-ES VM;
# 0 or EIO when it reaches the firmware
RULES = """
                    plain  sev    snp    mirror
LAUNCH_START        ENOTTY 0      EPERM  EINVAL
LAUNCH_UPDATE_DATA  ENOTTY EIO    EPERM  EINVAL
LAUNCH_UPDATE_VMSA  ENOTTY ENOTTY EPERM  0
LAUNCH_SECRET       ENOTTY EIO    EPERM  EINVAL
LAUNCH_MEASURE      ENOTTY EIO    EPERM  EINVAL
LAUNCH_FINISH       ENOTTY EIO    EPERM  EINVAL
GUEST_STATUS        ENOTTY 0      EPERM  0
DBG_DECRYPT         ENOTTY EIO    EPERM  0
DBG_ENCRYPT         ENOTTY EIO    EPERM  0
SEND_START          ENOTTY EIO    EPERM  EINVAL
SEND_UPDATE_DATA    ENOTTY EIO    EPERM  EINVAL
SEND_UPDATE_VMSA    EINVAL EINVAL EPERM  EINVAL
SEND_FINISH         ENOTTY EIO    EPERM  EINVAL
SEND_CANCEL         ENOTTY EIO    EPERM  EINVAL
RECEIVE_START       ENOTTY EINVAL EPERM  EINVAL
RECEIVE_UPDATE_DATA EINVAL EIO    EPERM  EINVAL
RECEIVE_UPDATE_VMSA EINVAL EINVAL EPERM  EINVAL
RECEIVE_FINISH      ENOTTY EIO    EPERM  EINVAL
CERT_EXPORT         EINVAL EINVAL EPERM  EINVAL
SNP_LAUNCH_START    ENOTTY ENOTTY EINVAL EINVAL
SNP_LAUNCH_UPDATE   EINVAL EINVAL EINVAL EINVAL
SNP_LAUNCH_FINISH   ENOTTY ENOTTY EINVAL EINVAL
FROBNICATE          EINVAL EINVAL EPERM  EINVAL
"""
_HEAD, *_ROWS = (line.split() for line in RULES.strip().splitlines())
CELLS = [(row[0], kind, cell) for row in _ROWS for kind, cell in zip(_HEAD, row[1:], strict=True)]
NUMBERS = {"0": 0, "EBUSY": EBUSY, "EINVAL": EINVAL, "EIO": EIO, "ENOTTY": ENOTTY, "EPERM": EPERM}


def test_that_the_table_of_rules_is_complete() -> None:
    assert {row[0] for row in _ROWS} == (set(KVM_COMMANDS) - {"INIT", "ES_INIT", "INIT2"}) | {
        "FROBNICATE"
    }


@pytest.mark.parametrize(("name", "kind", "cell"), CELLS)
def test_that_a_vm_may_or_may_not(name: str, kind: str, cell: str) -> None:
    match kind:
        case "mirror":
            source = make_vm()
            kvm_command(source, "LAUNCH_START", policy=4)
            vm = make_vm(source.type, source.host, 0, init=False)
            copy_context(vm, source)
            vm.vcpus = [KvmVcpu(0x30000)]
        case _:
            vm = make_vm(
                {"plain": VmType.DEFAULT, "sev": VmType.SEV, "snp": VmType.SNP}[kind],
                init=kind != "plain",
            )
    fields = {}
    if name not in ("LAUNCH_UPDATE_VMSA", "FROBNICATE") and not name.startswith("SNP"):
        fields = good_fields(vm.host.psp, name, vm.handle)
        del fields["handle"]
    assert errno_of(vm, name, **fields)[0] == NUMBERS[cell]


def test_that_a_host_without_sev_has_no_commands() -> None:
    host = KvmHost(make_psp(), has_sev=False)
    assert errno_of(make_vm(host=host, init=False), "INIT2") == (ENOTTY, 0)


def test_that_the_firmware_status_comes_with_eio() -> None:
    assert errno_of(launched(), "LAUNCH_FINISH") == (EIO, Status.INVALID_GUEST_STATE)


def test_that_a_second_start_leaves_no_guest_behind() -> None:
    vm = launched()
    first, count = vm.handle, len(vm.host.psp.guests)
    assert errno_of(vm, "LAUNCH_START", policy=4) == (EIO, Status.ASID_OWNED)
    assert (vm.handle, len(vm.host.psp.guests)) == (first, count)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("LAUNCH_UPDATE_DATA", {"size": 0}),
        ("LAUNCH_SECRET", {}),
        ("DBG_DECRYPT", {}),
        ("SEND_START", {}),
        ("SEND_UPDATE_DATA", {"spa": SPA + 16, "size": 4096}),
        ("RECEIVE_UPDATE_DATA", {"spa": SPA + 4080, "header": bytes(52), "data": bytes(32)}),
        ("RECEIVE_START", {"pdh": b"x"}),
        ("LAUNCH_UPDATE_VMSA", {}),
    ],
)
def test_that_kvm_refuses_before_it_asks_the_firmware(name: str, fields: dict[str, Any]) -> None:
    assert errno_of(launched(), name, **fields) == (EINVAL, 0)


@pytest.mark.parametrize(("kind", "errno"), [(VmType.SEV_ES, EINVAL), (VmType.SEV, 0)])
def test_that_a_protected_vcpus_registers_are_closed(kind: VmType, errno: int) -> None:
    vm = launched(kind)
    assert all(vcpu.protected == bool(errno) for vcpu in vm.vcpus)
    if errno:
        with pytest.raises(KvmError, match="GET_REGS: EINVAL"):
            check_register_access(vm, 1)
    else:
        check_register_access(vm, 1)


def test_that_asids_run_out_and_come_back() -> None:
    host = KvmHost(make_psp())
    vms = [launched(VmType.SEV_ES, host) for _ in range(7)]
    assert errno_of(make_vm(VmType.SEV_ES, host, 0, init=False), "INIT2") == (EBUSY, 0)
    vms[3].close()
    assert launched(VmType.SEV_ES, host).asid == 4 and make_vm(VmType.SEV, host).asid == 8


def test_that_a_moved_from_vm_is_dead_and_the_target_goes_on() -> None:
    source = launched()
    target = make_vm(source.type, source.host, init=False)
    move_context(target, source)
    assert errno_of(source, "GUEST_STATUS") == (EIO, 0)
    assert kvm_command(target, "GUEST_STATUS") == (4, 1, GuestState.RUNNING)
    assert kvm_command(target, "DBG_DECRYPT", spa=SPA, size=4096) == PLAIN
    assert target.vcpus[0].protected


@pytest.mark.parametrize("broken", ["vcpus", "vmsa", "type", "active", "plain", "itself"])
def test_that_a_migration_that_does_not_fit_is_refused(broken: str) -> None:
    host = KvmHost(make_psp())
    if broken in ("vmsa", "plain"):
        source = make_vm(host=host, init=broken == "vmsa")
    else:
        source = launched(host=host)
    kind = VmType.SEV if broken == "type" else VmType.SEV_ES
    nr_vcpus = 1 if broken == "vcpus" else 2
    target = make_vm(kind, host, nr_vcpus, init=broken == "active")
    with pytest.raises(KvmError, match="EINVAL"):
        move_context(source if broken == "itself" else target, source)
    assert not source.dead


@pytest.mark.parametrize("broken", ["vcpus", "active", "plain", "mirror", "snp", "itself"])
def test_that_a_mirror_that_does_not_fit_is_refused(broken: str) -> None:
    host = KvmHost(make_psp())
    source = make_vm(VmType.SNP if broken == "snp" else VmType.SEV_ES, host, init=broken != "plain")
    nr_vcpus = 1 if broken == "vcpus" else 0
    mirror = make_vm(VmType.SEV_ES, host, nr_vcpus, init=broken == "active")
    if broken == "mirror":
        copy_context(mirror, source)
        source, mirror = mirror, make_vm(VmType.SEV_ES, host, 0, init=False)
    with pytest.raises(KvmError, match="EINVAL"):
        copy_context(source if broken == "itself" else mirror, source)


def test_that_snp_launches_page_by_page() -> None:
    vm = make_vm(VmType.SNP)
    kvm_command(vm, "SNP_LAUNCH_START", policy=SNP_POLICY)
    kvm_command(vm, "SNP_LAUNCH_UPDATE", gpa=SPA, size=8192, type=1)
    kvm_command(vm, "SNP_LAUNCH_FINISH")
    assert vm.snp
    assert [(m.kind, m.gpa) for m in vm.snp.measured] == [
        (1, SPA),
        (1, SPA + 4096),
        (2, 0xFFFFFFFFF000),
        (2, 0xFFFFFFFFF000),
    ]
    assert all(vcpu.protected for vcpu in vm.vcpus) and vm.host.rmp.entry(vm.vcpus[0].vmsa_spa).vmsa
    assert errno_of(vm, "SNP_LAUNCH_UPDATE", gpa=0x9000, size=4096, type=1) == (
        EIO,
        Status.INVALID_GUEST_STATE,
    )
    assert not vm.host.rmp.entry(0x9000).assigned


@pytest.mark.parametrize(
    ("name", "fields", "errno"),
    [
        ("SNP_LAUNCH_START", {"policy": SNP_POLICY}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": 1, "size": 4096}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": 0, "size": 4095}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": 0, "size": 4096, "type": 2}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": 0, "size": 4096, "flags": 1}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": SPA - 4096, "size": 8192}, EIO),
        ("SNP_LAUNCH_FINISH", {"flags": 1}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": 1 << 30, "size": 4096}, EINVAL),
        ("SNP_LAUNCH_UPDATE", {"gpa": (1 << 18) - 4096, "size": 8192}, EINVAL),
    ],
)
def test_that_an_snp_launch_refuses_and_undoes(
    name: str, fields: dict[str, int], errno: int
) -> None:
    vm = make_vm(VmType.SNP)
    kvm_command(vm, "SNP_LAUNCH_START", policy=SNP_POLICY)
    kvm_command(vm, "SNP_LAUNCH_UPDATE", gpa=SPA, size=4096)
    assert errno_of(vm, name, **fields)[0] == errno
    assert set(vm.host.rmp.entries) == {SPA}


def test_that_a_deep_copy_of_a_vm_is_a_whole_machine() -> None:
    vm = make_vm(VmType.SNP)
    kvm_command(vm, "SNP_LAUNCH_START", policy=SNP_POLICY)
    twin = deepcopy(vm)
    kvm_command(twin, "SNP_LAUNCH_UPDATE", gpa=SPA, size=4096)
    assert twin.snp
    assert vm.snp
    assert twin.cipher is vm.cipher is not None
    assert any(twin.snp.digest)
    assert not any(vm.snp.digest)
    assert twin.snp.psp is twin.host.psp is not vm.host.psp
    assert twin.snp.rmp is twin.host.rmp
    assert not vm.host.rmp.entries


@pytest.mark.parametrize(
    "policy",
    [
        0,
        SnpPolicy.SMT,
        SnpPolicy.RESERVED_ONE,
        SNP_POLICY | SnpPolicy.SINGLE_SOCKET,
        SNP_POLICY | 1 << 21,
    ],
)
def test_that_kvm_reads_the_snp_policy_first(policy: int) -> None:
    vm = make_vm(VmType.SNP)
    assert errno_of(vm, "SNP_LAUNCH_START", policy=policy) == (EINVAL, 0) and vm.snp is None


CHECK = """#include <linux/kvm.h>
#include <linux/psp-sev.h>
#include <asm/svm.h>
#include <stdio.h>
#define SHOW(name) printf(#name " %lld\\n", (long long)(name));
int main(void) {{ {} return 0; }}
"""


@pytest.mark.skipif(
    not shutil.which("gcc"), reason="no gcc (Debian: apt-get install gcc libc6-dev)"
)
def test_that_the_numbers_are_those_of_the_kernels_headers(tmp_path: Path) -> None:
    header = Path("/usr/include/linux/psp-sev.h")
    if not header.is_file():
        lacking(f"no {header} (Debian: apt-get install linux-libc-dev)")
    other = {
        "HWERROR_PLATFORM": "HWSEV_RET_PLATFORM",
        "HWERROR_UNSAFE": "HWSEV_RET_UNSAFE",
        "PAGE_STATE": "PSC",
        "TERM": "TERM_REQUEST",
    }
    ours = {f"SEV_RET_{other.get(status.name, status.name)}": int(status) for status in Status}
    ours |= {f"KVM_SEV_{name}": rule.id for name, rule in KVM_COMMANDS.items()}
    ours |= {
        f"SVM_{'VMGEXIT' if code >> 31 else 'EXIT'}_{other.get(event.name, event.name)}": code
        for code, event in ghcb.EVENTS.items()
    }
    # This machine's kernel may be older
    known = set(re.findall(r"\b(?:SEV_RET|KVM_SEV|SVM_EXIT|SVM_VMGEXIT)_\w+", _headers()))
    names = sorted(ours.keys() & known)
    assert len(names) > 60 and len(known & {f"SEV_RET_{status.name}" for status in Status}) > 20
    source, program = tmp_path / "check.c", tmp_path / "check"
    source.write_text(CHECK.format(" ".join(f"SHOW({name})" for name in names)))
    subprocess.run(["gcc", "-o", program, source], check=True)
    shown = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert {name: int(value) for name, value in (line.split() for line in shown.splitlines())} == {
        name: ours[name] for name in names
    }


def _headers() -> str:
    headers = [f"-include{name}" for name in ("linux/kvm.h", "linux/psp-sev.h", "asm/svm.h")]
    command = ["gcc", "-E", "-dD", *headers, "-xc", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("SNP_LAUNCH_UPDATE", {"spa": 0x4000}, "no field spa, only gpa size type flags"),
        ("LAUNCH_UPDATE_VMSA", {"spa": 0}, "none at all"),
        ("SNP_LAUNCH_UPDATE", {"size": -4096}, "size takes 64 bits, not '-4096'"),
        ("LAUNCH_UPDATE_DATA", {"spa": None}, "spa takes 64 bits"),
        ("LAUNCH_SECRET", {"data": "x"}, "data takes bytes, not 'x'"),
        ("DBG_DECRYPT", {"size": "16"}, "size takes 64 bits"),
        ("LAUNCH_START", {"colour": 3}, "no such field"),
        ("LAUNCH_START", {"policy": 1 << 32}, "policy has 32 bits"),
    ],
)
def test_that_what_fits_into_no_struct_is_refused_before_anybody_is_asked(
    name: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidState, match=says):
        kvm_command(make_vm(VmType.SNP if name[:3] == "SNP" else VmType.SEV_ES), name, **fields)
