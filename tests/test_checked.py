"""Wrong arguments are a LabError in words in every public call, never something of Python's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from paths import GUESTS

import labkit as lk

HELLO = GUESTS / "hello.elf"

# What somebody may hand over by mistake: of every kind, and too small, too large, too long.
ODD = (
    None,
    1.5,
    float("nan"),
    [1],
    (),
    {},
    b"nr_done",
    b"",
    object(),
    "nowhere",
    "",
    "\0",
    "x.c:1",
    "a[1].b",
    -1,
    0,
    1 << 63,
    1 << 64,
    1 << 200,
    np.uint64(0x2000),
    Path("nowhere"),
    print,
)

# What waits for a person, or is a front door to what is tested in a room of its own.
LEFT_OUT = {"show", "load_ipython_extension"}


def public_things(vm: lk.Vm) -> Mapping[str, object]:
    """An object of each kind that users get into their hands."""
    assert vm.program is not None
    return {
        "lk": lk,
        "attacks": lk.attacks,
        "Program": lk.Program,
        "Vm": lk.Vm,
        "program": vm.program,
        "vm": vm,
        "vcpu": vm.vcpus[0],
        "memory": vm.memory,
        "host_globals": vm.host_globals,
        "regs": vm.vcpus[0].regs,
        "pool": vm.pool,
        "page_table": vm.page_table(),
        "eyes": vm.eyes(gva="guest_code"),
        "map": vm.memory_map(),
        "look": vm.look(),
        "vcpu_look": vm.vcpus[0].look(),
        "cpu": vm.cpu,
    }


def calls(thing: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public callables of an object, with those behind brackets and assignments."""
    names = thing.__all__ if isinstance(thing, ModuleType) else dir(type(thing))
    if isinstance(thing, type):
        names = [name for name in vars(thing) if isinstance(vars(thing)[name], classmethod)]
    for name in names:
        is_public = not name.startswith("_") or name in ("__getitem__", "__setitem__")
        if not is_public or name in LEFT_OUT:
            continue
        if not isinstance(thing, ModuleType | type):
            kind = inspect.getattr_static(type(thing), name)
            if not inspect.isfunction(kind):
                continue
        member = getattr(thing, name)
        if inspect.isfunction(member) or inspect.ismethod(member):
            yield name, member


def arguments(call: Callable[..., Any], vm: lk.Vm) -> dict[str, Any]:
    """A fitting value for each parameter that must be given."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            found[name] = fitting(name, str(parameter.annotation), vm)
    return found


def fitting(name: str, kind: str, vm: lk.Vm) -> Any:
    by_name = {"vm": vm, "program": HELLO, "backends": ["unicorn", "unicorn"], "facts": {}}
    if name in by_name:
        return by_name[name]
    if "str" in kind:
        return "guest_code"
    if "bytes" in kind:
        return b"\0"
    if "Callable" in kind:
        return print
    return 1


THINGS = (
    "lk",
    "attacks",
    "Program",
    "Vm",
    "program",
    "vm",
    "vcpu",
    "memory",
    "host_globals",
    "regs",
    "pool",
    "page_table",
    "eyes",
    "map",
    "look",
    "vcpu_look",
    "cpu",
)


@pytest.mark.parametrize("thing", THINGS)
def test_that_odd_arguments_are_refused_in_words_or_taken(thing: str) -> None:
    with lk.Vm.create(HELLO) as vm:
        for name, _ in calls(public_things(vm)[thing]):
            try_odd_arguments(thing, name)


def try_odd_arguments(thing: str, name: str) -> None:
    with lk.Vm.create(HELLO) as vm:
        call = dict(calls(public_things(vm)[thing]))[name]
        for parameter in inspect.signature(call).parameters.values():
            for odd in ODD:
                given = arguments(call, vm)
                more = []
                if parameter.kind is parameter.VAR_POSITIONAL:
                    more = [odd]
                elif parameter.kind is not parameter.VAR_KEYWORD:
                    given[parameter.name] = odd
                attempt(f"{thing}.{name}", partial(call, *given.values(), *more), odd)


def attempt(what: str, call: Callable[[], object], odd: object) -> None:
    try:
        call()
    except lk.LabError as error:
        assert str(error)
    except Exception as error:
        pytest.fail(f"{what} with {odd!r}: {type(error).__name__}: {error}")


def test_that_all_kinds_of_things_have_calls_to_try() -> None:
    with lk.Vm.create(HELLO) as vm:
        things = public_things(vm)
        assert set(things) == set(THINGS)
        assert sum(len(list(calls(thing))) for thing in things.values()) > 100


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vm: vm.read(None, 4), "Vm.read: gva takes text or a whole number, not None"),
        (lambda vm: vm.read(b"nr", 4), r"not b'nr' \(bytes\)"),
        (lambda vm: vm.read(gva=1.5, size=4), r"not 1\.5 \(float\)"),
        (lambda vm: vm.read([0x400000], 4), r"not \[4194304\] \(list\)"),
        (lambda vm: vm.vcpus[0].step(1.0), r"Vcpu.step: count takes a whole number, not 1\.0"),
        (lambda vm: vm.vcpus[0].run("9"), "Vcpu.run: max_insns takes a whole number, not '9'"),
        (lambda vm: vm.vcpus[0].break_at("guest_code", None), "places takes text or a whole"),
        (lambda vm: vm.pool.since(7), "PoolSnapshot.since: other takes a PoolSnapshot, not 7"),
        (lambda vm: lk.compare(HELLO, "unicorn"), "compare: backends takes a sequence of text"),
        (lambda vm: lk.Program.compile("", defines="A=1"), "defines takes a sequence of text"),
        (lambda vm: lk.Vm.create(HELLO, launch="no"), "launch takes True or False, not 'no'"),
        (lambda vm: vm.memory.read("pool", 4), "Memory.read: gpa takes a whole number"),
        (lambda vm: setattr(vm.vcpus[0].regs, "rip", "guest_code"), "rip takes a whole number"),
    ],
)
def test_that_the_sentence_says_what_is_taken_and_what_came(
    call: Callable[[lk.Vm], object], words: str
) -> None:
    with lk.Vm.create(HELLO) as vm, pytest.raises(lk.InvalidState, match=words):
        call(vm)


def test_that_numbers_of_numpy_are_taken_as_numbers() -> None:
    with lk.Vm.create(HELLO) as vm:
        table = vm.page_table()
        code = table.df[table.df.executable].iloc[0]
        assert vm.read(code.gva, np.int32(4)) == vm.read(int(code.gva), 4)
        assert vm.memory.read(code.gpa, 4) == vm.read(code.gva, 4)
        assert table.walk(code.gva).gpa == code.gpa
