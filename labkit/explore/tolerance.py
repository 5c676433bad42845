"""What two engines may disagree on, each with the cause that says nothing about the guest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labkit.engines.exits import BudgetExit
from labkit.explore.findings import Finding
from labkit.explore.sides import NO_GPA, Pair, Side

__all__ = ["AHEAD", "HOST", "TIME", "TOLERATED", "Tolerance", "excuse", "is_read_ahead"]

When = Callable[[Pair, object, object], bool]

RF = 1 << 16
PF, AF, ZF, SF = 1 << 2, 1 << 4, 1 << 6, 1 << 7

HOST = "a host address: the memory of two VMs lies in two places, both mean the same gpa"
TIME = (
    "it follows the clock: it changes on one engine alone, too, when only its TSC starts elsewhere"
)
AHEAD = (
    "an accessed bit alone, where a run was cut: Unicorn reads a block to its end before it runs "
    "it, as any CPU may read ahead (SDM vol. 3A 4.8)"
)


@dataclass(frozen=True)
class Tolerance:
    """What may differ: a kind and a place (regular expressions), why, and on which condition.

    The condition is asked with the two sides, and with the value of each.
    """

    kind: str
    place: str
    cause: str
    when: When

    def covers(self, pair: Pair, finding: Finding) -> bool:
        """Whether it lets this difference between two sides pass."""
        if not re.fullmatch(self.kind, finding.kind):
            return False
        if not re.fullmatch(self.place, finding.place):
            return False
        return self.when(pair, finding.a, finding.b)


def _lacking(what: str) -> When:
    """The condition that one of the engines cannot do this."""

    def lacks(pair: Pair, a: object, b: object) -> bool:
        return what not in pair.one.can or what not in pair.other.can

    return lacks


def _always(pair: Pair, a: object, b: object) -> bool:
    return True


def _is_same_gpa(pair: Pair, a: object, b: object) -> bool:
    """Both are host addresses, each of its own VM, and mean the same gpa."""
    if not _is_word(a) or not _is_word(b):
        return False
    gpa = pair.one.gpas(np.array([a], np.uint64))[0]
    other_gpa = pair.other.gpas(np.array([b], np.uint64))[0]
    return bool(gpa == other_gpa != NO_GPA)


def _is_word(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_rf_of_shutdown(pair: Pair, a: object, b: object) -> bool:
    """Only EFLAGS.RF differs, both met a triple fault, and who has it set cannot say how."""
    if not isinstance(a, int) or not isinstance(b, int) or a ^ b != RF:
        return False
    has_it = pair.one if a & RF else pair.other
    both_shut = _has_shut(pair.one) and _has_shut(pair.other)
    return both_shut and "triple_fault_vectors" not in has_it.can


def _has_shut(side: Side) -> bool:
    return any(event.kind == "shutdown" for event in side.log)


def _is_undefined_flag(pair: Pair, a: object, b: object) -> bool:
    """Nothing but flags that some instructions leave undefined, where both runs were cut."""
    if not isinstance(a, int) or not isinstance(b, int):
        return False
    return _are_cut(pair) and not (a ^ b) & ~(PF | AF | ZF | SF)


def _are_cut(pair: Pair) -> bool:
    """Both were stopped by their budget, wherever they were."""
    return pair.one.end == pair.other.end == BudgetExit.end


TOLERATED = (
    Tolerance(
        "event",
        r".*\.step",
        "step numbers: one of the runs was not counted instruction by instruction",
        _lacking("counted"),
    ),
    Tolerance(
        "event",
        "exception",
        "an exception inside the guest: one of the engines does not tell of them",
        _lacking("exceptions"),
    ),
    Tolerance(
        "event",
        "hypercall",
        "a hypercall: one of the engines answers it itself",
        _lacking("hypercalls"),
    ),
    Tolerance(
        "event",
        r"shutdown\.(vectors|why)",
        "how a triple fault came about: an engine here does not say",
        _lacking("triple_fault_vectors"),
    ),
    Tolerance(
        "event",
        r"internal-error\.(why|data|disassembly)",
        "each engine refuses an instruction in its own words",
        _always,
    ),
    Tolerance(
        "register",
        "rflags",
        "RF alone at a triple fault: KVM sets it before it delivers a fault "
        "(kvm_check_and_inject_events), and that delivery failed",
        _is_rf_of_shutdown,
    ),
    Tolerance(
        "register",
        "rflags",
        "PF, AF, ZF and SF alone, where a run was cut: logic instructions leave AF undefined, "
        "multiplications all four (SDM vol. 1 appendix A), and processors differ",
        _is_undefined_flag,
    ),
    Tolerance("event|register", ".*", HOST, _is_same_gpa),
)
"""What is let pass in events and registers, the first that covers it.

HOST holds for words of memory too, AHEAD for page tables, and TIME for all that another clock
proves to follow it.
"""


def excuse(pair: Pair, finding: Finding) -> str:
    """Why a difference between two sides is let pass, "" when it is not."""
    for tolerance in TOLERATED:
        if tolerance.covers(pair, finding):
            return tolerance.cause
    return ""


def is_read_ahead(pair: Pair, entry: int, other_entry: int) -> bool:
    """Whether AHEAD covers two page-table entries: an accessed bit alone, in runs that were cut."""
    accessed = pair.one.page_table.mode.flags.get("accessed")
    return _are_cut(pair) and entry ^ other_entry == accessed
