"""Debug registers that guests set for themselves: x86-64's DR0 to DR7, arm64's watchpoints."""

from __future__ import annotations

from functools import cache

import pytest

import labkit as lk
from labkit.engines.exits import BudgetExit

X86 = r"""
#include "labkit.h"
static volatile uint64_t watched, n, dr6;
static uint8_t buf[64];
#define DR(i, v) __asm__ volatile("mov %%0, %%%%dr" #i : : "r"((uint64_t)(v)))
static void db(struct ex_regs *regs)
{
	uint64_t value;

	__asm__ volatile("mov %%%%dr6, %%0" : "=r"(value));
	dr6 = value & 0xe00f;
	n++;
	DR(6, 0xffff0ff0);
	regs->rflags |= 1 << 16;
}
static __attribute__((noinline)) void target(void) { __asm__ volatile("nop"); }
void guest_code(void)
{
	uint64_t c = 40, value;
	void *d = buf;

	set_exception_handler(DB_VECTOR, db);
	%s
	GUEST_SYNC2(n, dr6);
	GUEST_DONE();
}
"""
UNUSED = "(void)c; (void)d; (void)value; (void)target; (void)watched;"
X86_CASES = {  # name: (code, times, DR6)
    "execute": ("DR(0, target); DR(7, 0x402); target();", 1, 1),
    "write": ("DR(1, &watched); DR(7, 0x408 | 1 << 20 | 2ul << 22); watched = 5;", 1, 2),
    "write beside": ("DR(1, &watched + 1); DR(7, 0x408 | 1 << 20 | 2ul << 22); watched = 5;", 0, 0),
    "a part of it": ("DR(2, (char *)&watched + 7); DR(7, 0x420 | 1ul << 24); watched = 5;", 1, 4),
    "write is no read": ("DR(1, &watched); DR(7, 0x408 | 1 << 20); value = watched;", 0, 0),
    "read": ("DR(3, &watched); DR(7, 0x480 | 3ul << 28); value = watched;", 1, 8),
    "rep": (
        "DR(1, buf + 20); DR(7, 0x408 | 1 << 20);"
        '__asm__ volatile("rep stosb" : "+c"(c), "+D"(d) : "a"(7) : "memory");',
        1,
        2,
    ),
    "locked": ("DR(0, &watched); DR(7, 0x402 | 1 << 16); __sync_fetch_and_add(&watched, 1);", 1, 1),
    "twice": ("DR(0, &watched); DR(7, 0x402 | 1 << 16); watched = 1; watched = 2;", 2, 1),
    "switched off": ("DR(0, &watched); DR(7, 0x402 | 1 << 16); DR(7, 0x400); watched = 1;", 0, 0),
    "general detect": (
        'DR(7, 0x2400); __asm__ volatile("mov %%dr0, %0" : "=r"(value));',
        1,
        0x2000,
    ),
}


@cache
def x86(name: str) -> lk.Program:
    return lk.Program.compile(X86.replace("%%", "%").replace("%s", UNUSED + X86_CASES[name][0]))


def synced(guest: lk.Program, budget: int | None = None) -> tuple[list[int], int]:
    """(what the guest says at its first ucall, how many instructions that took)."""
    with lk.Vm.create(guest) as vm:
        vcpu = vm.vcpus[0]
        came = vcpu.run(budget)
        while isinstance(came, BudgetExit):
            came = vcpu.run(budget)
        assert came.cmd == "SYNC", came
        return list(came.args[:2]), vcpu.step_count


@pytest.mark.parametrize("name", X86_CASES)
def test_that_a_guest_breaks_where_its_debug_registers_say(name):
    _, times, dr6 = X86_CASES[name]
    outcomes = [synced(x86(name), budget) for budget in (None, 1, 7, 100_000)]
    assert outcomes[0][0] == [times, dr6]
    assert all(outcome == outcomes[0] for outcome in outcomes)


ARM64 = r"""
#include "labkit.h"
static volatile uint64_t n, far, class;
static volatile uint64_t data[4];
static void handler(struct ex_regs *regs)
{
	class = read_sysreg(esr_el1) >> 26;
	far = read_sysreg(far_el1) - (uint64_t)data;
	n++;
	write_sysreg(0, dbgwcr0_el1);
	isb();
}
void guest_code(void)
{
	uint64_t value;

	for (int ec = 0x30; ec < 0x3d; ec++)
		set_exception_handler(VECTOR_SYNC_CURRENT * 64 + ec, handler);
	write_sysreg(0, oslar_el1);
	write_sysreg(read_sysreg(mdscr_el1) | 1 << 15 | 1 << 13, mdscr_el1); /* MDE, KDE */
	__asm__ volatile("msr daifclr, #8");
	data[1] = 7;
	value = 0;
	WATCH
	GUEST_SYNC2(n << 32 | class << 16 | far, data[1] + value);
	GUEST_DONE();
}
"""
SET = "write_sysreg((uint64_t)&data[{}], dbgwvr0_el1); write_sysreg({}, dbgwcr0_el1); isb();"
STORES, LOADS = "0xff << 5 | 2 << 3 | 3 << 1 | 1", "0xff << 5 | 1 << 3 | 3 << 1 | 1"
HIT = 1 << 32 | 0x35 << 16 | 8
ARM64_CASES = {
    "store": (SET.format(1, STORES) + "data[1] = 5;", [HIT, 5]),
    "store elsewhere": (SET.format(2, STORES) + "data[1] = 5;", [0, 5]),
    "store is no load": (SET.format(1, STORES) + "value = data[1];", [0, 14]),
    "load": (SET.format(1, LOADS) + "value = data[1];", [HIT, 14]),
    "add": (SET.format(1, STORES) + "data[1] += 5;", [HIT, 12]),
    "not at this level": (
        SET.format(1, "0xff << 5 | 2 << 3 | 2 << 1 | 1") + "data[1] = 5;",
        [0, 5],
    ),
    "masked": (SET.format(1, STORES) + 'asm volatile("msr daifset, #8"); data[1] = 5;', [0, 5]),
}


