"""Tables built, read back by the walker, and given to Unicorn's MMU as an independent oracle."""

from __future__ import annotations

import ctypes
import struct
import time

import pytest
import unicorn as uc
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import PS, ROOT, Memory, P, U, W, brute_force, hostile_tables, load
from unicorn import x86_const as x86

from labkit.arch.desc import HUGE, LAST, Field, Level, Match, PagingMode
from labkit.arch.x86 import X86_PXXV48_4K, X86_PXXV57_4K
from labkit.errors import InvalidState, MemoryFault
from labkit.paging.scan import scan
from labkit.paging.walk import walk

C51 = X86_PXXV48_4K.with_c_bit(51)
SIZES = X86_PXXV48_4K.page_sizes
CODE_GVA, CODE_GPA = 0x320000000000, 0x700000  # PML4[100], which no hostile table uses
LOAD, STORE = bytes.fromhex("488b03"), bytes.fromhex("488903")  # mov rax, [rbx]; mov [rbx], rax


@pytest.fixture
def lab():
    memory = Memory()
    return memory, memory.builder()


mapping = st.tuples(
    st.sampled_from(SIZES),
    st.integers(0, (1 << 48) - 1),
    st.integers(0, (1 << 51) - 1),
    st.integers(1, 1100),
    st.fixed_dictionaries({name: st.booleans() for name in ("writable", "user", "nx", "c")}),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(mapping, max_size=4), st.sampled_from([C51, X86_PXXV57_4K.with_c_bit(51)]))
def test_that_what_was_mapped_is_what_walk_and_scan_find(mappings, mode):
    memory = Memory(8 << 20)
    builder = memory.builder(mode)
    expected = {}
    for size, gva, gpa, nr_pages, flags in mappings:
        gva = mode.extend(gva & -size)
        gpa = gpa & -size & 0x3FFFFFFFFFFFF
        pages = range(gva, gva + nr_pages * size, size)
        try:
            builder.map(gva, gpa, nr_pages, size, **flags)
        except InvalidState:
            assert not mode.canonical(pages[-1]) or any(
                a < pages[-1] + size and gva < a + s for a, (_, s, _) in expected.items()
            )
            continue
        expected |= {
            page: (gpa + page - gva, size, {"accessed": False, "dirty": False, **flags})
            for page in pages
        }
    table = scan(memory.read, mode, builder.root_gpa)
    assert table.gva.tolist() == sorted(expected)
    assert not table.nr_bad
    for gva in [*expected][::97]:
        found = walk(memory.read, mode, builder.root_gpa, gva + 5)
        assert (found.gpa - 5, found.page_size, found.flags) == expected[gva]
        assert table.walk(gva + 5) == found


def test_that_kernel_style_tables_come_out_bit_for_bit(lab):
    memory, builder = lab
    builder.map(0x400000, 0x10000, 2)
    steps = walk(memory.read, builder.mode, builder.root_gpa, 0x401000).steps
    assert [step.entry for step in steps] == [0x101007, 0x102007, 0x103007, 0x11003]


def test_that_new_tables_are_cleared_first():
    memory = Memory()
    memory.data[1 << 20 :] = b"\xff" * (3 << 20)
    builder = memory.builder()
    builder.map(0x400000, 0x10000)
    assert len(scan(memory.read, builder.mode, builder.root_gpa)) == 1


def test_that_a_given_root_is_kept_and_continued(lab):
    memory, builder = lab
    builder.map(0x400000, 0x10000)
    again = memory.builder(root=builder.root_gpa | 0x18)
    again.map(0x401000, 0x20000)
    assert again.root_gpa == builder.root_gpa
    assert len(scan(memory.read, builder.mode, builder.root_gpa)) == 2


