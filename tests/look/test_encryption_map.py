"""Page tables against memory: what the map says, where it cuts, and what it refuses."""

from __future__ import annotations

import encryption_sample as secrets
import numpy as np
import pytest
import views_sample as sample
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.arch.desc import PagingMode
from labkit.arch.x86 import X86_PXXV48_4K
from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap, PageState, PageStates
from labkit.look.encryption_map import encryption_map
from labkit.look.snapshots import MemoryMap, MemoryRange
from labkit.paging.build import PageTableBuilder
from labkit.paging.scan import PageTable, scan

MODES = [
    X86_PXXV48_4K.with_c_bit(47),
    X86_PXXV48_4K.with_c_bit(51),
    X86_PXXV48_4K.with_c_bit(47, inverted=True),
]
NR_PAGES = 64  # of the small memory; tables lie from page 48 on


def mapped(mode: PagingMode, *pages: tuple[int, int, bool]) -> PageTable:
    """Page tables with these (gva, gpa, encrypted) pages."""
    memory = bytearray(NR_PAGES * 4096)
    tables = iter(range(48 * 4096, NR_PAGES * 4096, 4096))

    def read(gpa: int, n: int) -> bytes:
        return bytes(memory[gpa : gpa + n])

    def write(gpa: int, data: bytes) -> None:
        memory[gpa : gpa + len(data)] = data

    build = PageTableBuilder(read, write, lambda _size: next(tables), mode)
    for gva, gpa, secret in pages:
        build.map(gva, gpa, c=secret)
    return scan(read, mode, build.root_gpa)


def look(table: PageTable, state: PageState, protection: str = "sev") -> EncryptionMap:
    """The map of a memory whose first 48 pages are in one state, the tables' own private."""
    states = np.full(NR_PAGES, PageState.PRIVATE, np.uint8)
    states[:48] = state
    return encryption_map(table, [PageStates(0, states)], protection=protection)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("secret", "state", "protection", "says"),
    [
        (True, PageState.PRIVATE, "sev", ""),
        (False, PageState.SHARED, "sev", ""),
        (False, PageState.UNLAUNCHED, "snp", ""),
        (True, PageState.SHARED, "sev", "memory still plaintext"),
        (False, PageState.PRIVATE, "sev-es", "memory still ciphertext"),
        (True, PageState.UNLAUNCHED, "sev", "never launched"),
        (True, PageState.UNVALIDATED, "snp", "PVALIDATE"),
        (True, PageState.FOREIGN, "snp", "somebody else"),
        (True, PageState.SHARED, "snp", "#NPF"),
        (False, PageState.PRIVATE, "snp", "#NPF"),
    ],
)
def test_that_a_page_is_judged_by_what_both_say(
    mode: PagingMode, secret: bool, state: PageState, protection: str, says: str
) -> None:
    found = look(mapped(mode, (0x400000, 0x3000, secret)), state, protection)
    part = found.at(0x3ABC)
    assert part is not None and part.gvas == (0x400000,) and part.nr_pages == 1
    assert says in f"{part.problem}. {part.why}"
    if not says:
        assert not part.problem
        return
    assert part.problem.startswith(mode.c_word(secret))
    assert found.disagreements == (part,)
    assert part.problem in found.status


def test_that_a_page_mapped_both_ways_disagrees_whatever_it_is() -> None:
    leaves = ((0x400000, 0x3000, True), (0x500000, 0x3000, False), (0x600000, 0x3000, True))
    part = look(mapped(MODES[1], *leaves), PageState.PRIVATE).at(0x3000)
    assert part is not None
    assert (part.tables, part.nr_mappings) == ("both", 3)
    assert part.gvas == (0x400000, 0x500000)
    assert "gva 0x400000 maps it with C=1, gva 0x500000 with C=0" in part.why


