"""One guest on several engines: event logs side by side, then registers, memory and page tables; each difference has a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import product, takewhile, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labkit.engines.base import BudgetExit
from labkit.errors import InvalidState
from labkit.explore.comparison import Comparison, Difference, Row
from labkit.explore.sides import Side, look_back
from labkit.session.events import Event
from labkit.ucall.pool import Ucall

if TYPE_CHECKING:
    from labkit.session.running import Came

__all__ = ["HOST", "TIME", "TOLERATED", "Tolerance", "align", "compare"]

Make = Callable[[], Any]  # -> Vm
Happened = Event | Ucall
Events = tuple[Happened | None, ...]  # of one row, an engine each
Moved = set[tuple[object, ...]]  # what changes when the clock does
MOST = 2000  # events aligned by content; where more are left between equal ones, they are paired one by one
PAGE, RF = ~np.uint64(4095), 1 << 16
UNDEFINED = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7  # PF AF ZF SF


@dataclass(frozen=True)
class Tolerance:
    """What may differ: a kind and a place (regular expressions), why, and on which condition."""

    kind: str
    place: str
    cause: str
    when: Callable[[Side, Side, object, object], bool]


def _unlike(what: str) -> Callable[[Side, Side, object, object], bool]:
    """Not both of the engines can do this."""
    return lambda one, other, a, b: what not in one.can & other.can


def _same_gpa(one: Side, other: Side, a: object, b: object) -> bool:
    if not (type(a) is int and type(b) is int and 0 <= a < 1 << 64 and 0 <= b < 1 << 64):
        return False
    gpa = int(one.gpas(np.array([a], np.uint64))[0])
    return gpa == int(other.gpas(np.array([b], np.uint64))[0]) != (1 << 64) - 1


def _always(*_: object) -> bool:
    return True


def _rf_of_shutdown(one: Side, other: Side, a: object, b: object) -> bool:
    """Only EFLAGS.RF differs, both met a triple fault, and the side that has it does not know how."""
    has = one if isinstance(a, int) and a & RF else other
    shut = all(any(event.kind == "shutdown" for event in side.log) for side in (one, other))
    return (
        isinstance(a, int)
        and isinstance(b, int)
        and a ^ b == RF
        and shut
        and "triple_fault_vectors" not in has.can
    )


def _cut(one: Side, other: Side) -> bool:
    """Both were stopped by their budget, wherever they were."""
    return one.end == other.end == BudgetExit.end


HOST = "a host address: the memory of two VMs lies in two places, both mean the same gpa"
TIME = (
    "it follows the clock: it changes on one engine alone, too, when only its TSC starts elsewhere"
)
AHEAD = (
    "an accessed bit alone, where a run was cut: Unicorn reads a block to its end before it runs it, as any CPU may read ahead "
    "(SDM vol. 3A 4.8)"
)
TOLERATED = (
    Tolerance(
        "event",
        r".*\.step",
        "step numbers: one of the runs was not counted instruction by instruction",
        _unlike("counted"),
    ),
    Tolerance(
        "event",
        "exception",
        "an exception inside the guest: one of the engines does not tell of them",
        _unlike("exceptions"),
    ),
    Tolerance(
        "event",
        "hypercall",
        "a hypercall: one of the engines answers it itself",
        _unlike("hypercalls"),
    ),
    Tolerance(
        "event",
        r"shutdown\.(vectors|why)",
        "how a triple fault came about: an engine here does not say",
        _unlike("triple_fault_vectors"),
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
        "RF alone at a triple fault: KVM sets it before it delivers a fault (kvm_check_and_inject_events), and "
        "that delivery failed",
        _rf_of_shutdown,
    ),
    Tolerance(
        "register",
        "rflags",
        "PF, AF, ZF and SF alone, where a run was cut: logic instructions leave AF undefined, multiplications "
        "all four (SDM vol. 1 appendix A), and processors differ",
        lambda one, other, a, b: (
            _cut(one, other)
            and isinstance(a, int)
            and isinstance(b, int)
            and not (a ^ b) & ~UNDEFINED
        ),
    ),
    Tolerance("event|register", ".*", HOST, _same_gpa),
)
"""All that `compare` lets pass. HOST holds for words of memory too, AHEAD for page tables, TIME for what another clock proves."""
OTHER_TIME = {"msr_0x10": 1 << 40}


def compare(makers: Sequence[Make], drive: Callable[[Any], Came | None]) -> Comparison:
    """Make all VMs, run and look at one after the other, then compare every one with the first.

    `drive(vm)` plays the host until the guest's end and returns what came last; a LabError that it raises is an end too. Where
    something differs and the first engine is deterministic, it runs once more with its TSC elsewhere: what that alone changes
    follows the clock.
    """
    if len(makers) < 2:
        raise InvalidState(f"a comparison takes at least two engines, not {len(makers)}")
    with ExitStack() as stack:
        vms = [stack.enter_context(make()) for make in makers]
        sides = [look_back(vm, drive) for vm in vms]
        rows = align([side.log for side in sides])
        found = _found(sides, rows, set())
        if "deterministic" in sides[0].can and any(not difference.cause for difference in found):
            found = _found(
                sides,
                rows,
                _moved(
                    sides[0], look_back(_at_another_time(stack.enter_context(makers[0]())), drive)
                ),
            )
    sizes = {
        "events": len(rows),
        "registers": sum(map(len, sides[0].regs)),
        "pages": sum(len(data) for _, _, data in sides[0].slots) >> 12,
        "page tables": len(sides[0].tables),
    }
    return Comparison(
        sides[0].name,
        _names(sides),
        tuple(side.end for side in sides),
        tuple(side.why for side in sides),
        tuple(_row(n, row, found) for n, row in enumerate(rows)),
        tuple(found),
        sizes,
    )


def _at_another_time(vm: Any) -> Any:
    for vcpu, (name, value) in product(vm.vcpus, OTHER_TIME.items()):
        vcpu.regs[name] = value
    return vm


def _names(sides: Sequence[Side]) -> tuple[str, ...]:
    """The engines' names, with a number where one occurs again."""
    names = [side.backend for side in sides]
    nth = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return tuple(name if n == 1 else f"{name} {n}" for name, n in zip(names, nth, strict=True))