@pytest.mark.parametrize(
    ("gva", "nr_pages", "size", "message"),
    [
        (
            0x401000,
            1,
            4096,
            r"gva 0x401000 is mapped already: PT\[0x1\] at gpa 0x103008 is 0x11003",
        ),
        (
            0x3FE000,
            4,
            4096,
            r"gva 0x400000 is mapped already: PT\[0x0\] at gpa 0x103000 is 0x10003",
        ),
        (
            0x400000,
            1,
            1 << 21,
            r"gva 0x400000 is mapped already: PD\[0x2\] at gpa 0x102010 is 0x103007",
        ),
        (
            0x600000,
            1,
            4096,
            r"gva 0x600000 is mapped already: PD\[0x3\] at gpa 0x102018 is 0x200083",
        ),
    ],
)
def test_that_nothing_is_mapped_twice_and_memory_stays_as_it_was(lab, gva, nr_pages, size, message):
    memory, builder = lab
    builder.map(0x400000, 0x10000, 2)
    builder.map(0x600000, 0x200000, 1, 1 << 21)
    before = bytes(memory.data)
    with pytest.raises(InvalidState, match=message):
        builder.map(gva, 0x800000, nr_pages, size)
    assert memory.data == before


@pytest.mark.parametrize(
    ("args", "flags", "message"),
    [
        ((0x401, 0, 1), {}, "gva 0x401 is not aligned to the page size 0x1000"),
        ((0x400000, 0x10001, 1), {}, "gpa 0x10001 is not aligned"),
        ((0x400000, -4096, 1), {}, "gpa -0x1000 is not aligned"),
        ((0x201000, 0, 1, 1 << 21), {}, "gva 0x201000 is not aligned to the page size 0x200000"),
        ((0x400000, 0, 0), {}, "wants at least one page"),
        ((0x400000, 0, -3), {}, "wants at least one page"),
        ((0x7FFFFFFFE000, 0, 3), {}, "gva 0x7fffffffe000..0x800000000fff is not canonical"),
        ((1 << 47, 0, 1), {}, "not canonical"),
        ((-4096, 0, 1), {}, "not canonical"),
        ((0, 0, 1 << 40), {}, "not canonical"),
        (((1 << 64) - 4096, 0, 2), {}, "not canonical"),
        ((0x400000, 1 << 52, 1), {}, "does not fit the entry bits"),
        (
            (0, 0, 1, 8192),
            {},
            "x86/PXXV48_4K has no pages of 0x2000 bytes, only 0x1000 0x200000 0x40000000",
        ),
        (
            (0, 0, 1),
            {"colour": True},
            "x86/PXXV48_4K has no flag 'colour', only writable user accessed dirty nx",
        ),
        ((0, 0, 1), {"c": True}, "has no flag 'c'"),
    ],
)
def test_that_what_cannot_be_mapped_is_refused(lab, args, flags, message):
    memory, builder = lab
    before = bytes(memory.data)
    with pytest.raises(InvalidState, match=message):
        builder.map(*args, **flags)
    assert memory.data == before


@pytest.mark.parametrize("entry", [0x2000 | P | PS, 0x2000 | P | PS | W | U])
def test_that_a_reserved_entry_in_the_way_is_named(lab, entry):
    memory, builder = lab
    memory.put(builder.root_gpa, 0, entry)
    with pytest.raises(
        InvalidState, match=rf"gva 0x0 cannot be mapped: PML4\[0x0\] at gpa 0x100000 is {entry:#x}"
    ):
        builder.map(0, 0)


def test_that_tables_which_the_guest_overwrote_end_in_a_memory_fault(lab):
    memory, builder = lab
    memory.put(builder.root_gpa, 0, 0x7F000000 | P)
    with pytest.raises(MemoryFault, match="0x7f000000"):
        builder.map(0, 0)


def test_that_unmap_clears_and_the_page_can_be_mapped_again(lab):
    memory, builder = lab
    builder.map(0x3FF000, 0x10000, 4)
    builder.unmap(0x3FF000, 2)
    assert scan(memory.read, builder.mode, builder.root_gpa).gva.tolist() == [0x401000, 0x402000]
    builder.map(0x3FF000, 0x30000, 2)
    assert walk(memory.read, builder.mode, builder.root_gpa, 0x400000).gpa == 0x31000


def test_that_huge_pages_are_unmapped_whole_amid_small_ones(lab):
    memory, builder = lab
    builder.map(0x1FF000, 0x10000)
    builder.map(0x200000, 0x200000, 2, 1 << 21)
    builder.map(0x600000, 0x10000)
    builder.unmap(0x1FF000, 1 + 512)
    assert scan(memory.read, builder.mode, builder.root_gpa).gva.tolist() == [0x400000, 0x600000]


