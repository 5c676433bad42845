"""What Unicorn would execute wrongly is never executed, wherever it stands and however it came there."""

from __future__ import annotations

import pytest
from guests import CODE, DATA, HANDLERS, PAGES, asm, bare

import labkit as lk
from labkit.engines.exits import BudgetExit, DebugExit, HaltExit, InternalErrorExit, PioExit

VEX = bytes.fromhex("c5f1fec2")  # vpaddd xmm0,xmm1,xmm2
REFUSED = {  # assembly, or machine code
    "VEX 2": VEX,
    "VEX 3": "vpermilpd xmm0,xmm1,1",
    "VEX ymm": "vaddps ymm0,ymm1,ymm2",
    "BMI": "andn eax,ebx,ecx",
    "EVEX": "vaddps zmm0,zmm1,zmm2",
    "XOP": bytes.fromhex("8fe878c0c105"),
    "VEX memory": "vmovdqu xmm0,[rip]",
    "VEX unknown to capstone": bytes.fromhex("c5fbffc0"),
    "vzeroupper": "vzeroupper",
    "kmov": "kmovw k1,eax",
}
XSAVE = [
    "xsave [rsi]",
    "xrstor [rsi]",
    "xsaveopt [rsi]",
    "xsave64 [rsi]",
    "xsavec [rsi]",
    "xsaves [rsi]",
]
BUDGETS = [1000, 100_000, None]