def _row(n: int, events: Events, found: Sequence[Difference]) -> Row:
    event, mine = _first(events), [difference for difference in found if difference.row == n]
    return Row(
        event.vcpu,
        event.kind,
        tuple(e and e.step for e in events),
        tuple(e and f"{e.kind} {e.what}" for e in events),
        all(difference.cause for difference in mine),
        "; ".join(sorted({difference.cause for difference in mine} - {""})),
    )


def _first(events: Events) -> Happened:
    return next(event for event in events if event is not None)


# --- aligning

KEYS: tuple[Callable[[Happened], object], ...] = (
    lambda event: (event.vcpu, event.kind, event.what),
    lambda event: (event.vcpu, event.kind, getattr(event, "cmd", "")),
    lambda event: event.vcpu,
)


def align(logs: Sequence[Sequence[Happened]]) -> list[Events]:
    """Rows of events that belong together: equal ones first, then of one kind, then of one vCPU."""
    rows: list[Events] = [(event,) for event in logs[0]]
    for done, log in enumerate(logs[1:], 1):
        pairs = _pairs(rows, [(event,) for event in log], KEYS)
        rows = [(one or (None,) * done) + (other or (None,)) for one, other in pairs]
    return rows


def _pairs(
    one: Sequence[Events], other: Sequence[Events], keys: Sequence[Callable[[Happened], object]]
) -> Iterator[tuple[Events | None, Events | None]]:
    if not keys or not one or not other:
        yield from ((row, None) for row in one)
        yield from ((None, row) for row in other)
        return
    a, b = ([keys[0](_first(row)) for row in rows] for rows in (one, other))
    head = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))
    tail = sum(
        1
        for _ in takewhile(
            lambda both: both[0] == both[1],
            zip(reversed(a[head:]), reversed(b[head:]), strict=False),
        )
    )
    yield from zip(one[:head], other[:head], strict=True)
    one_left, other_left = one[head : len(one) - tail], other[head : len(other) - tail]
    if max(len(one_left), len(other_left)) > MOST:
        yield from zip_longest(one_left, other_left)
    else:
        match = SequenceMatcher(
            None, a[head : len(a) - tail], b[head : len(b) - tail], autojunk=False
        )
        for tag, i, i_end, j, j_end in match.get_opcodes():
            equal = zip(one_left[i:i_end], other_left[j:j_end], strict=False)
            yield from (
                equal
                if tag == "equal"
                else _pairs(one_left[i:i_end], other_left[j:j_end], keys[1:])
            )
    yield from zip(one[len(one) - tail :], other[len(other) - tail :], strict=True)