@pytest.mark.parametrize(
    ("gva", "nr_pages", "message"),
    [
        (0x403000, 2, r"gva 0x404000 is not mapped: PT\[0x4\] at gpa 0x103020 is 0x0"),
        (0x900000000, 1, r"gva 0x900000000 is not mapped: PDPT\[0x24\]"),
        (0x600000, 1, "gva 0x600000 is part of a page of 0x200000 bytes"),
        (0x601000, 512, "part of a page"),
        (0x400000, 0, "wants at least one page"),
        (0x400001, 1, "not aligned"),
        (1 << 47, 1, "not canonical"),
    ],
)
def test_that_unmap_and_protect_refuse_what_is_not_there(lab, gva, nr_pages, message):
    memory, builder = lab
    builder.map(0x400000, 0x10000, 4)
    builder.map(0x600000, 0x200000, 1, 1 << 21)
    before = bytes(memory.data)
    for call in (
        lambda: builder.unmap(gva, nr_pages),
        lambda: builder.protect(gva, nr_pages, writable=False),
    ):
        with pytest.raises(InvalidState, match=message):
            call()
    assert memory.data == before


def test_that_protect_changes_the_named_flags_only():
    memory = Memory()
    builder = memory.builder(C51)
    builder.map(0x400000, 0x10000, 3, user=True, c=True, accessed=True)
    builder.protect(0x401000, 1, writable=False, nx=True, c=False)
    flags = {
        "writable": True,
        "user": True,
        "accessed": True,
        "dirty": False,
        "nx": False,
        "c": True,
    }
    found = [
        walk(memory.read, C51, builder.root_gpa, gva).flags
        for gva in (0x400000, 0x401000, 0x402000)
    ]
    assert found == [flags, flags | {"writable": False, "nx": True, "c": False}, flags]


def test_that_2048_pages_are_mapped_in_about_a_millisecond():
    times = []
    for _ in range(20):
        builder = Memory().builder()
        start = time.perf_counter()
        builder.map(0x400000, 0, 2048)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3


class Cpu:
    """Unicorn's MMU over a memory: one load or store at a time, and what became of it."""

    def __init__(self, memory, root):
        self.uc, self.vectors, size = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64), [], len(memory.data)
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.keep = (ctypes.c_char * size).from_buffer(memory.data)
        self.uc.mem_map_ptr(0, size, uc.UC_PROT_ALL, ctypes.addressof(self.keep))
        self.uc.msr_write(0xC0000080, 0xD00)
        self.uc.reg_write(x86.UC_X86_REG_CR4, self.uc.reg_read(x86.UC_X86_REG_CR4) | 0x220)
        self.uc.reg_write(x86.UC_X86_REG_CR3, root)
        self.uc.reg_write(x86.UC_X86_REG_CR0, 0x80010021)
        self.uc.hook_add(uc.UC_HOOK_INTR, self.interrupt)

    def interrupt(self, engine, vector, _data):
        self.vectors.append(vector)
        engine.emu_stop()

    def access(self, gva, offset, value=0):
        """Run LOAD (offset 0) or STORE (offset 3): rax, or "#PF", or "no memory"."""
        self.uc.reg_write(x86.UC_X86_REG_RBX, gva)
        self.uc.reg_write(x86.UC_X86_REG_RAX, value)
        try:
            self.uc.emu_start(CODE_GVA + offset, 0, count=1)
        except uc.UcError:
            return "no memory"
        return {(): self.uc.reg_read(x86.UC_X86_REG_RAX), (14,): "#PF"}[tuple(self.vectors)]


def with_code(memory, root):
    """Maps LOAD and STORE with tables that the hostile ones do not point to."""
    memory.next_table = CODE_GPA + 0x1000
    memory.builder(root=root).map(CODE_GVA, CODE_GPA)
    memory.write(CODE_GPA, LOAD + STORE)


