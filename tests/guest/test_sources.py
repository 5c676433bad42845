"""Source text comes with the program, from its own folder, or from where the user said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from paths import GUESTS

import labkit as lk
from labkit.errors import CompileError, InvalidState
from labkit.guest.confine import why_not_confined
from labkit.guest.program import Program
from labkit.guest.sources import MAX_SOURCE, SourceFiles

NAME = "a" * 60 + ".c"
SOURCE = """#include "labkit.h"
void guest_code(void) { GUEST_SYNC(1); GUEST_DONE(); }
"""
MARK = "MARK of a file that the program does not bring"


@pytest.fixture(scope="module")
def image():
    return Program.compile(SOURCE, name=NAME).image


def naming(image, name):
    """The program with another name for its source, as long as before."""
    padded = name.replace("/", "/" * (1 + len(NAME) - len(name)), 1)
    return image.replace(NAME.encode(), padded.encode())


def program_naming(image, name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "guest.elf").write_bytes(naming(image, name))
    return Program.load(folder / "guest.elf")


def first_file(program):
    return program.line_at(program.symbol("guest_code").gva).file


def refused(program):
    """Why the source of its first function is not shown."""
    file = first_file(program)
    assert program.source(file) is None
    assert program.line_at(program.symbol("guest_code").gva).text is None
    return program.why_no_source(file)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/environ", "/dev/zero", "../../etc/passwd"]
)
def test_that_a_program_shows_no_file_that_it_does_not_bring(image, tmp_path, path):
    assert "source_path=" in refused(program_naming(image, path, tmp_path))


def test_that_the_view_says_why_there_is_no_source(image, tmp_path):
    vm = lk.Vm.create(program_naming(image, "/etc/passwd", tmp_path))
    assert vm.vcpus[0].look().source == ()
    said = vm.vcpus[0].look()._repr_mimebundle_()[0]
    assert "is not shown: it does not lie below the program's folder" in said["text/plain"]


def test_that_a_link_out_of_the_programs_folder_is_not_followed(image, tmp_path):
    (tmp_path / "secret.c").write_text(MARK)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.c").symlink_to(tmp_path / "secret.c")
    (inside / "etc").symlink_to("/etc")
    assert "leads out" in refused(program_naming(image, "/x/link.c", inside))
    assert "leads out" in refused(program_naming(image, "etc/passwd", inside))


def test_that_what_lies_below_the_programs_folder_is_shown(image, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.c").write_text(SOURCE)
    program = program_naming(image, "/home/somebody/src/x.c", tmp_path)
    assert program.source(first_file(program)) == SOURCE.splitlines()
    assert program.why_no_source(first_file(program)) == ""


def test_that_the_folder_of_a_linked_program_is_where_it_really_lies(image, tmp_path):
    program_naming(image, "/away/x.c", tmp_path / "real")
    (tmp_path / "real" / "x.c").write_text(SOURCE)
    (tmp_path / "x.c").write_text(MARK)
    (tmp_path / "link.elf").symlink_to(tmp_path / "real" / "guest.elf")
    program = Program.load(tmp_path / "link.elf")
    assert program.source(first_file(program)) == SOURCE.splitlines()


def test_that_folders_which_the_user_names_are_looked_in(image, tmp_path):
    (tmp_path / "far" / "src").mkdir(parents=True)
    (tmp_path / "far" / "src" / "x.c").write_text(SOURCE)
    changed = naming(image, "/home/somebody/src/x.c")
    for source_path in (tmp_path / "far", str(tmp_path / "far"), ["/usr", tmp_path / "far"]):
        program = Program.load(changed, source_path=source_path)
        assert program.source(first_file(program)) == SOURCE.splitlines()
    with pytest.raises(InvalidState, match="is no folder"):
        Program.load(changed, source_path=tmp_path / "nowhere")


def test_that_devices_pipes_and_what_is_no_text_are_not_shown(tmp_path):
    os.mkfifo(tmp_path / "fifo.c")
    (tmp_path / "folder.c").mkdir()
    (tmp_path / "large.c").write_bytes(b"x" * (MAX_SOURCE + 1))
    (tmp_path / "binary.c").write_bytes(b"a\0b")
    (tmp_path / ".hidden.c").write_text(MARK)
    files = SourceFiles({}, tmp_path / "guest.elf")
    reasons = {name: files.why_not(f"{name}.c") for name in ("fifo", "folder", "large", "binary")}
    assert reasons == {
        "fifo": "it is not a regular file",
        "folder": "it is not a regular file",
        "large": "it is larger than 4 MiB",
        "binary": "it is not text",
    }
    assert files.why_not(".hidden.c") == "hidden files are no source"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b", "x" * 5000, "a/" * 4000, "labkit/.."])
def test_that_any_name_of_a_file_has_an_answer(tmp_path, name):
    files = SourceFiles({}, tmp_path / "guest.elf")
    assert files.lines(name) is None
    assert files.why_not(name)


def test_that_the_librarys_folder_is_no_way_out(tmp_path):
    files = SourceFiles({}, None)
    assert files.lines("labkit/ucall.c")
    assert files.lines("labkit/../program.py") is None
    assert files.lines("labkit//etc/passwd") is None


def test_that_a_compiled_guest_brings_the_headers_it_included(tmp_path):
    (tmp_path / "own.h").write_text("static int own(int x)\n{\n\treturn x + 1;\n}\n")
    source = tmp_path / "g.c"
    source.write_text(f'#include "own.h"\n{SOURCE.replace("SYNC(1)", "SYNC(own(2))")}')
    program = Program.compile(source, opt="-O0")
    (tmp_path / "own.h").write_text("changed since\n")
    line = program.line_at(program.symbol("own").gva)
    assert line.file.endswith("own.h")
    assert program.source(line.file)[0] == "static int own(int x)"


HOSTILE = [
    '#include "{}"\n',
    "#include <{}>\n",
    '#define WHERE "{}"\n#include WHERE\n',
    '__asm__(".data\\n.incbin \\"{}\\"\\n.text");\nvoid guest_code(void) {{}}\n',
    '__asm__(".macro m a b\\n.\\\\a\\\\b \\"{}\\"\\n.endm\\nm inc bin");\n'
    "void guest_code(void) {{}}\n",
    'const char x[] = {{\n#embed "{}"\n}};\nvoid guest_code(void) {{}}\n',
]


@pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined() or "it can")
@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("compiler", ["zig", "gcc"])
@pytest.mark.parametrize("way", ["direct", "up", "link"])
def test_that_a_source_gets_no_file_from_outside_its_folder(tmp_path, compiler, text, way):
    secret = tmp_path / "secret"
    secret.write_text(f"{MARK}\n")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(secret)
    source = inside / "g.c"
    path = {"direct": secret, "up": "../secret", "link": "link"}[way]
    if way != "direct" and "include" not in text:
        path = inside / path  # relative names of an assembler are the work folder's
    source.write_text(text.format(path))
    try:
        Program.compile(source, compiler=compiler)
    except CompileError as error:
        assert MARK not in str(error) and MARK not in error.output
    else:
        pytest.fail("it was compiled")


def test_that_a_source_may_use_what_lies_in_folders_that_the_user_names(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"BROUGHT ALONG")
    (tmp_path / "own.h").write_text("#define OWN 1\n")
    text = (
        f'#include "own.h"\n__asm__(".data\\n.incbin \\"{tmp_path}/data.bin\\"\\n.text");\n{SOURCE}'
    )
    assert b"BROUGHT ALONG" in Program.compile(text, source_path=tmp_path).image


def test_that_compiling_holds_nobody_else(tmp_path):
    Program.compile(SOURCE)
    assert Path("/etc/passwd").read_bytes()


def test_that_a_source_is_a_regular_file(tmp_path):
    link = tmp_path / "x.c"
    link.symlink_to("/dev/zero")
    with pytest.raises(CompileError, match="not a regular file"):
        Program.compile(link)


def test_that_prebuilt_guests_show_their_source():
    program = Program.load(GUESTS / "hello.elf")
    assert program.source("hello.c")
