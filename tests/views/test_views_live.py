"""Between a VM and its views: how often they paint, and what they mark as changed."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import views_sample as sample
from paths import REPO
from views_run import Run

import labkit as lk
from labkit.hosts.buttons import VmController
from labkit.views import dashboard
from labkit.views.live import Hub, Publisher
from labkit.views.show import View


class Clock:
    """A clock that stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def publisher(cost: float = 0.0, messages: int = 1) -> tuple[Publisher, Clock, list[float]]:
    """A publisher with a clock of its own and the times at which it painted."""
    clock, painted = Clock(), list[float]()

    def publish() -> int:
        painted.append(clock.now)
        clock.now += cost
        return messages

    return Publisher(publish, clock), clock, painted


# --- how often


@pytest.mark.parametrize("messages", [1, 5])
def test_that_at_most_thirty_messages_a_second_are_sent_and_the_last_change_is_painted(
    messages: int,
) -> None:
    made, clock, painted = publisher(messages=messages)
    for _ in range(20_000):
        clock.now += 0.0001
        made.poke()
    assert 2 * 30 / messages * 0.8 <= len(painted) <= 2 * 30 / messages + 1
    assert made.dirty
    made.flush()
    assert painted[-1] == clock.now
    assert not made.dirty


def test_that_slow_painting_leaves_the_guest_most_of_the_time() -> None:
    made, clock, painted = publisher(cost=0.05)
    for _ in range(20_000):
        clock.now += 0.0001
        made.poke()
    assert len(painted) * 0.05 < 0.2 * clock.now


def test_that_a_flush_with_nothing_new_paints_nothing() -> None:
    made, _, painted = publisher()
    made.flush()
    made.poke()
    made.flush()
    assert len(painted) == 1


def test_that_the_event_loop_paints_what_is_left() -> None:
    painted: list[int] = []
    made = Publisher(lambda: painted.append(1) or 1)  # type: ignore[func-returns-value]

    async def cell() -> None:
        for _ in range(100):
            made.poke()
        assert len(painted) == 1
        await asyncio.sleep(0.1)

    asyncio.run(cell())
    assert len(painted) == 2


# --- what


def nothing(messages: int, problem: str) -> None:
    """What paints nothing."""


def test_that_views_of_one_vm_share_one_snapshot_a_paint_and_say_how_many_they_are() -> None:
    run, shown = Run(), list[str]()
    hub = Hub(run)

    def painter(name: str) -> Callable[[int, str], None]:
        return lambda messages, problem: shown.append(f"{name} of {messages}{problem}")

    for name in "ab":
        hub.watch(painter(name), True)
    shown.clear()
    run.snapshots = 0
    hub.publisher._next = 0
    run.go()
    assert shown == ["a of 2", "b of 2"]
    assert run.snapshots == 1


def test_that_nobody_looking_costs_no_snapshot() -> None:
    run = Run()
    hub = Hub(run)
    hub.watch(nothing, True)
    hub.watch(nothing, False)
    run.snapshots = 0
    run.go()
    assert run.snapshots == 0


def test_that_changes_are_marked_against_the_last_settled_state() -> None:
    run = Run()
    hub = Hub(run)
    hub.watch(nothing, True)
    assert hub.before is None
    for _ in range(50):
        run.go()
    hub.settle()
    assert hub.shown.step == 1327
    assert hub.before is not None
    assert hub.before.step == 1277
    hub.settle()
    assert hub.before.step == 1277  # looking again, or choosing something, forgets nothing
    hub.act("step")
    assert hub.before.step == 1327


# --- whoever else looks


@pytest.fixture
def make() -> Iterator[Callable[[], lk.Vm]]:
    """Makes VMs of two vCPUs that take slots in turns, and closes them."""
    made = list[lk.Vm]()

    def one() -> lk.Vm:
        guest = REPO / "data" / "guests" / "two_vcpus.elf"
        made.append(lk.Vm.create(guest, nr_vcpus=2, schedule="round_robin:40"))
        return made[-1]

    yield one
    for vm in made:
        vm.close()