@pytest.mark.parametrize(
    ("page_size", "gpa"), [(1 << 12, 0x20000), (1 << 21, 0x200000), (1 << 30, 0)]
)
@pytest.mark.parametrize("writable", [True, False])
def test_that_a_cpu_loads_and_stores_through_built_pages_and_marks_them(page_size, gpa, writable):
    memory = Memory(8 << 20)
    builder = memory.builder()
    gva = 0x7AC0000000
    with_code(memory, builder.root_gpa)
    builder.map(gva, gpa, 1, page_size, writable=writable, nx=True)
    memory.write(gpa + 0x18, struct.pack("<Q", 0x1122334455667788))
    cpu = Cpu(memory, builder.root_gpa)

    def flag(name):
        return walk(memory.read, builder.mode, builder.root_gpa, gva).flags[name]

    assert cpu.access(gva + 0x18, 0) == 0x1122334455667788
    assert flag("accessed")
    assert not flag("dirty")
    assert cpu.access(gva + 0x18, 3, 99) == (99 if writable else "#PF")
    assert flag("dirty") == writable
    assert memory.read(gpa + 0x18, 8) == struct.pack("<Q", 99 if writable else 0x1122334455667788)


@settings(max_examples=40, deadline=None)
@given(
    hostile_tables,
    st.sampled_from([0, 1 << 12, 1 << 21, 511 << 21, 3 << 30, 255 << 39, 256 << 39]),
    st.booleans(),
)
def test_that_a_cpu_agrees_with_the_walker_on_hostile_tables(tables, other, store):
    memory = load(tables, 8 << 20)
    with_code(memory, ROOT)
    mode = X86_PXXV48_4K.with_maxphyaddr(40)
    pristine = memory.read(0, 0x20000)
    leaves, bad = brute_force(memory, maxphyaddr=40)
    for gva in {mode.extend(other), *[*leaves][:6], *bad[:3]} - {CODE_GVA}:
        memory.write(0, pristine)
        memory.write(0x10008, b"in slot1")
        found = walk(memory.read, mode, ROOT, gva + 8)
        before = (
            memory.read(found.gpa, 8)
            if found.gpa is not None and found.gpa < len(memory.data)
            else b""
        )
        got = Cpu(memory, ROOT).access(gva + 8, 3 * store, 7)
        check_access(found, before, got, store, memory)


def check_access(found, before, got, store, memory):
    if found.gpa is None:
        assert got == "#PF" or (got == "no memory" and found.steps[-1].kind == "outside")
    elif store and not found.flags["writable"]:
        assert got == "#PF"
    elif not before:
        assert got == "no memory"
    elif found.gpa >= 0x6000:  # below lie the tables, in which the walk itself sets bits
        assert got == (7 if store else struct.unpack("<Q", before)[0])
        assert memory.read(found.gpa, 8) == (struct.pack("<Q", 7) if store else before)


# RISC-V privileged spec 10.4: the frame is shifted, a pointer is an entry with R = W = X = 0, and X
# grants what nx denies.
SV39 = PagingMode(
    "riscv/SV39",
    (Level("L2", 30, 9, leaf=HUGE), Level("L1", 21, 9, leaf=HUGE), Level("L0", 12, 9, leaf=LAST)),
    present=Match(1),
    pa=Field(((1 << 44) - 1) << 10, -2),
    table=Match(0b1110, 0),
    inverted=8,
    flags={"readable": 2, "writable": 4, "nx": 8, "user": 16, "accessed": 64, "dirty": 128},
    byteorder="big",
)


@pytest.mark.parametrize("size", SV39.page_sizes)
def test_that_the_vocabulary_also_describes_another_architecture(size):
    memory = Memory()
    builder = memory.builder(SV39)
    gva = 0xFFFFFFFF_C0000000
    builder.map(gva, 1 << 40, 2 if size < 1 << 30 else 1, size, readable=True, nx=True)
    builder.protect(gva, size // 4096, nx=False, writable=False)
    found, table = (
        walk(memory.read, SV39, builder.root_gpa, gva),
        scan(memory.read, SV39, builder.root_gpa),
    )
    assert found.gpa == 1 << 40 == table.gpa[0]
    assert table.gva[0] == gva
    assert found.page_size == size
    assert [name for name, on in found.flags.items() if on] == ["readable"]
    assert table.df.writable.tolist()[0] is False
    assert found.steps[-1].entry == 1 << 38 | 8 | 2 | 1


def test_that_user_pages_come_out_with_the_user_bit_at_every_level(lab):
    memory, builder = lab
    builder.map(0x400000, 0x10000, user=True)
    steps = walk(memory.read, builder.mode, builder.root_gpa, 0x400000).steps
    assert all(step.entry & U and step.entry & W for step in steps)
