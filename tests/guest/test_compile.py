"""Compiling guests: the compiler's own words, the user's names and lines, true prebuilt files."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from paths import GUESTS

from labkit.errors import CompileError, InvalidState, NotAvailable
from labkit.guest.compile import compile_guest
from labkit.guest.compilers import COMPILERS, find_compiler
from labkit.guest.prebuilt import build_prebuilt
from labkit.guest.program import Program

HELLO = """#include "labkit.h"

void guest_code(uint64_t vcpu)
{
	GUEST_SYNC(vcpu);
	GUEST_DONE();
}
"""

# cc is one of the others.
HERE = [name for name in COMPILERS if name == "zig" or (name != "cc" and shutil.which(name))]


@pytest.mark.parametrize("compiler", HERE)
def test_that_every_compiler_makes_the_same_kind_of_guest(compiler):
    program = compile_guest(HELLO, compiler=compiler, name="cell.c")
    assert (program.entry, program.segments[0].gva, program.compiler_output) == (
        program.symbol("guest_code").gva,
        0x400000,
        "",
    )
    assert [(s.writable, s.executable) for s in program.segments] == [
        (False, True),
        (False, False),
        (True, False),
    ]
    assert all(s.gva % 4096 == 0 for s in program.segments)
    gva = program.gva_of_line("cell.c", 5)[0]
    assert program.line_at(gva).text == "\tGUEST_SYNC(vcpu);"
    assert program.describe(gva).startswith("guest_code+")


@pytest.mark.parametrize("compiler", HERE)
@pytest.mark.parametrize(
    ("source", "where", "words"),
    [
        ("int x\nint y;\n", "cell.c:1:", "expected"),
        ("\n\nvoid guest_code(void) { y = 1; }\n", "cell.c:3:", "undeclared"),
        (
            "void guest_code(void) {\n\tGUEST_SYNC(1);\n}\n",
            "cell.c:2:",
            r'is #include "labkit.h" missing\?',
        ),
        ('#include "nowhere.h"\n', "cell.c:1:", "nowhere.h"),
        ('#include "labkit.h"\nvoid g(void);\nvoid f(void) { g(); }\n', "cell.c", "undefined"),
        (
            "float f(float a, float b)\n{\n\treturn a * b;\n}\n",
            "cell.c",
            "guests have no floating point",
        ),
    ],
)
def test_that_an_error_is_the_compilers_own_with_the_users_line(compiler, source, where, words):
    with pytest.raises(CompileError, match=words) as caught:
        compile_guest(source, compiler=compiler, name="cell.c")
    assert where in str(caught.value)
    assert "labkit-" not in str(caught.value)
    assert caught.value.command[0]
    number = where.split(":")[1] if ":" in where else ""
    assert not number or source.splitlines()[int(number) - 1].strip() in str(caught.value), (
        "the excerpt is the user's line"
    )


@pytest.mark.parametrize("compiler", HERE)
@pytest.mark.parametrize(
    "word",
    [
        "noinline",
        *(f"__attribute__ (({name}))" for name in ("noinline", "cold, noinline", "__noinline__")),
    ],
)
def test_that_a_function_is_kept_out_of_line_in_the_kernels_way_and_in_the_compilers(
    compiler, word
):
    source = f"""#include "labkit.h"
