"""What changed between two snapshots, merged into ranges."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from tables import ROOT, A, D, Memory, P, W, hostile_tables, load

from labkit.arch.x86 import X86_PXXV48_4K, X86_PXXV57_4K
from labkit.errors import InvalidState
from labkit.paging.diff import diff
from labkit.paging.scan import scan

C51 = X86_PXXV48_4K.with_c_bit(51)


@pytest.fixture
def lab():
    """A builder with eight pages at 0x400000, and a function that takes a snapshot."""
    memory = Memory()
    builder = memory.builder(C51)
    builder.map(0x400000, 0x10000, 8, c=True)
    return builder, lambda: scan(memory.read, C51, builder.root_gpa)


def rows(frame):
    return frame[["sign", "gva", "gva_end", "nr_pages", "before", "after"]].values.tolist()


def test_that_equal_snapshots_differ_in_nothing(lab):
    _builder, snapshot = lab
    assert snapshot().diff(snapshot()).empty


def test_that_new_pages_have_a_plus(lab):
    builder, snapshot = lab
    before = snapshot()
    builder.map(0x500000, 0x20000, 3, nx=True)
    assert rows(snapshot().diff(before)) == [["+", 0x500000, 0x502FFF, 3, "", "gpa 0x20000 P W NX"]]
    assert rows(before.diff(snapshot())) == [["-", 0x500000, 0x502FFF, 3, "gpa 0x20000 P W NX", ""]]


def test_that_changed_rights_have_a_tilde(lab):
    builder, snapshot = lab
    before = snapshot()
    builder.protect(0x402000, 2, c=False)
    builder.protect(0x404000, 1, writable=False)
    assert rows(snapshot().diff(before)) == [
        ["~", 0x402000, 0x403FFF, 2, "gpa 0x12000 P W C", "gpa 0x12000 P W"],
        ["~", 0x404000, 0x404FFF, 1, "gpa 0x14000 P W C", "gpa 0x14000 P C"],
    ]


def test_that_a_page_moved_elsewhere_has_a_tilde(lab):
    builder, snapshot = lab
    before = snapshot()
    builder.unmap(0x400000, 1)
    builder.map(0x400000, 0x30000, c=True)
    assert rows(snapshot().diff(before)) == [
        ["~", 0x400000, 0x400FFF, 1, "gpa 0x10000 P W C", "gpa 0x30000 P W C"]
    ]


def test_that_a_split_huge_page_is_a_minus_and_a_plus():
    memory = load(
        {
            ROOT: {0: 0x2000 | P | W},
            0x2000: {0: 0x3000 | P | W},
            0x3000: {1: 0x200000 | P | W | 1 << 7},
        }
    )
    before = scan(memory.read, X86_PXXV48_4K, ROOT)
    memory.put(0x3000, 1, 0x4000 | P | W)
    for i in range(512):
        memory.put(0x4000, i, 0x200000 + 4096 * i | P | W)
    changes = diff(before, scan(memory.read, X86_PXXV48_4K, ROOT))
    assert sorted(rows(changes)) == [
        ["+", 0x200000, 0x3FFFFF, 512, "", "gpa 0x200000 P W"],
        ["-", 0x200000, 0x3FFFFF, 1, "gpa 0x200000 P W", ""],
    ]


def test_that_accessed_and_dirty_count_as_changes(lab):
    builder, snapshot = lab
    before = snapshot()
    builder.protect(0x407000, 1, accessed=True, dirty=True)
    assert rows(snapshot().diff(before)) == [
        ["~", 0x407000, 0x407FFF, 1, "gpa 0x17000 P W C", "gpa 0x17000 P W A D C"]
    ]


def test_that_a_right_taken_at_an_upper_level_changes_the_pages_below():
    memory = load(
        {
            gpa: {0: gpa + 0x1000 | P | W | (A | D if gpa == 0x4000 else 0)}
            for gpa in (ROOT, 0x2000, 0x3000, 0x4000)
        }
    )
    before = scan(memory.read, X86_PXXV48_4K, ROOT)
    memory.put(0x2000, 0, 0x3000 | P)
    after = scan(memory.read, X86_PXXV48_4K, ROOT)
    assert rows(after.diff(before)) == [
        ["~", 0, 0xFFF, 1, "gpa 0x5000 P W A D", "gpa 0x5000 P A D"]
    ]


def test_that_unlike_formats_are_not_compared():
    memory = Memory()
    with pytest.raises(InvalidState, match="cannot compare x86/PXXV57_4K with x86/PXXV48_4K"):
        scan(memory.read, X86_PXXV48_4K, ROOT).diff(scan(memory.read, X86_PXXV57_4K, ROOT))


@settings(max_examples=60, deadline=None)
@given(hostile_tables, hostile_tables)
def test_that_the_changes_turn_one_snapshot_into_the_other(tables, others):
    before, after = (scan(load(each).read, X86_PXXV48_4K, ROOT) for each in (tables, others))
    state = {(row.gva, row.page_size): words(before, row) for row in before.leaves.itertuples()}
    for row in after.diff(before).itertuples():
        for i in range(row.nr_pages):
            key = row.gva + i * row.page_size, row.page_size
            assert (state.pop(key, "") == "") == (row.sign == "+") == (row.before == "")
            if row.after:
                gpa, *flags = row.after.split()[1:]
                state[key] = [int(gpa, 16) + i * row.page_size, *flags]
    assert state == {
        (row.gva, row.page_size): words(after, row) for row in after.leaves.itertuples()
    }


def words(table, row):
    return [row.gpa, "P", *(table.mode.letters(int(table.rights[row.Index])).split())]
