"""`import labkit as lk` is all that users need: what it has, and what it takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import pytest
from paths import GUESTS

import labkit as lk
from labkit import errors

HELLO = GUESTS / "hello.c"


def test_that_dir_shows_what_is_public_and_nothing_else() -> None:
    assert set(dir(lk)) == set(lk.__all__)
    assert all(hasattr(lk, name) for name in lk.__all__)


def test_that_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(dir(lk))


@pytest.mark.parametrize("name", ["CpuModel", "Comparison", "Program", "Ucall", "Vcpu", "Vm"])
def test_that_a_class_that_users_name_is_there(name: str) -> None:
    assert isinstance(getattr(lk, name), type) and getattr(lk, name).__doc__


def test_that_attacks_and_exits_are_modules_of_words() -> None:
    for words in (lk.attacks, lk.exits):
        assert isinstance(words, ModuleType) and words.__all__


def all_subclasses(kind: type) -> set[type]:
    below = set(kind.__subclasses__())
    return below.union(*(all_subclasses(child) for child in below))


def test_that_every_exit_that_a_run_returns_is_in_exits() -> None:
    for module in walk_packages(lk.__path__, "labkit."):
        if not module.name.startswith(("labkit.views", "labkit.magics", "labkit.cli.__main__")):
            import_module(module.name)
    ours = {
        kind.__name__
        for kind in all_subclasses(lk.exits.Exit)
        if kind.__module__.startswith("labkit.")
    }
    # What Ctrl-C makes of a run is a KeyboardInterrupt for its caller.
    assert ours - {"InterruptExit"} | {"Exit"} == set(lk.exits.__all__)


def test_that_an_exit_can_be_matched() -> None:
    vm = lk.Vm.create('#include "labkit.h"\nvoid guest_code(uint64_t v) { outb(0x80, 7); }')
    match vm.run():
        case lk.exits.PioExit(port=0x80, is_write=True, data=data):
            assert data == 7
        case came:
            pytest.fail(repr(came))


@pytest.mark.parametrize(
    "guest",
    [HELLO, str(HELLO), HELLO.read_text(), HELLO.with_suffix(".elf"), lk.Program.load],
    ids=["path of C", "path of C as text", "C source", "path of ELF", "Program"],
)
def test_that_vm_create_and_compare_take_what_a_user_has_in_hand(guest: Any) -> None:
    if callable(guest):
        guest = guest(HELLO.with_suffix(".elf"))
    assert [uc.cmd for uc in lk.Vm.create(guest).run_until_done()][-1] == "DONE"
    assert lk.compare(guest, ["unicorn", "unicorn"]).ends == ("done", "done")


@pytest.mark.parametrize("guest", [7, None])
def test_that_what_is_no_guest_is_refused(guest: Any) -> None:
    with pytest.raises(lk.InvalidState, match=r"needs a program|program takes a Program"):
        lk.compare(guest, ["unicorn", "unicorn"])


def test_that_a_path_without_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(lk.LabError, match="nowhere"):
        lk.compare(tmp_path / "nowhere.elf", ["unicorn", "unicorn"])