def drawn(hub: Hub) -> View:
    """What a view of the hub shows now."""
    return dashboard.render(hub.shown, hub.before)


def marks(view: View) -> tuple[list[str], str]:
    """What a view calls changed: the registers, and the pool's sentence (values differ by VM)."""
    rows = re.findall(r'class="chg"[^>]*><td class="nm">(\w+)', view.panes["registers"])
    (pool,) = re.findall(r'aria-label="(Pool: [^"]*)"', view.panes["pool"])
    return rows, pool


def watched(vm: lk.Vm) -> Hub:
    """A hub of its own that somebody looks at."""
    hub = Hub(VmController(vm))
    hub.watch(nothing, True)
    return hub


def look_at_all(vm: lk.Vm) -> None:
    """What a person may ask for in a cell."""
    vm.look()
    dashboard.bundle(vm.pool)
    dashboard.bundle(vm.page_table())
    for vcpu in vm.vcpus:
        dashboard.bundle(vcpu.look())


ACTIONS = ("run", "step", "step", "step_line", "run", "run", "step")


def test_that_looks_between_two_steps_change_no_mark(make: Callable[[], lk.Vm]) -> None:
    vm, twin = make(), make()
    hub, alone = watched(vm), watched(twin)
    for action in ACTIONS:
        look_at_all(vm)
        hub.act(action)
        look_at_all(vm)
        hub.refresh()  # as a second widget does when it is made
        alone.act(action)
        assert marks(drawn(hub)) == marks(drawn(alone))
        registers, pool = marks(drawn(hub))
        assert registers
        assert "changed since" in pool


def test_that_two_views_of_one_vm_mark_each_what_they_have_not_shown(
    make: Callable[[], lk.Vm],
) -> None:
    vm = make()
    one, other = watched(vm), watched(vm)
    start = vm.step
    one.act("run")
    middle = vm.step
    one.act("run")
    other.settle()
    assert one.shown.step == other.shown.step == vm.step
    assert one.before is not None
    assert one.before.step == middle
    assert other.before is not None
    assert other.before.step == start


def test_that_a_view_changes_nothing_that_a_person_asks_for(make: Callable[[], lk.Vm]) -> None:
    vm = make()
    hub = watched(vm)
    for action in ACTIONS:
        hub.act(action)
        assert vm.pool.changed_since is None
        assert not any(row.changed for row in vm.vcpus[0].look().registers)


def test_that_a_new_view_marks_nothing_whoever_looked_before(make: Callable[[], lk.Vm]) -> None:
    vm = make()
    for _ in range(3):
        look_at_all(vm)
        vm.run()
    view = drawn(Hub(VmController(vm)))
    registers, pool = marks(view)
    assert registers == []
    assert "changed" not in pool


def test_that_a_snapshot_that_somebody_compared_keeps_its_marks() -> None:
    marked = sample.vcpu().since(sample.vcpu(late=False))
    view = dashboard.render(sample.vm(vcpus=(marked,)))
    assert view.panes["registers"].count('class="chg"') == 2
    assert "2 changed since step" in view.panes["pool"]


def test_that_a_vcpu_nobody_looked_at_before_has_no_marks() -> None:
    unseen = replace(sample.vcpu(late=False), registers=())
    view = dashboard.render(sample.vm(vcpus=(sample.fresh_vcpu(),)), sample.vm(vcpus=(unseen,)))
    assert 'class="chg"' not in view.panes["registers"]


# --- what it costs


def test_that_drawing_loads_neither_widgets_nor_pandas() -> None:
    script = (
        "import sys, labkit.views.dashboard, labkit.views.live;"
        "print([m for m in ('anywidget', 'ipywidgets', 'pandas', 'IPython') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
