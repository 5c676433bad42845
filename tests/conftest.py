"""Fixtures for what a machine may lack: the kernel's own binaries, /dev/kvm, a browser.

What is missing is a visible skip. With CI=true (which .ci/run sets after installing everything) a
missing browser or kernel source fails instead; /dev/kvm depends on the machine and always skips.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

REPO = Path(__file__).resolve().parents[1]
BUILD_SELFTESTS = REPO / "tests" / "kernel" / "build.sh"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    # a test that needs the outside fails
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


def lacking(reason: str) -> NoReturn:
    """Skip the test with the reason; fail it in CI, where everything was installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI this must be there: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's top directory."""
    return REPO


@pytest.fixture(scope="session")
def selftests() -> Path:
    """The directory of the kernel's KVM selftests, built when they are not.

    `guest_print_test`, `x86_64/sev_smoke_test`, ...
    """
    return _built()


def _built(*arguments: str) -> Path:
    """What build.sh says it built; a test is skipped when the kernel's source is not here."""
    done = subprocess.run(
        [BUILD_SELFTESTS, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode == 3:
        lacking(done.stderr.strip())
    if done.returncode:
        pytest.fail(done.stderr, pytrace=False)
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session", params=["arm64", "riscv", "s390"])
def cross_selftests(request: pytest.FixtureRequest) -> Path:
    """The directory of guest_print_test, cross built for another architecture."""
    return _built(request.param)


@cache
def _program(path: Path) -> Any:
    import labkit as lk

    return lk.Program.load(path)


class KernelHost:
    """Makes VMs from the kernel's selftest binaries and closes them when the test is over."""

    def __init__(self, selftests: Path) -> None:
        self.selftests = selftests
        self.vms: list[Any] = []

    def __call__(self, name: str, entry: str = "guest_code", **options: Any) -> Any:
        """A VM that will run one of a binary's guest functions; options are those of Vm.create."""
        import labkit as lk

        path = self.selftests / name
        if not path.is_file():
            path = self.selftests / "x86_64" / name
        return self.keep(lk.Vm.create(_program(path), entry, **options))

    def ready(self, name: str, entry: str = "guest_code", **options: Any) -> Any:
        """The same, after what labkit's own table of hosted guests does before it runs."""
        from labkit.hosts.selftests import HOSTED

        [hosted] = [hosted for hosted in HOSTED if (hosted.binary, hosted.entry) == (name, entry)]
        vm = self(name, entry, **hosted.create, **options)
        hosted.before(vm)
        return vm

    def keep(self, vm: Any) -> Any:
        """Close this VM too."""
        self.vms.append(vm)
        return vm


@pytest.fixture
def host(selftests: Path) -> Iterator[KernelHost]:
    """host("guest_print_test", entry, ...) makes a VM from a kernel selftest."""
    host = KernelHost(selftests)
    yield host
    for vm in host.vms:
        vm.close()


@pytest.fixture(scope="session")
def kvm() -> Path:
    """/dev/kvm, usable."""
    path = Path("/dev/kvm")
    if not os.access(path, os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not here, or not readable and writable by this user")
    return path


@pytest.fixture(scope="module")
def native() -> Iterator[Any]:
    """A child process to step instructions in, with the areas of a bare guest."""
    from guests import CODE, DATA, STACKS
    from native import SIZE, Native

    try:
        child = Native((CODE, SIZE), (DATA, SIZE), (STACKS, SIZE))
    except OSError as error:
        pytest.skip(f"no native single steps here: {error}")
    yield child
    child.close()


@pytest.fixture(params=["unicorn", pytest.param("kvm", marks=pytest.mark.kvm)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every engine in turn: what a test says of one, it says of all."""
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    return str(request.param)


@pytest.fixture(
    params=[
        "unicorn",
        pytest.param("kvm kernel", marks=pytest.mark.kvm),
        pytest.param("kvm user", marks=pytest.mark.kvm),
    ]
)
def engine(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every engine in every ring in turn, as options of Vm.create."""
    backend, _, privilege = request.param.partition(" ")
    if backend == "kvm":
        request.getfixturevalue("kvm")
    return {"backend": backend, "privilege": privilege or "kernel"}


@pytest.fixture
def guest(backend: str) -> Iterator[Any]:
    """guests.bare on every engine in turn; its VMs are closed."""
    from guests import bare

    vms = []

    def make(*args: Any, **options: Any) -> Any:
        vms.append(bare(*args, backend=backend, **options))
        return vms[-1]

    yield make
    for vm in vms:
        vm.close()


# Not longer than a module: while it lives, Playwright's event loop is in the way of others.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium (a Playwright Browser) that reaches 127.0.0.1 and nothing else."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        lacking("no Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found[0], headless=True, args=list(BROWSER_FLAGS)
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page in a fresh profile; a script error on it fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors, "script errors on the page: " + "; ".join(errors)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, so that `-m "not browser"` needs no care."""
    marks = {
        "selftests": pytest.mark.kernel,
        "kvm": pytest.mark.kvm,
        "browser": pytest.mark.browser,
        "page": pytest.mark.browser,
    }
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in marks:
                item.add_marker(marks[fixture])
