"""A VM for the live views that only counts steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import views_sample as sample

from labkit.errors import InvalidState
from labkit.look.snapshots import VmSnapshot


class Run:
    """A VM that only counts steps: a Controller that remembers what it was asked for."""

    actions = frozenset({"step", "run", "select", "vcpu", "toggle_breakpoint"})

    def __init__(self) -> None:
        self.vm = sample.vm()
        self.log: list[tuple[str, dict[str, object]]] = []
        self.watchers: list[Callable[[], None]] = []
        self.snapshots = 0  # how many were taken

    def snapshot(self) -> VmSnapshot:
        """The VM now."""
        self.snapshots += 1
        return self.vm

    def act(self, name: str, **facts: object) -> None:
        """Remember it; step and run go on by a step, no symbol is known."""
        self.log.append((name, facts))
        if facts.get("kind") == "symbol":
            raise InvalidState("no such symbol: <b>")
        if name in ("step", "run"):
            self.go()

    def go(self, steps: int = 1) -> None:
        """Run, and tell everybody."""
        self.vm = replace(self.vm, step=self.vm.step + steps)
        for tell in self.watchers:
            tell()

    closed = False
    looking = nullcontext()

    def observe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back after every step."""
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    def when_done(self, tell: Callable[[str], None]) -> None:
        """Nothing takes long here."""
