"""What a person does with a VM from its views: one step and one selection for all views of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labkit.errors import InvalidState
from labkit.look.selection import select
from labkit.look.snapshots import Selection, VmSnapshot
from labkit.look.vm import look_at_vm
from labkit.session.running import RUNNABLE
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm

__all__ = ["VmController"]

# Instructions that one press of a button may take: a page must not hang on a guest that spins.
RUN_LIMIT = 20_000_000

WHILE_IT_RUNS = frozenset({"select", "vcpu", "stop"})
STEADY = frozenset({"select", "vcpu", "toggle_breakpoint"})  # actions that can be done at any time
RUNNING = frozenset({"run", "step", "step_line"})


class VmController:
    """One VM as the live views see it: the vCPU in front, the selection, and the buttons."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.front = 0
        self.chosen: tuple[str, int] | None = None

    @property
    def actions(self) -> frozenset[str]:
        """What can be done now; of a VM that runs for long already, to look on and to stop it."""
        running = self.vm.running
        if running is not None and running.is_long:
            return WHILE_IT_RUNS
        if not self.vm.vcpus or self._vcpu.state not in RUNNABLE:
            return STEADY
        if self.vm.guest is not None and not self.vm.guest.launched:
            return STEADY
        return STEADY | RUNNING

    @property
    def _vcpu(self) -> Vcpu:
        if not self.vm.vcpus:
            raise InvalidState(f"{self.vm.name} has no vCPU")
        return self.vm.vcpus[self.front]

    def snapshot(self) -> VmSnapshot:
        """The VM now, with the vCPU in front and the selection."""
        with self.vm.turn.looking:
            return look_at_vm(self.vm, self.front, self._selection())

    def _selection(self) -> Selection | None:
        if self.chosen is None:
            return None
        kind, value = self.chosen
        return select(self.vm, kind, value)

    def act(self, name: str, **facts: Any) -> None:
        """Do it; raises InvalidState for what is no action, and whatever the VM raises.

        The facts come from a browser: index of a vCPU; gva or line of a breakpoint; kind and value
        of a selection.
        """
        if name == "stop":
            self.vm.stop()
        elif name == "run":
            self._vcpu.run(RUN_LIMIT)
        elif name == "step":
            self._vcpu.step()
        elif name == "step_line":
            self._vcpu.step_line()
        elif name == "vcpu":
            self._bring_to_front(facts["index"])
        elif name == "toggle_breakpoint":
            self._toggle(**facts)
        elif name == "select":
            self._choose(facts["kind"], facts["value"])
        else:
            raise InvalidState(f"there is no action {name!r}", name=name)

    def _bring_to_front(self, index: int) -> None:
        if not 0 <= index < len(self.vm.vcpus):
            raise InvalidState(f"there is no vCPU {index}")
        self.front = index

    def _toggle(self, gva: int | None = None, line: int | None = None) -> None:
        """A breakpoint on or off, at an address or at a line of the file in front."""
        vcpu = self._vcpu
        places: frozenset[int] = frozenset()
        if line is not None:
            places = self._of_line(vcpu, line)
        elif gva is not None:
            places = frozenset({gva})
        if not places:
            raise InvalidState(f"no code at line {line}")
        if places <= vcpu.breakpoints:
            vcpu.set_breakpoints(vcpu.breakpoints - places)
        else:
            vcpu.set_breakpoints(vcpu.breakpoints | places)

    def _of_line(self, vcpu: Vcpu, line: int) -> frozenset[int]:
        """The gvas of a line of the file in front; none without debug information."""
        here = vcpu.source_line()
        if here is None or self.vm.program is None:
            return frozenset()
        return frozenset(self.vm.program.gva_of_line(here.file, line))

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
