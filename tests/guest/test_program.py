"""Programs: what an ELF file says about addresses, names and lines, and which files are refused."""

from __future__ import annotations

import struct
import subprocess
import time

import pytest
from paths import GUESTS

import labkit as lk
from labkit.engines.exits import HaltExit
from labkit.errors import ElfError, InvalidState, SymbolNotFound
from labkit.guest.program import Program

HELLO = GUESTS / "hello.elf"
PHDRS = 64


@pytest.fixture(scope="module")
def hello():
    return Program.load(HELLO)


def patched(offset, fmt, value):
    """hello.elf with one field overwritten."""
    image = bytearray(HELLO.read_bytes())
    struct.pack_into("<" + fmt, image, offset, value)
    return bytes(image)


def linked(tmp_path, *flags, source="int main(void) { return 0; }\n"):
    """Something that the machine's gcc links."""
    path = tmp_path / "linked"
    try:
        subprocess.run(
            ["gcc", *flags, "-x", "c", "-", "-o", str(path)],
            input=source,
            text=True,
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"gcc cannot do this here: {error}")
    return path


def readelf(*options):
    try:
        return subprocess.run(
            ["readelf", *options, str(HELLO)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except OSError:
        pytest.skip("no readelf on this machine")


def test_that_a_prebuilt_guest_has_three_segments_with_their_rights(hello):
    assert [(s.gva, s.readable, s.writable, s.executable) for s in hello.segments] == [
        (0x400000, True, False, True),
        (0x403000, True, False, False),
        (0x404000, True, True, False),
    ]
    assert all(len(s.data) <= s.memsz for s in hello.segments)
    size = sum(s.memsz for s in hello.segments)
    assert repr(hello) == (f"Program('hello.elf', x86_64, 3 segments of {size} bytes at 0x400000)")


def test_that_segments_and_symbols_are_those_that_readelf_shows(hello):
    rows = [line.split() for line in readelf("-sW") if " FUNC " in line or " OBJECT " in line]
    assert rows
    assert {(r[7], int(r[1], 16), int(r[2])) for r in rows} <= {
        (s.name, s.gva, s.size) for s in hello.symbols.values()
    }


@pytest.mark.parametrize(
    "name",
    ["guest_code", "ucall", "ucall_alloc", "ucall_pool", "exception_handlers", "idt_handlers"],
)
def test_that_the_host_finds_the_names_it_needs(hello, name):
    assert hello.segment_at(hello.symbol(name).gva) is not None


@pytest.mark.parametrize("kind", ["", "static "])
def test_that_a_name_is_the_guests_before_it_is_the_librarys(kind):
    source = f'#include "labkit.h"\n{kind}noinline void put(void) {{ GUEST_DONE(); }}\n'
    program = Program.compile(f"{source}void guest_code(void) {{ put(); }}\n", opt="-O0")
    assert [s.name for s in program.all_symbols].count("put") == 2, "printf.c has a put() too"
    assert program.line_at(program.symbol("put").gva).file == "guest.c"


def test_that_a_missing_symbol_names_its_neighbours(hello):
    with pytest.raises(
        SymbolNotFound, match="no symbol 'gest_code'; did you mean guest_code"
    ) as caught:
        hello.symbol("gest_code")
    assert "guest_code" in caught.value.near


def test_that_an_address_is_described_by_the_symbol_that_covers_it(hello):
    alloc = hello.symbol("ucall_alloc")
    assert hello.symbol_at(alloc.gva + 5) == (alloc, 5)
    assert [hello.describe(gva) for gva in (alloc.gva, alloc.gva + 0x2C, 0x1234)] == [
        "ucall_alloc",
        "ucall_alloc+0x2c",
        "0x1234",
    ]
    for symbol in hello.symbols.values():
        assert (
            symbol.kind == "notype"
            or hello.symbol_at(symbol.gva + max(symbol.size - 1, 0))[0].gva == symbol.gva
        )


def test_that_every_instruction_of_a_guest_has_its_line_and_back(hello):
    gvas = [gva for n in range(1, 12) for gva in hello.gva_of_line("hello.c", n)]
    assert len(gvas) >= 4
    assert hello.symbol("guest_code").gva in gvas
    lines = [hello.line_at(gva) for gva in gvas]
    assert {line.text.strip() for line in lines} >= {"GUEST_SYNC(1);", "GUEST_DONE();"}
    assert all(
        gva in hello.gva_of_line(line.file, line.line)
        for gva, line in zip(gvas, lines, strict=True)
    )
    assert hello.line_at(0x123) is None
    assert hello.gva_of_line("hello.c", 999) == ()
    assert hello.gva_of_line("none.c", 1) == ()


def test_that_library_lines_come_with_their_text(hello):
    line = hello.line_at(hello.symbol("ucall_alloc").gva)
    assert line.file == "labkit/ucall.c"
    assert "ucall_alloc" in "".join(hello.source(line.file)[line.line - 2 : line.line])
    assert hello.gva_of_line("ucall.c", line.line) == hello.gva_of_line("labkit/ucall.c", line.line)
    assert hello.source("nowhere.c") is None


def test_that_lines_agree_with_readelf(hello):
    rows = [
        line.split() for line in readelf("--debug-dump=decodedline") if line.startswith("hello.c  ")
    ]
    lines = {
        int(gva, 16): int(number) for _, number, gva, *_ in rows if number != "-"
    }  # the last row of an address counts
    assert len(lines) >= 4
    assert all(hello.line_at(gva).line == number for gva, number in lines.items())


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (b"", "not an ELF file"),
        (b"MZ\x90\0", "not an ELF file"),
        (b"\x7fELF\x02\x01", "truncated"),
        (patched(4, "B", 1), "32-bit"),
        (patched(5, "B", 2), "big-endian"),
        (patched(4, "B", 9), "unknown class"),
        (patched(16, "H", 3), "position independent"),
        (patched(16, "H", 1), "never linked"),
        (patched(16, "H", 4), "core dump"),
        (patched(18, "H", 8), "another machine .EM_MIPS"),
        (patched(18, "H", 0xFFF0), "another machine"),
        (patched(24, "Q", 0x500000), "entry point 0x500000 lies outside"),
        (patched(32, "Q", 1 << 40), "truncated: the program headers"),
        (patched(54, "H", 55), "no usable program headers"),
        (patched(56, "H", 0), "no usable program headers"),
        (patched(56, "H", 0xFFFF), "no usable program headers"),
        (HELLO.read_bytes()[:0x1800], "truncated: segment 0"),
        (patched(PHDRS + 8, "Q", 1 << 63), "truncated: segment 0"),
        (patched(PHDRS + 32, "Q", 0x100000), "more bytes in the file"),
        (patched(PHDRS + 40, "Q", 1 << 62), "all segments together"),
        (patched(PHDRS + 40, "Q", 0x5000), "segments overlap"),
        (
            patched(PHDRS + 16, "Q", (1 << 64) - 0x1000),
            "segment 0 at 0xfffffffffffff000 leaves the address space",
        ),
    ],
)
def test_that_a_file_that_cannot_be_a_guest_is_refused_with_the_reason(image, what):
    with pytest.raises(ElfError, match=what) as caught:
        Program.load(image, name="x.elf")
    assert str(caught.value).startswith("x.elf: ")
    assert caught.value.path == "x.elf"


