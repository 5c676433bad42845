"""ELF files as facts: what pyelftools reads, checked so far that a hostile file costs an ElfError and nothing else."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from struct import unpack_from
from typing import Any, Literal, NoReturn

import numpy as np
from elftools.elf.elffile import ELFFile

from labkit.errors import ElfError

__all__ = ["ElfFacts", "Segment", "Symbol", "debug_info", "read_elf"]

ARCHES = {
    ("EM_X86_64", 1): "x86_64",
    ("EM_AARCH64", 1): "arm64",
    ("EM_RISCV", 1): "riscv64",
    ("EM_S390", 2): "s390x",
}  # e_machine, EI_DATA
MAX_MEMSZ = 1 << 30  # bytes of all segments together
PHDR_SIZE, SHDR_SIZE, MAX_HEADERS = 56, 64, 4096
MAX_NAME, MAX_SECTION_NAME, MAX_DEBUG, MAX_RUN = 4096, 256, 1 << 28, 1 << 14
GP = b"__global_pointer$"  # riscv64: what gp holds; of all absolute symbols the only place
KINDS: dict[int, Literal["notype", "object", "func"]] = {
    0: "notype",
    1: "object",
    2: "func",
    10: "func",
}  # STT_*; 10: IFUNC
SYM = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)  # little-endian
BYTEORDERS: dict[int, Literal["little", "big"]] = {1: "little", 2: "big"}  # EI_DATA
assert SYM.itemsize == 24  # Elf64_Sym

HOW = {
    "ET_DYN": "position independent (PIE or a shared library); link it with -no-pie at a fixed address",
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
        rights = "".join(
            c if on else "-"
            for c, on in zip("rwx", (self.readable, self.writable, self.executable), strict=True)
        )
        return f"Segment(0x{self.gva:x}..0x{self.end:x} {rights}, {len(self.data)} bytes from the file)"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name with an address; size 0 means that nobody said how long it is."""

    name: str
    gva: int
    size: int
    kind: Literal["func", "object", "notype"]


@dataclass(frozen=True)
class ElfFacts:
    """What one ELF file says, segments sorted by address, symbols in file order."""

    arch: str
    byteorder: Literal["little", "big"]
    entry: int
    segments: tuple[Segment, ...]
    symbols: tuple[Symbol, ...]


def read_elf(image: bytes, name: str) -> ElfFacts:
    """Read segments and symbols; ElfError says what is wrong with `name` otherwise."""

    def refuse(problem: str, **found: object) -> NoReturn:
        raise ElfError(f"{name}: {problem}", path=name, what=problem, found=found)

    if image[:4] != b"\x7fELF":
        refuse(f"not an ELF file: it starts with {image[:4].hex(' ') or 'nothing'}")
    if len(image) < 64:
        refuse(f"truncated: {len(image)} bytes do not hold an ELF header")
    if image[4] != 2:
        refuse(
            f"{'a 32-bit ELF' if image[4] == 1 else 'an ELF of unknown class'}; guests are 64-bit"
        )
    if image[5] not in BYTEORDERS:
        refuse(f"an ELF of unknown byte order {image[5]}")
    try:
        elf = ELFFile(io.BytesIO(_without_bad_sections(image)))
        header = {
            key: elf.header[key]
            for key in ("e_type", "e_machine", "e_entry", "e_phoff", "e_phnum", "e_phentsize")
        }
    except Exception as error:  # pyelftools meets hostile bytes with exceptions of every kind
        refuse(f"broken ELF header ({error or type(error).__name__})")
    byteorder = BYTEORDERS[image[5]]
    if (header["e_machine"], image[5]) not in ARCHES:
        runs = ", ".join(
            f"{arch} ({BYTEORDERS[data]}-endian)" for (_, data), arch in ARCHES.items()
        )
        refuse(
            f"for another machine ({header['e_machine']}, {byteorder}-endian); labkit runs {runs}"
        )
    if header["e_type"] != "ET_EXEC":
        refuse(f"{HOW.get(header['e_type'], 'not an executable')} (e_type {header['e_type']})")
    segments = _segments(elf, header, image, refuse)
    entry = int(header["e_entry"])
    if entry and not any(s.gva <= entry < s.end for s in segments):
        refuse(f"its entry point 0x{entry:x} lies outside every segment", entry=entry)
    return ElfFacts(
        ARCHES[header["e_machine"], image[5]], byteorder, entry, segments, _symbols(elf, image)
    )


def _without_bad_sections(image: bytes) -> bytes:
    """The image, with a section table that does not fit taken out: a guest runs without one, and pyelftools would trip."""
    order = "<>"[image[5] == 2]
    (shoff,), (size, count, names) = (
        unpack_from(f"{order}Q", image, 40),
        unpack_from(f"{order}3H", image, 58),
    )
    if (
        size == SHDR_SIZE
        and 0 < count <= MAX_HEADERS
        and names < count
        and shoff + count * SHDR_SIZE <= len(image)
    ):
        headers = [
            unpack_from(f"{order}I20xQ", image, shoff + i * SHDR_SIZE) for i in range(count)
        ]  # sh_name, sh_offset
        if all(
            image.find(b"\0", at := headers[names][1] + name, at + MAX_SECTION_NAME) >= 0
            for name, _ in headers
        ):
            return image
    return image[:40] + bytes(8) + image[48:58] + bytes(6) + image[64:]


