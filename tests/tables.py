"""Shared by the paging tests: memory in a bytearray, hostile tables, x86's rules a second time."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from labkit.arch.x86 import X86_PXXV48_4K
from labkit.bits import align_up
from labkit.errors import MemoryFault
from labkit.paging.build import PageTableBuilder

P, W, U, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
ROOT = 0x1000


class Memory:
    """One memslot from gpa 0 on; tables are allocated from 1 MiB on."""

    def __init__(self, size=4 << 20):
        self.data = bytearray(size)
        self.next_table = 1 << 20

    def read(self, gpa, n):
        self.check(gpa, n)
        return bytes(memoryview(self.data)[gpa : gpa + n])

    def write(self, gpa, data):
        self.check(gpa, len(data))
        self.data[gpa : gpa + len(data)] = data

    def check(self, gpa, n):
        if gpa < 0 or gpa + n > len(self.data):
            raise MemoryFault(f"gpa {gpa:#x} is outside", gpa=gpa, size=n)

    def put(self, gpa, index, entry):
        self.write(gpa + 8 * index, struct.pack("<Q", entry))

    def alloc_table(self, size=4096):
        gpa = self.next_table
        self.next_table += align_up(size, 4096)
        return gpa

    def builder(self, mode=X86_PXXV48_4K, root=None):
        return PageTableBuilder(self.read, self.write, self.alloc_table, mode, root)


def chain(memory, *entries, gva=0):
    """Tables at 0x1000, 0x2000, ... whose entry for gva is the next of entries."""
    for depth, entry in enumerate(entries):
        memory.put(ROOT + 0x1000 * depth, gva >> (39 - 9 * depth) & 511, entry)


hostile_index = st.sampled_from([0, 1, 2, 255, 256, 257, 511])
TARGETS = [
    0x1000,
    0x2000,
    0x3000,
    0x4000,
    0x5000,
    0x10000,
    0x200000,
    0x40000000,
    0x7FF000,
    1 << 39,
    0xFFFFF << 32,
]
FLAGS = [P, P | W, P | W | U, P | U | A | D, P | W | U | A | NX, 0, W]
ODD = [0, 0, 0, 0, PS, PS | 1 << 12, PS | 1 << 13, 1 << 11, 1 << 51]
table_entry = st.builds(
    lambda target, flags: target | flags, st.sampled_from(TARGETS[:5]), st.sampled_from(FLAGS[:5])
)
huge_entry = st.builds(
    lambda target, flags: target | flags | PS,
    st.sampled_from([0, 1 << 12, 1 << 21, 1 << 30]),
    st.sampled_from(FLAGS[:5]),
)
odd_entry = st.builds(
    lambda target, flags, odd: target | flags | odd, *map(st.sampled_from, (TARGETS, FLAGS, ODD))
)
hostile_table = st.dictionaries(
    hostile_index, table_entry | huge_entry | odd_entry, min_size=1, max_size=4
)
hostile_tables = st.fixed_dictionaries(dict.fromkeys(TARGETS[:5], hostile_table))


def load(tables, size=1 << 20):
    """Memory that holds {table gpa: {index: entry}}."""
    memory = Memory(size)
    for gpa, entries in tables.items():
        for index, entry in entries.items():
            memory.put(gpa, index, entry)
    return memory


def brute_force(memory, root=ROOT, levels=4, c_bit=None, maxphyaddr=52):
    """Every leaf as gva -> (gpa, size, W, U, NX, A, D), and the gvas of bad entries.

    By recursion straight from the SDM.
    """
    leaves = {}
    bad = []
    address = ((1 << maxphyaddr) - 4096) & ~(1 << c_bit if c_bit else 0)
    reserved = (1 << 52) - (1 << maxphyaddr)

    def visit(table, level, gva, w, u, nx):
        if table + 4096 > len(memory.data):
            bad.append(gva)
            return
        for index, entry in enumerate(struct.unpack_from("<512Q", memory.data, table)):
            if not entry & P:
                continue
            here = gva + (index << (12 + 9 * (level - 1)))
            if level == levels and index >= 256:
                here += (1 << 64) - (1 << (12 + 9 * levels))
            rights = w and bool(entry & W), u and bool(entry & U), nx or bool(entry & NX)
            if entry & reserved:
                bad.append(here)
            elif level > 1 and not entry & PS:
                visit(entry & address, level - 1, here, *rights)
            elif level > 3 or (
                level > 1 and entry & address & ((1 << (12 + 9 * (level - 1))) - 0x2000)
            ):
                bad.append(here)
            else:
                size = 1 << (12 + 9 * (level - 1))
                leaves[here] = (
                    entry & address & -size,
                    size,
                    *rights,
                    bool(entry & A),
                    bool(entry & D),
                )

    visit(root, levels, 0, True, True, False)
    return leaves, bad
