"""One address through x86 tables: what a CPU finds, and the words for what it does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import (
    NX,
    PS,
    ROOT,
    TARGETS,
    A,
    D,
    Memory,
    P,
    U,
    W,
    brute_force,
    chain,
    hostile_tables,
    load,
)

from labkit.arch.x86 import X86_PXXV48_4K, X86_PXXV57_4K
from labkit.errors import InvalidState, PageFault
from labkit.paging.walk import walk

GVA = 0x201234  # PML4[0] PDPT[0] PD[1] PT[1]
TABLES = (0x2000 | P | W | U, 0x3000 | P | W | U, 0x4000 | P | W | U)
C51 = X86_PXXV48_4K.with_c_bit(51)


def walked(*entries, gva=GVA, mode=X86_PXXV48_4K):
    memory = Memory(1 << 16)
    chain(memory, *entries, gva=gva)
    return walk(memory.read, mode, ROOT, gva)


@pytest.mark.parametrize(
    ("entries", "gpa", "size"),
    [
        ((*TABLES, 0x5000 | P), 0x5234, 1 << 12),
        ((*TABLES[:2], 0x600000 | P | PS), 0x601234, 1 << 21),
        (
            (*TABLES[:2], 0x600000 | P | PS | 1 << 12),
            0x601234,
            1 << 21,
        ),  # bit 12 of a huge leaf is PAT
        ((TABLES[0], 0x40000000 | P | PS), 0x40201234, 1 << 30),
        ((*TABLES, 0x5000 | P | PS), 0x5234, 1 << 12),  # bit 7 of a PT entry is PAT
    ],
)
def test_that_leaves_of_every_size_translate(entries, gpa, size):
    found = walked(*entries)
    assert (found.gpa, found.page_size, found.problem, found.steps[-1].kind) == (
        gpa,
        size,
        None,
        "leaf",
    )
    assert found.steps[-1].next_gpa == gpa & -size
    assert len(found.steps) == len(entries)


@pytest.mark.parametrize(
    ("entries", "kind", "problem"),
    [
        ((0,), "hole", "PML4[0x0] at gpa 0x1000 is not present (entry 0x0)"),
        ((*TABLES[:2], 0), "hole", "PD[0x1] at gpa 0x3008 is not present (entry 0x0)"),
        ((*TABLES, 0xABC0), "hole", "PT[0x1] at gpa 0x4008 is not present (entry 0xabc0)"),
        (
            (0x2000 | P | PS,),
            "reserved",
            "PML4[0x0] at gpa 0x1000 is a leaf, which PML4 may not hold (entry 0x2081)",
        ),
        (
            (*TABLES[:2], 0x602000 | P | PS),
            "reserved",
            "PD[0x1] at gpa 0x3008 has reserved bits set (entry 0x602081)",
        ),
        (
            (TABLES[0], 0x40200000 | P | PS),
            "reserved",
            "PDPT[0x0] at gpa 0x2000 has reserved bits set (entry 0x40200081)",
        ),
        (
            (TABLES[0], 0x99000 | P),
            "outside",
            "PDPT[0x0] at gpa 0x2000 points to gpa 0x99000, outside guest memory (entry 0x99001)",
        ),
    ],
)
def test_that_a_walk_which_fails_is_a_value_with_a_sentence(entries, kind, problem):
    found = walked(*entries)
    problem = f"gva 0x201234: {problem}"
    assert (found.gpa, found.page_size, found.flags, found.steps[-1].kind, found.problem) == (
        None,
        0,
        {},
        kind,
        problem,
    )
    with pytest.raises(PageFault) as caught:
        found.require()
    assert str(caught.value) == problem
    assert caught.value.gva == GVA
    assert caught.value.walk is found


@pytest.mark.parametrize(
    ("mode", "gva", "problem"),
    [
        (
            X86_PXXV48_4K,
            1 << 47,
            "gva 0x800000000000 is not canonical: bits 63..48 must be equal to bit 47",
        ),
        (
            X86_PXXV48_4K,
            0xFFFF7FFFFFFFFFFF,
            "gva 0xffff7fffffffffff is not canonical: bits 63..48 must be equal to bit 47",
        ),
        (
            X86_PXXV57_4K,
            1 << 56,
            "gva 0x100000000000000 is not canonical: bits 63..57 must be equal to bit 56",
        ),
        (X86_PXXV48_4K, -1, "gva -0x1 is not a 64-bit address"),
        (X86_PXXV48_4K, 1 << 64, "gva 0x10000000000000000 is not a 64-bit address"),
    ],
)
def test_that_an_address_no_cpu_translates_is_a_problem_sentence(mode, gva, problem):
    found = walk(Memory(1 << 16).read, mode, ROOT, gva)
    assert (found.problem, found.steps, found.gpa) == (problem, (), None)


def test_that_a_root_outside_memory_is_a_problem_sentence():
    found = walk(Memory(1 << 16).read, X86_PXXV48_4K, 0x7FF00018, 0)
    assert found.problem == "gva 0x0: the root table at gpa 0x7ff00000 is outside guest memory"
    assert found.root == 0x7FF00000


@pytest.mark.parametrize(
    ("level", "change", "flag", "value"),
    [
        *((level, W, "writable", False) for level in range(4)),
        *((level, U, "user", False) for level in range(4)),
        *((level, NX, "nx", True) for level in range(4)),
        (0, A, "accessed", False),
        (3, A, "accessed", True),
        (3, D, "dirty", True),
    ],
)
def test_that_effective_rights_join_all_levels(level, change, flag, value):
    entries = [*TABLES, 0x5000 | P | W | U]
    before = walked(*entries).flags
    entries[level] ^= change
    after = walked(*entries).flags
    assert before == {
        "writable": True,
        "user": True,
        "accessed": False,
        "dirty": False,
        "nx": False,
    }
    assert after == before | {flag: value}


@pytest.mark.parametrize("c_bit", [47, 51, 40])
def test_that_a_c_bit_is_a_flag_and_no_part_of_any_frame(c_bit):
    c = 1 << c_bit
    found = walk(walked_memory(c).read, X86_PXXV48_4K.with_c_bit(c_bit), ROOT | c, GVA)
    assert found.gpa == 0x5234
    assert found.flags["c"]
    assert "encrypted (C=1)" in found.status
    assert found.root == ROOT
    assert walk(walked_memory(c).read, X86_PXXV48_4K, ROOT, GVA).steps[0].kind == "outside"


def walked_memory(extra):
    memory = Memory(1 << 16)
    chain(memory, *(entry | extra for entry in (*TABLES, 0x5000 | P)), gva=GVA)
    return memory


def test_that_a_c_bit_in_a_huge_leaf_is_not_reserved():
    assert walked(*TABLES[:2], 0x600000 | P | PS | 1 << 51, mode=C51).gpa == 0x601234


@pytest.mark.parametrize("c_bit", [0, 11, 52, 63])
def test_that_a_c_bit_outside_the_frame_bits_is_refused(c_bit):
    with pytest.raises(InvalidState, match=f"bit {c_bit} cannot be the C-bit"):
        X86_PXXV48_4K.with_c_bit(c_bit)


def test_that_a_second_c_bit_is_refused():
    with pytest.raises(InvalidState, match="bit 47"):
        C51.with_c_bit(47)


@pytest.mark.parametrize("level", range(4))
def test_that_frame_bits_above_maxphyaddr_are_reserved_but_for_the_c_bit(level):
    entries = [*TABLES, 0x5000 | P]
    entries[level] |= 1 << 47
    small = X86_PXXV48_4K.with_maxphyaddr(40)
    assert walked(*entries, mode=small).steps[-1].kind == "reserved"
    assert len(walked(*entries, mode=small).steps) == level + 1
    assert walked(*entries, mode=small.with_c_bit(47)).gpa == 0x5234


def test_that_five_levels_are_walked():
    memory = Memory(1 << 16)
    gva = 0x00FF000000201234
    for depth, entry in enumerate((*TABLES, 0x5000 | P | W, 0x7000 | P)):
        memory.put(ROOT + 0x1000 * depth, gva >> (48 - 9 * depth) & 511, entry)
    found = walk(memory.read, X86_PXXV57_4K, ROOT, gva)
    assert found.gpa == 0x7234
    assert [str(step) for step in found.steps] == [
        "PML5[0xff]",
        "PML4[0x0]",
        "PDPT[0x0]",
        "PD[0x1]",
        "PT[0x1]",
    ]


def test_that_the_text_is_one_line_per_entry_and_the_result():
    assert walked(*TABLES, 0x5000 | P | W | A | NX | 1 << 51, mode=C51).text.splitlines() == [
        "PML4[0x000] 0x1000 -> 0x2000 P W U",
        "PDPT[0x000] 0x2000 -> 0x3000 P W U",
        "PD[0x001]   0x3008 -> 0x4000 P W U",
        "PT[0x001]   0x4008 -> 0x5000 P W A NX C",
        "gva 0x201234 is gpa 0x5234: encrypted (C=1), writable, no execute. "
        "Four entries read, all present.",
    ]
    assert walked(*TABLES[:2], 0).text.splitlines()[2:] == [
        "PD[0x001]   0x3008 -> not present (entry 0x0)",
        "gva 0x201234: PD[0x1] at gpa 0x3008 is not present (entry 0x0).",
    ]
    assert (
        walked(0x99000 | P).text.splitlines()[0]
        == "PML4[0x000] 0x1000 -> 0x99000 P  outside guest memory"
    )


def test_that_the_repr_is_one_line():
    assert repr(walked(*TABLES, 0x5000 | P | U)) == (
        "<Walk x86/PXXV48_4K: gva 0x201234 is gpa 0x5234: read only, executable, user. "
        "Four entries read, all present.>"
    )


index = st.sampled_from([0, 1, 2, 255, 511])
interesting = st.tuples(index, index, index, index).map(
    lambda at: sum(i << s for i, s in zip(at, (12, 21, 30, 39), strict=True))
)


@settings(max_examples=150, deadline=None)
@given(
    hostile_tables,
    st.sampled_from([None, 51]),
    st.lists(interesting | st.integers(-5, (1 << 64) + 5), max_size=8),
)
def test_that_walks_of_hostile_tables_never_raise_and_are_right(tables, c_bit, gvas):
    memory = load(tables)
    mode = X86_PXXV48_4K.with_c_bit(c_bit) if c_bit else X86_PXXV48_4K
    leaves, bad = brute_force(memory, c_bit=c_bit)
    for gva in [*gvas, *leaves, *(gva + size - 1 for gva, (_, size, *_rest) in leaves.items())]:
        gva = mode.extend(gva) if 0 <= gva < 1 << 48 else gva
        page = next(
            (
                start
                for start in (gva & -4096, gva & -(1 << 21), gva & -(1 << 30))
                if start in leaves and gva - start < leaves[start][1]
            ),
            None,
        )
        found = walk(memory.read, mode, ROOT, gva)
        assert (found.gpa is None) == (page is None)
        assert found.text
        assert repr(found)
        if page is not None:
            flags = tuple(
                found.flags[name] for name in ("writable", "user", "nx", "accessed", "dirty")
            )
            assert (found.gpa - (gva - page), found.page_size, *flags) == leaves[page]
    assert all(walk(memory.read, mode, ROOT, gva).problem for gva in bad)


@given(st.integers(0, (1 << 48) - 1), st.sampled_from(TARGETS[5:8]))
def test_that_a_hole_names_the_first_entry_that_is_missing(gva, target):
    found = walk(
        load({ROOT: {gva >> 39: target}}).read, X86_PXXV48_4K, ROOT, X86_PXXV48_4K.extend(gva)
    )
    assert found.steps[-1].kind == "hole"
    assert f"PML4[{gva >> 39:#x}] at gpa {ROOT + 8 * (gva >> 39):#x}" in found.problem
