"""ELF files as facts, checked so far that a hostile one costs an ElfError and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from struct import Struct
from typing import Literal, NamedTuple, NoReturn

from labkit.errors import ElfError
from labkit.guest.sections import MAX_HEADERS, open_elf
from labkit.guest.symbols import Symbol, read_symbols

__all__ = ["ElfFacts", "Segment", "Symbol", "read_elf"]

MAX_MEMSZ = 1 << 30  # bytes of all segments together

ARCHES: dict[tuple[str | int, int], str] = {  # by e_machine and EI_DATA
    ("EM_X86_64", 1): "x86_64",
    ("EM_AARCH64", 1): "arm64",
    ("EM_RISCV", 1): "riscv64",
    ("EM_S390", 2): "s390x",
}
BYTEORDERS: dict[int, Literal["little", "big"]] = {1: "little", 2: "big"}  # EI_DATA
EHDR_SIZE = 64  # Elf64_Ehdr
PHDR = "2I6Q"  # Elf64_Phdr: the fields of _ProgramHeader
PHDR_SIZE = 56
PT_LOAD = 1
PF_X, PF_W, PF_R = 1, 2, 4

# What files are that are not linked at a fixed address, by e_type.
HOW: dict[str | int, str] = {
    "ET_DYN": (
        "position independent (PIE or a shared library); link it with -no-pie at a fixed address"
    ),
    "ET_REL": "an object file that was never linked",
    "ET_CORE": "a core dump",
}


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD: data goes to gva, zeros follow up to memsz bytes."""

    gva: int
    data: bytes
    memsz: int
    readable: bool
    writable: bool
    executable: bool

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gva + self.memsz

    def __repr__(self) -> str:
        granted = (self.readable, self.writable, self.executable)
        rights = "".join(c if on else "-" for c, on in zip("rwx", granted, strict=True))
        where = f"0x{self.gva:x}..0x{self.end:x}"
        return f"Segment({where} {rights}, {len(self.data)} bytes from the file)"


@dataclass(frozen=True)
class ElfFacts:
    """What one ELF file says.

    Segments are sorted by address; symbols are global ones first, each kind in file order. entry
    is a gva, 0 for a file that has none.
    """

    arch: str
    byteorder: Literal["little", "big"]
    entry: int
    segments: tuple[Segment, ...]
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True)
class _File:
    """An image under the name that messages give it."""

    image: bytes
    name: str

    def refuse(self, problem: str, **found: object) -> NoReturn:
        """Say why this file cannot be a guest."""
        raise ElfError(f"{self.name}: {problem}", path=self.name, what=problem, found=found)


class _Header(NamedTuple):
    """The fields of the ELF header that matter here."""

    e_type: str | int  # a number where pyelftools knows no name
    e_machine: str | int
    e_entry: int
    e_phoff: int
    e_phnum: int
    e_phentsize: int


