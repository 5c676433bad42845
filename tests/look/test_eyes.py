"""One page through two eyes: what counts as changed, what is refused, what its status says."""

from __future__ import annotations

import encryption_sample as secrets
import pytest

from labkit.errors import InvalidState
from labkit.look.eyes import PageEyes


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
    assert guest.changed.sum() == 1
    assert host.changed.sum() > 8
    assert host.changed.any(axis=1).tolist() == guest.changed.any(axis=1).tolist()
    assert host.entropy > 7.9 > 3 > guest.entropy
    assert host.nr_different == 256 > guest.nr_different
    assert "1 byte changed for the guest" in page.status
    assert "in 1 block of 16 bytes." in page.status


def test_that_blocks_that_only_the_guest_sees_changed_count() -> None:
    page = PageEyes(0x1000, bytes(32), b"\1" * 32, bytes(32), bytes(32))
    assert page.status.endswith(
        "32 bytes changed for the guest, 0 bytes for the host, in 2 blocks of 16 bytes."
    )


def test_that_a_page_without_a_past_has_not_changed() -> None:
    page = PageEyes(0x1000, bytes(32), bytes(32), what="stack")
    assert not page.eyes[0].changed.any()
    assert page.status == (
        "Page 0x1000, stack: both see the same bytes; "
        "0.00 bits a byte on the host's side, 0.00 on the guest's."
    )


def test_that_a_look_before_is_what_changes_are_marked_against() -> None:
    before = PageEyes(0x1000, bytes(32), bytes(32), step=5)
    after = PageEyes(0x1000, b"\1" + bytes(31), bytes(32), step=9).since(before)
    assert after.since_step == 5
    assert after.eyes[0].changed.sum() == 1 and not after.eyes[1].changed.any()


@pytest.mark.parametrize(("gpa", "size"), [(0x2000, 32), (0x1000, 16)])
def test_that_a_look_at_something_else_is_no_look_before(gpa: int, size: int) -> None:
    page = PageEyes(0x1000, bytes(32), bytes(32))
    with pytest.raises(InvalidState, match=f"looked at gpa {gpa:#x}"):
        page.since(PageEyes(gpa, bytes(size), bytes(size)))
