"""Who runs next: schedules by name, the same every time."""

from __future__ import annotations

import pytest

import labkit as lk
from labkit.machine.schedule import DEFAULT_QUANTUM, Schedule


def turns(schedule: Schedule, runnable: list[int], count: int) -> list[tuple[int, int | None]]:
    """The next turns, each used up to its end."""
    taken = []
    for _ in range(count):
        index, insns = schedule.pick(runnable)
        taken.append((index, insns))
        schedule.ran(insns or 0)
    return taken


def test_that_round_robin_gives_every_vcpu_its_quantum_in_turn():
    assert turns(Schedule.named("round_robin:7"), [0, 1, 2], 4) == [(0, 7), (1, 7), (2, 7), (0, 7)]
    assert turns(Schedule.named("round_robin"), [1, 4], 3) == [
        (1, DEFAULT_QUANTUM),
        (4, DEFAULT_QUANTUM),
        (1, DEFAULT_QUANTUM),
    ]


def test_that_a_vcpu_keeps_its_turn_over_an_exit_and_loses_it_when_it_can_run_no_more():
    schedule = Schedule.named("round_robin:10")
    assert schedule.pick([0, 1, 2]) == (0, 10)
    schedule.ran(4)
    assert schedule.pick([0, 1, 2]) == (0, 6)
    assert schedule.pick([1, 2]) == (1, 10)


def test_that_sequential_stays_with_the_first_and_one_alone_is_not_bounded():
    assert turns(Schedule.named("sequential"), [2, 3], 2) == [(2, None), (2, None)]
    assert Schedule.named("round_robin:5").pick([3]) == (3, None)


def test_that_random_is_decided_by_its_seed():
    one, two, other = (
        turns(Schedule.named(name), [0, 1, 2], 50)
        for name in ("random:1:9", "random:1:9", "random:2:9")
    )
    assert one == two != other
    assert {i for i, _ in one} == {0, 1, 2}
    assert {n for _, n in one} == set(range(1, 10))


@pytest.mark.parametrize("name", ["round_robin:3", "random:5:20", "sequential", "random"])
def test_that_a_saved_schedule_goes_on_where_it_stood(name):
    schedule = Schedule.named(name)
    turns(schedule, [0, 1, 2], 5)
    schedule.pick([0, 1, 2])
    schedule.ran(1)
    saved = schedule.save()
    wanted = turns(schedule, [0, 1, 2], 9)
    assert turns(Schedule.restored(saved), [0, 1, 2], 9) == wanted


NO_NAMES = [
    "",
    "fifo",
    "round_robin:0",
    "round_robin:-1",
    "round_robin:x",
    "round_robin:1:2",
    "random:1:2:3",
    "sequential:1",
    "random:1:0",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_that_a_name_that_is_none_is_refused_with_the_names_that_are(name):
    with pytest.raises(lk.InvalidState, match="schedule"):
        Schedule.named(name)