class _ProgramHeader(NamedTuple):
    """One Elf64_Phdr."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


def read_elf(image: bytes, name: str) -> ElfFacts:
    """Read segments and symbols; raises ElfError, which says what is wrong with `name`."""
    file = _File(image, name)
    _check_ident(file)
    try:
        elf = open_elf(image)
        header = _Header(
            e_type=elf.header["e_type"],
            e_machine=elf.header["e_machine"],
            e_entry=elf.header["e_entry"],
            e_phoff=elf.header["e_phoff"],
            e_phnum=elf.header["e_phnum"],
            e_phentsize=elf.header["e_phentsize"],
        )
    except Exception as error:  # pyelftools meets hostile bytes with exceptions of every kind
        file.refuse(f"broken ELF header ({error or type(error).__name__})")
    arch = _check_machine(file, header)

    segments = _segments(file, header)
    entry = int(header.e_entry)
    if entry and not any(segment.gva <= entry < segment.end for segment in segments):
        file.refuse(f"its entry point 0x{entry:x} lies outside every segment", entry=entry)
    symbols = read_symbols(elf, image)
    return ElfFacts(arch, BYTEORDERS[image[5]], entry, segments, symbols)


def _check_ident(file: _File) -> None:
    """Refuse what is no 64-bit ELF file."""
    image = file.image
    if image[:4] != b"\x7fELF":
        file.refuse(f"not an ELF file: it starts with {image[:4].hex(' ') or 'nothing'}")
    if len(image) < EHDR_SIZE:
        file.refuse(f"truncated: {len(image)} bytes do not hold an ELF header")

    ei_class = image[4]
    ei_data = image[5]
    if ei_class == 1:
        file.refuse("a 32-bit ELF; guests are 64-bit")
    if ei_class != 2:
        file.refuse("an ELF of unknown class; guests are 64-bit")
    if ei_data not in BYTEORDERS:
        file.refuse(f"an ELF of unknown byte order {ei_data}")


def _check_machine(file: _File, header: _Header) -> str:
    """The architecture; refuses what is for another machine or not linked at a fixed address."""
    ei_data = file.image[5]
    arch = ARCHES.get((header.e_machine, ei_data))
    if arch is None:
        machine = f"{header.e_machine}, {BYTEORDERS[ei_data]}-endian"
        runs = ", ".join(
            f"{known} ({BYTEORDERS[data]}-endian)" for (_, data), known in ARCHES.items()
        )
        file.refuse(f"for another machine ({machine}); labkit runs {runs}")
    if header.e_type != "ET_EXEC":
        how = HOW.get(header.e_type, "not an executable")
        file.refuse(f"{how} (e_type {header.e_type})")
    return arch


def _segments(file: _File, header: _Header) -> tuple[Segment, ...]:
    """What is to be loaded, sorted by address."""
    found: list[Segment] = []
    total = 0
    for index, program_header in enumerate(_program_headers(file, header)):
        if program_header.p_type != PT_LOAD or not program_header.p_memsz:
            continue
        segment = _segment(file, index, program_header, MAX_MEMSZ - total)
        total += segment.memsz
        found.append(segment)

    if not found:
        file.refuse("nothing to load: it has no PT_LOAD segment")
    found.sort(key=lambda segment: segment.gva)
    for low, high in itertools.pairwise(found):
        if low.end > high.gva:
            ranges = f"0x{low.gva:x}..0x{low.end:x} and 0x{high.gva:x}..0x{high.end:x}"
            file.refuse(f"segments overlap: {ranges}")
    return tuple(found)


def _program_headers(file: _File, header: _Header) -> list[_ProgramHeader]:
    """All program headers, which must lie in the file."""
    nr_headers = header.e_phnum
    size = header.e_phentsize
    if size != PHDR_SIZE or not 0 < nr_headers <= MAX_HEADERS:
        file.refuse(f"no usable program headers ({nr_headers} of {size} bytes)")
    end = header.e_phoff + nr_headers * PHDR_SIZE
    if end > len(file.image):
        file.refuse(f"truncated: the program headers end behind the file's {len(file.image)} bytes")

    order = "<" if BYTEORDERS[file.image[5]] == "little" else ">"
    table = file.image[header.e_phoff : end]
    return [_ProgramHeader(*fields) for fields in Struct(order + PHDR).iter_unpack(table)]


def _segment(file: _File, index: int, header: _ProgramHeader, room: int) -> Segment:
    """One segment, if it fits the file, the address space, and the room that others left."""
    filesz = header.p_filesz
    memsz = header.p_memsz
    if filesz > memsz:
        file.refuse(
            f"segment {index} has more bytes in the file (0x{filesz:x}) "
            f"than in memory (0x{memsz:x})",
            segment=index,
        )
    if memsz > room:
        file.refuse(
            f"segment {index} wants 0x{memsz:x} bytes; "
            f"all segments together may have 0x{MAX_MEMSZ:x}",
            segment=index,
        )
    end = header.p_offset + filesz
    if end > len(file.image):
        file.refuse(
            f"truncated: segment {index} ends at byte 0x{end:x} "
            f"of the file's 0x{len(file.image):x}",
            segment=index,
        )
    if header.p_vaddr + memsz > 1 << 64:
        file.refuse(
            f"segment {index} at 0x{header.p_vaddr:x} leaves the address space", segment=index
        )
    return Segment(
        gva=header.p_vaddr,
        data=file.image[header.p_offset : end],
        memsz=memsz,
        readable=bool(header.p_flags & PF_R),
        writable=bool(header.p_flags & PF_W),
        executable=bool(header.p_flags & PF_X),
    )
