"""One guest on several engines, and everything that can be seen of it held side by side.

Event logs first, then ends, registers, memory and page tables; each difference has a name, and each
that is tolerated has a cause.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

from labkit.errors import InvalidState
from labkit.explore.align import Aligned, align, first
from labkit.explore.comparison import Comparison, Difference, Row
from labkit.explore.differences import Timed, differences, what_follows_the_clock
from labkit.explore.sides import AnyVm, Side, engine_names, look_back
from labkit.machine.memory import PAGE
from labkit.session.events import Happened
from labkit.session.running import Came

__all__ = ["compare"]

# The clock of a run that asks what follows it: IA32_TSC, where a vCPU has one that can be moved.
TSC, TSC_OFFSET, OTHER_TIME = "msr_0x10", "tsc_offset", 1 << 40


def compare(
    makers: Sequence[Callable[[], AnyVm]], drive: Callable[[AnyVm], Came | None]
) -> Comparison:
    """Make all VMs, run and look at one after the other, then compare every one with the first.

    `drive(vm)` plays the host until the guest's end and returns what came last; a LabError that it
    raises is an end too. Where something differs and the first engine is deterministic, it runs
    once more with its TSC elsewhere: what that alone changes follows the clock. (The clocks of
    other architectures than x86-64 cannot be set.) Raises InvalidState for less than two engines,
    and what the makers raise.
    """
    if len(makers) < 2:
        raise InvalidState(f"a comparison takes at least two engines, not {len(makers)}")

    with ExitStack() as stack:
        vms = [stack.enter_context(closing(make())) for make in makers]
        sides = [look_back(vm, drive) for vm in vms]
        rows = align([side.log for side in sides])
        found = tuple(differences(sides, rows, Timed()))

        is_equal = all(difference.cause for difference in found)
        if not is_equal and _can_run_at_another_time(sides[0]):
            again = stack.enter_context(closing(makers[0]()))
            for vcpu in again.vcpus:
                vcpu.cpu.set_regs({TSC: OTHER_TIME})
            timed = what_follows_the_clock(sides[0], look_back(again, drive))
            found = tuple(differences(sides, rows, timed))
    return _comparison(sides, rows, found)


def _can_run_at_another_time(side: Side) -> bool:
    """Whether this run would be the same again, and its clock can be set."""
    return "deterministic" in side.can and all(TSC_OFFSET in regs for regs in side.regs)


def _comparison(
    sides: Sequence[Side], rows: Sequence[Aligned], found: tuple[Difference, ...]
) -> Comparison:
    of_row = defaultdict[int | None, list[Difference]](list)
    for difference in found:
        of_row[difference.row].append(difference)
    return Comparison(
        name=sides[0].name,
        backends=engine_names(sides),
        ends=tuple(side.end for side in sides),
        whys=tuple(side.why for side in sides),
        rows=tuple(_row(row, of_row[number]) for number, row in enumerate(rows)),
        found=found,
        compared=_sizes(sides[0], len(rows)),
    )


def _row(events: Aligned, found: Sequence[Difference]) -> Row:
    event = first(events)
    causes = {difference.cause for difference in found}
    return Row(
        vcpu=event.vcpu,
        kind=event.kind,
        steps=tuple(None if one is None else one.step for one in events),
        whats=tuple(_words(one) for one in events),
        equal="" not in causes,
        why="; ".join(sorted(causes - {""})),
    )


def _words(event: Happened | None) -> str | None:
    return None if event is None else f"{event.kind} {event.what}"


def _sizes(side: Side, nr_events: int) -> Mapping[str, int]:
    """How much of each kind there was to compare."""
    return {
        "events": nr_events,
        "registers": sum(len(regs) for regs in side.regs),
        "pages": sum(len(slot.data) for slot in side.slots) // PAGE,
        "page tables": len(side.tables),
    }
