"""The host half of one guest function of a kernel selftest, as far as one loop can play it.

Answer devices, expect ucalls, act between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from labkit.engines.exits import Exit, HypercallExit, InternalErrorExit, MmioExit, PioExit
from labkit.errors import LabError, NotAvailable
from labkit.guest.program import Program
from labkit.session.running import Came, can
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm
from labkit.ucall.calls import Ucall

__all__ = ["Act", "Answer", "Hosted", "Prepare", "Said", "Verdict", "host", "play", "require"]

# Of a hosted guest between two ucalls: instructions (where counting costs nothing), and exits.
BUDGET = 3_000_000
EXITS = 20_000

# Exits that a host can do something about.
ANSWERED = PioExit | MmioExit | HypercallExit | InternalErrorExit

Said = int | str
"""What a guest says: the stage of a GUEST_SYNC, or the name of another ucall or exit."""

Prepare = Callable[[Vm], object]
"""What is done to a VM before its guest runs."""

Act = Callable[[Vcpu], object]
"""What is done to a vCPU after it said something."""

Answer = Callable[[Vcpu, Exit, dict[int, int]], object]
"""What is done about an exit; the dict is the vCPU's own, for what must be remembered."""


def _nothing(vm: Vm) -> None:
    """What most guests need before they run."""


@dataclass(frozen=True)
class Hosted:
    """What the host of one guest function must do.

    Every vCPU goes through all of it, one after the other.

    binary and entry: the selftest, and the function in it.
    before: what is done to the VM first.
    says: what is due from the guest, in order; the last one ends it.
    then: place in says -> what is done to the vCPU after it.
    answer: what is done about exits that are not due; without it ports read 0, and pages without
    memory read what was last written there.
    create: for `Vm.create`.
    needs: capabilities of the engine.
    """

    binary: str
    entry: str = "guest_code"
    before: Prepare = _nothing
    says: tuple[Said, ...] = ("DONE",)
    then: Mapping[int, Act] = field(default_factory=dict)
    answer: Answer | None = None
    create: Mapping[str, int] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How a guest function did on an engine: "passes", "fails" or "cannot", and why."""

    binary: str
    function: str
    backend: str
    verdict: str
    why: str = ""


def host(
    hosted: Hosted, program: Program, backend: str, create: Callable[..., Vm] = Vm.create
) -> Verdict:
    """Make a VM and host a guest function in it; what the engine lacks is "cannot"."""
    word, why = _outcome(hosted, program, backend, create)
    return Verdict(hosted.binary, hosted.entry, backend, word, why)


def _outcome(
    hosted: Hosted, program: Program, backend: str, create: Callable[..., Vm]
) -> tuple[str, str]:
    """The verdict in a word, and why."""
    where = {"backend": backend, "privilege": "kernel"}
    try:
        with create(program, hosted.entry, **where, **hosted.create) as vm:
            require(hosted, vm)
            why = play(hosted, vm)
    except NotAvailable as err:
        return "cannot", str(err)
    except LabError as err:
        return "fails", str(err)
    return ("fails", why) if why else ("passes", "")


def require(hosted: Hosted, vm: Vm) -> None:
    """Raise NotAvailable, with the engine's reasons, where it lacks what a guest function needs."""
    lacks = [need + _reason(vm, need) for need in hosted.needs if not can(vm, need)]
    if lacks:
        raise NotAvailable(f"the engine lacks {'; '.join(lacks)}")


def _reason(vm: Vm, name: str) -> str:
    """The reason that the engine gives with a capability, for the end of a sentence."""
    for capability in vm.capabilities:
        if capability.name == name:
            return f": {capability.why}"
    return ""


def play(hosted: Hosted, vm: Vm) -> str:
    """Host a guest function to its end.

    Returns "", or what was otherwise than the test's C half wants it. Raises NotAvailable when the
    engine refuses an instruction of the guest.
    """
    hosted.before(vm)
    for vcpu in vm.vcpus:
        remembered: dict[int, int] = {}
        for place, due in enumerate(hosted.says):
            came = _next(hosted, vcpu, remembered, due)
            said = _said(came)
            if said != due and isinstance(came, InternalErrorExit):
                raise NotAvailable(vm.explain(came))
            if said != due:
                return f"vCPU {vcpu.index}: {_words(due)} was due, but {vm.explain(came)}"
            if place in hosted.then:
                hosted.then[place](vcpu)
    return ""


def _next(hosted: Hosted, vcpu: Vcpu, remembered: dict[int, int], due: Said) -> Came:
    """What comes next that is due, or that no host can answer."""
    budget = BUDGET if can(vcpu.vm, "deterministic") else None
    for _ in range(EXITS):
        came: Came = vcpu.run(budget)
        if not isinstance(came, ANSWERED) or _said(came) == due:
            return came
        if hosted.answer is not None:
            hosted.answer(vcpu, came, remembered)
        elif isinstance(came, InternalErrorExit):
            return came
        else:
            _answer_as_memory(vcpu, came, remembered)
    return came


def _answer_as_memory(vcpu: Vcpu, came: Exit, remembered: dict[int, int]) -> None:
    """Let a page without memory read what was last written there; ports read 0 as it is."""
    if isinstance(came, MmioExit) and came.is_write:
        remembered[came.gpa] = came.data
    elif isinstance(came, MmioExit):
        vcpu.complete(remembered.get(came.gpa, 0))


def _said(came: Came) -> Said:
    if not isinstance(came, Ucall):
        return came.end
    return came.args[1] if came.cmd == "SYNC" else came.cmd


def _words(due: Said) -> str:
    return f"GUEST_SYNC({due:#x})" if isinstance(due, int) else due
