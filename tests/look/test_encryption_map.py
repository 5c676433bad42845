"""Page tables against memory, page by page: what the map says, where it cuts, and what it refuses."""

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
from labkit.look.eyes import PageEyes
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
    memory, tables = bytearray(NR_PAGES * 4096), iter(range(48 * 4096, NR_PAGES * 4096, 4096))

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
    assert says in f"{part.problem}. {part.why}" and bool(part.problem) == bool(says)
    assert not says or (
        part.problem.startswith(mode.c_word(secret))
        and found.disagreements == (part,)
        and part.problem in found.status
    )


def test_that_a_page_mapped_both_ways_disagrees_whatever_it_is() -> None:
    found = look(
        mapped(
            MODES[1], (0x400000, 0x3000, True), (0x500000, 0x3000, False), (0x600000, 0x3000, True)
        ),
        PageState.PRIVATE,
    )
    part = found.at(0x3000)
    assert part is not None and (part.tables, part.nr_mappings, part.gvas) == (
        "both",
        3,
        (0x400000, 0x500000),
    )
    assert "gva 0x400000 maps it with C=1, gva 0x500000 with C=0" in part.why


def test_that_page_tables_in_plaintext_disagree_because_walks_are_private() -> None:
    table = mapped(MODES[0], (0x400000, 0x3000, True))
    found = encryption_map(table, [PageStates.of(0, np.arange(NR_PAGES) < 48)])
    assert {part.gpa // 4096 for part in found.disagreements} == {
        48
    } and "page table in plaintext" in found.status


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
    table = mapped(
        MODES[1], *((0x400000 + 4096 * page, gpa * 4096, secret) for page, gpa, secret in pages)
    )
    found = encryption_map(
        table,
        [
            PageStates(0, np.array(states[:20], np.uint8)),
            PageStates(30 * 4096, np.array(states[30:], np.uint8)),
        ],
    )
    assert [part.gpa for part in found.ranges[1:]] == [
        part.gpa + 4096 * part.nr_pages
        if part.gpa + 4096 * part.nr_pages != 20 * 4096
        else 30 * 4096
        for part in found.ranges[:-1]
    ]
    for gpa in (*range(20), *range(30, NR_PAGES)):
        part, here = (
            found.at(gpa * 4096),
            sorted((0x400000 + 4096 * page, secret) for page, at, secret in pages if at == gpa),
        )
        assert part is not None and part.memory == states[gpa] and part.nr_mappings == len(here)
        lowest = [
            next((gva for gva, secret in here if secret is which), None) for which in (True, False)
        ]
        assert [gva + gpa * 4096 - part.gpa for gva in part.gvas] == [
            gva for gva in lowest if gva is not None
        ]


def test_that_the_table_has_one_row_a_range() -> None:
    found = secrets.encryption()
    df = found.df
    assert (
        len(df) == len(found.ranges)
        and df.nr_pages.sum() == 512
        and list(df[df.problem != ""].gpa) == [0xD4000, 0x102000]
    )
    assert list(df[df.what == "code"].gva) == [0x400000] and df.gva.isna().sum() == sum(
        not part.gvas for part in found.ranges
    )
    assert repr(found).count("\n") == 0 and len(
        look(sample.page_table(51), PageState.SHARED).df.columns
    ) == len(df.columns)


def test_that_an_empty_memory_has_an_empty_map() -> None:
    found = encryption_map(mapped(MODES[0]), [])
    assert (
        found.ranges == ()
        and found.df.empty
        and "agree everywhere" in found.status
        and found.at(0) is None
    )


def test_that_tables_which_point_to_themselves_are_mapped_too() -> None:
    root = np.zeros(512, np.uint64)
    root[:] = 0x3
    table = scan(lambda gpa, n: root.tobytes()[:n] if gpa < 4096 else b"", MODES[1], 0)
    found = encryption_map(table, [PageStates.of(0, np.ones(16, bool))])
    part = found.at(0)
    assert (
        part is not None
        and part.nr_mappings == len(table) > 100_000
        and part.problem == "C=0, memory still ciphertext"
    )


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
    with pytest.raises(InvalidState, match="begin inside"):
        encryption_map(
            mapped(MODES[0]),
            [PageStates.of(0, np.ones(3, bool)), PageStates.of(0x2000, np.ones(3, bool))],
        )
    with pytest.raises(InvalidState, match="no C-bit"):
        encryption_map(sample.page_table(), [])


@pytest.mark.parametrize(
    ("host", "guest", "gpa"),
    [
        (b"", b"", 0),
        (bytes(16), bytes(32), 0),
        (bytes(15), bytes(15), 0),
        (bytes(16), bytes(16), 8),
        (bytes(1 << 17), bytes(1 << 17), 0),
    ],
)
def test_that_eyes_that_do_not_see_the_same_blocks_are_refused(
    host: bytes, guest: bytes, gpa: int
) -> None:
    with pytest.raises(InvalidState, match="16-byte blocks"):
        PageEyes(gpa, host, guest)


def test_that_one_byte_for_the_guest_is_a_block_for_the_host() -> None:
    page = secrets.eyes(at=(0x238,))
    host, guest = page.eyes
    assert (
        guest.changed.sum() == 1
        and host.changed.any(axis=1).tolist() == guest.changed.any(axis=1).tolist()
        and host.changed.sum() > 8
    )
    assert host.entropy > 7.9 > 3 > guest.entropy and host.nr_different == 256 > guest.nr_different
    assert (
        "1 byte changed for the guest" in page.status and "in 1 block of 16 bytes." in page.status
    )


def test_that_blocks_that_only_the_guest_sees_changed_count() -> None:
    page = PageEyes(0x1000, bytes(32), b"\1" * 32, bytes(32), bytes(32))
    assert page.status.endswith(
        "32 bytes changed for the guest, 0 bytes for the host, in 2 blocks of 16 bytes."
    )