def refused(vcpu: lk.Vcpu, gva: int, budget: int | None = 1000) -> bool:
    """Whether the vCPU stops before the instruction there and says what it is."""
    came = vcpu.run(budget)
    return (
        isinstance(came, InternalErrorExit)
        and came.pc == vcpu.pc == gva
        and bool(came.data)
        and vcpu.state == "stuck"
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", REFUSED)
def test_that_vector_instructions_are_refused_and_named(name, budget):
    insn = REFUSED[name]
    code = asm(insn) if isinstance(insn, str) else insn
    vm = bare(b"\x90" + code)
    assert (
        refused(vm.vcpus[0], CODE + 1, budget)
        and "VEX" in vm.events.what.iloc[-1]
        and vm.vcpus[0].step_count == 1
    )
    assert refused(vm.vcpus[0], CODE + 1), "and again when it is asked to go on"


@pytest.mark.parametrize(
    "text", ["lock neg qword ptr [rsi]", "lock neg byte ptr [rsi+9]", "lock neg dword ptr fs:[rsi]"]
)
def test_that_lock_neg_is_refused_because_its_flags_would_be_wrong(text):
    assert (
        refused(bare(text).vcpus[0], CODE)
        and bare("neg qword ptr [rsi]; hlt").vcpus[0].run() == HaltExit()
    )


@pytest.mark.parametrize("text", XSAVE)
def test_that_xsave_is_undefined_without_osxsave_and_refused_with_it(text):
    vm = bare(text)
    assert vm.vcpus[0].run(9) == HaltExit() and vm.vcpus[0].pc == HANDLERS + 16 * 6 + 1
    vm = bare(text)
    vm.vcpus[0].regs.cr4 |= 1 << 18
    assert refused(vm.vcpus[0], CODE)


@pytest.mark.parametrize(
    "text",
    [
        "nop; nop",
        "jmp 1f; .byte 0xb8; 1:",
        "call 1f; 1:",
        "mov eax,1; test eax,eax; jnz 1f; nop; 1:",
        "mov ecx,2; rep stosb",
    ],
)
def test_that_the_first_instruction_of_a_vcpu_of_a_block_or_behind_a_jump_is_looked_at(text):
    assert refused(bare(VEX).vcpus[0], CODE)
    before = asm(text)
    assert refused(bare(before + VEX).vcpus[0], CODE + len(before))


def test_that_the_first_instruction_of_a_handler_is_looked_at():
    vm = bare("ud2")
    vm.write(HANDLERS + 16 * 6, VEX)
    assert refused(vm.vcpus[0], HANDLERS + 16 * 6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_that_a_jump_into_the_middle_of_an_instruction_is_looked_at(budget):
    hidden = (
        b"\x48\xb8"
        + VEX
        + bytes(4)
        + asm(f"inc r8; mov edx,{CODE}; lea rcx,[rdx+2]; cmp r8,3; cmove rdx,rcx; jmp rdx")
    )
    vcpu = bare(hidden).vcpus[0]
    assert refused(vcpu, CODE + 2, budget) and vcpu.regs.r8 == 3


@pytest.mark.parametrize("size", range(1, 4))
def test_that_an_instruction_across_two_pages_is_looked_at(size):
    vm = bare(b"\x90" * (4096 - size) + VEX + b"\xf4")
    vm.vcpus[0].regs.rip = CODE + 4096 - size - 3
    assert refused(vm.vcpus[0], CODE + 4096 - size)


WRITER = f"""mov eax,{int.from_bytes(VEX, "little"):#x}; lea rdi,[rip+4f]; xor ecx,ecx
1: inc ecx; call 3f; cmp ecx,{{rounds}}; jne 1b; mov [rdi],eax; {{between}} call 3f; hlt
3: inc r8
4: nop; nop; nop; nop; inc r9; ret"""


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("between", ["", "cpuid; mov ebx,5;", "mov rax,cr3; mov cr3,rax;"])
@pytest.mark.parametrize("rounds", [1, 2000])
def test_that_code_the_guest_writes_while_it_runs_is_looked_at(rounds, between, budget):
    code = asm(WRITER.format(rounds=rounds, between=between))
    vcpu = bare(code).vcpus[0]
    while (came := vcpu.run(budget)) == BudgetExit(budget):
        pass
    assert (
        isinstance(came, InternalErrorExit)
        and came.data == VEX
        and vcpu.regs.r9 == rounds
        and vcpu.regs.r8 == rounds + 1
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "old, new",
    [
        ("cpuid", "xor eax,eax"),
        ("in al,dx", "nop"),
        ("rdtsc", "nop; nop"),
        ("rep stosb", "nop; nop"),
        ("nop; nop", "cpuid"),
        ("mov ss,eax", "inc eax"),
        ("pause", "nop; nop"),
    ],
)
def test_that_a_sensitive_instruction_that_was_overwritten_is_forgotten(old, new, budget):
    text = f"xor eax,eax; mov ax,0x10; 1: {old}; inc r9; lea rdi,[rip+1b]; mov dword ptr [rdi],0; cmp r9,2; jne 1b; hlt"
    code = bytearray(asm(text))
    there = len(asm("xor eax,eax; mov ax,0x10"))
    wanted = asm(new) + code[there + len(asm(new)) : there + 4]
    code = code.replace(bytes(4), wanted[:4])
    vcpu = bare(bytes(code)).vcpus[0]
    while (came := vcpu.run(budget)) != HaltExit():
        assert came == BudgetExit(budget) or isinstance(came, PioExit)
    assert vcpu.regs.r9 == 2 and vcpu.step_count < 40


def two_spaces(one: bytes, two: bytes) -> tuple[lk.Vm, int]:
    """A VM with a second set of page tables in which other code lies at CODE + 0x1000; returns its root too."""
    vm = bare(b"\x90" * 4096 + one)
    space = vm.machine.space
    first = space.root_gpa
    copies = {gpa: space.alloc_pages(1, "page tables") for gpa in sorted(space.tables)}
    for gpa, copy in copies.items():
        vm.memory.write(copy, vm.memory.read(gpa, 4096))
    for copy in copies.values():
        words = [int.from_bytes(vm.memory.read(copy + i, 8), "little") for i in range(0, 4096, 8)]
        moved = [
            word
            - (word & 0xFF_FFFF_F000)
            + copies.get(word & 0xFF_FFFF_F000, word & 0xFF_FFFF_F000)
            for word in words
        ]
        vm.memory.write(copy, b"".join(word.to_bytes(8, "little") for word in moved))
    entry = vm.page_table(root=copies[first]).walk(CODE + 0x1000).steps[-1]
    page = space.alloc_pages(1, "test")
    vm.memory.write(page, two)
    vm.memory.write(entry.entry_gpa, (entry.entry & 0xFFF | page).to_bytes(8, "little"))
    return vm, copies[first]


@pytest.mark.parametrize("budget", BUDGETS)
def test_that_another_page_at_the_same_gva_is_looked_at(budget):
    vm, other = two_spaces(asm("nop; nop; nop; nop; inc r8; ret"), VEX + asm("ret"))
    vm.write(
        CODE,
        asm(
            f"mov ebp,{CODE + 4096}; mov ecx,9; 1: call rbp; dec ecx; jnz 1b; mov eax,{other}; mov cr3,rax; call rbp; hlt"
        ),
    )
    vcpu = vm.vcpus[0]
    while (came := vcpu.run(budget)) == BudgetExit(budget):
        pass
    assert isinstance(came, InternalErrorExit) and came.pc == CODE + 0x1000 and came.data == VEX


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "one, two",
    [
        ("cpuid; inc r8; ret", "nop; nop; inc r9; ret"),
        ("rep stosb; inc r8; ret", "inc eax; inc r9; ret"),
        ("in al,dx; inc r8; ret", "cpuid; inc r9; ret"),
        ("mov ss,edx; inc r8; ret", "rep stosb; inc r9; ret"),
    ],
)
def test_that_two_address_spaces_with_different_code_at_one_gva_each_get_their_own(
    one, two, budget
):
    vm, other = two_spaces(asm(one), asm(two))
    first = vm.machine.space.root_gpa
    vm.write(
        CODE,
        asm(
            f"1: mov ebp,{CODE + 4096}; mov edi,{DATA}; mov ecx,2; mov edx,0x10; call rbp; mov eax,{other}; mov cr3,rax;"
            f"mov ecx,2; call rbp; mov eax,{first}; mov cr3,rax; inc r10; cmp r10,5; jne 1b; hlt"
        ),
    )
    vcpu, exits = vm.vcpus[0], 0
    while (came := vcpu.run(budget)) != HaltExit():
        exits += isinstance(came, PioExit)
        assert came == BudgetExit(budget) or isinstance(came, PioExit)
    assert (vcpu.regs.r8, vcpu.regs.r9, vcpu.regs.r10) == (5, 5, 5) and exits == 5 * (
        "in" in one[:3]
    )
    twin, steps = two_spaces(asm(one), asm(two))[0], 0
    twin.write(CODE, vm.read(CODE, 256))
    while twin.vcpus[0].step() != HaltExit():
        steps += 1
    assert vcpu.step_count == twin.vcpus[0].step_count


@pytest.mark.parametrize("budget", [1000, 100_000])
def test_that_a_second_vcpu_sees_the_code_that_the_first_one_wrote(budget):
    vm = bare(b"", nr_vcpus=2)
    writer, runner = vm.vcpus
    vm.write(CODE, asm("1: inc r8; nop; nop; nop; nop; jmp 1b"))
    vm.write(
        CODE + 0x100,
        asm(
            f"1: mov dword ptr [rip-0x107],{int.from_bytes(VEX, 'little'):#x};"
            "mov dword ptr [rip-0x111],0x90909090; jmp 1b"
        ),
    )
    writer.regs.rip = CODE + 0x100
    for _ in range(3):
        assert runner.run(budget) == BudgetExit(budget)
        runner.regs.rip = CODE
        assert writer.step() is None and vm.read(CODE + 3, 4) == VEX
        assert refused(runner, CODE + 3, budget)
        assert writer.step(2) is None and vm.read(CODE + 3, 4) == b"\x90" * 4


def test_that_what_the_host_writes_is_seen_at_once():
    vm = bare("1: inc r8; nop; nop; jmp 1b")
    vcpu = vm.vcpus[0]
    vcpu.run(100)
    vm.write(CODE + 3, asm("cpuid"))
    assert vcpu.run(8) == BudgetExit(8) and vcpu.regs.rbx == int.from_bytes(b"Auth", "little")
    vm.write(CODE + 3, asm("hlt"))
    assert vcpu.run(9) == HaltExit()
    vm.memory.write(vm.gva2gpa(CODE + 3), VEX)
    vcpu.regs.rip = CODE
    assert refused(vcpu, CODE + 3)


def test_that_page_tables_the_host_writes_are_seen_at_once():
    vm = bare(f"1: mov rax,[{DATA}]; jmp 1b")
    vcpu, space = vm.vcpus[0], vm.machine.space
    vm.write(DATA, b"one")
    vcpu.run(10)
    entry, page = space.walk(DATA).steps[-1], space.alloc_pages(1, "test")
    vm.memory.write(page, b"two")
    vm.memory.write(entry.entry_gpa, (entry.entry & 0xFFF | page).to_bytes(8, "little"))
    assert vcpu.run(2) == BudgetExit(2) and vcpu.regs.rax == int.from_bytes(b"two", "little")
    space.builder.unmap(DATA, 1)
    assert vcpu.run(9) == HaltExit() and vcpu.pc == HANDLERS + 16 * 14 + 1 and vcpu.regs.cr2 == DATA


def test_that_code_of_another_mode_is_refused():
    vm = bare("push 0x40; lea rax,[rip+3]; push rax; retfq; nop; nop")
    vm.write(vm.machine.tables_gva + 0x40, 0x00CF9B000000FFFF.to_bytes(8, "little"))
    vm.vcpus[0].regs.gdt_limit = 0x47
    came = vm.vcpus[0].run(20)
    assert (
        isinstance(came, InternalErrorExit) and "64-bit" in came.why and vm.vcpus[0].step_count == 4
    )


def test_that_breakpoints_and_guards_do_not_hide_each_other():
    vm = bare(b"\x90" + VEX)
    vm.vcpus[0].break_at(CODE + 1)
    assert vm.vcpus[0].run(9) == DebugExit(CODE + 1) and refused(vm.vcpus[0], CODE + 1)


@pytest.mark.parametrize(
    "data", [bytes([page % 256]) * 4096 for page in range(0, 256, 37)] + [bytes(range(256)) * 16]
)
def test_that_random_bytes_never_bring_python_down(data):
    vm = bare(data * PAGES)
    for start in range(0, 64, 7):
        vm.vcpus[0].regs.rip = CODE + start
        vm.vcpus[0].run(2000)
    assert len(vm.page_table().leaves) and vm.vcpus[0].disassemble()
