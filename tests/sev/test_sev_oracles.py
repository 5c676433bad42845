"""Witnesses that nobody here wrote.

They are `sev-snp-measure` for launch digests, libvirt's `virt-qemu-sev-validate` for measurements.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import struct
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import lacking
from hypothesis import given, settings
from hypothesis import strategies as st
from sev_sample import make_psp, status_of
from sevsnpmeasure import guest as oracle
from sevsnpmeasure.gctx import GCTX
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmsa import VMSA as OracleVmsa
from sevsnpmeasure.vmsa import SevEsSaveArea

from labkit.machine.memory import Memory
from labkit.sev import transport
from labkit.sev.kvm import kvm_command
from labkit.sev.kvm_host import KvmHost, KvmVcpu, KvmVm, VmType
from labkit.sev.policy import Policy, SnpPolicy
from labkit.sev.psp import Psp
from labkit.sev.snp import PageType, extend
from labkit.sev.vmsa import SNP_ACTIVE, VMSA, vmsa_page

FOUR_GB, AP_EIP, SIGNATURE = 1 << 32, 0x0080_B004, 0x0083_0F10
TOOL = Path("/usr/bin/virt-qemu-sev-validate")
_FOOTER, _RESET, _METADATA = (
    "96b582de-1fb2-45f7-baea-a366c55a082d",
    "00f771de-1a7e-4fcb-890e-68c77e2fb44e",
    "dc886566-984a-4798-a75e-5585a7bf67cc",
)
SECTIONS = (
    (0x800000, 0x9000, 1, PageType.ZERO),
    (0x80D000, 0x1000, 2, PageType.SECRETS),
    (0x80E000, 0x1000, 3, PageType.CPUID),
    (0x810000, 0x10000, 1, PageType.ZERO),
)  # gpa, bytes, OVMF's section type, and the page type it becomes


def firmware(seed: int, pages: int, ap_eip: int = AP_EIP) -> bytes:
    """A firmware image as OVMF ends.

    That is random code, SEV metadata, and the table of GUIDs 32 bytes before the end.
    """
    metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(SECTIONS), 1, len(SECTIONS))
    metadata += b"".join(struct.pack("<III", *section[:3]) for section in SECTIONS)
    entries = b"".join(
        data + struct.pack("<H", len(data) + 18) + uuid.UUID(name).bytes_le
        for name, data in (
            (_RESET, struct.pack("<I", ap_eip)),
            (_METADATA, struct.pack("<I", 512 + len(metadata))),
        )
    )
    entries += struct.pack("<H", len(entries) + 18) + uuid.UUID(_FOOTER).bytes_le
    image = bytearray(random.Random(seed).randbytes(4096 * pages))
    image[-512 - len(metadata) : -512] = metadata
    image[-32 - len(entries) : -32] = entries
    return bytes(image)


def reset_vmsa(eip: int, features: int = 0) -> bytes:
    """The save area of a vCPU as QEMU resets it, built from labkit's register names."""
    regs = {
        "efer": 0x1000,
        "cr4": 0x40,
        "cr0": 0x10,
        "dr7": 0x400,
        "dr6": 0xFFFF0FF0,
        "rflags": 2,
        "rip": eip & 0xFFFF,
        "rdx": SIGNATURE,
        "g_pat": 0x0007_0406_0007_0406,
        "sev_features": features,
        "xcr0": 1,
        "mxcsr": 0x1F80,
        "x87_fcw": 0x37F,
        "cs": 0xF000,
        "gdt_limit": 0xFFFF,
        "idt_limit": 0xFFFF,
    }
    data = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (0, 0xFFFF, 0x9300))
    code = {
        "cs": (eip & 0xFFFF0000, 0xFFFF, 0x9B00),
        "ldtr": (0, 0xFFFF, 0x8200),
        "tr": (0, 0xFFFF, 0x8B00),
    }
    return vmsa_page(regs, data | code)


def platform(image: bytes, nr_vcpus: int, features: int = 0) -> tuple[Psp, list[int]]:
    """A secure processor whose memory holds the image at 0x100000 and the VMSAs behind it."""
    psp = make_psp()
    memory = Memory()
    memory.add(0, 0x1000000)
    psp.memory = memory
    memory.write(0x100000, image)
    spas = [0x100000 + len(image) + 4096 * i for i in range(nr_vcpus)]
    for i, spa in enumerate(spas):
        memory.write(spa, reset_vmsa(AP_EIP if i else 0xFFFFFFF0, features))
    return psp, spas


