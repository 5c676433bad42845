"""Code that writes over itself, before itself and behind itself: run, stepped and in any parts."""

from __future__ import annotations

import pytest

import labkit as lk
from labkit.engines.exits import BudgetExit

SNIPPETS = {  # what is returned, the code
    "next immediate": (0x2A, "movb $0x2a, 1+1f(%rip)\n1: mov $0x11,%al\n movzx %al,%eax\n ret"),
    "loop body": (
        0xF,
        "xor %eax,%eax\n mov $5,%ecx\n1: incb 2f+1(%rip)\n2: add $0,%al\n loop 1b\n ret",
    ),
    "before itself": (
        0xF,
        "xor %eax,%eax\n mov $5,%ecx\n1: add $1,%al\n incb 1b+1(%rip)\n dec %ecx\n jnz 1b\n ret",
    ),
    "lock xadd": (
        0x41,
        "mov $1,%eax\n lock xadd %al, 1f+1(%rip)\n1: mov $0x40,%al\n movzx %al,%eax\n ret",
    ),
    "rep movs ahead": (
        0x77,
        "lea 3f(%rip),%rsi\n lea 2f(%rip),%rdi\n mov $5,%ecx\n rep movsb\n2: mov $1,%eax\n ret\n3: mov $0x77,%eax\n",
    ),
    "push ahead": (
        0x0,
        "mov %rsp,%rdx\n lea 1f+8(%rip),%rsp\n movabs $0x9090909090c03190,%rcx\n mov $5,%eax\n push %rcx\n1: .fill 8,1,0x90\n mov %rdx,%rsp\n ret",
    ),
    "data beside code": (
        0x13BA,
        "mov $100,%ecx\n xor %eax,%eax\n1: add %ecx,%eax\n mov %eax,3f(%rip)\n dec %ecx\n jnz 1b\n ret\n3: .long 0",
    ),
    "a jump away from itself": (0x6, "movw $0x00eb,1f(%rip)\n1: jmp 1b\n mov $6,%eax\n ret"),
    "a store over itself": (
        0x90909090,
        "mov $0x90909090,%eax\n1: mov %eax,1b(%rip)\n mov 1b(%rip),%eax\n ret",
    ),
    "over itself, the same bytes": (
        0xFFFA0589,
        "mov 1f(%rip),%eax\n1: mov %eax,1b(%rip)\n mov 1b(%rip),%eax\n ret",
    ),
    "xchg over itself": (
        0x90909090,
        "mov $0x90909090,%eax\n1: xchg %eax,1b(%rip)\n mov 1b(%rip),%eax\n ret",
    ),
    "movs over itself": (
        0xF9058B90,
        "lea 2f(%rip),%rsi\n lea 1f(%rip),%rdi\n1: movsb\n mov 1b(%rip),%eax\n ret\n2: .byte 0x90",
    ),
    "lock cmpxchg over itself": (
        0x90909090,
        "mov 1f(%rip),%eax\n mov $0x90909090,%ecx\n1: lock cmpxchg %ecx,1b(%rip)\n nop;nop;nop;nop\n mov 1b(%rip),%eax\n ret",
    ),
    "rep stosb over itself": (
        0x58B0001,
        "lea 1f(%rip),%rdi\n mov $0x90,%eax\n mov $2,%ecx\n1: rep stosb\n mov 1b(%rip),%eax\n mov %cx,%ax\n ret",
    ),
    "rep stosb up to itself": (
        0x2,
        "lea 1f-3(%rip),%rdi\n mov $0x90,%eax\n mov $6,%ecx\n jmp 1f\n nop;nop;nop;nop\n1: rep stosb\n nop;nop;nop\n mov %ecx,%eax\n ret",
    ),
    "call over itself": (
        0x2,
        "mov %rsp,%rdx\n lea 1f+8(%rip),%rsp\n lea 2f(%rip),%rax\n nop\n1: call *%rax\n nop;nop;nop;nop;nop;nop;nop;nop\n2: mov %rdx,%rsp\n mov 1b(%rip),%eax\n sub $1b,%eax\n ret",
    ),
    "push over itself": (
        0x90909090,
        "mov %rsp,%rdx\n lea 1f+8(%rip),%rsp\n movabs $0x9090909090909090,%rax\n1: push %rax\n nop;nop;nop;nop;nop;nop;nop;nop\n mov %rdx,%rsp\n mov 1b(%rip),%eax\n ret",
    ),
    "over itself behind mov ss": (
        0x90909090,
        "mov $0x90909090,%eax\n mov %ss,%ecx\n mov %ecx,%ss\n1: mov %eax,1b(%rip)\n mov 1b(%rip),%eax\n ret",
    ),
}
SOURCE = r"""
#include "labkit.h"
__asm__(".text\n.balign 4096\n.globl stub\nstub:\n%s\n.balign 4096\n");
void guest_code(void)
{
	uint64_t r;

	set_cr0(get_cr0() & ~(1ul << 16)); /* WP=0: ring 0 may write its read-only text */
	__asm__ volatile("call stub" : "=a"(r) : : "memory", "cc", "rcx", "rdx", "rsi", "rdi");
	GUEST_SYNC(r);
	GUEST_DONE();
}
"""


def outcome(guest: lk.Program, budget: int) -> tuple[object, int]:
    """What the guest returns in runs of at most budget instructions, and how many there were."""
    with lk.Vm.create(guest) as vm:
        vcpu = vm.vcpus[0]
        came = vcpu.run(budget)
        for _ in range(1000):
            if not isinstance(came, BudgetExit):
                break
            came = vcpu.run(budget)
        return came.args[1], vcpu.step_count


@pytest.mark.parametrize("name", SNIPPETS)
def test_that_code_that_changes_itself_runs_as_it_steps(name):
    wanted, code = SNIPPETS[name]
    guest = lk.Program.compile(SOURCE % code.replace("\n", "\\n"))
    outcomes = {outcome(guest, budget) for budget in (1, 2, 3, 7, 100, 2000, 100_000)}
    assert len(outcomes) == 1
    assert next(iter(outcomes))[0] == wanted


# A CPU ends a REP that overwrites itself after the iteration that did; KVM's software emulator,
# which runs ring 0 on some hosts, does not
@pytest.mark.kvm
@pytest.mark.parametrize("name", [name for name in SNIPPETS if not name.startswith("rep stosb")])
def test_that_such_code_gives_on_kvm_what_it_should(kvm, name):
    wanted, code = SNIPPETS[name]
    guest = lk.Program.compile(SOURCE % code.replace("\n", "\\n"))
    with lk.Vm.create(guest, backend="kvm") as vm:
        assert vm.vcpus[0].run().args[1] == wanted
