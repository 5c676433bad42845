"""`labkit run --backend unicorn,kvm`: the same guest on several engines, and whether they agree."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from labkit.cli.output import print_json, say
from labkit.cli.run import create_options
from labkit.cli.said import print_came

if TYPE_CHECKING:
    from labkit.explore.comparison import Comparison
    from labkit.guest.program import Program
    from labkit.lab import Vm
    from labkit.session.running import Came

__all__ = ["run_compared"]


def run_compared(args: argparse.Namespace, program: Program) -> int:
    """Run a guest on several engines; status 0 when they agree and every vCPU reached DONE.

    With --json it prints what each engine's guest said, one after the other, before the verdict.
    """
    import labkit

    backends = args.backend.split(",")
    options = create_options(args)
    options["privilege"] = options["privilege"] or "kernel"
    host = _Host(args.max_insns, nr_told=len(backends) if args.json else 0)
    found = labkit.compare(program, backends, args.entry, args.vcpus, host=host, **options)
    if args.json:
        print_json(_as_json(found))
    else:
        say(found.text)
    good = found.equal and set(found.ends) == {"done"}
    return 0 if good else 1


class _Host:
    """Plays the host of one VM after the other, and prints what comes from the first of them.

    A run after those of the engines only asks what the clock does: nobody is told of it.
    """

    def __init__(self, max_insns: int | None, nr_told: int) -> None:
        self.max_insns = max_insns
        self.nr_told = nr_told

    def __call__(self, vm: Vm) -> Came | None:
        """Run this VM to its end and return what came last."""
        from labkit.session.explain import ending
        from labkit.session.running import drive

        if self.nr_told == 0:
            return drive(vm, self.max_insns)
        self.nr_told -= 1
        last = drive(vm, self.max_insns, partial(print_came, as_json=True, backend=vm.backend))
        end, why = ending(vm, last)
        print_json({"backend": vm.backend, "end": end, "why": why, "insns": vm.step})
        return last


def _as_json(found: Comparison) -> dict[str, object]:
    """The verdict."""
    return {
        "end": "equal" if found.equal else "different",
        "ends": dict(zip(found.backends, found.ends, strict=True)),
        "differences": [asdict(difference) for difference in found.differences],
        "tolerated": found.causes,
    }
