"""The structures and numbers of labkit/engines/kvm/abi.py against <linux/kvm.h>, by a C program that prints them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from conftest import lacking

from labkit.engines.kvm.abi import CAPS, CONSTANTS, EXITS, IOCTLS, MEMBERS, STRUCTS
from labkit.guest.compilers import find_compiler

HEADER = Path("/usr/include/linux/kvm.h")
OURS = {"kvm_vcpu_events": {"raw"}, "kvm_run": {"padding"}}  # members that are one lump with us


def lines() -> dict[str, int]:
    """What C must print, by expression."""
    wanted: dict[str, int] = {}
    for name, kind in STRUCTS.items():
        if (
            name != "kvm_run"
        ):  # KVM_GET_VCPU_MMAP_SIZE says how long that is; behind what we use there is padding
            wanted[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for member, _ in kind._fields_:
            if member not in OURS.get(name, ()) and not member.startswith("pad"):
                place = {"kvm_guest_debug": {"debugreg": "arch.debugreg"}}.get(name, {}).get(
                    member, member
                )
                wanted[f"offsetof(struct {name}, {place})"] = getattr(kind, member).offset
    union = STRUCTS["kvm_run"].padding.offset
    for name, kind in MEMBERS.items():
        for member, _ in kind._fields_:
            if not member.startswith("pad"):
                place = f"arch.{member}" if name == "debug" else member
                wanted[f"offsetof(struct kvm_run, {name}.{place})"] = (
                    union + getattr(kind, member).offset
                )
    return wanted | IOCTLS | EXITS | CAPS | CONSTANTS


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The same, as the header has it."""
    if not HEADER.exists():
        lacking(f"no {HEADER} (Debian: apt-get install linux-libc-dev)")
    work = tmp_path_factory.mktemp("abi")
    prints = "\n".join(f'printf("%llu\\n", (unsigned long long)({what}));' for what in lines())
    includes = "".join(f"#include <{name}.h>\n" for name in ("linux/kvm", "stddef", "stdio"))
    (work / "abi.c").write_text(f"{includes}int main(void) {{ {prints} return 0; }}\n")
    built = subprocess.run(
        [
            *find_compiler().command,
            "-w",
            "-isystem",
            "/usr/include",
            "-isystem",
            "/usr/include/x86_64-linux-gnu",
            work / "abi.c",
            "-o",
            work / "abi",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([work / "abi"], capture_output=True, text=True, check=True)
    return dict(zip(lines(), map(int, done.stdout.split()), strict=True))


def test_that_every_size_offset_and_number_is_the_header_s(header: dict[str, int]) -> None:
    assert {
        what: (ours, header[what]) for what, ours in lines().items() if ours != header[what]
    } == {}


@pytest.mark.parametrize("name", STRUCTS)
def test_that_no_structure_has_a_hole_that_ctypes_filled(name: str) -> None:
    kind, end = STRUCTS[name], 0
    for member, _ in kind._fields_:
        field = getattr(kind, member)
        assert field.offset == end, (
            f"{name}.{member} lies at {field.offset}, what is before ends at {end}"
        )
        end = field.offset + field.size
    assert ctypes.sizeof(kind) == end or name in ("kvm_run", "kvm_dirty_log")
