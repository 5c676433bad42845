"""Globals by their C types: what the host reads is what the guest has, whoever compiled it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.guest.declared import declared_type
from labkit.guest.values import Array, CType, Field, Number, Record

ARCHES = ("x86_64", "arm64", "riscv64", "s390x")

SOURCE = r"""
#include "labkit.h"

typedef struct {
    int x;
    unsigned flags : 3;
    int neg : 5;
    unsigned long big : 40;
    union { char c[8]; unsigned long word; };
    struct { short s[2][3]; } in;
} box_t;
enum colour { RED = -1, BLUE = 5 };

_Bool yes = 1;
enum colour ink = BLUE;
const char *message = "hi";
char text[10] = "abc";
box_t box = {.x = -3, .flags = 5, .neg = -7, .big = 0x123456789a, .c = "hello",
             .in = {{{1, 2, 3}, {4, 5, -6}}}};
box_t boxes[3];
struct list { struct list *next; int v; } head = {&head, 9};
uint64_t told[8];

void guest_code(uint64_t vcpu)
{
    box.x++;
    boxes[1] = box;
    yes = !yes;
    ink = RED;
    head.v += message[0] + text[0];
    GUEST_SYNC(0);
    told[0] = box.x;
    told[1] = box.flags;
    told[2] = box.neg;
    told[3] = box.big;
    told[4] = boxes[2].in.s[1][2];
    told[5] = boxes[2].word;
    GUEST_DONE();
}
"""


@pytest.fixture(params=ARCHES)
def vm(request):
    with lk.Vm.create(lk.Program.compile(SOURCE, arch=request.param)) as vm:
        vm.run()
        yield vm


def test_that_each_c_type_is_read_as_what_it_is(vm):
    assert vm.read_global("yes") is False
    assert vm.read_global("ink") == -1
    assert vm.string_at(vm.read_global("message")) == "hi"
    assert vm.read_global("text") == b"abc".ljust(10, b"\0")
    assert vm.read_global("head") == {"next": vm.gva_of("head"), "v": 9 + ord("h") + ord("a")}


def test_that_a_struct_has_its_fields_by_name(vm):
    box = vm.read_global("box")
    assert (box.x, box["flags"], box.neg, box.big) == (-2, 5, -7, 0x123456789A)
    assert box.c == b"hello\0\0\0" and box.word == int.from_bytes(box.c, vm.program.byteorder)
    assert box["in"].s == [[1, 2, 3], [4, 5, -6]]
    assert vm.read_global("boxes")[1] == box
    assert repr(box).startswith("box_t {.x = -2, .flags = 5, .neg = -7")


def test_that_a_part_of_a_global_has_a_name(vm):
    assert vm.read_global("boxes[1].in.s[1][2]") == -6
    assert vm.read_global("box.neg") == -7
    assert vm.read("boxes[1].x", 4) == vm.read("box", 4)
    assert vm.gva_of("boxes[1]") == vm.gva_of("boxes") + len(vm.read("box", 1)) * box_size(vm)


def box_size(vm):
    return vm.program.variable("box").size


def test_that_the_guest_reads_what_the_host_wrote_by_name(vm):
    vm.write_guest_global("box", {"x": 77, "neg": -16, "big": (1 << 40) - 1})
    vm.write_guest_global("box.flags", 2)
    vm.write_guest_global("boxes[2].in.s[1]", [0, 0, 1234])
    vm.write_guest_global("boxes[2]", {"c": "labkit"})
    vm.run_until_done()
    word = int.from_bytes(b"labkit\0\0", vm.program.byteorder)
    assert vm.read_global("told")[:6] == [77, 2, (1 << 64) - 16, (1 << 40) - 1, 1234, word]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("box", 5, "no number"),
        ("box", {"q": 1}, "box_t has no field 'q', but x, flags, neg, big, c, word, in"),
        ("box", {"x": 1 << 31}, r"2147483648 does not fit into box\.x, which is int"),
        ("box", {"flags": 8}, r"box\.flags has 3 bits, which 8 does not fit"),
        ("box.neg", -17, "5 bits"),
        ("boxes", [1, 2], "takes 3 elements"),
        ("boxes[3].x", 1, r"boxes\[3\]: boxes has 3 elements"),
        ("text", "eleven bytes", "text of at most 10 bytes"),
        ("box.x.y", 1, "has no field 'y': it is int"),
        ("head.next.v", 1, "has no field 'v': it is a pointer"),
        ("guest_code", 1, "is a function"),
        ("bocks", 1, "did you mean box"),
    ],
)
def test_that_what_does_not_fit_is_refused_and_nothing_written(vm, name, value, words):
    before = vm.snapshot()
    with pytest.raises(lk.LabError, match=words):
        vm.write_guest_global(name, value)
    assert vm.snapshot().machine.slots == before.machine.slots


def test_that_without_debug_information_numbers_are_numbers_and_the_rest_bytes(tmp_path):
    program = stripped(tmp_path, ["-g0"])
    with lk.Vm.create(program, ucall=None) as vm:
        assert vm.read_global("nr") == (1 << 64) - 3  # nobody says that it has a sign
        assert vm.read_global("arr") == b"".join(i.to_bytes(4, "little") for i in range(1, 7))
        with pytest.raises(lk.LabError, match="no debug information says"):
            vm.read_global("box.x")


PLAIN = r"""
typedef struct { int x; unsigned flags : 3; int neg : 5; unsigned long big : 40; double d; } box_t;
box_t box = {-2, 5, -7, 3, 1.5};
long nr = -3;
int arr[2][3] = {{1, 2, 3}, {4, 5, 6}};
static volatile int hidden = 9;
void guest_code(void) { hidden++; arr[0][0]++; for (;;); }
"""


def stripped(folder: Path, flags: list[str], compiler: tuple[str, ...] = ()) -> Path:
    """PLAIN as an ELF file of a compiler's own making."""
    zig = (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-freestanding")
    source, target = folder / "plain.c", folder / "plain.elf"
    source.write_text(PLAIN)
    fixed = ["-O1", "-static", "-nostdlib", "-fno-pie", "-no-pie", "-Wl,-e,guest_code"]
    command = [*(compiler or zig), *fixed, *flags, str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.mark.parametrize("flag", ["-gdwarf-3", "-gdwarf-4", "-gdwarf-5"])
@pytest.mark.parametrize("compiler", [(), ("gcc",)], ids=["clang", "gcc"])
def test_that_other_compilers_and_other_dwarf_say_the_same(tmp_path, compiler, flag):
    if compiler and shutil.which(compiler[0]) is None:
        pytest.skip("no gcc here")
    with lk.Vm.create(stripped(tmp_path, [flag], compiler), ucall=None) as vm:
        box = {"x": -2, "flags": 5, "neg": -7, "big": 3, "d": 1.5}
        assert vm.read_global("box") == box
        assert (vm.read_global("nr"), vm.read_global("hidden")) == (-3, 9)
        assert vm.read_global("arr") == [[1, 2, 3], [4, 5, 6]]
        vm.write_guest_global("box.d", -0.25)
        assert vm.read_global("box.d") == -0.25


# --- whatever the type: what is written is what is read

numbers = st.sampled_from(
    [Number("n", size, kind) for size in (1, 2, 4, 8) for kind in ("signed", "unsigned")]
)


def records(inner: st.SearchStrategy[CType]) -> st.SearchStrategy[CType]:
    return st.lists(inner, min_size=1, max_size=4).map(record)


def record(types: list[CType]) -> Record:
    fields, at = [], 0
    for index, kind in enumerate(types):
        fields.append(Field(f"f{index}", at, kind))
        at += kind.size
    return Record("struct", at, tuple(fields))


def arrays(inner: st.SearchStrategy[CType]) -> st.SearchStrategy[CType]:
    return st.builds(lambda kind, count: Array("a", kind, count), inner, st.integers(0, 4))


types = st.recursive(numbers, lambda inner: records(inner) | arrays(inner), max_leaves=8)


@given(types, st.data(), st.sampled_from(["little", "big"]))
def test_that_bytes_are_the_same_after_decoding_and_encoding(kind, data, order):
    raw = data.draw(st.binary(min_size=kind.size, max_size=kind.size))
    assert kind.encode(kind.decode(raw, order), order, "x") == raw


@pytest.fixture(scope="module")
def image():
    return lk.Program.compile(SOURCE).image


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_that_forged_debug_information_gives_a_type_or_none(image, data):
    program = lk.Program.load(image)
    start = image.find(b"box_t")
    assert start > 0
    forged = bytearray(image)
    for _ in range(data.draw(st.integers(1, 20))):
        forged[data.draw(st.integers(len(image) // 4, len(image) - 1))] = data.draw(
            st.integers(0, 255)
        )
    for name in ("box", "boxes", "head"):
        kind = declared_type(bytes(forged), program.symbol(name).gva)
        assert kind is None or kind.size >= 0
