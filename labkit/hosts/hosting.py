"""The host half of a kernel selftest, as far as one loop can play it: answer devices, expect ucalls, act between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from labkit.engines.base import Exit, HypercallExit, InternalErrorExit, MmioExit, PioExit
from labkit.errors import LabError, NotAvailable
from labkit.session.running import Came, can
from labkit.ucall.pool import Ucall

__all__ = [
    "Hosted",
    "Verdict",
    "clear_cpuid",
    "hole",
    "host",
    "play",
    "require",
    "survey",
    "value_at",
]

BUDGET, EXITS = (
    3_000_000,
    20_000,
)  # of a hosted guest between two ucalls: instructions (where counting costs nothing), and exits
ANSWERED = (
    PioExit | MmioExit | HypercallExit | InternalErrorExit
)  # exits that a host can do something about
Said = int | str


@dataclass(frozen=True)
class Hosted:
    """What the host of one guest function must do; every vCPU goes through all of it, one after the other."""

    binary: str
    entry: str = "guest_code"
    before: Callable[[Any], object] = lambda vm: None
    says: tuple[Said, ...] = (
        "DONE",
    )  # a number is a GUEST_SYNC of that stage, a name another ucall or exit; the last one ends it
    then: Mapping[int, Callable[[Any], object]] = field(
        default_factory=dict
    )  # place in says -> what is done to the vCPU behind it
    answer: Callable[[Any, Exit, dict[int, int]], object] | None = (
        None  # to exits not due; else ports read 0, holes what was written
    )
    create: Mapping[str, Any] = field(default_factory=dict)  # for Vm.create
    needs: tuple[str, ...] = ()  # capabilities of the engine


@dataclass(frozen=True)
class Verdict:
    """How a guest function did on an engine: "passes", "fails" or "cannot", and why."""

    binary: str
    function: str
    backend: str
    verdict: str
    why: str = ""


def play(hosted: Hosted, vm: Any) -> str:
    """Host a guest function to its end; returns "" or what was otherwise than the test's C half wants it.

    Raises NotAvailable when the engine refuses an instruction of the guest.
    """
    hosted.before(vm)
    for vcpu in vm.vcpus:
        ram: dict[int, int] = {}
        for place, due in enumerate(hosted.says):
            came = _next(hosted, vcpu, ram, due)
            said = _said(came)
            if isinstance(came, InternalErrorExit) and said != due:
                raise NotAvailable(vm.explain(came))
            if said != due:
                return f"vCPU {vcpu.index}: {_words(due)} was due, but {vm.explain(came)}"
            hosted.then.get(place, lambda vcpu: None)(vcpu)
    return ""


def _next(hosted: Hosted, vcpu: Any, ram: dict[int, int], due: Said) -> Came:
    counts = can(vcpu.vm, "deterministic")
    for _ in range(EXITS):
        came: Came = vcpu.run(BUDGET if counts else None)
        if isinstance(came, Ucall) or _said(came) == due or not isinstance(came, ANSWERED):
            return came
        if hosted.answer is not None:
            hosted.answer(vcpu, came, ram)
        elif isinstance(came, InternalErrorExit):
            return came
        elif isinstance(came, MmioExit) and came.is_write:
            ram[came.gpa] = came.data
        elif isinstance(came, MmioExit):
            vcpu.complete(ram.get(came.gpa, 0))
    return came


def _said(came: Came) -> Said:
    if isinstance(came, Ucall):
        return came.args[1] if came.cmd == "SYNC" else came.cmd
    return came.end


def _words(due: Said) -> str:
    return f"GUEST_SYNC({due:#x})" if isinstance(due, int) else due


def host(hosted: Hosted, program: Any, backend: str, create: Callable[..., Any]) -> Verdict:
    """Make a VM with `create` (Vm.create) and host a guest function in it; what the engine lacks is "cannot"."""
    verdict = ("passes", "")
    try:
        with create(
            program, hosted.entry, backend=backend, privilege="kernel", **hosted.create
        ) as vm:
            require(hosted, vm)
            if why := play(hosted, vm):
                verdict = "fails", why
    except NotAvailable as err:
        verdict = "cannot", str(err)
    except LabError as err:
        verdict = "fails", str(err)
    return Verdict(hosted.binary, hosted.entry, backend, *verdict)


def require(hosted: Hosted, vm: Any) -> None:
    """Raise NotAvailable, with the engine's reasons, where it lacks what a guest function needs."""
    lacks = [need + _reason(vm, need) for need in hosted.needs if not can(vm, need)]
    if lacks:
        raise NotAvailable(f"the engine lacks {'; '.join(lacks)}")


def _reason(vm: Any, name: str) -> str:
    return next(
        (f": {capability.why}" for capability in vm.capabilities if capability.name == name), ""
    )


def survey(
    folder: Path,
    backends: Sequence[str],
    load: Callable[[Path], Any],
    create: Callable[..., Any],
    known: Iterable[Hosted],
) -> Iterator[Verdict]:
    """A verdict for every guest function below a folder that is known, and for every ELF file without one or that cannot be read.

    Raises NotAvailable when it is no folder, or holds no ELF file.
    """
    if not folder.is_dir():
        raise NotAvailable(
            f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}", path=folder
        )
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_elf(path)]
    if not paths:
        raise NotAvailable(
            f"{folder}: no ELF file in it; build the kernel's tools/testing/selftests/kvm first",
            path=folder,
        )
    for path in paths:
        name, mine = (
            str(path.relative_to(folder)),
            [hosted for hosted in known if hosted.binary == path.name],
        )
        try:
            program = load(path)
        except LabError as err:
            yield Verdict(name, "", "", "cannot", str(err))
            continue
        guests = ", ".join(
            sorted(
                symbol
                for symbol in program.symbols
                if re.fullmatch(r"(?!memstress)\w*guest_(code|main)\w*", symbol)
            )
        )
        if not mine:
            why = (
                f"labkit knows no host half for {guests}"
                if guests
                else "no function is named guest_code or guest_main"
            )
            yield Verdict(name, "", "", "cannot", why)
        for hosted, backend in product(mine, backends):
            if hosted.entry not in program.symbols:
                yield Verdict(
                    name, hosted.entry, backend, "cannot", "this binary has no such function"
                )
            else:
                yield replace(host(hosted, program, backend, create), binary=name)


def _is_elf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError as err:
        raise NotAvailable(f"{path}: {err.strerror}", path=path) from err


def hole(vm: Any, gpa: int, gva: int | None = None) -> None:
    """Map a guest-physical page where no memslot is, identically unless told otherwise: accesses become MMIO exits."""
    vm.machine.space.map(gpa if gva is None else gva, gpa)


def value_at(vm: Any, gva: int, size: int) -> int:
    """A little-endian number in guest memory."""
    return int.from_bytes(vm.read(gva, size), "little")


def clear_cpuid(vm: Any, leaf: int, register: int, bit: int) -> None:
    """Take a feature out of the VM's CPUID (vcpu_clear_cpuid_feature); registers are 0 to 3 for EAX to EDX."""
    regs = list(vm.cpu.cpuid[leaf, 0])
    regs[register] &= ~(1 << bit)
    vm.cpu.cpuid[leaf, 0] = tuple(regs)
