"""How long each pool slot was held, by whom: the rows under the lanes of a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from labkit.look.snapshots import Hold
from labkit.session.vm import Vm
from labkit.ucall.calls import Ucall
from labkit.ucall.history import AGAIN, PoolEvent

__all__ = ["look_at_holds"]

NEWEST = 5000  # events of the pool that are looked at


def look_at_holds(vm: Vm) -> tuple[Hold, ...]:
    """The stays of slots in the pool's newest events, by their beginning; () without a pool."""
    if vm.host_pool is None:
        return ()
    history = vm.host_pool.history
    newest = list(islice(reversed(history), NEWEST))
    return tuple(sorted(_holds(reversed(newest)), key=lambda hold: (hold.start, hold.slot)))


def _holds(events: Iterable[PoolEvent]) -> Iterable[Hold]:
    """What was taken and given back, then what is still held."""
    open_since: dict[int, tuple[int, int]] = {}  # slot -> (vCPU, step)
    for event in events:
        if isinstance(event, Ucall):
            continue
        step, vcpu, slot, what = event
        taken = open_since.pop(slot, None)
        if taken is not None:
            yield Hold(slot, taken[0], taken[1], step)
        if what in ("taken", AGAIN):
            open_since[slot] = (vcpu, step)
    for slot, (vcpu, step) in open_since.items():
        yield Hold(slot, vcpu, step, None)
