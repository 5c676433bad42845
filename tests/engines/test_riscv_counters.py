"""riscv64's counters in U-mode: what scounteren does not allow is illegal (Privileged Architecture 12.1.5)."""

from __future__ import annotations

from functools import cache

import pytest

import labkit as lk

ECALL_U, ILLEGAL = 8, 2
SOURCE = r"""
#include "labkit.h"
uint64_t page;
volatile uint32_t insn;
volatile uint64_t allowed;
static volatile uint64_t cause;
static uint64_t back;
static void handler(struct ex_regs *regs) { cause = regs->cause; regs->epc = back; regs->status |= 1 << 8; }
void guest_code(void)
{
	for (int i = 0; i < 32; i++)
		set_exception_handler(i, handler);
	csr_write(sstatus, csr_read(sstatus) | 1 << 18); /* SUM */
	csr_write(scounteren, allowed);
	((volatile uint32_t *)page)[0] = insn;
	((volatile uint32_t *)page)[1] = 0x73; /* ecall */
	__asm__ volatile("fence.i\n\tla t0, 1f\n\tsd t0, %0\n\tli t0, 0x100\n\tcsrc sstatus, t0\n\tcsrw sepc, %1\n\tsret\n1:" : "=m"(back) : "r"(page) : "t0", "a0", "memory");
	GUEST_SYNC(cause);
	GUEST_DONE();
}
"""
USER_EXECUTABLE = 0x18  # U and X of an entry


@cache
def guest() -> lk.Program:
    return lk.Program.compile(SOURCE, arch="riscv64")


@pytest.mark.parametrize(
    ("insn", "allowed", "cause"),
    [
        (0x00000013, 0, ECALL_U),  # nop
        (0xC0002573, 0, ILLEGAL),  # rdcycle a0
        (0xC0102573, 0, ILLEGAL),  # rdtime a0
        (0xC0202573, 0, ILLEGAL),  # rdinstret a0
        (0xC0302573, 0, ILLEGAL),  # csrr a0, hpmcounter3
        (0xC0002573, 7, ECALL_U),
        (0xC0102573, 5, ILLEGAL),
        (0xC0102573, 2, ECALL_U),
        (0xC0202573, 4, ECALL_U),
        (0xC0007573, 6, ILLEGAL),  # csrrci a0, cycle, 0
        (0xC0006573, 1, ECALL_U),  # csrrsi a0, cycle, 0
        (0xC0001573, 7, ILLEGAL),  # csrrw a0, cycle, zero: it cannot be written
        (0xC0302573, 0xFFFFFFFF, ILLEGAL),  # there is none
        (0xC1F02573, 0xFFFFFFFF, ILLEGAL),
    ],
)
def test_that_a_counter_is_read_in_user_mode_only_where_it_may(insn, allowed, cause):
    with lk.Vm.create(guest()) as vm:
        page = vm.alloc(4096)
        for name, value in (("page", page), ("insn", insn), ("allowed", allowed)):
            vm.write_guest_global(name, value)
        step = vm.page_table().walk(page).steps[-1]
        vm.memory.write(step.entry_gpa, (step.entry | USER_EXECUTABLE).to_bytes(8, "little"))
        assert vm.vcpus[0].run(100_000).args[1] == cause
