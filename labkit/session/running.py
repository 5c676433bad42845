"""Running guests to an end: one after the other, all under a schedule, with every ucall on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from labkit.engines.base import BudgetExit, DebugExit, Exit, HypercallExit
from labkit.errors import (
    BudgetExceeded,
    GuestAssertFailed,
    GuestCrashed,
    InvalidState,
    NotAvailable,
)
from labkit.machine.schedule import Schedule
from labkit.session.arrivals import arrived
from labkit.ucall.pool import BadUcallExit, Ucall

__all__ = ["RUNNABLE", "collect", "goes_on", "run_on", "run_scheduled", "runnable", "stream"]

RUNNABLE = ("not started", "running")
Came = Ucall | Exit


def runnable(vcpus: Sequence[Any]) -> list[int]:
    """The vCPUs that can go on; raises InvalidState when none can."""
    found = [v.index for v in vcpus if v.state in RUNNABLE]
    if not found:
        raise InvalidState(
            f"no vCPU can run: {', '.join(f'vCPU {v.index} {v.state}' for v in vcpus) or 'there is none'}"
        )
    return found


def run_scheduled(vcpus: Sequence[Any], schedule: Schedule, max_insns: int | None) -> Came:
    """Run until the next ucall or exit of any vCPU; BudgetExit after max_insns instructions in all."""
    left = max_insns
    while True:
        index, quantum = schedule.pick(runnable(vcpus))
        vcpu, before = vcpus[index], vcpus[index].step_count
        limits = [n for n in (quantum, left) if n is not None]
        came: Came = vcpu.run(min(limits) if limits else None)
        ran = vcpu.step_count - before
        schedule.ran(ran)
        left = None if left is None else left - ran
        if not isinstance(came, BudgetExit):
            return came
        if left is not None and left <= 0:
            return BudgetExit(max_insns or 0)


def run_on(vm: Any, max_insns: int | None) -> Came:
    """Run a VM under its schedule until the next ucall or exit of any vCPU."""
    if vm.schedule.kind != "parallel":
        return run_scheduled(vm.vcpus, vm.schedule, max_insns)
    if max_insns is not None:
        raise NotAvailable(
            'schedule "parallel": instructions of vCPUs that run at once are not counted, so there is no max_insns'
        )
    index, exit = vm.machine.run_parallel(runnable(vm.vcpus))
    return arrived(vm, vm.vcpus[index], exit)


def goes_on(came: Came) -> bool:
    """Whether a guest can be expected to go on after this: a ucall that ends it, a crash and a used-up pool say no."""
    match came:
        case Ucall(cmd=cmd):
            return cmd not in ("ABORT", "UNHANDLED")
        case BadUcallExit(kind=kind):
            return kind not in (
                "exhausted",
                "unreadable",
            )  # the others are reported, nothing was read through them
        case _:
            return isinstance(came, HypercallExit)


def stream(
    run: Callable[[int | None], Came],
    done: Callable[[], bool],
    clock: Callable[[], int],
    max_insns: int | None,
) -> Iterator[Came]:
    """Every ucall and exit until done, until one that a guest does not survive, or until the budget is used up."""
    start = clock()
    while not done():
        came = run(None if max_insns is None else max(0, max_insns - (clock() - start)))
        yield (
            came if max_insns is None or not isinstance(came, BudgetExit) else BudgetExit(max_insns)
        )  # not what was left of it
        if not goes_on(came):
            return


def collect(coming: Iterator[Came], explain: Callable[[Came], str]) -> list[Ucall]:
    """The ucalls of a stream that ends well; raises GuestAssertFailed, BudgetExceeded, GuestCrashed, or InvalidState at a breakpoint."""
    ucalls: list[Ucall] = []
    for came in coming:
        if isinstance(came, Ucall):
            ucalls.append(came)
        if goes_on(came):
            continue
        match came:
            case Ucall(cmd="ABORT"):
                raise GuestAssertFailed(
                    explain(came),
                    vcpu=came.vcpu,
                    ucall=came,
                    file=came.file,
                    line=came.line,
                    expr=came.expr,
                    ucalls=ucalls,
                )
            case Ucall():
                raise GuestCrashed(
                    explain(came), vcpu=came.vcpu, ucall=came, exit=None, ucalls=ucalls
                )
            case BudgetExit():
                raise BudgetExceeded(explain(came), insns=came.insns, ucalls=ucalls)
            case DebugExit():
                raise InvalidState(
                    f"a breakpoint, not the end: {explain(came)}; run() goes on from here",
                    exit=came,
                    ucalls=ucalls,
                )
            case _:
                raise GuestCrashed(explain(came), exit=came, ucalls=ucalls)
    return ucalls