@cache
def arm64(name: str) -> lk.Program:
    return lk.Program.compile(ARM64.replace("WATCH", ARM64_CASES[name][0]), arch="arm64")


@pytest.mark.parametrize("name", ARM64_CASES)
def test_that_an_arm64_watchpoint_comes_before_the_access(name):
    outcomes = [synced(arm64(name), budget) for budget in (None, 1, 7, 100_000)]
    assert outcomes[0][0] == ARM64_CASES[name][1]
    assert all(outcome == outcomes[0] for outcome in outcomes)


UNALIGNED = {  # (SCTLR_EL1's bits, instruction on x1 = buf + 1): exception class, DFSC
    "ldar x0, [x1]": (0, 0x25, 0x21),
    "ldarh w0, [x1]": (0, 0x25, 0x21),
    "stlr w0, [x1]": (0, 0x25, 0x21),
    "ldapr x0, [x1]": (0, 0x25, 0x21),
    "ldaxr x0, [x1]": (0, 0x25, 0x21),
    "ldsmax w0, w2, [x1]": (0, 0x25, 0x21),
    "ldarb w0, [x1]": (2, 0, 0),
    "ldr x0, [x1]": (0, 0, 0),
    "ldr w0, [x1, #4]": (2, 0x25, 0x21),
    "strh w0, [x1]": (2, 0x25, 0x21),
    "ldp x0, x2, [x1]": (2, 0x25, 0x21),
    "ldr x0, [x1, #7]!": (2, 0, 0),
    "ldrsw x0, [x1], #3": (2, 0x25, 0x21),
    "ldr x0, [x1, x3, lsl #3]": (2, 0x25, 0x21),
    "ldurb w0, [x1]": (2, 0, 0),
    "prfm pldl1keep, [x1]": (2, 0, 0),
    "mov x2, sp\\n\\tadd x4, x2, #8\\n\\tmov sp, x4\\n\\tldr x0, [sp]\\n\\tmov sp, x2": (
        8,
        0x26,
        0,
    ),
    "ldr x0, [sp]": (8, 0, 0),
}
ALIGN = r"""
#include "labkit.h"
static uint8_t buf[64] __attribute__((aligned(64)));
static volatile uint64_t esr;
static void handler(struct ex_regs *regs) { esr = read_sysreg(esr_el1); regs->pc += 4; }
void guest_code(void)
{
	uint64_t sctlr = read_sysreg(sctlr_el1);

	for (int ec = 0; ec < 64; ec++)
		set_exception_handler(VECTOR_SYNC_CURRENT * 64 + ec, handler);
	write_sysreg(sctlr | BITS, sctlr_el1);
	isb();
	__asm__ volatile(".arch armv8.3-a\n\tmov x1, %0\n\tmov x3, #1\n\tINSN" : : "r"(buf + 1) : "x0", "x1", "x2", "x3", "x4", "memory");
	write_sysreg(sctlr, sctlr_el1);
	isb();
	GUEST_SYNC2(esr >> 26, esr & 0x3f);
	GUEST_DONE();
}
"""


@pytest.mark.parametrize("insn", UNALIGNED)
def test_that_arm64_alignment_faults_come_where_they_are_owed(insn):
    bits, exception_class, dfsc = UNALIGNED[insn]
    source = ALIGN.replace("BITS", str(bits)).replace("INSN", insn)
    guest = lk.Program.compile(source, arch="arm64")
    assert synced(guest) == synced(guest, 1)
    assert synced(guest)[0] == [exception_class, dfsc]


@pytest.mark.parametrize("insn, choose", [("ldsmax", max), ("ldsmin", min)])
@pytest.mark.parametrize("suffix, bits", [("", 32), ("h", 16), ("b", 8)])
@pytest.mark.parametrize("old, other", [(0x80000010, 0x20), (5, 0xFFFFFFF0), (0x7F, 0x80)])
def test_that_arm64_compares_with_a_sign(insn, choose, suffix, bits, old, other):
    source = (
        '#include "labkit.h"\nvolatile uint64_t m, other;\nvoid guest_code(void)\n{\n\tuint64_t r;\n'
        f'\t__asm__ volatile(".arch armv8.3-a\\n\\t{insn}{suffix} %w1, %w0, [%2]" : "=r"(r)'
        ' : "r"(other), "r"(&m) : "memory");\n\tGUEST_SYNC2(r, m);\n\tGUEST_DONE();\n}\n'
    )
    with lk.Vm.create(lk.Program.compile(source, arch="arm64")) as vm:
        vm.write_guest_global("m", 0x1234_5678_0000_0000 | old)
        vm.write_guest_global("other", other)
        mask = (1 << bits) - 1
        new = choose(old & mask, other & mask, key=lambda v: v - (v >> bits - 1 << bits))
        assert list(vm.vcpus[0].run().args[:2]) == [
            old & mask,
            0x1234_5678_0000_0000 | old & ~mask | new,
        ]
