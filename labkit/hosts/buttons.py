"""What a person does with a VM from its views: run, step, select, set breakpoints; one step and one selection for all views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labkit.errors import InvalidState
from labkit.look.snapshots import Selection, VmSnapshot
from labkit.look.vcpu import select
from labkit.look.vm import look_at_vm
from labkit.session.running import RUNNABLE

__all__ = ["VmController"]

RUN_LIMIT = 20_000_000  # instructions that one press of a button may take: a page must not hang on a guest that spins


class VmController:
    """One VM as the live views see it."""

    def __init__(self, vm: Any) -> None:
        self.vm = vm
        self.front = 0
        self.chosen: tuple[str, int] | None = None

    @property
    def actions(self) -> frozenset[str]:
        """What can be done now."""
        steady = {"select", "vcpu", "toggle_breakpoint"}
        if (
            self.vm.vcpus
            and self._vcpu.state in RUNNABLE
            and (self.vm.guest is None or self.vm.guest.launched)
        ):
            return frozenset(steady | {"run", "step", "step_line"})
        return frozenset(steady)

    @property
    def _vcpu(self) -> Any:
        if not self.vm.vcpus:
            raise InvalidState(f"{self.vm.name} has no vCPU")
        return self.vm.vcpus[self.front]

    def snapshot(self) -> VmSnapshot:
        """The VM now, with the vCPU in front and the selection."""
        return look_at_vm(self.vm, self.front, self._selection())

    def _selection(self) -> Selection | None:
        if self.chosen is None:
            return None
        kind, value = self.chosen
        return select(self.vm, kind, value)

    def act(self, name: str, **facts: Any) -> None:
        """Do it; raises InvalidState for what is no action, and whatever the VM raises."""
        if name == "run":
            self._vcpu.run(RUN_LIMIT)
        elif name in ("step", "step_line"):
            getattr(self._vcpu, name)()
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
        places: frozenset[int] = frozenset() if gva is None else frozenset({gva})
        if line is not None:
            here = vcpu.source_line()
            places = (
                frozenset(self.vm.program.gva_of_line(here.file, line))
                if here is not None
                else places
            )
        if not places:
            raise InvalidState(f"no code at line {line}")
        vcpu.set_breakpoints(
            vcpu.breakpoints - places if places <= vcpu.breakpoints else vcpu.breakpoints | places
        )

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
        """Call back after every change of the VM; returns a function that ends it."""
        end: Callable[[], None] = self.vm.observe(callback)
        return end