def test_that_the_save_area_is_the_oracles() -> None:
    theirs = OracleVmsa(SevMode.SEV_SNP, AP_EIP, SIGNATURE, SNP_ACTIVE)
    assert [reset_vmsa(eip, SNP_ACTIVE) for eip in (0xFFFFFFF0, AP_EIP)] == list(theirs.pages(2))
    fields = {name: getattr(SevEsSaveArea, name) for name, *_ in SevEsSaveArea._fields_}  # type: ignore[misc]
    assert len(fields.keys() & VMSA.fields.keys()) > 75
    assert all(
        (fields[name].offset, fields[name].size) == VMSA.fields[name]
        for name in fields.keys() & VMSA.fields.keys()
    )


@pytest.mark.parametrize("pages", [1, 2, 33])
@pytest.mark.parametrize(
    ("mode", "policy", "nr_vcpus"),
    [
        (SevMode.SEV, 0, 0),
        (SevMode.SEV_ES, Policy.ES, 1),
        (SevMode.SEV_ES, Policy.ES, 4),
    ],
)
def test_that_a_launch_digest_is_the_oracles(
    tmp_path: Path, pages: int, mode: SevMode, policy: int, nr_vcpus: int
) -> None:
    path, image = tmp_path / "OVMF.fd", firmware(pages, pages)
    path.write_bytes(image)
    psp, spas = platform(image, nr_vcpus)
    handle = psp.command("LAUNCH_START", policy=policy)
    psp.command("ACTIVATE", handle=handle, asid=psp.asids(bool(policy))[0])
    psp.command("LAUNCH_UPDATE_DATA", handle=handle, spa=0x100000, size=len(image))
    for spa in spas:
        psp.command("LAUNCH_UPDATE_VMSA", handle=handle, spa=spa, size=4096)
    assert psp.guests[handle].digest == oracle.calc_launch_digest(
        mode, nr_vcpus, SIGNATURE, str(path), "", "", "", 0
    )


@pytest.mark.parametrize(("pages", "nr_vcpus"), [(1, 1), (3, 4), (40, 2)])
def test_that_an_snp_launch_digest_is_the_oracles(
    tmp_path: Path, pages: int, nr_vcpus: int
) -> None:
    path, image = tmp_path / "OVMF.fd", firmware(pages, pages)
    path.write_bytes(image)
    psp, spas = platform(image, nr_vcpus, SNP_ACTIVE)
    psp.memory.write(0x80E000, bytes(4096))  # the CPUID page
    vm = KvmVm(
        KvmHost(psp),
        VmType.SNP,
        spa=lambda gpa: gpa - (FOUR_GB - len(image)) + 0x100000 if gpa > 1 << 31 else gpa,
    )
    kvm_command(vm, "INIT2")
    vm.vcpus = [KvmVcpu(spa) for spa in spas]
    kvm_command(vm, "SNP_LAUNCH_START", policy=SnpPolicy.SMT | SnpPolicy.RESERVED_ONE)
    kvm_command(vm, "SNP_LAUNCH_UPDATE", gpa=FOUR_GB - len(image), size=len(image))
    for gpa, size, _, kind in SECTIONS:
        kvm_command(vm, "SNP_LAUNCH_UPDATE", gpa=gpa, size=size, type=kind)
    kvm_command(vm, "SNP_LAUNCH_FINISH")
    assert vm.snp
    assert vm.snp.digest == oracle.calc_launch_digest(
        SevMode.SEV_SNP, nr_vcpus, SIGNATURE, str(path), "", "", "", SNP_ACTIVE
    )


pages_of_a_launch = st.lists(
    st.tuples(st.sampled_from(PageType), st.integers(0, (1 << 40) - 1), st.integers(0, 255)),
    max_size=12,
)


@settings(deadline=None)
@given(pages_of_a_launch)
def test_that_any_sequence_of_pages_chains_as_the_oracles(
    sequence: list[tuple[PageType, int, int]],
) -> None:
    digest, theirs = bytes(48), GCTX()
    add = {
        PageType.ZERO: theirs.update_zero_pages,
        PageType.UNMEASURED: theirs.update_unmeasured_pages,
    }
    for kind, gfn, fill in sequence:
        page, gpa = bytes([fill]) * 4096, gfn << 12
        digest = extend(digest, kind, GCTX.VMSA_GPA if kind is PageType.VMSA else gpa, page)
        if kind in add:
            add[kind](gpa, 4096)
        elif kind is PageType.NORMAL:
            theirs.update_normal_pages(gpa, page)
        elif kind is PageType.VMSA:
            theirs.update_vmsa_page(page)
        else:
            (theirs.update_secrets_page if kind is PageType.SECRETS else theirs.update_cpuid_page)(
                gpa
            )
    assert digest == theirs.ld()