# --- what differs


class _Raw(NamedTuple):
    """A difference before anybody asked whether it is tolerated; seq is the event's number in the first log."""

    kind: str
    place: str
    vcpu: int | None
    a: object
    b: object
    row: int | None = None
    seq: int | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """The same in another pair of runs."""
        return self.kind, self.place, self.vcpu, self.seq


def _found(sides: Sequence[Side], rows: Sequence[Events], moved: Moved) -> list[Difference]:
    one, out, names = sides[0], list[Difference](), _names(sides)
    for k, other in enumerate(sides[1:], 1):
        both = names[0], names[k]
        for raw in (*_of_events(rows, k), *_of_state(one, other)):
            cause = _excuse(one, other, raw) or (TIME if raw.key in moved else "")
            out.append(
                Difference(
                    raw.kind,
                    raw.place,
                    raw.vcpu,
                    both,
                    (_shown(raw.a), _shown(raw.b)),
                    cause,
                    raw.row,
                )
            )
        out += _of_memory(one, other, both, moved)
    return out


def _moved(one: Side, again: Side) -> Moved:
    """Everything that a run of the same engine with another clock has otherwise, for no reason but the clock."""
    rows = align([one.log, again.log])
    raws = (
        raw
        for raw in (*_of_events(rows, 1), *_of_state(one, again))
        if raw.row is None or raw.seq is not None
    )
    moved: Moved = {raw.key for raw in raws if not _excuse(one, again, raw)}
    return moved | {
        (gpa,) for gpas, _, _, host in _words(one, again) for gpa in gpas[~host].tolist()
    }


def _excuse(one: Side, other: Side, raw: _Raw) -> str:
    return next(
        (
            tolerance.cause
            for tolerance in TOLERATED
            if re.fullmatch(tolerance.kind, raw.kind)
            and re.fullmatch(tolerance.place, raw.place)
            and tolerance.when(one, other, raw.a, raw.b)
        ),
        "",
    )


def _of_events(rows: Sequence[Events], k: int) -> Iterator[_Raw]:
    seq = -1
    for n, row in enumerate(rows):
        a, b = row[0], row[k]
        seq += a is not None
        this = (event := _first(row)).vcpu, n, None if a is None else seq
        if a is None or b is None or a.kind != b.kind:
            if a is not b:
                yield _Raw("event", event.kind, this[0], a and a.what, b and b.what, *this[1:])
            continue
        old, new = _facts(a), _facts(b)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield _Raw(
                    "event", f"{a.kind}.{name}", this[0], old.get(name), new.get(name), *this[1:]
                )


def _facts(event: Happened) -> dict[str, object]:
    if isinstance(event, Ucall):
        facts = event._asdict()
        return facts | {f"args[{i}]": value for i, value in enumerate(facts.pop("args"))}
    facts = dict(event.facts)
    exit = facts.pop("exit", None)
    return facts | (dict(vars(exit)) if exit is not None else {}) | {"step": event.step}


