"""Page tables against memory: what tables say of each page, what it is, where the two differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from labkit.errors import InvalidState
from labkit.look.encryption import EncryptionMap, EncryptionRange, PageStates
from labkit.look.encryption_rules import GARBLES, REFUSES, Problem, Rules, problem_of
from labkit.look.encryption_segments import Segment, cut_memory
from labkit.look.snapshots import MemoryMap, MemoryRange
from labkit.paging.scan import PageTable

__all__ = ["encryption_map"]


def encryption_map(
    table: PageTable,
    truth: Iterable[PageStates],
    memory: MemoryMap | None = None,
    *,
    protection: str = "sev",
    facts: tuple[str, ...] = (),
) -> EncryptionMap:
    """Compare page tables with the state of every page of memory.

    memory: says what pages are for; without it the labels of the page table do.
    facts: what the title tells beside the protection ("policy 0x20").

    What the tables map outside of memory is not memory and not in the map. Raises InvalidState for
    a mode without a C-bit or shared bit, and for page states that overlap.
    """
    mode = table.mode
    if mode.c_bit is None:
        raise InvalidState(
            f"{mode.name} has no C-bit: nothing of this guest is encrypted", mode=mode.name
        )
    slots = sorted(truth, key=lambda slot: slot.gpa)
    _check_apart(slots)

    uses = () if memory is None else memory.ranges
    words = (mode.c_word(True), mode.c_word(False))
    rules = REFUSES if protection == "snp" else GARBLES
    ranges = [_range(part, table, uses, rules, words) for part in cut_memory(table, slots, uses)]
    return EncryptionMap(
        step=table.step or 0,
        protection=protection.upper(),
        words=words,
        facts=(*facts, f"{mode.c_name}-bit {mode.c_bit}"),
        slots=tuple((slot.gpa, slot.end - slot.gpa) for slot in slots),
        ranges=tuple(ranges),
    )


def _check_apart(slots: Sequence[PageStates]) -> None:
    """Raises InvalidState when one of the slots, which ascend, begins inside another."""
    for low, high in pairwise(slots):
        if low.end > high.gpa:
            raise InvalidState(
                f"page states at gpa {high.gpa:#x} begin inside those at gpa {low.gpa:#x}",
                gpa=high.gpa,
            )


def _range(
    part: Segment,
    table: PageTable,
    uses: Sequence[MemoryRange],
    rules: Rules,
    words: tuple[str, str],
) -> EncryptionRange:
    """A segment with its use and, where its mappings and memory disagree, what is wrong."""
    gvas = tuple(gva for gva in (part.gva_encrypted, part.gva_shared) if gva is not None)
    mapped = _mapped(part)
    found = problem_of(rules, mapped, part.is_walked, part.memory)
    problem = Problem("", "") if found is None else found.spelled(words)
    why = problem.why
    if mapped == "both":
        yes, no = words
        why = f"gva {gvas[0]:#x} maps it with {yes}, gva {gvas[1]:#x} with {no}. {why}"

    tables = mapped
    if not tables:
        tables = "walked" if part.is_walked else "not mapped"
    return EncryptionRange(
        gpa=part.gpa,
        nr_pages=part.nr_pages,
        tables=tables,
        memory=part.memory,
        gvas=gvas,
        nr_mappings=part.nr_encrypted + part.nr_shared,
        what=_what(part, gvas, table, uses),
        problem=problem.words,
        why=why,
    )


def _mapped(part: Segment) -> str:
    """How the leaves of the page tables map a segment; "" when none does."""
    if part.nr_encrypted and part.nr_shared:
        return "both"
    if part.nr_encrypted:
        return "encrypted"
    return "shared" if part.nr_shared else ""


def _what(
    part: Segment, gvas: tuple[int, ...], table: PageTable, uses: Sequence[MemoryRange]
) -> str:
    """What a segment is for; "" when nobody knows."""
    if part.use >= 0:
        return uses[part.use].kind
    return table.label(gvas[0]) if gvas else ""