class Owner:
    """A guest owner with libvirt's tool and the files it wants."""

    def __init__(self, directory: Path, policy: int, nr_vcpus: int) -> None:
        self.directory, self.policy, self.nr_vcpus = directory, policy, nr_vcpus
        self.keys = transport.TransportKeys(
            random.Random(1).randbytes(16), random.Random(2).randbytes(16)
        )
        self.image = firmware(5, 4)
        self.psp, spas = platform(self.image, nr_vcpus)
        own = transport.private_key(b"owner")
        session = transport.make_session(own, self.psp.pdh, self.keys, policy, bytes(32))
        self.handle = self.psp.command(
            "LAUNCH_START", policy=policy, pdh=transport.public_bytes(own), session=session
        )
        self.psp.command(
            "ACTIVATE", handle=self.handle, asid=self.psp.asids(bool(policy & Policy.ES))[0]
        )
        self.psp.command(
            "LAUNCH_UPDATE_DATA", handle=self.handle, spa=0x100000, size=len(self.image)
        )
        for spa in spas:
            self.psp.command("LAUNCH_UPDATE_VMSA", handle=self.handle, spa=spa, size=4096)
        self.measure = self.psp.command("LAUNCH_MEASURE", handle=self.handle, size=48)
        for name, data in {
            "tk": self.keys.tek + self.keys.tik,
            "fd": self.image,
            "vmsa0": reset_vmsa(0xFFFFFFF0),
            "vmsa1": reset_vmsa(AP_EIP),
            "secret": b"a key for the disk",
        }.items():
            (directory / name).write_bytes(data)

    def validate(self, *more: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        """Run the tool on the measurement; `changes` replace its options."""
        options = {
            "measurement": base64.b64encode(self.measure).decode(),
            "api-major": self.psp.api[0],
            "api-minor": self.psp.api[1],
            "build-id": self.psp.build,
            "policy": self.policy,
            "firmware": "fd",
            "tk": "tk",
        }
        if self.policy & Policy.ES:
            options |= {"num-cpus": self.nr_vcpus, "vmsa-cpu0": "vmsa0", "vmsa-cpu1": "vmsa1"}
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        command = [
            "/usr/bin/python3",
            str(TOOL),
            *(f"--{name}={value}" for name, value in options.items()),
            *more,
        ]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        return subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=60
        )


@pytest.fixture(
    params=[
        (0, 0),
        (Policy.NODBG | Policy.NOSEND, 0),
        (0x01000000 | Policy.ES, 1),
        (Policy.ES | Policy.NODBG, 3),
    ],
    ids=["sev", "nodbg", "es", "es-3"],
)
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Owner:
    if not TOOL.is_file() or not shutil.which("/usr/bin/python3"):
        packages = "libvirt-clients-qemu python3-lxml python3-cryptography"
        lacking(f"no {TOOL} (Debian: apt-get install {packages})")
    made = Owner(tmp_path, *request.param)
    probe = subprocess.run(
        ["/usr/bin/python3", "-c", "import lxml.etree, libvirt, cryptography"],
        capture_output=True,
        text=True,
        env={},
    )
    if probe.returncode:
        lacking(f"/usr/bin/python3: {probe.stderr.splitlines()[-1]}")
    return made


def test_that_libvirt_accepts_the_measurement(owner: Owner) -> None:
    done = owner.validate()
    assert (done.returncode, done.stdout) == (0, "OK: Looks good to me\n"), done.stderr


@pytest.mark.parametrize("wrong", ["policy", "measurement", "nonce", "firmware", "build"])
def test_that_libvirt_rejects_another_launch(owner: Owner, wrong: str) -> None:
    flip = {"measurement": 0, "nonce": 47}.get(wrong, -1)
    blob = bytes(byte ^ (i == flip) for i, byte in enumerate(owner.measure))
    (owner.directory / "other").write_bytes(owner.image[:-1] + bytes([owner.image[-1] ^ 1]))
    changes = {
        "policy": {"policy": owner.policy ^ 1},
        "firmware": {"firmware": "other"},
        "build": {"build_id": 23},
    }
    done = owner.validate(**changes.get(wrong, {"measurement": base64.b64encode(blob).decode()}))
    assert done.returncode and "Measurement does not match, VM is not trustworthy" in done.stderr


def test_that_a_secret_packed_by_libvirt_arrives(owner: Owner) -> None:
    guid = "736869e5-84f0-4973-92ec-06879ce3da0b"
    done = owner.validate(
        f"--inject-secret={guid}:secret", secret_header="header", secret_payload="payload"
    )
    assert not done.returncode, done.stderr
    header, data = (
        base64.b64decode((owner.directory / name).read_text()) for name in ("header", "payload")
    )
    fields = {"handle": owner.handle, "spa": 0x8000, "header": header}
    assert (
        status_of(owner.psp, "LAUNCH_SECRET", data=data[:-1] + bytes([data[-1] ^ 1]), **fields)
        == 0x0B
    )
    owner.psp.command("LAUNCH_SECRET", data=data, **fields)
    inside = owner.psp.decrypt_guest(owner.psp.guests[owner.handle], 0x8000, len(data))
    assert b"a key for the disk" in inside and uuid.UUID(guid).bytes_le in inside