def _of_state(one: Side, other: Side) -> Iterator[_Raw]:
    if one.end != other.end:
        yield _Raw("end", "end", None, one.why or one.end, other.why or other.end)
    if len(one.states) != len(other.states):
        yield _Raw("state", "number of vCPUs", None, len(one.states), len(other.states))
    for vcpu, (old, new) in enumerate(zip(one.states, other.states, strict=False)):
        if old != new:
            yield _Raw("state", "state", vcpu, old, new)
    for vcpu, (a, b) in enumerate(zip(one.regs, other.regs, strict=False)):
        yield from (
            _Raw("register", name, vcpu, a.get(name), b.get(name))
            for name in {**a, **b}
            if a.get(name) != b.get(name)
        )


def _words(one: Side, other: Side) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(gpas, words, other words, whether both are host addresses of one gpa) of what differs, slot by slot."""
    for (gpa, _, a), (other_gpa, _, b) in zip(one.slots, other.slots, strict=False):
        if (gpa, len(a)) == (other_gpa, len(b)):
            old, new = np.frombuffer(a, "<u8"), np.frombuffer(b, "<u8")
            at = np.flatnonzero(old != new)
            gpas, old, new = at.astype(np.uint64) * np.uint64(8) + np.uint64(gpa), old[at], new[at]
            yield (
                gpas,
                old,
                new,
                ((same := one.gpas(old)) == other.gpas(new)) & (same != ~np.uint64(0)),
            )


def _of_memory(
    one: Side, other: Side, names: tuple[str, str], moved: Moved
) -> Iterator[Difference]:
    shapes = tuple(
        ", ".join(f"{gpa:#x}+{len(data):#x}" for gpa, _, data in side.slots)
        for side in (one, other)
    )
    if shapes[0] != shapes[1]:
        yield Difference("memory", "memslots", None, names, (shapes[0], shapes[1]))
    late = np.array([key[0] for key in moved if len(key) == 1], np.uint64)
    tables = np.array(sorted(one.tables.keys() | other.tables.keys()), np.uint64)
    for gpas, old, new, host in _words(one, other):
        cause = np.where(host, HOST, np.where(np.isin(gpas, late), TIME, ""))
        entry = np.isin(gpas & PAGE, tables)
        for at in np.flatnonzero(entry).tolist():
            side = one if int(gpas[at] & PAGE) in one.tables else other
            values = _entry(one, int(old[at])), _entry(one, int(new[at]))
            ahead = (
                AHEAD
                if _cut(one, other)
                and int(old[at] ^ new[at]) == one.page_table.mode.flags.get("accessed")
                else ""
            )
            yield Difference(
                "page table",
                side.entry(int(gpas[at])),
                None,
                names,
                values,
                str(cause[at]) or ahead,
            )
        for why in sorted(set(cause[~entry].tolist())):
            yield from _of_pages(
                one, names, why, *(column[~entry & (cause == why)] for column in (gpas, old, new))
            )


def _of_pages(
    one: Side, names: tuple[str, str], cause: str, gpas: Any, old: Any, new: Any
) -> Iterator[Difference]:
    """A difference a page: its first byte, by gpa, gva and symbol."""
    _, first, counts = np.unique(gpas & PAGE, return_index=True, return_counts=True)
    for at, count in zip(first.tolist(), counts.tolist(), strict=True):
        a, b = int(old[at]), int(new[at])
        skip = ((a ^ b) & -(a ^ b)).bit_length() - 1 >> 3
        values = (a.to_bytes(8, "little")[skip:].hex(" "), b.to_bytes(8, "little")[skip:].hex(" "))
        more = f" and {count - 1} more words of its page" if count > 1 else ""
        yield Difference(
            "memory", one.place(int(gpas[at]) + skip) + more, None, names, values, cause
        )


def _entry(side: Side, entry: int) -> str:
    mode = side.page_table.mode
    return (
        f"gpa {mode.pa.get(entry):#x} P {mode.letters(entry)} ({entry:#x})"
        if mode.present(entry)
        else f"not present ({entry:#x})"
    )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)
    return "none" if value is None else f"{value:#x}" if type(value) is int else str(value)
