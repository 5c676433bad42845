"""What page tables and memory make of each other: whether a page is well, and if not, why.

In the model every protection but SNP garbles where the two differ; a real TDX module refuses the
access instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from labkit.look.encryption import PageState

__all__ = ["GARBLES", "REFUSES", "Problem", "Rules", "problem_of"]


class Problem(NamedTuple):
    """A disagreement; {yes} and {no} stand for the two values of the encryption bit."""

    words: str  # few
    why: str  # a sentence

    def spelled(self, words: tuple[str, str]) -> Problem:
        """The same for a mode that says encrypted and shared in these words: "C=1", "C=0"."""
        yes, no = words
        return Problem(self.words.format(yes=yes, no=no), self.why.format(yes=yes, no=no))


# What a page table entry says ("encrypted", "shared"; "walked" of a table itself) and what memory
# is -> what is wrong with that. A pair that is not here is well.
Rules = Mapping[tuple[str, PageState], Problem]

_PLAIN = "{yes}, memory still plaintext"
_NEVER = "{yes}, never launched"
_CIPHER = "{no}, memory still ciphertext"
_WALKED = "page table in plaintext"
_BOTH = Problem(
    "{yes} and {no} at once",
    "What the guest writes through the one mapping it reads back as noise through the other.",
)

GARBLES: Rules = {
    ("encrypted", PageState.SHARED): Problem(
        _PLAIN,
        "The guest decrypts what nobody encrypted: it will read noise.",
    ),
    ("encrypted", PageState.UNLAUNCHED): Problem(
        _NEVER,
        "No launch command encrypted it: "
        "the guest will read noise until it has written whole blocks.",
    ),
    ("shared", PageState.PRIVATE): Problem(
        _CIPHER,
        "The guest reads it undecrypted: it will read noise, and what it writes garbles a block.",
    ),
    ("walked", PageState.SHARED): Problem(
        _WALKED,
        "The CPU walks page tables as encrypted memory, whatever a bit says: it will find noise.",
    ),
    ("walked", PageState.UNLAUNCHED): Problem(
        _WALKED,
        "No launch command encrypted it, and the CPU walks page tables as encrypted memory.",
    ),
}

# SNP, APM vol. 2 (24593) 15.36.10
_NO_OWNER = "The RMP assigns it to no guest: an access with {yes} exits to the host (#NPF)."
_PRIVATE_WALK = "The CPU walks page tables as private memory: the walk exits to the host (#NPF)."
REFUSES: Rules = {
    ("encrypted", PageState.SHARED): Problem(_PLAIN, _NO_OWNER),
    ("encrypted", PageState.UNLAUNCHED): Problem(_NEVER, _NO_OWNER),
    ("encrypted", PageState.UNVALIDATED): Problem(
        "{yes}, not validated",
        "The first access raises #VC until the guest runs PVALIDATE.",
    ),
    ("encrypted", PageState.FOREIGN): Problem(
        "{yes}, another's page",
        "The RMP gives the page to somebody else: an access with {yes} exits to the host (#NPF).",
    ),
    ("shared", PageState.PRIVATE): Problem(
        _CIPHER,
        "A read gives ciphertext; a write meets the RMP and exits to the host (#NPF).",
    ),
    ("shared", PageState.UNVALIDATED): Problem(
        "{no}, assigned",
        "The page is still the guest's own: a write exits to the host (#NPF).",
    ),
    ("shared", PageState.FOREIGN): Problem(
        "{no}, another's page",
        "The RMP gives the page to somebody else: a write exits to the host (#NPF).",
    ),
    ("walked", PageState.SHARED): Problem(_WALKED, _PRIVATE_WALK),
    ("walked", PageState.UNLAUNCHED): Problem(_WALKED, _PRIVATE_WALK),
    ("walked", PageState.UNVALIDATED): Problem(
        "page table not validated",
        "The walk raises #VC until the guest runs PVALIDATE.",
    ),
    ("walked", PageState.FOREIGN): Problem(
        "another's page table",
        "The RMP gives the page to somebody else: the walk exits (#NPF).",
    ),
}


def problem_of(rules: Rules, mapped: str, is_walked: bool, memory: PageState) -> Problem | None:
    """What is wrong with a page; None when tables and memory agree.

    mapped: "encrypted", "shared", "both", or "" when no leaf maps it; is_walked: a page table lies
    in it, which weighs more.
    """
    if is_walked and ("walked", memory) in rules:
        return rules["walked", memory]
    if mapped == "both":
        return _BOTH
    return rules.get((mapped, memory))
