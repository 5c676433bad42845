"""A long afternoon: looks, tables and views cost the same after many events and many VMs."""

from __future__ import annotations

import gc
import time
import weakref

import pytest

import labkit as lk
from labkit.session.events import Event, EventLog
from labkit.ucall.calls import Ucall

LOOP = """#include "labkit.h"
void guest_code(void) { for (;;) GUEST_SYNC(1); }
"""


def ucall(step, text=None):
    return Ucall("SYNC", (step, 0, 0, 0, 0, 0, 0), text, 0, step % 512, step)


def rows(frame):
    """A table as plain values, None for what is missing."""
    return [
        tuple(None if one is None or one is lk_na() else one for one in row)
        for row in frame.itertuples(index=False)
    ]


def lk_na():
    import pandas as pd

    return pd.NA


@pytest.fixture(scope="module")
def program():
    return lk.Program.compile(LOOP)


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def test_that_a_table_that_grew_is_the_one_made_at_once():
    entries = [ucall(step, "said" if step % 3 else None) for step in range(40)]
    entries[7] = Event(7, 0, "exception", {"vector": 13})
    entries[20] = ucall(20)._replace(slot=None)
    grown = EventLog()
    for happened in entries:
        grown.append(happened)
        last = grown.frame()
    at_once = EventLog(entries).frame()
    assert last.equals(at_once)
    assert list(last.dtypes) == list(at_once.dtypes) == list(EventLog().frame().dtypes)
    assert rows(last)[7][4:] == (None, None, None, None)
    assert last.what.tolist() == [happened.what for happened in entries]


def test_that_a_table_is_its_readers_own():
    log = EventLog([ucall(1)])
    mine = log.frame()
    mine.loc[0, "what"] = "changed"
    log.append(ucall(2))
    assert log.frame().what[0] != "changed"
    assert len(mine) == 1


def test_that_a_log_that_is_put_back_has_its_own_table():
    log = EventLog([ucall(1), ucall(2)])
    assert len(log.frame()) == 2
    log.replace([ucall(9)])
    assert log.frame().step.tolist() == [9]


def test_that_more_events_cost_what_they_are(program):
    log = EventLog([ucall(step) for step in range(200_000)])
    whole = seconds(log.frame)
    for step in range(100):
        log.append(ucall(step))
    assert seconds(log.frame) < whole / 3
    assert log.frame().memory_usage().sum() / len(log) < 80  # bytes, texts aside


def test_that_a_look_costs_the_same_at_any_length(program):
    vm = lk.Vm.create(program)
    vm.run()
    vm.look()
    short = min(seconds(vm.look) for _ in range(3))
    vm.log.entries.extend(ucall(step) for step in range(300_000))
    assert min(seconds(vm.look) for _ in range(3)) < 2 * short + 0.005


def test_that_a_look_keeps_the_events_of_its_moment(program):
    vm = lk.Vm.create(program)
    vm.run()
    before = vm.snapshot()
    seen = vm.look()
    vm.run()
    assert (len(seen.events), len(vm.look().events)) == (1, 2)
    assert seen.events[-1] == seen.events[0] == seen.events[-1:][0]
    vm.restore(before)
    vm.run()
    assert seen.events == seen.events[:] and len(seen.events) == 1
    with pytest.raises(IndexError):
        seen.events[1]


def test_that_a_vm_that_was_shown_and_closed_is_gone(program):
    alive = []
    for _ in range(3):
        vm = lk.Vm.create(program)
        widget = vm.show()
        vm.run()
        vm.close()
        alive += [weakref.ref(vm), weakref.ref(widget)]
    del vm, widget
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


def test_that_a_view_in_a_page_outlives_its_vm_until_the_page_lets_go(program):
    vm = lk.Vm.create(program)
    widget = vm.show()
    widget._receive(None, {"act": "hello"}, None)
    vm.close()
    assert widget.comm is not None and "step" in widget.view().title
    widget._receive(None, {"act": "bye"}, None)
    assert widget.comm is None


def test_that_a_shell_does_not_keep_a_vm(program):
    from IPython.testing.globalipapp import start_ipython

    shell = start_ipython()
    if shell is None:
        pytest.skip("another test has started IPython's shell")
    before = len(shell.events.callbacks["post_execute"])
    vm = lk.Vm.create(program)
    vm.show()
    assert len(shell.events.callbacks["post_execute"]) == before + 1
    gone = weakref.ref(vm)
    vm.close()
    del vm
    gc.collect()
    assert gone() is None
    assert len(shell.events.callbacks["post_execute"]) == before


def test_that_pages_are_allocated_in_the_same_time_each(program):
    vm = lk.Vm.create(program, memory=128 << 20)
    first = seconds(lambda: [vm.alloc(4096) for _ in range(2000)])
    for _ in range(6000):
        vm.alloc(4096)
    assert seconds(lambda: [vm.alloc(4096) for _ in range(2000)]) < 2 * first
