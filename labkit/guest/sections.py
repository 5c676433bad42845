"""The sections of an ELF file, read by pyelftools as far as hostile bytes allow.

A guest runs without sections: they hold names and debug information only. What is broken in them
is left out, and what would cost pyelftools minutes counts as broken.
"""

from __future__ import annotations

import io
from struct import unpack_from
from typing import Any

import numpy as np
from elftools.elf.elffile import ELFFile

__all__ = ["MAX_HEADERS", "debug_info", "open_elf", "section_bytes"]

MAX_HEADERS = 4096
SHDR_SIZE = 64  # Elf64_Shdr
SHF_COMPRESSED = 0x800
BIG_ENDIAN = 2  # ELFDATA2MSB
MAX_SECTION_NAME = 256  # bytes
MAX_DEBUG = 1 << 28  # bytes of all .debug_ sections together
MAX_STRING = 1 << 14  # bytes of the longest string in any of them


def open_elf(image: bytes) -> ELFFile:
    """A file of at least 64 bytes, without its section table where that does not fit.

    Raises whatever pyelftools meets in a broken header.
    """
    if not _sections_fit(image):
        # e_shoff, then e_shentsize, e_shnum and e_shstrndx: no section table
        image = image[:40] + bytes(8) + image[48:58] + bytes(6) + image[64:]
    return ELFFile(io.BytesIO(image))


def _sections_fit(image: bytes) -> bool:
    """Whether the section table lies in the file, and every section's name has an end."""
    order = ">" if image[5] == BIG_ENDIAN else "<"
    (table,) = unpack_from(f"{order}Q", image, 40)
    size, count, names_index = unpack_from(f"{order}3H", image, 58)
    if size != SHDR_SIZE or not 0 < count <= MAX_HEADERS or names_index >= count:
        return False
    if table + count * SHDR_SIZE > len(image):
        return False

    headers = [
        unpack_from(f"{order}I20xQ", image, table + i * SHDR_SIZE)  # sh_name, sh_offset
        for i in range(count)
    ]
    _, names_offset = headers[names_index]
    for name, _ in headers:
        start = names_offset + name
        if image.find(b"\0", start, start + MAX_SECTION_NAME) < 0:
            return False
    return True


def section_bytes(header: Any, image: bytes) -> bytes:
    """What a section holds; b"" for one that has nothing in the file, or has it compressed."""
    if header["sh_type"] == "SHT_NOBITS" or header["sh_flags"] & SHF_COMPRESSED:
        return b""
    offset = int(header["sh_offset"])
    return image[offset : offset + int(header["sh_size"])]


def debug_info(image: bytes) -> Any:
    """The pyelftools DWARFInfo of an image that read_elf accepted.

    None when there is none, or an absurd amount.
    """
    elf = open_elf(image)
    sections = [s for s in elf.iter_sections() if s.name.startswith(".debug_")]
    if sum(s.data_size for s in sections) > MAX_DEBUG or not elf.has_dwarf_info(strict=True):
        return None
    # pyelftools reads strings byte by byte, as often as asked
    if any(_longest_string(s.data()) > MAX_STRING for s in sections):
        return None
    return elf.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)


def _longest_string(data: bytes) -> int:
    """How many bytes follow each other without a NUL, at most."""
    zeros = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
    return int(np.diff(zeros, prepend=-1, append=len(data)).max())