static {word} int twice(int n) {{ barrier(); return 2 * n; }}
void guest_code(int n) {{ GUEST_SYNC(twice(n)); }}
"""
    program = Program.compile(source, compiler=compiler, opt="-O2")
    assert "twice" in program.symbols
    assert not program.compiler_output


def test_that_both_ways_in_one_source_are_an_error_that_says_so():
    with pytest.raises(CompileError, match=r"cannot have the kernel's bare noinline too"):
        Program.compile(
            '#include "labkit.h"\n'
            "__attribute__((noinline)) void a(void) {}\n"
            "noinline void guest_code(void) { a(); }\n"
        )


def test_that_warnings_are_kept():
    program = compile_guest("void guest_code(void) { int unused; }\n", name="cell.c")
    assert "cell.c:1:" in program.compiler_output


def test_that_a_file_is_compiled_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.h").write_text("#define NUMBER 5\n")
    (tmp_path / "sub" / "guest.c").write_text(
        '#include "mine.h"\nint guest_code(void) { return NUMBER; }\n'
    )
    monkeypatch.chdir(tmp_path)
    program = Program.compile("sub/guest.c")
    assert (program.name, program.line_at(program.entry).file) == ("guest", "sub/guest.c")
    (tmp_path / "sub" / "mine.h").write_text("#define NUMBER 6\n")
    assert Program.compile(Path("sub/guest.c")).image != program.image, "a changed header counts"
    (tmp_path / "sub" / "guest.c").write_text("\n\nint guest_code(void) { return x; }\n")
    with pytest.raises(CompileError, match=r"sub/guest\.c:3:"):
        Program.compile("sub/guest.c")


def test_that_options_reach_the_compiler():
    source = "int guest_code(void) { return VALUE; }\n"
    image = Program.compile(source, defines=("VALUE=0x1234", "OTHER")).image
    assert image != Program.compile(source, defines=("VALUE=0x1235",)).image
    assert Program.compile(HELLO, opt="-O0").image != Program.compile(HELLO, opt="-O2").image


@pytest.mark.parametrize("name", ['a "b" \\ c.c', "é.c", "cell 1", "x/y.c", ".source.c"])
def test_that_a_source_may_have_any_printable_name(name):
    program = compile_guest(HELLO, name=name)
    assert program.line_at(program.entry).file == name
    assert program.line_at(program.entry).text


@pytest.mark.parametrize("name", ["labkit.h", "kvm_util.h", "string.h"])
def test_that_a_source_cannot_have_the_name_of_a_header_that_it_includes(name):
    with pytest.raises(InvalidState, match="the guest library has a header of that name"):
        compile_guest(HELLO, name=name)
    assert compile_guest(HELLO, name=f"mine/{name}").symbol("guest_code")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "a\nb"}, InvalidState, "cannot be the name"),
        ({"name": "/"}, InvalidState, "cannot be the name"),
        ({"name": "x" * 300}, InvalidState, "cannot be the name"),
        ({"arch": "mips"}, NotAvailable, "arm64, riscv64, s390x"),
        ({"compiler": "tcc"}, InvalidState, "tcc"),
        ({"defines": ("A\0B",)}, CompileError, "could not run"),
        ({"opt": "-Onsense"}, CompileError, "Onsense"),
        ({"source_or_path": "\ud800\n"}, CompileError, "cannot be read"),
        ({"source_or_path": "nowhere.c"}, CompileError, "cannot be read"),
        ({"source_or_path": Path("/")}, CompileError, "cannot be read"),
    ],
)
def test_that_wrong_arguments_are_refused_in_words(arguments, error, words):
    with pytest.raises(error, match=words):
        compile_guest(**{"source_or_path": HELLO, **arguments})


def test_that_bytes_that_are_no_utf8_survive_in_a_comment(tmp_path):
    (tmp_path / "latin.c").write_bytes(b"/* caf\xe9 */ int guest_code(void) { return 1; }\n")
    assert "caf\ufffd" in Program.compile(tmp_path / "latin.c").line_at(0x400000).text


def test_that_a_guest_without_guest_code_is_no_error():
    program = Program.compile("int other(void) { return 1; }\n")
    assert program.compiler_output == ""
    assert program.symbol("other").kind == "func"


def test_that_compiling_the_same_again_is_quick():
    def took():
        start = time.perf_counter()
        compile_guest(HELLO, compiler="zig")
        return time.perf_counter() - start

    compile_guest(HELLO, compiler="zig")
    # 0.05 s on a quiet machine: nothing in the command differs from run to run.
    assert min(took() for _ in range(5)) < 0.25


def test_that_a_missing_compiler_says_what_to_do(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        NotAvailable, match="'gcc' for x86_64 is not on this machine; pip install ziglang"
    ):
        find_compiler("gcc")
    assert find_compiler().name == "zig"
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(NotAvailable, match="a C compiler for arm64 is not on this machine"):
        find_compiler(arch="arm64")


def test_that_a_home_without_write_access_is_no_obstacle(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    assert compile_guest("int guest_code(void) { return 77; }\n", compiler="zig").entry


@pytest.mark.parametrize("compiler", HERE)
def test_that_nothing_of_this_machine_gets_into_a_guest(compiler):
    image = compile_guest(HELLO, compiler=compiler).image
    if compiler == "zig":  # gcc keeps its temporary files' names
        assert image == compile_guest(HELLO, compiler=compiler).image
    for place in (
        os.path.expanduser("~"),
        str(GUESTS.parent.parent),
        sys.prefix,
        tempfile.gettempdir(),
        "labkit-",
    ):
        assert place.encode() not in image


# --- prebuilt ---


def producer(path):
    """The compiler that an ELF file says it was made with."""
    with path.open("rb") as file:
        unit = next(ELFFile(file).get_dwarf_info().iter_CUs())
        return unit.get_top_DIE().attributes["DW_AT_producer"].value


def test_that_every_prebuilt_guest_is_what_its_source_compiles_to(tmp_path):
    for source in GUESTS.glob("*.c"):
        shutil.copy(source, tmp_path)
    for built in build_prebuilt(tmp_path):
        kept = GUESTS / built.relative_to(tmp_path)
        if producer(built) != producer(kept):
            pytest.skip(f"built by {producer(kept).decode()}, this is {producer(built).decode()}")
        assert built.read_bytes() == kept.read_bytes(), (
            f"{kept.name} is stale: python -m labkit.guest.prebuilt data/guests"
        )
    assert {p.stem for p in GUESTS.glob("*.elf")} == {p.stem for p in GUESTS.glob("*.c")}


@pytest.mark.parametrize("path", sorted(GUESTS.glob("*.elf")), ids=lambda p: p.stem)
def test_that_every_prebuilt_guest_is_small_and_shows_its_source(path):
    program = Program.load(path)
    assert path.stat().st_size < 50_000
    assert program.source(f"{path.stem}.c") == path.with_suffix(".c").read_text().splitlines()
    assert program.line_at(program.symbol("guest_code").gva).file == f"{path.stem}.c"
