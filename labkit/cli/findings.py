"""What this machine has of all that the lab can use; for what is missing, why and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from labkit.arch import ARCHES
from labkit.errors import LabError
from labkit.sev import PROTECTIONS, SIMPLIFIED

__all__ = ["DEFAULT_ENGINE", "Finding", "examine"]

DEFAULT_ENGINE = "unicorn"
ENGINES = ("unicorn", "kvm", "qemu")  # all that are planned: one that is not here yet says so
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "firefox")
KVM = Path("/dev/kvm")
KVM_MODULES = {
    "kvm_intel": "Intel VMX",
    "kvm_amd": "AMD SVM",
    "kvm_pvm": "no VMX or SVM: guest code of ring 0 is emulated in software",
}
LINUX_SOURCE = Path("/usr/src/linux-source-6.12.tar.xz")  # where Debian's package puts it


@dataclass(frozen=True)
class Finding:
    """One thing looked for; `note` says where it is, or why it is not usable and what to do."""

    kind: str
    name: str
    ok: bool
    version: str = ""
    note: str = ""


def examine() -> Iterator[Finding]:
    """Look for everything, one kind after the other; never raises, what is missing is a finding."""
    yield _python()
    yield from _packages()
    yield from _engines()
    yield from _encryption()
    yield from _compilers()
    yield _kvm()
    yield _qemu()
    yield _browser()
    yield _linux_source()


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    note = sys.executable
    if not ok:
        note += ": 3.11 or newer is needed"
    return Finding("python", platform.python_implementation(), ok, platform.python_version(), note)


def _packages() -> Iterator[Finding]:
    """labkit itself, and what it requires; requirements behind a ";" belong to an extra."""
    try:
        required = metadata.requires("labkit") or []
    except metadata.PackageNotFoundError:
        note = "not installed: make setup, or pip install -e ."
        yield Finding("package", "labkit", False, "", note)
        return
    yield Finding("package", "labkit", True, metadata.version("labkit"))
    for line in required:
        match = re.match(r"[\w.-]+", line)
        if match and ";" not in line:
            yield _package(match[0], line)


def _package(name: str, requirement: str) -> Finding:
    version = _installed(name)
    if version:
        return Finding("package", name, True, version)
    return Finding("package", name, False, "", f"pip install '{requirement}'")


def _installed(package: str) -> str:
    """The version of an installed package, "" when it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _engines() -> Iterator[Finding]:
    """All engines, then what each of them can."""
    found = [list(_engine(name)) for name in ENGINES]
    for engine, *_ in found:
        yield engine
    for _, *capabilities in found:
        yield from capabilities


def _engine(name: str) -> Iterator[Finding]:
    """One engine, and what it can.

    Not guessed: the engine makes a VM with one vCPU, which is where it measures what it needs, or
    says why it cannot.
    """
    version = _installed(name)
    try:
        from labkit.arch.x86_cpu import CpuModel
        from labkit.engines import open_engine

        engine = open_engine(name, "x86_64", CpuModel())
        engine.create_vcpu(0, lambda kind, facts: None)
        engine.close()
    except (ImportError, OSError, LabError) as err:
        yield Finding("engine", name, False, version, str(err))
        return
    yield Finding("engine", name, True, version, "default" if name == DEFAULT_ENGINE else "")
    for capability in engine.capabilities:
        yield Finding(f"{name} can", capability.name, capability.have, "", capability.why)


def _encryption() -> Iterator[Finding]:
    """Which protections there are, and where the model is simpler than the machine."""
    for name, note in PROTECTIONS:
        yield Finding("protection", name, True, "", note)
    for name, note in SIMPLIFIED:
        yield Finding("simplified in encryption", name, False, "", note)


def _compilers() -> Iterator[Finding]:
    zig = _first_line(sys.executable, "-m", "ziglang", "version")
    note = f"default; guests of {', '.join(ARCHES)}" if zig else "pip install ziglang"
    yield Finding("compiler", "ziglang", bool(zig), _number(zig), note)
    for name in ("gcc", "clang"):
        yield _program("compiler", name, missing="not needed")


def _program(kind: str, name: str, missing: str) -> Finding:
    """A program of the machine; `missing` is the note when it is not there."""
    path = shutil.which(name)
    if not path:
        return Finding(kind, name, False, "", missing)
    says = _first_line(path, "--version")
    if not says:
        return Finding(kind, name, False, "", f"{path} --version does not run")
    return Finding(kind, name, True, _number(says), path)


def _first_line(*command: str) -> str:
    """What a program prints first; "" when it cannot be started, fails or takes ten seconds."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode != 0:
        return ""
    return done.stdout.strip().partition("\n")[0]


def _number(text: str) -> str:
    """The version number in a line, "" when there is none.

    It is the last one, because distributions put theirs before in parentheses.
    """
    without_parentheses = re.sub(r"\([^)]*\)", "", text)
    found: list[str] = re.findall(r"\d+\.\d+[\w.]*", without_parentheses)
    return found[-1] if found else ""


def _kvm() -> Finding:
    if not KVM.exists():
        note = "no such device: no KVM module loaded, or a container without it"
        return Finding("machine", str(KVM), False, "", note)
    if not os.access(KVM, os.R_OK | os.W_OK):
        note = "no permission: add yourself to the group kvm"
        return Finding("machine", str(KVM), False, "", note)
    loaded = [
        f"{name} ({what})"
        for name, what in KVM_MODULES.items()
        if Path("/sys/module", name).exists()
    ]
    note = ", ".join(loaded) or "readable and writable; module not known"
    return Finding("machine", str(KVM), True, "", note)


def _qemu() -> Finding:
    missing = "only to look into a VM that QEMU runs (Debian: qemu-system-x86)"
    return _program("machine", "qemu-system-x86_64", missing)


def _browser() -> Finding:
    """The first browser that runs."""
    for name in BROWSERS:
        finding = _program("browser", name, "")
        if finding.ok:
            return finding
    why = "only the browser tests need it; any browser shows the lab (Debian: chromium)"
    return Finding("browser", "chromium", False, "", why)


def _linux_source() -> Finding:
    if os.access(LINUX_SOURCE, os.R_OK):
        return Finding("kernel", "linux-source-6.12", True, "", str(LINUX_SOURCE))
    why = "only the tests with the kernel's own binaries need it (Debian: linux-source-6.12)"
    return Finding("kernel", "linux-source-6.12", False, "", why)
