"""Hostile ELF files: whatever the bytes, loading ends soon, with a Program or with an ElfError."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import GUESTS

from labkit.errors import ElfError, LabError
from labkit.guest.globals import global_var
from labkit.guest.program import Program

GUEST = GUESTS / "two_vms.elf"
IMAGE = GUEST.read_bytes()


def regions():
    """Where the structure is: mutations there say more than mutations of code."""
    with GUEST.open("rb") as file:
        elf = ELFFile(file)
        sections = [
            (s["sh_offset"], s["sh_size"])
            for s in elf.iter_sections()
            if s["sh_size"] and s["sh_type"] != "SHT_NOBITS"
        ]
        return [(0, 64), (64, 3 * 56), (elf["e_shoff"], 64 * elf["e_shnum"]), *sections]


EXTREMES = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\x80" * 8, b"\1" * 16]
VALUES = st.one_of(
    st.binary(min_size=1, max_size=1), st.sampled_from(EXTREMES), st.binary(min_size=1, max_size=8)
)
PLACES = st.sampled_from(regions()).flatmap(lambda r: st.integers(r[0], r[0] + r[1] - 1))
MUTATIONS = st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=12)


def mutated(mutations):
    image = bytearray(IMAGE)
    for offset, value in mutations:
        image[offset : offset + len(value)] = value
    return bytes(image[: len(IMAGE)])


def load_and_look(image):
    """Everything that reads the file; any exception but ElfError gets out."""
    start = time.perf_counter()
    try:
        program = Program.load(image)
    except ElfError as error:
        assert str(error).startswith("guest: ")
        return
    finally:
        assert time.perf_counter() - start < 1
    assert sum(s.memsz for s in program.segments) <= 1 << 30
    for symbol in [*program.symbols.values()][:40]:
        program.describe(symbol.gva)
        line = program.line_at(symbol.gva + 4)
        assert line is None or (line.line > 0 and isinstance(line.file, str))
    for name in ("secret", "balance", "greeting"):
        with suppress(LabError):
            global_var(program, name)
    assert time.perf_counter() - start < 5


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(MUTATIONS)
@example([(0x28, b"\xff" * 8)])
def test_that_a_mutated_file_loads_or_is_an_elf_error(mutations):
    load_and_look(mutated(mutations))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(IMAGE)))
def test_that_a_truncated_file_loads_or_is_an_elf_error(length):
    load_and_look(IMAGE[:length])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_that_a_file_of_noise_is_an_elf_error(noise):
    for image in (noise, b"\x7fELF\x02\x01\x01" + noise):
        with pytest.raises(ElfError):
            Program.load(image)


def section(name):
    with GUEST.open("rb") as file:
        header = ELFFile(file).get_section_by_name(name)
        return header["sh_offset"], header["sh_size"]


@pytest.mark.parametrize(
    "name",
    [
        ".debug_info",
        ".debug_line",
        ".debug_abbrev",
        ".debug_str",
        ".symtab",
        ".strtab",
        ".shstrtab",
    ],
)
@pytest.mark.parametrize("byte", [b"\0", b"\1", b"\x7f", b"\x80", b"\xff"])
def test_that_a_section_full_of_one_byte_does_no_harm(name, byte):
    offset, size = section(name)
    load_and_look(mutated([(offset, byte * size)]))


def test_that_a_name_without_an_end_is_no_trap():
    """Every section's name points into two megabytes without a NUL.

    pyelftools alone would read them byte by byte, each time.
    """
    image = bytearray(IMAGE)
    shoff = int.from_bytes(image[40:48], "little")
    shnum = int.from_bytes(image[60:62], "little")
    headers = bytes(image[shoff : shoff + 64 * shnum])
    more = headers[64:128] * (3900 - shnum)
    image[40:48] = len(image).to_bytes(8, "little")
    image[60:62] = (3900).to_bytes(2, "little")
    load_and_look(bytes(image) + headers + more + b"A" * (2 << 20))
