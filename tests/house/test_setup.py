"""The set-up: what is declared is used; `make setup` works once, and says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from modules import TEST_MODULES, Module, check
from packaging.requirements import Requirement
from packaging.version import Version
from paths import REPO

import labkit

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
SCRIPTS = (".ci/run", "tests/kernel/build.sh")

# Imported names whose distribution is called otherwise, or comes with one that is declared.
COMES_WITH = {
    "elftools": "pyelftools",
    "traitlets": "ipywidgets",
    "IPython": "ipywidgets",
    "jupyter_core": "jupyterlab",
    "nbclient": "jupyterlab",
    "nbformat": "jupyterlab",
    "numba": None,
}


def test_that_the_version_is_one() -> None:
    assert labkit.__version__ == PROJECT["version"]


def test_that_environment_yml_asks_for_the_same() -> None:
    *conda, pip = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip["pip"] == [*PROJECT["dependencies"], "-e ."]


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=str)
def test_that_a_dependency_has_a_lower_bound_that_is_met(requirement: Requirement) -> None:
    assert [bound.operator for bound in requirement.specifier] == [">="]
    assert Version(metadata.version(requirement.name)) in requirement.specifier


def undeclared(module: Module) -> Iterator[str]:
    """Imports of what pyproject.toml does not ask for."""
    declared = {requirement.name for requirement in DEPENDENCIES}
    for name, line, _ in module.imports:
        top = name.partition(".")[0]
        if top == "labkit" or top in sys.stdlib_module_names:
            continue
        if top == "playwright" and module.room == "bench":
            continue  # it measures where the test extra is, and says so elsewhere
        if COMES_WITH.get(top, top) not in declared:
            yield f"{module.rel}:{line} imports {top}"


def test_that_every_import_is_declared() -> None:
    check(undeclared)


def test_that_every_dependency_of_the_tests_is_used() -> None:
    tests = [Requirement(line).name for line in PROJECT["optional-dependencies"]["test"]]
    used = {name.partition(".")[0] for module in TEST_MODULES for name, _, _ in module.imports}
    names = {"sev-snp-measure": "sevsnpmeasure"}  # what is imported is called otherwise
    assert not [name for name in tests if names.get(name, name) not in used]


def test_that_the_console_script_exists() -> None:
    module, _, function = PROJECT["scripts"]["labkit"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("script", SCRIPTS)
def test_that_a_script_is_executable_and_parses(script: str) -> None:
    assert os.access(REPO / script, os.X_OK)
    subprocess.run(["sh", "-n", REPO / script], check=True)


def make(where: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MAKE") and name != "PYTHON"
    }
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=where, env=env, capture_output=True, text=True
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory with the Makefile, whose .venv/bin/python writes down how it was called."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    python.chmod(0o755)
    return tmp_path


def installs(clone: Path) -> int:
    return (clone / "calls").read_text().count("pip install")


def test_that_set_up_does_its_work_once(clone: Path) -> None:
    assert make(clone, "setup").returncode == 0 and installs(clone) == 1
    again = make(clone, "setup")
    assert (again.returncode, again.stdout, installs(clone)) == (0, "", 1)


def test_that_a_changed_pyproject_is_installed(clone: Path) -> None:
    make(clone, "setup")
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert make(clone, "setup").returncode == 0 and installs(clone) == 2


def test_that_the_developers_set_up_covers_the_users(clone: Path) -> None:
    assert make(clone, "setup-dev").returncode == 0
    assert make(clone, "setup").returncode == 0 and installs(clone) == 1
    assert "--editable .[dev]" in (clone / "calls").read_text()


def test_that_a_moved_clone_is_installed_again(clone: Path) -> None:
    make(clone, "setup")
    moved = clone.rename(clone.with_name("moved"))
    (moved / ".venv/bin/python").write_text(f'#!/bin/sh\necho "$@" >>{moved}/calls\n')
    assert make(moved, "setup").returncode == 0 and installs(moved) == 2


def test_that_a_failed_install_is_tried_again(clone: Path) -> None:
    python = clone / ".venv/bin/python"
    good = python.read_text()
    python.write_text(good + 'case "$*" in *install*) exit 1;; esac\n')
    assert make(clone, "setup").returncode != 0
    python.write_text(good)
    assert make(clone, "setup").returncode == 0 and installs(clone) == 2


def test_that_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = make(tmp_path, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr and f"{old} (3.9)" in done.stderr
    assert not (tmp_path / ".venv").exists()


def build_selftests(**env: object) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run(
        [REPO / "tests/kernel/build.sh"], env=full, capture_output=True, text=True
    )


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the kernel's selftests are built on x86_64 only"
)
def test_that_a_missing_kernel_source_is_named(tmp_path: Path) -> None:
    done = build_selftests(
        LABKIT_LINUX_SOURCE=tmp_path / "none.tar.xz", LABKIT_SELFTESTS=tmp_path / "cache"
    )
    assert done.returncode == 3
    assert "none.tar.xz" in done.stderr and "linux-source-6.12" in done.stderr


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the kernel's selftests are built on x86_64 only"
)
def test_that_the_build_replaces_nothing_of_others(tmp_path: Path) -> None:
    tarball, other = tmp_path / "source.tar.xz", tmp_path / "other"
    tarball.write_bytes(b"not an archive")
    other.mkdir()
    (other / "precious").touch()
    assert build_selftests(LABKIT_LINUX_SOURCE=tarball, LABKIT_SELFTESTS=other).returncode == 1
    done = build_selftests(LABKIT_LINUX_SOURCE=tarball, LABKIT_SELFTESTS=tmp_path / "cache")
    # it names its log and leaves no half-built directory
    assert done.returncode == 1 and "cache.log" in done.stderr
    assert (other / "precious").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["guest_print_test", "x86_64/sev_smoke_test", "x86_64/xcr0_cpuid_test", "x86_64/kvm_pv_test"],
)
def test_that_the_kernels_own_binaries_are_there(selftests: Path, name: str) -> None:
    head = (selftests / name).read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    # ET_EXEC, EM_X86_64: fixed addresses
    assert head[16:20] == b"\x02\x00\x3e\x00"
    # beside it, where its line table says
    assert (selftests / f"{name}.c").exists()


def test_that_no_path_of_a_machine_is_written_down() -> None:
    home = re.compile(r"/(home|Users)/[a-z]\w*/|/root/")
    source = {".py", ".c", ".h", ".js", ".css", ".S", ".ld"}
    files = [path for path in (REPO / "labkit").rglob("*") if path.suffix in source]
    files += [REPO / name for name in ("Makefile", "pyproject.toml", *SCRIPTS)]
    assert not [str(path) for path in files if home.search(path.read_text())]