def test_that_page_tables_in_plaintext_disagree_because_walks_are_private() -> None:
    table = mapped(MODES[0], (0x400000, 0x3000, True))
    found = encryption_map(table, [PageStates.of(0, np.arange(NR_PAGES) < 48)])
    assert [part.gpa // 4096 for part in found.disagreements] == [48]
    assert "page table in plaintext" in found.status


@pytest.mark.parametrize(
    ("nr_bad", "says"),
    [
        (1, "it will read noise."),
        (2, "noise. 1 more range disagrees."),
        (3, "noise. 2 more ranges disagree."),
    ],
)
def test_that_the_status_counts_what_else_disagrees(nr_bad: int, says: str) -> None:
    leaves = [(0x400000 + 0x2000 * page, 0x2000 * page, True) for page in range(nr_bad)]
    assert look(mapped(MODES[1], *leaves), PageState.SHARED).status.endswith(says)


@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 47), st.booleans()),
        max_size=30,
        unique_by=lambda page: page[0],
    ),
    st.lists(st.sampled_from(PageState), min_size=NR_PAGES, max_size=NR_PAGES),
)
@settings(max_examples=60, deadline=None)
def test_that_ranges_tile_memory_and_agree_with_a_look_at_every_page(
    pages: list[tuple[int, int, bool]], states: list[PageState]
) -> None:
    leaves = [(0x400000 + 4096 * page, 4096 * gfn, secret) for page, gfn, secret in pages]
    low = PageStates(0, np.array(states[:20], np.uint8))
    high = PageStates(30 * 4096, np.array(states[30:], np.uint8))
    found = encryption_map(mapped(MODES[1], *leaves), [low, high])

    ends = [part.end for part in found.ranges[:-1]]
    starts = [high.gpa if end == low.end else end for end in ends]
    assert [part.gpa for part in found.ranges] == [0, *starts]

    for gfn in (*range(20), *range(30, NR_PAGES)):
        gpa = 4096 * gfn
        part = found.at(gpa)
        assert part is not None and part.memory == states[gfn]
        encrypted = [gva for gva, at, secret in leaves if at == gpa and secret]
        shared = [gva for gva, at, secret in leaves if at == gpa and not secret]
        assert part.nr_mappings == len(encrypted) + len(shared)
        lowest = [min(gvas) for gvas in (encrypted, shared) if gvas]
        assert [gva + gpa - part.gpa for gva in part.gvas] == lowest


def test_that_neighbours_with_different_uses_are_ranges_of_their_own() -> None:
    uses = (MemoryRange(0x1000, 2, "code"), MemoryRange(0x3000, 1, "data"))
    memory = MemoryMap((), uses, 0)
    states = PageStates.of(0, np.zeros(NR_PAGES, bool))
    found = encryption_map(mapped(MODES[1]), [states], memory)
    shown = [(part.gpa, part.nr_pages, part.what) for part in found.ranges[:4]]
    assert shown == [(0, 1, ""), (0x1000, 2, "code"), (0x3000, 1, "data"), (0x4000, 44, "")]


def test_that_the_table_has_one_row_a_range() -> None:
    found = secrets.encryption()
    df = found.df
    assert len(df) == len(found.ranges)
    assert df.nr_pages.sum() == 512
    assert list(df[df.problem != ""].gpa) == [0xD4000, 0x102000]
    assert list(df[df.what == "code"].gva) == [0x400000]
    assert df.gva.isna().sum() == sum(not part.gvas for part in found.ranges)
    other = look(sample.page_table(51), PageState.SHARED).df
    assert list(other.columns) == list(df.columns)
    assert repr(found).count("\n") == 0


def test_that_an_empty_memory_has_an_empty_map() -> None:
    found = encryption_map(mapped(MODES[0]), [])
    assert found.ranges == () and found.df.empty and found.at(0) is None
    assert "agree everywhere" in found.status


def test_that_tables_which_point_to_themselves_are_mapped_too() -> None:
    root = np.zeros(512, np.uint64)
    root[:] = 0x3
    table = scan(lambda gpa, n: root.tobytes()[:n] if gpa < 4096 else b"", MODES[1], 0)
    found = encryption_map(table, [PageStates.of(0, np.ones(16, bool))])
    part = found.at(0)
    assert part is not None and part.nr_mappings == len(table) > 100_000
    assert part.problem == "C=0, memory still ciphertext"


@pytest.mark.parametrize(
    "states", [np.zeros(4, np.int64), np.zeros((2, 2), np.uint8), np.full(4, 9, np.uint8)]
)
def test_that_states_of_the_wrong_kind_are_refused(states: np.ndarray) -> None:
    with pytest.raises(InvalidState, match="page states at gpa 0x1000"):
        PageStates(0x1000, states)


def test_that_facts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidState, match="gpa 0x0"):
        PageStates.of(0, np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(InvalidState, match="gpa 0x10"):
        PageStates.of(0x10, np.ones(3, bool))
    overlapping = [PageStates.of(0, np.ones(3, bool)), PageStates.of(0x2000, np.ones(3, bool))]
    with pytest.raises(InvalidState, match="begin inside"):
        encryption_map(mapped(MODES[0]), overlapping)
    with pytest.raises(InvalidState, match="no C-bit"):
        encryption_map(sample.page_table(), [])
