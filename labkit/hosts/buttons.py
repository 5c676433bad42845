"""What a person does with a VM from its views: one step and one selection for all views of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from labkit.engines.exits import BudgetExit, StopExit
from labkit.errors import InvalidState
from labkit.hosts.worker import begin
from labkit.look.selection import select
from labkit.look.snapshots import Selection, VmSnapshot
from labkit.look.vm import Looking, look_at_vm
from labkit.session.running import RUNNABLE, Came, can, drive, runnable
from labkit.session.stepping import run_to
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm
from labkit.words import num

__all__ = ["VmController"]

# Instructions that one press of a button may take: a page must not wait for a guest that spins.
RUN_LIMIT = 20_000_000

LOOKS = frozenset({"select", "vcpu", "frame", "log_of"})  # actions that change nothing of the VM
WHILE_IT_RUNS = LOOKS | {"stop"}
STEADY = LOOKS | {"toggle_breakpoint"}
RUNNING = frozenset({"run", "step", "step_line", "next_line", "finish", "run_to", "end"})
TOGETHER = frozenset({"turn", "run_any"})  # of several vCPUs
RESTART = frozenset({"restart"})


class VmController:
    """One VM as the live views see it: the vCPU in front, the selection, and the buttons."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.front = 0
        self.frame = 0
        self.log_of: int | None = None
        self.chosen: tuple[str, int] | None = None
        self._done: list[Callable[[str], None]] = []
        self._moved = self._progress()  # as when the views last looked
        self._said = ""  # what came of the last button, where the VM itself does not say it

    @property
    def looking(self) -> AbstractContextManager[None]:
        """The VM stands still meanwhile, and nobody else changes it."""
        return self.vm.turn.looking

    @property
    def closed(self) -> bool:
        """Whether there is nothing to look at any longer."""
        return self.vm.closed

    @property
    def actions(self) -> frozenset[str]:
        """What can be done now; of a VM that runs for long already, to look on and to stop it."""
        if self.vm.closed:
            return frozenset()
        running = self.vm.running
        if running is not None and running.is_long:
            return WHILE_IT_RUNS
        if not self.vm.vcpus:
            return STEADY
        if self.vm.guest is not None and not self.vm.guest.launched:
            return STEADY
        offered = STEADY
        if self._vcpu.state in RUNNABLE:
            offered |= RUNNING
        elif not self._vcpu.sealed:
            offered |= RESTART
        if len(self.vm.vcpus) > 1 and any(vcpu.state in RUNNABLE for vcpu in self.vm.vcpus):
            offered |= TOGETHER | {"end"}
        return offered

    @property
    def _vcpu(self) -> Vcpu:
        if not self.vm.vcpus:
            raise InvalidState(f"{self.vm.name} has no vCPU")
        return self.vm.vcpus[self.front]

    def snapshot(self) -> VmSnapshot:
        """The VM now, with the vCPU in front and the selection."""
        with self.vm.turn.looking:
            self._follow()
            looking = Looking(self.front, self._selection(), self.frame, self.log_of)
            seen = look_at_vm(self.vm, looking)
        if self._said:
            seen = replace(seen, status=f"{self._said} {seen.status}")
        return seen

    def _follow(self) -> None:
        """Bring the vCPU to the front that moved last, and its innermost frame.

        Not while a guest runs: then the one that a person looks at stays there.
        """
        moved = self._progress()
        if moved == self._moved or self.vm.running is not None:
            return
        if len(moved) == len(self._moved):
            before = dict(self._moved)
            movers = [index for index, step in moved if before.get(index) != step]
            if self.vm.shifts.vcpu in movers:
                self.front = self.vm.shifts.vcpu
            elif movers:
                self.front = movers[-1]
        self._moved = moved
        self.frame = 0
        self._said = ""

    def _progress(self) -> tuple[tuple[int, int], ...]:
        """How far each vCPU is."""
        return tuple((vcpu.index, vcpu.step_count) for vcpu in self.vm.vcpus)

    def _selection(self) -> Selection | None:
        if self.chosen is None:
            return None
        kind, value = self.chosen
        vcpu = self.vm.vcpus[self.front] if self.vm.vcpus else None
        return select(self.vm, kind, value, vcpu)

    def act(self, name: str, **facts: Any) -> None:
        """Do it; raises InvalidState for what is no action, and whatever the VM raises.

        What takes longer than a moment goes on after the return, see `when_done`.
        The facts come from a browser: index of a vCPU or a frame; gva or line of a breakpoint or of
        a place to run to; kind and value of a selection.
        """
        if name in RUNNING | TOGETHER:
            begin(name, partial(self._run, name, facts), self._tell_done)
        elif name == "stop":
            self.vm.stop()
        elif name == "restart":
            self._vcpu.set_entry(self.vm.machine.entries[self.front])
        elif name == "vcpu":
            self._bring_to_front(facts["index"])
        elif name == "frame":
            self.frame = facts["index"]
        elif name == "log_of":
            self.log_of = facts["index"]
        elif name == "toggle_breakpoint":
            self._toggle(**facts)
        elif name == "select":
            self._choose(facts["kind"], facts["value"])
        else:
            raise InvalidState(f"there is no action {name!r}", name=name)

    def _run(self, name: str, facts: Mapping[str, Any]) -> None:
        """Run as a button says, on the worker's thread."""
        self._said = ""
        came = self._ran(name, facts)
        with self.vm.turn.looking:
            self._follow()  # now: what it would forget of the button before this one is gone
        if isinstance(came, BudgetExit):
            self._said = f"No ucall in {num(came.insns)} instructions: run on?"
        elif isinstance(came, StopExit):
            self._said = "Stopped."

    def _ran(self, name: str, facts: Mapping[str, Any]) -> Came | None:
        match name:
            case "step":
                return self._vcpu.step()
            case "step_line":
                return self._vcpu.step_line()
            case "next_line":
                return self._vcpu.next_line(RUN_LIMIT)
            case "finish":
                return self._vcpu.finish(self._limit())
            case "run_to":
                return self._run_to(**facts)
            case "run":
                return self._vcpu.run(self._limit())
            case "turn":
                return self._turn()
            case "run_any":
                return self.vm.run(self._limit())
            case _:
                return self._to_the_end()

    def _limit(self) -> int | None:
        """The budget of a run; None where counting makes it slow, and a deadline ends it."""
        return RUN_LIMIT if can(self.vm, "deterministic") else None

    def _turn(self) -> Came | None:
        """One turn of the schedule, to its end or to the next ucall."""
        if self.vm.schedule.kind == "parallel":
            return self.vm.run()
        _, quantum = self.vm.schedule.pick(runnable(self.vm.vcpus))
        came = self.vm.run(quantum or self._limit())
        is_whole_turn = quantum is not None and isinstance(came, BudgetExit)
        return None if is_whole_turn else came

    def _to_the_end(self) -> Came | None:
        """All vCPUs under the schedule, until all are done or one cannot go on."""
        with self.vm.turn.run("run_until_done"):  # one run, or a stop between two would be lost
            return drive(self.vm, self._limit())

    def _run_to(self, gva: int | None = None, line: int | None = None) -> Came | None:
        if gva is None and line is None:
            chosen = self._selection()
            gva = None if chosen is None else chosen.gva
        places = self._places(gva, line)
        with self.vm.turn.run("run_to"):
            return run_to(self._vcpu, places, self._limit())

    def when_done(self, tell: Callable[[str], None]) -> None:
        """Call tell(problem) when what a button began ends after its click has returned."""
        self._done.append(tell)

    def _tell_done(self, problem: str) -> None:
        for tell in list(self._done):
            tell(problem)

    def _bring_to_front(self, index: int) -> None:
        if not 0 <= index < len(self.vm.vcpus):
            raise InvalidState(f"there is no vCPU {index}")
        self.front = index

    def _toggle(self, gva: int | None = None, line: int | None = None) -> None:
        """A breakpoint on or off, at an address or at a line of the file in front."""
        vcpu = self._vcpu
        places = self._places(gva, line)
        if places <= vcpu.breakpoints:
            vcpu.set_breakpoints(vcpu.breakpoints - places)
        else:
            vcpu.set_breakpoints(vcpu.breakpoints | places)

    def _places(self, gva: int | None, line: int | None) -> frozenset[int]:
        """The gvas of a click in the source or in the disassembly; InvalidState for none."""
        if gva is not None:
            return frozenset({gva})
        if line is None:
            raise InvalidState("no address is selected")
        places = self._of_line(self._vcpu, line)
        if not places:
            raise InvalidState(f"no code at line {line}")
        return places

    def _of_line(self, vcpu: Vcpu, line: int) -> frozenset[int]:
        """The gvas of a line of the file in front; none without debug information."""
        trace = vcpu.backtrace()
        file = trace[min(self.frame, len(trace) - 1)].file
        if file is None or self.vm.program is None:
            return frozenset()
        return frozenset(self.vm.program.gva_of_line(file, line))

    def _choose(self, kind: str, value: Any) -> None:
        if kind == "none":
            self.chosen = None
        elif kind == "register":
            self.chosen = ("register", self._vcpu.regs[str(value)])
        elif kind == "symbol":
            self.chosen = ("gva", self.vm.gva_of(str(value)))
        else:
            self.chosen = (kind, int(value))

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back after every change of the VM, and now and then while its guest runs.

        Returns a function that ends it.
        """
        end_changes = self.vm.observe(callback)
        end_ticks = self.vm.turn.follow(callback)

        def end() -> None:
            end_changes()
            end_ticks()

        return end