def linked_at(gva, code=b"\x48\x8b\x05\xf9\xff\xff\xff\xf4"):  # mov rax, [rip - 7]; hlt
    """An x86-64 ELF of one segment."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    machine = 62
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, gva + 120, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return (
        ident
        + header
        + struct.pack("<IIQQQQQQ", 1, 7, 0, gva, gva, 120 + len(code), 120 + len(code), 4096)
        + code
    )


@pytest.mark.parametrize(
    "gva", [0x1000, (1 << 47) - 0x1000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_8000_0000]
)
def test_that_a_program_may_lie_anywhere_in_both_halves_of_the_address_space(gva):
    program = Program.load(linked_at(gva), name="x.elf")
    with lk.Vm.create(program, entry=gva + 120) as vm:
        assert vm.vcpus[0].run() == HaltExit()
        assert vm.vcpus[0].regs.rax == 0xF4FFFFFFF9058B48
        assert vm.page_table().walk(gva + 120).gpa == vm.gva2gpa(gva + 120)
        assert vm.vcpus[0].pc == gva + 128


def test_that_a_program_in_the_hole_between_the_halves_is_refused():
    with pytest.raises(
        InvalidState, match=r"gva 0x900000000000..0x900000000fff is not canonical in x86/PXXV48_4K"
    ):
        lk.Vm.create(Program.load(linked_at(0x9000_0000_0000)), entry=0x9000_0000_0078)


@pytest.mark.parametrize("path", ["nowhere.elf", "/", "/dev/zero", "x\0y"])
def test_that_a_path_without_a_file_is_refused(path):
    with pytest.raises(ElfError):
        Program.load(path)


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [(40, "Q", 1 << 50), (58, "H", 3), (60, "H", 0xFFFF), (62, "H", 0xFFFE)],
)
def test_that_a_broken_section_table_costs_only_the_names(offset, fmt, value):
    program = Program.load(patched(offset, fmt, value))
    assert program.symbols == {}
    assert program.line_at(0x400000) is None
    assert len(program.segments) == 3
    with pytest.raises(SymbolNotFound, match="no symbols at all"):
        program.symbol("guest_code")


def test_that_a_dynamically_linked_fixed_program_loads_and_pie_does_not(tmp_path):
    assert Program.load(linked(tmp_path, "-no-pie", "-g")).symbol("main").kind == "func"
    with pytest.raises(ElfError, match="link it with -no-pie"):
        Program.load(linked(tmp_path, "-pie", "-fPIE"))


@pytest.mark.parametrize("version", ["-gdwarf-3", "-gdwarf-4", "-gdwarf-5"])
def test_that_every_version_of_dwarf_gives_the_same_lines(tmp_path, version):
    source = "\nint f(int x)\n{\n\treturn x * 3;\n}\nint main(void)\n{\n\treturn f(2);\n}\n"
    (tmp_path / "s.c").write_text(source)
    program = Program.load(
        linked(tmp_path, "-no-pie", version, source=f'# 1 "{tmp_path}/s.c"\n{source}')
    )
    assert program.line_at(program.symbol("f").gva + 7).text == "\treturn x * 3;"
    assert program.gva_of_line("s.c", 3) == (program.symbol("f").gva,)


def test_that_a_large_binary_loads_fast(tmp_path):
    source = "".join(f"int f{n}(void) {{ return {n}; }}\n" for n in range(3000)) + "int main(){}\n"
    path = linked(tmp_path, "-no-pie", "-static", source=source)
    assert path.stat().st_size > 900_000
    times = []
    for _ in range(3):
        start = time.perf_counter()
        program = Program.load(path)
        program.describe(program.symbol("f2999").gva)
        times.append(time.perf_counter() - start)
    assert len(program.symbols) > 4000
    assert min(times) < 0.2  # 0.1 s for 2 MB on a quiet machine
