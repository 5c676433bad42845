"""Guests that destroy what they stand on: one clear word about it, a VM that can still be looked at, and a Python that lives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import cache

import pytest
from guests import CODE, DATA, HANDLERS, PAGES, asm, bare
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GUESTS, TESTS, prebuilt_entries

import labkit as lk
from labkit.engines.exits import BudgetExit, InternalErrorExit, ShutdownExit

HOLE_GVA, HOLE = 0x7000_0000, 0xC000_0000
SOURCE = """#include "labkit.h"
extern struct ucall_header *ucall_pool;
static inline uint64_t cr3(void) { uint64_t v; asm volatile("mov %%cr3, %0" : "=r"(v)); return v; }
void guest_code(uint64_t vcpu) { for (;;) cpu_relax(); }
static void jump(uint64_t gva) { asm volatile("jmp *%0" :: "r"(gva)); }
void guest_jumps_to_null(uint64_t vcpu) { jump(0); }
void guest_jumps_to_data(uint64_t vcpu) { jump((uint64_t)ucall_pool); }
void guest_returns(uint64_t vcpu) { }
void guest_divides(uint64_t vcpu) { asm volatile("xor %%ecx, %%ecx; div %%ecx" ::: "rcx", "rax", "rdx"); }
void guest_loads_cr3(uint64_t bad) { asm volatile("mov %0, %%cr3" :: "r"(bad)); GUEST_DONE(); }
void guest_leaves_long_mode(uint64_t vcpu) { asm volatile("mov %0, %%cr0" :: "r"(0x10021UL)); GUEST_DONE(); }
void guest_clears_stack(uint64_t vcpu) { memset((void *)((uint64_t)__builtin_frame_address(0) & ~0xfffUL), 0, 0x1000); GUEST_SYNC(1); }
void guest_moves_stack(uint64_t gva) { asm volatile("mov %0, %%rsp; push %0; ud2" :: "r"(gva)); }
void guest_forges_abort(uint64_t vcpu) { ucall(UCALL_ABORT, 3, 1UL << 63, ~0UL, ~0UL); }
void guest_talks(uint64_t vcpu) { for (;;) GUEST_SYNC(1); }
void guest_uses_avx(uint64_t vcpu) { asm volatile(".byte 0xc5, 0xf1, 0xfe, 0xc2"); }
"""
# functions of the guest library: entered like this they write through a null pointer
LIBRARY = ("guest_snprintf", "guest_vsnprintf")


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


def still_there(vm: lk.Vm) -> bool:
    """Whether the VM can be looked at from every side."""
    vcpu = vm.vcpus[0]
    walk, events, regs = vm.page_table().walk(CODE), vm.events, vcpu.regs.all()
    assert (
        repr(vm)
        and repr(vcpu)
        and repr(vm.page_table())
        and repr(walk)
        and str(events)
        and repr(vcpu.disassemble())
    )
    assert (
        vm.page_table().df is not None
        and vm.memory_map()
        and vm.look()
        and vcpu.look()
        and vm.pool.held is not None
    )
    assert vm.fork().vcpus[0].regs.all() == regs
    vm.restore(vm.snapshot())
    return vcpu.regs.all() == regs


# entry, argument, what ends it, words of the message or event
BAD = [
    ("guest_jumps_to_null", None, lk.GuestCrashed, "#PF .*0x10.* at 0x0, where no instruction"),
    ("guest_jumps_to_data", None, lk.GuestCrashed, "#PF .*0x11.*fault address"),
    ("guest_returns", None, lk.GuestCrashed, "#PF .* at 0x0"),
    ("guest_divides", None, lk.GuestCrashed, "#DE .*guest.c:"),
    ("guest_loads_cr3", 0x5000, lk.GuestCrashed, "triple fault|fetch"),
    ("guest_loads_cr3", 0x3FFFFFF000, lk.GuestCrashed, "triple fault|no memslot"),
    ("guest_loads_cr3", 1 << 62, lk.GuestCrashed, ""),
    ("guest_leaves_long_mode", None, lk.GuestCrashed, ""),
    ("guest_clears_stack", None, lk.GuestCrashed, ""),
    ("guest_moves_stack", 0x66660000, lk.GuestCrashed, "triple fault"),
    ("guest_moves_stack", 1 << 63, lk.GuestCrashed, "triple fault"),
    ("guest_uses_avx", None, lk.GuestCrashed, "VEX"),
    ("guest_code", None, lk.BudgetExceeded, "budget"),
    ("guest_talks", None, lk.BudgetExceeded, "the budget of 50000 instructions"),
    (
        "guest_forges_abort",
        None,
        lk.GuestAssertFailed,
        r"ABORT without words \(its file has no readable name",
    ),
]


@pytest.mark.parametrize("entry, argument, error, words", BAD)
def test_that_a_guest_which_goes_wrong_is_named_with_its_place(entry, argument, error, words):
    with lk.Vm.create(program(), entry) as vm:
        if argument is not None:
            vm.vcpus[0].args_set(argument)
        with pytest.raises(error, match=words or None) as caught:
            vm.vcpus[0].run_until_done(50_000)
        assert "vCPU 0" in str(caught.value) and "\n" not in str(caught.value) and still_there(vm)


BAD_EXAMPLES = [entry for entry in prebuilt_entries("bad") if entry != "guest_code"]


@pytest.mark.parametrize("entry", [*BAD_EXAMPLES, *LIBRARY])
def test_that_the_bad_guests_of_the_examples_end_and_can_be_looked_at(entry):
    with lk.Vm.create(lk.Program.load(GUESTS / "bad.elf"), entry) as vm:
        try:
            vm.vcpus[0].run_until_done(3_000_000)
        except lk.LabError as err:
            assert "vCPU 0" in str(err)
        assert len(vm.events) and still_there(vm)


PATTERNS = [b"\0", b"\xff", b"\xcc", b"\x03\x10\0\0\0\0\0\0", bytes(range(1, 256))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["page tables", "tables", "stacks", "ucall pool", "code", "data"])
def test_that_a_guest_without_its_own_tables_ends_in_order(kind, pattern):
    vm = lk.Vm.create(program(), "guest_divides")
    for use in vm.machine.space.uses:
        if use.kind == kind:
            vm.memory.write(use.gpa, (pattern * 4096 * use.nr_pages)[: 4096 * use.nr_pages])
    came = vm.vcpus[0].run(20_000)
    assert (
        came is not None
        and len(vm.events) + isinstance(came, BudgetExit)
        and str(came)
        and still_there(vm)
    )
    for use in (
        lambda: vm.vcpus[0].set_entry("guest_code"),
        lambda: vm.vcpus[0].step(5),
        lambda: vm.alloc(5000),
        lambda: vm.read(CODE, 4),
        lambda: vm.vcpus[0].run(1000),
    ):
        try:
            use()
        except lk.LabError as err:
            assert str(err)
    vm.close()


def test_that_an_interrupted_fetch_at_the_end_of_memory_is_one_clear_exit():
    vm = bare("nop", memory=8 << 20)
    vm.machine.space.map(HOLE_GVA, (8 << 20) - 4096, 2)
    vm.write(HOLE_GVA, b"\x90" * 4090 + asm("nop; nop; mov rax,0x1122334455667788")[:6])
    (vcpu,) = vm.vcpus
    vcpu.regs.rip = HOLE_GVA + 4090
    came = vcpu.run(50)
    assert (
        isinstance(came, InternalErrorExit)
        and f"fetch from gpa {8 << 20:#x}" in came.why
        and came.pc == vcpu.pc == HOLE_GVA + 4092
    )
    assert vcpu.step_count == 2 and vcpu.run(5) == came


@pytest.mark.parametrize("offset, steps", [(0, 1), (0x123, 1)])
def test_that_code_in_device_memory_is_not_run(offset, steps):
    vm = bare(f"mov eax,{HOLE_GVA + offset}; jmp rax")
    vm.machine.space.map(HOLE_GVA, HOLE, 1)
    came = vm.vcpus[0].run(50)
    assert (
        isinstance(came, InternalErrorExit)
        and f"fetch from gpa {HOLE + offset:#x}" in came.why
        and vm.vcpus[0].step_count == 2
    )
    assert f"pc {HOLE_GVA + offset:#x}" in vm.events.what.iloc[-1] and vm.vcpus[0].state == "stuck"


@pytest.mark.parametrize("budget", [100, 100_000, None])
def test_that_an_exception_with_its_stack_in_a_hole_is_a_shutdown_that_says_so(budget):
    vm = bare("mov rsp,rbx; ud2")
    vm.machine.space.map(HOLE_GVA, HOLE, 1)
    vm.vcpus[0].regs.rbx = HOLE_GVA + 4096
    came = vm.vcpus[0].run(budget)
    assert (
        isinstance(came, ShutdownExit)
        and came.vectors == (6, 14, 8)
        and "no writable stack" in came.why
    )


def test_that_a_guest_which_unmaps_itself_ends():
    vm = bare(f"mov eax,{DATA}; 1: mov qword ptr [rax],0; add rax,8; jmp 1b")
    table = vm.machine.space.walk(CODE).steps[0].entry_gpa & -4096
    vm.machine.space.builder.unmap(DATA, PAGES)
    vm.machine.space.map(DATA, table, 1)
    came = vm.vcpus[0].run(5000)
    assert isinstance(came, ShutdownExit | InternalErrorExit) or vm.vcpus[0].pc >= HANDLERS
    assert vm.page_table() is not None


SPIN = """
import sys, time, labkit as lk
sys.path.insert(0, {tests!r})
from guests import bare
vm = bare({text!r}, nr_vcpus={nr})
print("go", flush=True)
start = time.monotonic()
try:
    vm.{run}
