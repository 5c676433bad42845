"""`compare` tells the truth.

Two equal runs are equal, and whatever is bent in one of them is found and named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import guests
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import GUESTS

import labkit as lk
from labkit.arch.x86_cpu import CpuModel
from labkit.explore.align import align
from labkit.explore.tolerance import HOST, TIME, TOLERATED
from labkit.session.events import Event
from labkit.session.running import drive
from labkit.views import compare as view

SOURCE = """
#include "labkit.h"
uint64_t counter, table[1024], now;
void guest_code(uint64_t vcpu)
{
	for (uint64_t i = 0; i < 4; i++) { counter += i; GUEST_SYNC(i); }
	table[600] = 7;
	GUEST_PRINTF("counter is %lu\\n", counter);
	GUEST_DONE();
}
void guest_clock(uint64_t vcpu)
{
	now = rdtsc();
	GUEST_SYNC_ARGS(1, now, 0, 0, 0);
	GUEST_PRINTF("%lu\\n", now);
	GUEST_DONE();
}
void guest_cpuid(uint64_t vcpu)
{
	uint32_t a, b, c, d;
	cpuid(0x80000008, &a, &b, &c, &d);
	GUEST_SYNC(a);
	GUEST_DONE();
}
void guest_halts(uint64_t vcpu) { GUEST_SYNC(1); hlt(); }
void guest_faults(uint64_t vcpu) { GUEST_SYNC(1); *(volatile int *)0x123456000 = 1; }
void guest_fails(uint64_t vcpu) { GUEST_SYNC(1); GUEST_ASSERT_EQ(counter, 1); }
"""
Bend = Callable[[lk.Vm], object]


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE, name="sample")


def vm(entry: str = "guest_code", name: str = "straight", tsc: int = 0, **create: Any) -> lk.Vm:
    made = lk.Vm.create(program(), entry, name=name, **create)
    made.vcpus[0].regs["msr_0x10"] = tsc
    return made


def bent(bend: Bend, entry: str = "guest_code") -> lk.Comparison:
    """A guest twice, the second time with something changed when it is over."""

    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        if vm.name == "bent":
            bend(vm)
        return last

    return lk.compare(None, [partial(vm, entry), partial(vm, entry, "bent")], host=host)


def flip_entry(name: str, depth: int, bit: int) -> Bend:
    def bend(vm: lk.Vm) -> None:
        step = vm.page_table().walk(vm.gva_of(name)).steps[depth]
        entry = step.entry ^ 1 << bit
        vm.memory.write(step.entry_gpa, entry.to_bytes(8, vm.arch.mode.byteorder))

    return bend


def edit_event(at: int, **facts: Any) -> Bend:
    return lambda vm: vm.log.entries.__setitem__(at, vm.log.entries[at]._replace(**facts))


# name -> what is changed, the kind of the difference, words of it
BENDS: dict[str, tuple[Bend, str, str]] = {
    "register": (
        lambda vm: setattr(vm.vcpus[0].regs, "rbx", 0x1234),
        "register",
        "vCPU 0 register rbx: unicorn 0x",
    ),
    "resume flag": (
        lambda vm: vm.vcpus[0].cpu.set_regs({"rflags": vm.vcpus[0].regs.rflags ^ 1 << 16}),
        "register",
        "register rflags: ",
    ),
    "vector register": (
        lambda vm: vm.vcpus[0].regs.__setitem__("xmm3", 9),
        "register",
        "xmm3: unicorn 0x0, unicorn 2 0x9",
    ),
    "MSR": (lambda vm: setattr(vm.vcpus[0].regs, "lstar", 1), "register", "lstar"),
    "global": (lambda vm: vm.write_guest_global("counter", 7), "memory", " counter: unicorn 06"),
    "byte inside": (
        lambda vm: vm.write(vm.gva_of("table") + 4803, b"\1"),
        "memory",
        "table+0x12c3: unicorn 00",
    ),
    "two words of a page": (
        lambda vm: vm.write(vm.gva_of("table"), b"\1" * 16),
        "memory",
        "table and 1 more words of its page",
    ),
    "page that nothing maps": (
        lambda vm: vm.memory.write(0x7FF008, b"\5"),
        "memory",
        "gpa 0x7ff008: unicorn 00",
    ),
    "host address": (
        lambda vm: vm.write(vm.pool.gva + vm.pool.slots_offset + 1088, bytes(8)),
        "memory",
        "ucalls[0].hva",
    ),
    "accessed bit": (flip_entry("guest_code", 3, 5), "page table", "PT[0x0] of gva 0x400000"),
    "dirty bit": (flip_entry("counter", 3, 6), "page table", "PT["),
    "accessed bit of a directory": (
        flip_entry("guest_code", 2, 5),
        "page table",
        "PD[0x2] of gva 0x400000",
    ),
    "accessed bit at the top": (
        flip_entry("guest_code", 0, 5),
        "page table",
        "PML4[0x0] of gva 0x0",
    ),
    "bit that software owns": (flip_entry("guest_code", 3, 9), "page table", "PT[0x0]"),
    "missing event": (
        lambda vm: vm.log.entries.pop(2),
        "event",
        "event 2 ucall: unicorn SYNC args",
    ),
    "missing last event": (lambda vm: vm.log.entries.pop(), "event", "event 5 ucall: unicorn DONE"),
    "one event more": (
        lambda vm: vm.log.entries.insert(1, Event(5, 0, "mmio", {"gpa": 5})),
        "event",
        "event 1 mmio: unicorn none, unicorn 2 gpa 0x5",
    ),
    "string": (
        edit_event(4, text="counter is 8\n"),
        "event",
        r"event 4 ucall.text: unicorn 'counter is 6\n', unicorn 2 'counter is 8\n'",
    ),
    "argument": (
        lambda vm: edit_event(1, args=(*vm.log.entries[1].args[:1], 2, 0, 0, 0, 0, 0))(vm),
        "event",
        "event 1 ucall.args[1]: unicorn 0x1, unicorn 2 0x2",
    ),
    "command": (
        edit_event(1, cmd="NONE"),
        "event",
        "event 1 ucall.cmd: unicorn SYNC, unicorn 2 NONE",
    ),
    "slot": (edit_event(1, slot=3), "event", "event 1 ucall.slot: unicorn 0x0, unicorn 2 0x3"),
    "step": (edit_event(1, step=1), "event", "event 1 ucall.step"),
    "other vCPU": (edit_event(1, vcpu=1), "event", "event 1 ucall"),
    "state": (
        lambda vm: setattr(vm.vcpus[0], "state", "halted"),
        "state",
        "vCPU 0 state state: unicorn done, unicorn 2 halted",
    ),
}


def test_that_two_runs_of_one_guest_are_equal_and_why_hvas_differ() -> None:
    found = bent(lambda vm: None)
    assert found.equal and found.ends == ("done", "done") and set(found.causes) == {HOST}
    assert found.df.equal.all() and found.df.shape == (6, 8)
    assert "equal" in repr(found) and "\n" not in repr(found)


@pytest.mark.parametrize("name", BENDS)
def test_that_what_is_bent_is_found_and_named(name: str) -> None:
    bend, kind, words = BENDS[name]
    found = bent(bend)
    assert not found.equal and {difference.kind for difference in found.differences} == {kind}
    assert words in str(found.differences[0]), found.differences[0]
    assert str(found.differences[0])[:40] in repr(found) and "≠" in found.text
    assert 'tr class="dis"' in view.render(found).html and kind in view.render(found).html


@pytest.mark.parametrize("name", [name for name in BENDS if BENDS[name][1] == "event"])
def test_that_the_row_of_a_bent_event_is_not_equal(name: str) -> None:
    found = bent(BENDS[name][0])
    wrong = {difference.row for difference in found.differences}
    assert wrong == set(found.df.index[~found.df.equal]) and len(wrong) in (1, 2)


@pytest.mark.parametrize(
    ("other", "end", "words"),
    [
        ("guest_faults", "unhandled", "#PF"),
        ("guest_fails", "abort", "counter == 1"),
        ("guest_code", "done", "done"),
    ],
)
def test_that_another_exit_is_another_end(other: str, end: str, words: str) -> None:
    found = lk.compare(None, [partial(vm, "guest_halts"), partial(vm, other)])
    assert found.ends == ("halted", end)
    difference = next(d for d in found.differences if d.kind == "end")
    assert "halt" in difference.values[0] and words in difference.values[1]
    assert any(
        row.whats[0] and row.whats[0].startswith("halted") and not row.equal for row in found.rows
    )


def test_that_another_cpu_model_is_a_difference() -> None:
    model = CpuModel()
    model.cpuid[0x80000008, 0] = (36 | 48 << 8, 0, 0, 0)
    found = lk.compare(program(), ["unicorn", partial(vm, "guest_cpuid", cpu=model)], "guest_cpuid")
    assert "ucall.args[1]: unicorn 0x3028, unicorn 2 0x3024" in str(found.differences[0])


def test_that_what_follows_the_clock_is_tolerated_and_says_so() -> None:
    found = lk.compare(None, [partial(vm, "guest_clock"), partial(vm, "guest_clock", tsc=12345)])
    assert found.equal and set(found.causes) == {HOST, TIME}
    late = {(d.kind, d.place.split()[-1]) for d in found.tolerated if d.cause == TIME}
    assert {("event", "ucall.args[2]"), ("event", "ucall.text"), ("memory", "now")} <= late
    assert TIME in found.df.tolerated[0] and "≈" in found.text


def test_that_the_clock_excuses_nothing_else() -> None:
    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        if vm.name == "bent":
            vm.write_guest_global("counter", 3)
        return last

    found = lk.compare(
        None, [partial(vm, "guest_clock"), partial(vm, "guest_clock", "bent", 12345)], host=host
    )
    assert [d.place.split()[-1] for d in found.differences] == ["counter"] and TIME in found.causes


def test_that_a_budget_changes_nothing_that_a_guest_sees() -> None:
    code = (
        "mov rax, 0x123456789abcdef0; mov rbx, 0x8000000000000001; mov r15, 0x700000000000; "
        "cmp rax, rbx; mov al, [r15]"
    )
    budgets = iter((None, 3000, None))
    found = lk.compare(
        None, [partial(guests.bare, code)] * 2, host=lambda vm: vm.run(next(budgets))
    )
    assert found.ends == ("halted", "halted") and found.equal, found.text


def test_that_three_engines_are_compared_with_the_first() -> None:
    found = lk.compare(None, [vm, vm, partial(vm, "guest_clock")])
    assert {d.backends for d in found.differences} == {("unicorn", "unicorn 3")}
    assert found.backends == ("unicorn", "unicorn 2", "unicorn 3") and "unicorn 3" in found.text


@pytest.mark.parametrize("arch", ["arm64", "riscv64", "s390x"])
def test_that_other_architectures_are_compared_too(arch: str) -> None:
    guest = lk.Program.load(GUESTS / arch / "hello.elf")
    found = lk.compare(guest, ["unicorn", "unicorn"])
    assert found.equal and set(found.causes) == {HOST}


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("arm64", "L3[0x0] of gva 0x400000 guest_code: unicorn gpa 0x2000 P A (0x2493)"),
        ("riscv64", "L0[0x0] of gva 0x400000 guest_code: unicorn gpa 0x2000 P R A (0x84b)"),
        ("s390x", "PAGE[0x0] of gva 0x400000 guest_code: unicorn gpa 0x2000 P  (0x2200)"),
    ],
)
def test_that_a_bent_entry_is_named_in_the_words_of_its_architecture(arch: str, words: str) -> None:
    guest = lk.Program.load(GUESTS / arch / "hello.elf")
    names = iter(("straight", "bent"))

    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        if next(names, "") == "bent":
            flip_entry("guest_code", -1, 0)(vm)
        return last

    found = lk.compare(guest, ["unicorn", "unicorn"], host=host)
    assert [d.kind for d in found.differences] == ["page table"]
    assert words in str(found.differences[0])


def test_that_a_big_endian_word_begins_with_its_first_byte_that_differs() -> None:
    guest = lk.Program.load(GUESTS / "s390x" / "hello.elf")
    pools = iter((0x1122334455667788, 0x1122334455660000))

    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        vm.write_guest_global("ucall_pool", next(pools, 0x1122334455667788))
        return last

    found = lk.compare(guest, ["unicorn", "unicorn"], host=host)
    assert "ucall_pool+0x6: unicorn 77 88, unicorn 2 00 00" in str(found.differences[0])


def test_that_an_entry_far_inside_a_large_table_is_one() -> None:
    guest = lk.Program.load(GUESTS / "s390x" / "hello.elf")
    bits = iter((0, 1))

    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        root = vm.page_table().walk(0).steps[0].entry_gpa
        vm.memory.write(root + 8 * 1500 + 7, bytes([0x20 | next(bits, 0)]))
        return last

    found = lk.compare(guest, ["unicorn", "unicorn"], host=host)
    assert "page table R1[0x5dc] of gva" in str(found.differences[0])


def test_that_guests_with_encrypted_registers_can_run_at_another_time() -> None:
    states = iter(("done", "halted"))

    def host(vm: lk.Vm) -> object:
        last = drive(vm)
        vm.vcpus[0].state = next(states, "done")
        return last

    found = lk.compare(program(), ["unicorn", "unicorn"], host=host, protect="sev-es")
    assert [d.kind for d in found.differences] == ["state"]


def test_that_an_error_of_the_host_is_an_end_too() -> None:
    found = lk.compare(None, [vm, vm], host=lambda vm: vm.run_until_done(20))
    assert found.equal and found.ends == ("BudgetExceeded",) * 2
    assert "20 instructions" in found.whys[0]


@pytest.mark.parametrize(
    ("backends", "words"),
    [(["unicorn"], "at least two"), ([], "at least two"), (["unicorn", "bochs"], "bochs")],
)
def test_that_a_comparison_needs_two_engines_that_are_there(
    backends: list[str], words: str
) -> None:
    with pytest.raises(lk.LabError, match=words):
        lk.compare(program(), backends)


def test_that_every_tolerance_has_a_cause_of_its_own() -> None:
    causes = [tolerance.cause for tolerance in TOLERATED] + [TIME]
    assert len(set(causes)) == len(causes) and HOST in causes
    assert all(len(cause) > 30 for cause in causes)


EVENTS = st.lists(
    st.builds(
        Event,
        st.just(0),
        st.integers(0, 2),
        st.sampled_from(["mmio", "pio"]),
        st.fixed_dictionaries({"gpa": st.integers(0, 3)}),
    ),
    max_size=30,
)


@given(EVENTS, st.data())
def test_that_alignment_loses_nothing_and_finds_what_was_taken_out(
    log: list[Event], data: st.DataObject
) -> None:
    gone = data.draw(st.sets(st.integers(0, len(log) - 1), max_size=3)) if log else set()
    rows = align([log, [event for i, event in enumerate(log) if i not in gone]])
    assert [row[0] for row in rows if row[0]] == log
    assert sum(row[1] is None for row in rows) == len(gone)
    assert all(row[0] == row[1] for row in rows if row[1])


@given(EVENTS, EVENTS)
def test_that_any_two_logs_align_without_loss(one: list[Event], other: list[Event]) -> None:
    rows = align([one, other])
    assert [row[0] for row in rows if row[0]] == one
    assert [row[1] for row in rows if row[1]] == other
    assert all(row[0].vcpu == row[1].vcpu for row in rows if row[0] and row[1])


def test_that_very_long_logs_align_in_time() -> None:
    log = [Event(0, 0, "mmio", {"gpa": i % 7}) for i in range(30_000)]
    assert sum(row[1] is None for row in align([log, log[:15_000] + log[15_001:]])) == 1
    assert len(align([log, log[::-1]])) == 30_000


def test_that_the_view_folds_what_is_equal_and_escapes_what_a_guest_wrote() -> None:
    many = [Event(i, 0, "mmio", {"gpa": 1}) for i in range(40)]
    found = bent(lambda vm: vm.log.entries.extend(many))
    other = bent(edit_event(4, text="<script>x</script>\x1b[31m"))
    assert "<script>" not in view.render(other).html and "\x1b" not in other.text
    assert "not in its log" in view.render(found).img_html and len(found.differences) == 40
