"""Guest globals from the host: types by DWARF, one copy on the host and one in each VM."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import GUESTS

from labkit.errors import InvalidState, SymbolNotFound
from labkit.guest.globals import (
    GlobalVar,
    HostGlobals,
    global_var,
    read_guest_global,
    write_guest_global,
)
from labkit.guest.program import Program

SOURCE = """
#include "labkit.h"
typedef volatile const int16_t odd_t;
enum colour { RED, BLUE } colour = BLUE;
odd_t odd = -7;
static volatile bool flag = true;
unsigned char byte = 200;
char letter = 'a';
struct { uint32_t a, b; } pair = { 1, 2 };
char array[8] = "1234567";
struct ucall *pointer = (struct ucall *)0x1000;
uint64_t big;
struct { char c[3]; } three;
void guest_code(void) { static volatile int hidden = 5; hidden += flag; }
"""


@pytest.fixture(scope="module")
def program():
    return Program.compile(SOURCE)


class Vm:
    """One VM's copy of the program's memory."""

    def __init__(self, program):
        self.bytes = {s.gva: bytearray(s.data.ljust(s.memsz, b"\0")) for s in program.segments}
        self.writes = []

    def _at(self, gva):
        start = max(s for s in self.bytes if s <= gva)
        return self.bytes[start], gva - start

    def read(self, gva, size):
        data, at = self._at(gva)
        return bytes(data[at : at + size])

    def write(self, gva, value):
        data, at = self._at(gva)
        data[at : at + len(value)] = value
        self.writes.append((gva, len(value)))


@pytest.mark.parametrize(
    ("name", "size", "is_int", "signed", "value"),
    [
        ("odd", 2, True, True, -7),
        ("colour", 4, True, False, 1),
        ("flag", 1, True, False, 1),
        ("byte", 1, True, False, 200),
        ("letter", 1, True, True, 97),
        ("pair", 8, False, None, b"\1\0\0\0\2\0\0\0"),
        ("array", 8, False, None, b"1234567\0"),
        ("pointer", 8, True, False, 0x1000),
        ("big", 8, True, False, 0),
        ("three", 3, False, None, b"\0\0\0"),
        ("ucall_pool", 8, True, False, 0),
        ("guest_code.hidden", 4, True, True, 5),
    ],
)
def test_that_a_global_has_the_type_that_c_gave_it(program, name, size, is_int, signed, value):
    var = global_var(program, name)
    assert (var.size, var.is_int, var.signed) == (size, is_int, signed)
    assert HostGlobals(program)[name] == value == read_guest_global(program, name, Vm(program).read)


def test_that_without_debug_information_the_size_decides(program):
    image = bytearray(program.image)
    at = image.find(b".debug_info\0")
    image[at : at + 11] = b".nodbg_info"
    assert global_var(Program.load(bytes(image)), "odd") == GlobalVar(
        "odd", program.symbol("odd").gva, 2, True, None
    )
    assert global_var(Program.load(bytes(image)), "three").is_int is False


def test_that_each_vm_has_its_own_copy_and_the_host_one_more(program):
    host = HostGlobals(program)
    one = Vm(program)
    two = Vm(program)
    host["big"] = 42
    host.to_guest("big", one.write)
    write_guest_global(program, "big", 7, two.write)
    assert [read_guest_global(program, "big", vm.read) for vm in (one, two)] == [42, 7]
    assert host["big"] == 42
    assert host.from_guest("big", two.read) == 7
    assert host["big"] == 7


def test_that_a_pointer_is_written_in_one_piece(program):
    vm = Vm(program)
    write_guest_global(program, "ucall_pool", 0x7000, vm.write)
    assert vm.writes == [(program.symbol("ucall_pool").gva, 8)]


@given(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([True, False, None]),
)
def test_that_a_number_is_kept_or_refused(number, size, signed):
    var = GlobalVar("x", 0, size, True, signed)
    low = 0 if signed is False else -(1 << 8 * size - 1)
    high = (1 << 8 * size - 1) - 1 if signed else (1 << 8 * size) - 1
    if low <= number <= high:
        assert var.decode(var.encode(number)) in (number, number % (1 << 8 * size))
    else:
        with pytest.raises(InvalidState, match="does not fit"):
            var.encode(number)


def test_that_values_come_in_pythons_and_numpys_types(program):
    var = global_var(program, "big")
    assert [var.encode(v) for v in (True, np.uint64(2**63), b"\3" * 8)] == [
        b"\1" + b"\0" * 7,
        b"\0" * 7 + b"\x80",
        b"\3" * 8,
    ]


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("nothing", 1, SymbolNotFound, "no symbol 'nothing'"),
        ("guest_code", 1, InvalidState, "it is a function"),
        ("handle_exception", 1, InvalidState, "it is a function"),
        ("byte", 256, InvalidState, "256 does not fit: byte is a 8-bit unsigned number"),
        ("byte", "x", InvalidState, "takes a number or 1 bytes, not 'x'"),
        ("big", 1.5, InvalidState, r"not 1\.5"),
        ("big", None, InvalidState, "not None"),
        ("pair", 5, InvalidState, "pair is no number"),
        ("pair", b"123", InvalidState, "has 8 bytes, not 3"),
    ],
)
def test_that_a_wrong_use_is_refused_before_anything_is_written(program, name, value, error, words):
    vm = Vm(program)
    with pytest.raises(error, match=words):
        write_guest_global(program, name, value, vm.write)
    assert vm.writes == []


def test_that_a_type_is_looked_up_once(program):
    def took(times):
        start = time.perf_counter()
        for _ in range(times):
            write_guest_global(program, "ucall_pool", 1, lambda *_: None)
        return time.perf_counter() - start

    program = Program.load(program.image)
    first = took(1)
    assert took(10) < first


def test_that_prebuilt_guests_keep_their_types():
    program = Program.load(GUESTS / "two_vms.elf")
    assert [HostGlobals(program)[name] for name in ("secret", "balance")] == [1, -5]


@pytest.mark.parametrize("arch", ["x86_64", "s390x"])
def test_that_an_enum_has_the_sign_that_the_compiler_gave_it(arch):
    source = """
enum way { DOWN = -1, UP = 1 } way = DOWN;
enum { ON = 1 } light = ON;
void guest_code(void) { way = UP; }
"""
    program = Program.compile(source, arch=arch)
    assert HostGlobals(program)["way"] == -1
    assert [global_var(program, name).signed for name in ("way", "light")] == [True, False]