except KeyboardInterrupt:
    print("stopped", flush=True)
state = [dict(v.regs.all()) for v in vm.vcpus]
assert vm.vcpus[0].step(20) is None and vm.vcpus[0].state == "running"
print("went on", vm.vcpus[0].regs.r8 - state[0]["r8"])
"""
LOOPS = [
    "1: inc r8; inc r9; jmp 1b",
    "1: lock inc qword ptr [rsi]; inc r8; jmp 1b",
    "1: jmp 1b",
    "1: pause; inc r8; jmp 1b",
    "1: cpuid; inc r8; jmp 1b",
    "1: mov ecx,0x3000; mov edi,0x20000100; rep stosb; jmp 1b",
    "1: call 2f; jmp 1b; 2: inc r8; ret",
]


def interrupted(text: str, run: str, nr: int = 1, wait: float = 0.4) -> tuple[str, float]:
    """Run that in another process, press Ctrl-C, and see how long it takes to stop."""
    code = SPIN.format(tests=str(TESTS), text=text, nr=nr, run=run)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout.readline() == "go\n"
    time.sleep(wait)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    try:
        said = child.communicate(timeout=20)[0]
    finally:
        child.kill()
    return said, time.monotonic() - sent


@pytest.mark.parametrize(
    "run, nr", [("vcpus[0].run()", 1), ("run()", 2), ("vcpus[0].run(10**12)", 1)]
)
@pytest.mark.parametrize("text", LOOPS)
def test_that_ctrl_c_stops_an_endless_loop_with_its_state_intact(text, run, nr):
    said, took = interrupted(text, run, nr)
    assert said.startswith("stopped\nwent on") and took < 5


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8))
def test_that_random_page_table_entries_bring_nobody_down(words):
    with bare(f"1: inc r8; mov rax,[{DATA}]; push rax; jmp 1b") as vm:
        steps = vm.machine.space.walk(CODE).steps
        for i, word in enumerate(words):
            vm.memory.write(
                steps[i % len(steps)].entry_gpa + 8 * (i // len(steps)), word.to_bytes(8, "little")
            )
        assert str(vm.vcpus[0].run(500)) and repr(vm.page_table()) and repr(vm.vcpus[0])


NAMES = (
    "cr0",
    "cr3",
    "cr4",
    "efer",
    "rsp",
    "rip",
    "rflags",
    "gdt_base",
    "gdt_limit",
    "idt_base",
    "idt_limit",
    "tr_base",
    "tr_limit",
    "fs_base",
    "cs",
    "ss",
    "ds",
    "dr7",
    "cr8",
    "star",
)


@settings(max_examples=40, deadline=None)
@given(
    regs=st.dictionaries(
        st.sampled_from(NAMES),
        st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 16)),
        max_size=4,
    )
)
def test_that_any_register_may_hold_anything(regs):
    with bare("1: int3; ud2; lgdt [rsi]; mov ds,eax; push rax; syscall; iretq; jmp 1b") as vm:
        for name, value in regs.items():
            try:
                vm.vcpus[0].regs[name] = value
            except lk.LabError as err:
                assert name in str(err)
        assert str(vm.vcpus[0].run(300)) and vm.vcpus[0].regs.all()