def _segments(elf: Any, header: dict[str, Any], image: bytes, refuse: Any) -> tuple[Segment, ...]:
    if header["e_phentsize"] != PHDR_SIZE or not 0 < header["e_phnum"] <= MAX_HEADERS:
        refuse(f"no usable program headers ({header['e_phnum']} of {header['e_phentsize']} bytes)")
    if header["e_phoff"] + header["e_phnum"] * PHDR_SIZE > len(image):
        refuse(f"truncated: the program headers end behind the file's {len(image)} bytes")
    found: list[Segment] = []
    try:
        headers = [elf._get_segment_header(i) for i in range(header["e_phnum"])]
    except Exception as error:
        refuse(f"broken program header ({error})")
    for i, ph in enumerate(headers):
        if ph["p_type"] != "PT_LOAD" or not ph["p_memsz"]:
            continue
        gva, offset, filesz, memsz, flags = (
            int(ph[key]) for key in ("p_vaddr", "p_offset", "p_filesz", "p_memsz", "p_flags")
        )
        if filesz > memsz:
            refuse(
                f"segment {i} has more bytes in the file (0x{filesz:x}) than in memory (0x{memsz:x})",
                segment=i,
            )
        if memsz + sum(s.memsz for s in found) > MAX_MEMSZ:
            refuse(
                f"segment {i} wants 0x{memsz:x} bytes; all segments together may have 0x{MAX_MEMSZ:x}",
                segment=i,
            )
        if offset + filesz > len(image):
            refuse(
                f"truncated: segment {i} ends at byte 0x{offset + filesz:x} of the file's 0x{len(image):x}",
                segment=i,
            )
        if gva + memsz > 1 << 64:
            refuse(f"segment {i} at 0x{gva:x} leaves the address space", segment=i)
        found.append(
            Segment(
                gva,
                image[offset : offset + filesz],
                memsz,
                bool(flags & 4),
                bool(flags & 2),
                bool(flags & 1),
            )
        )
    if not found:
        refuse("nothing to load: it has no PT_LOAD segment")
    found.sort(key=lambda s: s.gva)
    for low, high in itertools.pairwise(found):
        if low.end > high.gva:
            refuse(
                f"segments overlap: 0x{low.gva:x}..0x{low.end:x} and 0x{high.gva:x}..0x{high.end:x}"
            )
    return tuple(found)


def _symbols(elf: Any, image: bytes) -> tuple[Symbol, ...]:
    """The symbol table (the dynamic one when the file is stripped); whatever is broken in it is left out."""
    try:
        sections = list(elf.iter_sections())
        table = next(
            s for wanted in ("SHT_SYMTAB", "SHT_DYNSYM") for s in sections if s["sh_type"] == wanted
        )
        data, names = (_bytes_of(s.header, image) for s in (table, sections[table["sh_link"]]))
    except Exception:  # no table, or a broken one: a guest without names still runs
        return ()
    rows = np.frombuffer(
        data[: len(data) // SYM.itemsize * SYM.itemsize],
        SYM.newbyteorder(">" if image[5] == 2 else "<"),
    )
    rows = rows[
        (rows["shndx"] != 0) & (rows["name"] < len(names)) & np.isin(rows["info"] & 15, list(KINDS))
    ]
    found = []
    for name, info, _, shndx, gva, size in rows.tolist():
        end = names.find(b"\0", name, name + MAX_NAME)
        if (
            end > name
            and names[name : name + 1] not in (b"$", b".")
            and (shndx != 0xFFF1 or names[name:end] == GP)
        ):  # $x, .L: the tools' own
            found.append(
                (
                    info >> 4 == 0,
                    Symbol(names[name:end].decode("utf-8", "replace"), gva, size, KINDS[info & 15]),
                )
            )
    return tuple(
        symbol for _, symbol in sorted(found, key=lambda pair: pair[0])
    )  # global before local


def _bytes_of(header: Any, image: bytes) -> bytes:
    offset, size = int(header["sh_offset"]), int(header["sh_size"])
    if header["sh_type"] == "SHT_NOBITS" or header["sh_flags"] & 0x800:  # 0x800: SHF_COMPRESSED
        return b""
    return image[offset : offset + size]


def debug_info(image: bytes) -> Any:
    """The pyelftools DWARFInfo of an image that read_elf accepted, or None when there is none (or an absurd amount)."""
    elf = ELFFile(io.BytesIO(_without_bad_sections(image)))
    sections = [s for s in elf.iter_sections() if s.name.startswith(".debug_")]
    if sum(s.data_size for s in sections) > MAX_DEBUG or not elf.has_dwarf_info(strict=True):
        return None
    if any(
        _longest_run(s.data()) > MAX_RUN for s in sections
    ):  # pyelftools reads strings byte by byte, as often as asked
        return None
    return elf.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)


def _longest_run(data: bytes) -> int:
    """How many bytes follow each other without a NUL, at most: the longest string that can be read there."""
    zeros = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
    return int(np.diff(zeros, prepend=-1, append=len(data)).max())
