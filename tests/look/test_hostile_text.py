"""No text that labkit makes for a person holds what a terminal obeys, whatever a program says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

import labkit as lk
from labkit.guest.program import Program
from labkit.outside import plain, printable

BAD = "<b>\x1b[31m\x1b]0;PWNED\x07\x1b[2J\x9b\N{RIGHT-TO-LEFT OVERRIDE}\r"
# In place of names of the same length; C1 controls and direction marks are two and three bytes.
NAMES = {letter: f"{letter}{BAD}".encode() for letter in "GFC"}
LENGTH = len(NAMES["G"])
GLOBAL, FUNCTION, FILE = ("G" * LENGTH, "F" * LENGTH, "C" * (LENGTH - 2) + ".c")

SOURCE = r"""#include "labkit.h"
volatile uint64_t GLOBAL = 7;
noinline void FUNCTION(uint64_t x)
{
    GLOBAL += x;
    GUEST_SYNC(x);
    GUEST_PRINTF("%s", "BAD\r\nfake line: done (5 instructions)");
    END;
}
void guest_code(void) { FUNCTION(1); GUEST_DONE(); }
"""
ENDS = {
    "fault": "*(volatile uint64_t *)0x123 = 1",
    "abort": 'GUEST_FAIL("%s", "BAD")',
    "assert": 'GUEST_ASSERT(!"BAD")',
    "done": "GUEST_SYNC(0)",
}

# What a guest said is data, as it was: these attributes hold it, and no others.
DATA = {"text", "image"}
CALLS = ("look", "page_table", "explain", "backtrace", "disassemble", "source_line", "where")


def hostile(end, folder: Path) -> Program:
    """A program whose every name, and everything it says, is BAD."""
    said = "".join(f'\\x{byte:02x}""' for byte in BAD.encode())
    source = SOURCE.replace("END", ENDS[end]).replace("BAD", said)
    source = source.replace("GLOBAL", GLOBAL).replace("FUNCTION", FUNCTION)
    image = Program.compile(source, name=FILE).image
    for name, letter in ((GLOBAL, "G"), (FUNCTION, "F"), (FILE, "C")):
        assert name.encode() in image
        image = image.replace(name.encode(), NAMES[letter])
    path = folder / f"x{BAD}.elf".replace("/", "")
    path.write_bytes(image)
    return Program.load(path)


def texts(thing, seen, path="vm"):
    """Every text that somebody may read of a thing of ours, with where it was found."""
    if id(thing) in seen or isinstance(thing, bytes | int | float | type | None.__class__):
        return
    seen[id(thing)] = thing
    if isinstance(thing, str):
        yield path, thing
    elif isinstance(thing, pd.DataFrame):
        yield f"{path} table", thing.to_string()
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield f"{path} key", str(key)
            yield from texts(value, seen, f"{path}[{key!r}]")
    elif type(thing).__module__.startswith("labkit"):
        yield from of_ours(thing, seen, path)
    elif isinstance(thing, tuple | list | frozenset):
        for index, value in enumerate(thing):
            yield from texts(value, seen, f"{path}[{index}]")


def of_ours(thing, seen, path):
    yield f"repr({path})", repr(thing)
    yield f"str({path})", str(thing)
    if hasattr(thing, "_repr_mimebundle_"):
        yield f"{path} text/plain", thing._repr_mimebundle_()[0]["text/plain"]
    names = {name for name in dir(thing) if not name.startswith("_")} - DATA
    if dataclasses.is_dataclass(thing):
        names -= {"data"}
    for name in sorted(names):
        try:
            value = getattr(thing, name)
            if callable(value) and name in CALLS and name != "explain":
                value = value()
        except (lk.LabError, AttributeError) as error:
            value = str(error)
        if not callable(value):
            yield from texts(value, seen, f"{path}.{name}")


def run(vm):
    """Run to the end; returns what was raised, and the ucalls."""
    came = []
    try:
        for one in vm.stream(100_000):
            came.append(one)
    except lk.LabError as error:
        came.append(error)
    return came


@pytest.mark.parametrize("end", ENDS)
def test_that_no_text_holds_what_a_terminal_obeys(end, tmp_path):
    vm = lk.Vm.create(hostile(end, tmp_path))
    vm.vcpus[0].break_at(vm.program.symbol("F" + BAD).gva)
    before = vm.page_table()
    vm.run()
    front = list(texts(vm, {}))
    vm.vcpus[0].set_breakpoints(frozenset())
    came = run(vm)
    said = front + list(texts(vm, {})) + list(texts(came, {}))
    said += [("explain", vm.explain(one)) for one in came]
    said += list(texts(vm.page_table().diff(before), {}))
    said += list(texts(vm.memory, {}))
    assert len(said) > 200
    bad = [(where, text) for where, text in said if text != printable(text)]
    assert bad == []


@pytest.mark.parametrize("end", ["abort", "assert", "fault"])
def test_that_errors_and_the_command_line_hold_nothing_of_it(end, tmp_path, capsys):
    from labkit.cli import main

    program = hostile(end, tmp_path)
    with pytest.raises(lk.LabError) as caught:
        lk.Vm.create(program).run_until_done(100_000)
    with pytest.raises(lk.LabError) as unknown:
        lk.Vm.create(program).gva_of(f"F{BAD}x")
    (path,) = tmp_path.glob("*.elf")
    assert main(["run", str(path), "--max-insns", "100000"]) == 1
    out, err = capsys.readouterr()
    for text in (str(caught.value), str(unknown.value), out, err):
        assert text == printable(text)
    assert "\\x1b[2J" in out


def test_that_a_symbol_is_found_by_either_of_its_spellings(tmp_path):
    program = hostile("done", tmp_path)
    raw = f"F{BAD}"
    assert program.symbol(raw) == program.symbol(plain(raw)) == program.symbols[plain(raw)]
