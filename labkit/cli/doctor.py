"""`labkit doctor`: what this machine can do for the lab, and for what is missing, why and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from labkit.arch import ARCHES
from labkit.errors import LabError
from labkit.sev import PROTECTIONS, SIMPLIFIED

__all__ = ["DEFAULT_ENGINE", "Finding", "add", "examine"]

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


def add(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    about = "what this machine can do, and why not"
    parser: argparse.ArgumentParser = commands.add_parser("doctor", help=about, description=__doc__)
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    usable = False
    findings = examine()
    for kind, group in groupby(findings, key=lambda finding: finding.kind):
        rows = list(group)
        usable |= any(f.ok for f in rows if (f.kind, f.name) == ("engine", DEFAULT_ENGINE))
        print(
            "\n".join(json.dumps(asdict(f)) for f in rows) if args.json else _table(kind, rows),
            flush=True,
        )
    if not args.json:
        print(f"\nThe default engine, {DEFAULT_ENGINE}, is {'usable' if usable else 'NOT usable'}.")
    return 0 if usable else 1


def _table(kind: str, rows: list[Finding]) -> str:
    names, versions = (
        max(len(getattr(row, column)) for row in rows) for column in ("name", "version")
    )
    lines = (
        f"  {'yes' if r.ok else ' no'}  {r.name:<{names}}  {r.version:<{versions}}  {r.note}".rstrip()
        for r in rows
    )
    return "\n".join((kind, *lines))


def examine() -> Iterator[Finding]:
    """Look for everything, one kind after the other; never raises, what is missing is a finding."""
    yield _python()
    yield from _packages()
    engines = [list(_engine(name)) for name in ENGINES]
    yield from (found[0] for found in engines)
    yield from (can for found in engines for can in found[1:])
    yield from (Finding("protection", name, True, "", note) for name, note in PROTECTIONS)
    yield from (
        Finding("simplified in encryption", name, False, "", note) for name, note in SIMPLIFIED
    )
    yield from _compilers()
    yield _kvm()
    yield _program(
        "machine",
        "qemu-system-x86_64",
        missing="only to look into a VM that QEMU runs (Debian: qemu-system-x86)",
    )
    yield _browser()
    yield _linux_source()


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    note = sys.executable if ok else f"{sys.executable}: 3.11 or newer is needed"
    return Finding("python", platform.python_implementation(), ok, platform.python_version(), note)


def _packages() -> Iterator[Finding]:
    try:
        required = metadata.requires("labkit") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "package", "labkit", False, "", "not installed: make setup, or pip install -e ."
        )
        return
    yield Finding("package", "labkit", True, metadata.version("labkit"))
    for line in required:
        if ";" not in line and (
            match := re.match(r"[\w.-]+", line)
        ):  # those behind a ";" belong to an extra
            version = _installed(match[0])
            yield Finding(
                "package",
                match[0],
                bool(version),
                version,
                "" if version else f"pip install '{line}'",
            )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _engine(name: str) -> Iterator[Finding]:
    """Not guessed: the engine makes a VM with one vCPU, which is where it measures what it needs, or says why it cannot."""
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
    yield from (Finding(f"{name} can", c.name, c.have, "", c.why) for c in engine.capabilities)


def _compilers() -> Iterator[Finding]:
    zig = _first_line(sys.executable, "-m", "ziglang", "version")
    note = f"default; guests of {', '.join(ARCHES)}" if zig else "pip install ziglang"
    yield Finding("compiler", "ziglang", bool(zig), _number(zig), note)
    for name in ("gcc", "clang"):
        yield _program("compiler", name, missing="not needed")


def _program(kind: str, name: str, missing: str) -> Finding:
    path = shutil.which(name)
    says = _first_line(path, "--version") if path else ""
    if not path:
        return Finding(kind, name, False, "", missing)
    return Finding(
        kind, name, bool(says), _number(says), path if says else f"{path} --version does not run"
    )


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
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _number(text: str) -> str:
    """The version number in a line: the last one, because distributions put theirs before in parentheses."""
    found = re.findall(r"\d+\.\d+[\w.]*", re.sub(r"\([^)]*\)", "", text))
    return str(found[-1]) if found else ""


def _kvm() -> Finding:
    if not KVM.exists():
        return Finding(
            "machine",
            str(KVM),
            False,
            "",
            "no such device: no KVM module loaded, or a container without it",
        )
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Finding(
            "machine", str(KVM), False, "", "no permission: add yourself to the group kvm"
        )
    loaded = [
        f"{name} ({what})"
        for name, what in KVM_MODULES.items()
        if Path("/sys/module", name).exists()
    ]
    return Finding(
        "machine",
        str(KVM),
        True,
        "",
        ", ".join(loaded) or "readable and writable; module not known",
    )


def _browser() -> Finding:
    found = [finding for name in BROWSERS if (finding := _program("browser", name, "")).ok]
    why = "only the browser tests need it; any browser shows the lab (Debian: chromium)"
    return found[0] if found else Finding("browser", "chromium", False, "", why)


def _linux_source() -> Finding:
    ok = os.access(LINUX_SOURCE, os.R_OK)
    why = "only the tests with the kernel's own binaries need it (Debian: linux-source-6.12)"
    return Finding("kernel", "linux-source-6.12", ok, "", str(LINUX_SOURCE) if ok else why)
