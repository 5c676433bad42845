"""Running guests to an end: alone or under a schedule, with every ucall on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from labkit.engines.exits import BudgetExit, DebugExit, Exit, HypercallExit, StopExit
from labkit.errors import (
    BudgetExceeded,
    GuestAssertFailed,
    GuestCrashed,
    InvalidState,
    NotAvailable,
    Stopped,
)
from labkit.machine.schedule import Schedule
from labkit.session.arrivals import arrived
from labkit.ucall.calls import BadUcallExit, Ucall

if TYPE_CHECKING:
    from labkit.session.vcpu import Vcpu
    from labkit.session.vm import Vm

__all__ = [
    "RUNNABLE",
    "Came",
    "can",
    "collect",
    "drive",
    "goes_on",
    "run_on",
    "run_scheduled",
    "runnable",
    "stream",
    "stream_of",
]

Came = Ucall | Exit
"""What comes back from a run."""

RUNNABLE = ("not started", "running")
LONG = 20_000_000  # instructions of a guest to which nobody gave a budget


def can(vm: Vm, name: str) -> bool:
    """Whether the VM's engine declares the capability of that name."""
    return any(capability.name == name and capability.have for capability in vm.capabilities)


def runnable(vcpus: Sequence[Vcpu]) -> list[int]:
    """The indices of the vCPUs that can go on; raises InvalidState when none can."""
    found = [vcpu.index for vcpu in vcpus if vcpu.state in RUNNABLE]
    if not found:
        states = ", ".join(f"vCPU {vcpu.index} {vcpu.state}" for vcpu in vcpus)
        raise InvalidState(f"no vCPU can run: {states or 'there is none'}")
    return found


def run_scheduled(vcpus: Sequence[Vcpu], schedule: Schedule, max_insns: int | None) -> Came:
    """Run until the next ucall or exit of any vCPU; BudgetExit after max_insns in all."""
    left = max_insns
    while True:
        index, quantum = schedule.pick(runnable(vcpus))
        vcpu = vcpus[index]
        before = vcpu.cpu.insns

        try:
            came = vcpu.run(_smaller(quantum, left))
        finally:  # Ctrl-C ends a turn that goes on where it was
            ran = vcpu.cpu.insns - before
            schedule.ran(ran)
        if not isinstance(came, BudgetExit):
            return came

        if left is not None:
            left -= ran
            if left <= 0:
                return BudgetExit(max_insns or 0)


def _smaller(quantum: int | None, left: int | None) -> int | None:
    """The smaller of two numbers of instructions, where None is without end."""
    if quantum is None:
        return left
    if left is None:
        return quantum
    return min(quantum, left)


def run_on(vm: Vm, max_insns: int | None) -> Came:
    """Run a VM under its schedule until the next ucall or exit of any vCPU."""
    if vm.schedule.kind != "parallel":
        return run_scheduled(vm.vcpus, vm.schedule, max_insns)
    if max_insns is not None:
        raise NotAvailable(
            'schedule "parallel": instructions of vCPUs that run at once are not counted, '
            "so there is no max_insns"
        )
    index, exit = vm.machine.run_parallel(runnable(vm.vcpus))
    return arrived(vm, vm.vcpus[index], exit)


def goes_on(came: Came) -> bool:
    """Whether a guest can be expected to go on after this.

    A ucall that ends it, a crash and a used-up pool say no; a bad value that nothing was read
    through is reported, and the guest goes on.
    """
    match came:
        case Ucall(cmd=cmd):
            return cmd not in ("ABORT", "UNHANDLED")
        case BadUcallExit(kind=kind):
            return kind not in ("exhausted", "unreadable")
        case _:
            return isinstance(came, HypercallExit)


def stream(
    run: Callable[[int | None], Came],
    done: Callable[[], bool],
    clock: Callable[[], int],
    max_insns: int | None,
) -> Iterator[Came]:
    """Every ucall and exit until done, one that a guest does not survive, or the budget's end.

    The BudgetExit that ends it names the whole budget, not what was left of it at the last run.
    """
    start = clock()
    while not done():
        if max_insns is None:
            came = run(None)
        else:
            came = run(max(0, max_insns - (clock() - start)))
            if isinstance(came, BudgetExit):
                came = BudgetExit(max_insns)
        yield came
        if not goes_on(came):
            return


def stream_of(vm: Vm, max_insns: int | None) -> Iterator[Came]:
    """What `vm.stream` gives: all vCPUs under the schedule."""

    def run_once(left: int | None) -> Came:
        with vm.turn.run("stream"):
            return run_on(vm, left)

    def all_done() -> bool:
        return all(vcpu.state == "done" for vcpu in vm.vcpus)

    try:
        yield from stream(run_once, all_done, lambda: vm.step, max_insns)
    finally:
        vm.machine.pause()


def drive(
    vm: Vm, max_insns: int | None = None, tell: Callable[[Came], object] | None = None
) -> Came | None:
    """Run a VM to its end, telling of each ucall and exit; returns what came last.

    Without max_insns a guest may use LONG instructions on an engine that counts them for nothing
    (capability "deterministic"), and elsewhere as long as the engine lets it.
    """
    if max_insns is None and can(vm, "deterministic"):
        max_insns = LONG
    last = None
    for last in vm.stream(max_insns):
        if tell is not None:
            tell(last)
    return last


def collect(coming: Iterator[Came], explain: Callable[[Came], str]) -> list[Ucall]:
    """The ucalls of a stream that ends well.

    Raises GuestAssertFailed, BudgetExceeded, GuestCrashed, or InvalidState at a breakpoint; each
    has the ucalls so far as its fact `ucalls`.
    """
    ucalls: list[Ucall] = []
    for came in coming:
        if isinstance(came, Ucall):
            ucalls.append(came)
        if not goes_on(came):
            _refuse(came, explain(came), ucalls)
    return ucalls


def _refuse(came: Came, why: str, ucalls: list[Ucall]) -> NoReturn:
    """Raise the error that belongs to an end that is no good one."""
    match came:
        case Ucall(cmd="ABORT"):
            raise GuestAssertFailed(
                why,
                vcpu=came.vcpu,
                ucall=came,
                file=came.file,
                line=came.line,
                expr=came.expr,
                ucalls=ucalls,
            )
        case Ucall():
            raise GuestCrashed(why, vcpu=came.vcpu, ucall=came, exit=None, ucalls=ucalls)
        case BudgetExit():
            raise BudgetExceeded(why, insns=came.insns, ucalls=ucalls)
        case StopExit():
            raise Stopped(f"{why}; run() goes on from here", ucalls=ucalls)
        case DebugExit():
            raise InvalidState(
                f"a breakpoint, not the end: {why}; run() goes on from here",
                exit=came,
                ucalls=ucalls,
            )
        case _:
            raise GuestCrashed(why, exit=came, ucalls=ucalls)
