"""Every way a vCPU comes back to its host, what the host can answer, and that it goes on from there."""

from __future__ import annotations

import pytest
from guests import CODE, DATA, HANDLERS, bare

import labkit as lk
from labkit.engines.exits import (
    BudgetExit,
    DebugExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    MmioExit,
    PioExit,
)

HOLE_GVA, HOLE = 0x7000_0000, 0xC000_0000  # four mapped pages where no memslot is
RAX = 0x1122_3344_5566_7788
only_unicorn = pytest.mark.parametrize("backend", ["unicorn"], indirect=True)
BUDGETS = [1000, 100_000, None]  # counted by Unicorn, counted by blocks, not bounded


@pytest.fixture
def machine(backend):
    """machine(text, **regs) makes a guest with device memory and these registers."""
    vms = []

    def make(text: str | bytes, **regs: int) -> tuple[lk.Vm, lk.Vcpu]:
        vm = bare(text, backend=backend)
        vms.append(vm)
        vm.machine.space.map(HOLE_GVA, HOLE, 4)
        vm.vcpus[0].cpu.set_regs({"rax": RAX, "rbx": HOLE_GVA, "rdx": 0x1234} | regs)
        return vm, vm.vcpus[0]

    yield make
    for vm in vms:
        vm.close()


def steps(vcpu: lk.Vcpu, count: int) -> bool:
    """Whether that many instructions retired, where they were counted."""
    return not vcpu.exact or vcpu.step_count == count


IN = [
    ("in al,dx", 0x1234, 1, 0x1122_3344_5566_77AB),
    ("in ax,dx", 0x1234, 2, 0x1122_3344_5566_89AB),
    ("in eax,dx", 0x1234, 4, 0xEF12_89AB),
    ("in al,0x80", 0x80, 1, 0x1122_3344_5566_77AB),
    ("in eax,0xec", 0xEC, 4, 0xEF12_89AB),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text, port, size, rax", IN)
def test_that_in_gives_what_the_host_answers(machine, text, port, size, rax, budget):
    _, vcpu = machine(f"nop; {text}; inc r8; hlt")
    assert vcpu.run(budget) == PioExit(port, size, False, 0) and vcpu.regs.rax == (
        RAX >> 8 * size << 8 * size if size < 4 else 0
    )
    vcpu.complete(0xEF12_89AB)
    assert (
        steps(vcpu, 2)
        and vcpu.run(budget) == HaltExit()
        and (vcpu.regs.rax, vcpu.regs.r8) == (rax, 1)
    )


@pytest.mark.parametrize("text, size", [("out dx,al", 1), ("out dx,ax", 2), ("out dx,eax", 4)])
def test_that_out_hands_over_what_was_written(machine, text, size):
    _, vcpu = machine(f"{text}; hlt")
    assert vcpu.run(9) == PioExit(0x1234, size, True, RAX & (1 << 8 * size) - 1)
    with pytest.raises(lk.InvalidState, match="nothing to complete"):
        vcpu.complete(1)
    assert vcpu.run(9) == HaltExit() and vcpu.regs.rax == RAX


@pytest.mark.parametrize(
    "prefix, times",
    [("", 1), ("mov ecx,3; rep ", 3), ("xor ecx,ecx; rep ", 0), ("std; mov ecx,2; rep ", 2)],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_that_string_io_leaves_once_an_element(machine, prefix, times, size):
    vm, vcpu = machine(
        f"{prefix}ins{'?bw?d'[size]}; lea rsi,[rsi+64]; {prefix}outs{'?bw?d'[size]}; hlt"
    )
    vm.write(DATA + 0x40 - 8, bytes(range(64)))
    step = -size if "std" in prefix else size
    for i in range(times):
        assert vcpu.run(9) == PioExit(0x1234, size, False, 0)
        vcpu.complete(0x04030201 + i)
    assert (
        vm.read(DATA + 0x100 + step * (times - 1), size)
        == (0x04030201 + times - 1).to_bytes(4, "little")[:size]
        or not times
    )
    for i in range(times):
        wanted = int.from_bytes(vm.read(DATA + 64 + step * i, size), "little")
        assert vcpu.run(9) == PioExit(0x1234, size, True, wanted)
    assert vcpu.run(9) == HaltExit() and vcpu.regs.rdi == DATA + 0x100 + step * times


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "text, step", [("rep insb", 1), ("std; rep insw", -2), (".byte 0x67; rep insd", 4)]
)
def test_that_registers_behind_each_element_of_a_string_are_those_of_one_iteration(
    machine, text, step, budget
):
    vm, vcpu = machine(f"{text}; hlt", rcx=3, rdi=DATA + 0x100)
    for i in (1, 2, 3):
        assert vcpu.run(budget) == PioExit(0x1234, abs(step), False, 0)
        assert (vcpu.regs.rcx, vcpu.regs.rdi) == (3 - i, DATA + 0x100 + step * i) and (
            vm.read(vcpu.pc, 1) == b"\xf4"
        ) == (i == 3)
        vcpu.complete(0x04030200 + i)
        assert vm.read(DATA + 0x100 + step * (i - 1), 1) == bytes([i])
    assert vcpu.run(budget) == HaltExit() and vcpu.regs.rdi == DATA + 0x100 + step * 3


@pytest.mark.parametrize("budget", BUDGETS)
def test_that_a_count_changed_inside_a_string_counts_from_there(machine, budget):
    _, vcpu = machine("rep insb; hlt", rcx=5, rdi=DATA)
    assert vcpu.run(budget) == PioExit(0x1234, 1, False, 0)
    vcpu.regs.rcx = 1
    assert (
        vcpu.run(budget) == PioExit(0x1234, 1, False, 0)
        and vcpu.run(budget) == HaltExit()
        and vcpu.regs.rdi == DATA + 2
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_that_a_string_that_meets_a_fault_goes_on_behind_it(machine, budget):
    vm, vcpu = machine("rep insb; hlt", rcx=3, rdi=0x66660FFE)
    vm.machine.space.map(0x66660000, vm.gva2gpa(DATA))
    exits = [vcpu.run(budget) for _ in range(2)]
    assert exits == [PioExit(0x1234, 1, False, 0)] * 2 and vcpu.regs.rcx == 1
    while len(exits) < 4 and not isinstance(
        came := vcpu.run(budget), HaltExit
    ):  # KVM asks the device first, then faults
        exits.append(came)
    assert exits in ([exits[0]] * 2, [exits[0]] * 3)
    assert vcpu.pc == HANDLERS + 16 * 14 + 1 and (vcpu.regs.cr2, vcpu.regs.rcx) == (0x66661000, 1)


@only_unicorn  # KVM asks the device first, and meets the fault when it stores what the device said
def test_that_string_io_follows_its_prefixes_and_faults_like_any_access(machine):
    vm, vcpu = machine(
        ".byte 0x64,0x6e; .byte 0x67,0xf3,0x6e; outsb; mov edi,0x66660000; insb",
        fs_base=0x10,
        rsi=DATA,
        rcx=0x7_0000_0001,
    )
    vm.write(DATA, bytes(range(64)))
    assert [vcpu.run(9).data for _ in range(3)] == [0x10, 1, 2] and vcpu.regs.rcx == 0
    assert (
        vcpu.run(9) == HaltExit()
        and vcpu.pc == HANDLERS + 16 * 14 + 1
        and vcpu.regs.cr2 == 0x66660000
    )


LOADS = [
    ("mov rax,[rbx+8]", 8, (1 << 64) - 2, (1 << 64) - 2),
    ("mov eax,[rbx+8]", 4, 7, 7),
    ("mov al,[rbx+8]", 1, 0x1FF, RAX | 0xFF),
    ("movzx eax,word ptr [rbx+8]", 2, 0x12345, 0x2345),
    ("movsx rax,byte ptr [rbx+8]", 1, 0x80, (1 << 64) - 128),
    ("add rax,[rbx+8]", 8, 8, RAX + 8),
]
STORES = [
    ("mov [rbx+8],rax", 8, RAX),
    ("mov [rbx+8],al", 1, 0x88),
    ("mov dword ptr [rbx+8],-1", 4, 0xFFFFFFFF),
    ("lea rdi,[rbx+8]; stosw", 2, 0x7788),
    ("lea rsp,[rbx+16]; push rax", 8, RAX),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text, size, value, rax", LOADS)
def test_that_a_load_from_device_memory_gets_what_the_host_answers(
    machine, text, size, value, rax, budget
):
    _, vcpu = machine(f"nop; {text}; inc r8; hlt")
    assert (
        vcpu.run(budget) == MmioExit(HOLE + 8, size, False, 0)
        and vcpu.pc == CODE + 1
        and steps(vcpu, 1)
    )
    vcpu.complete(value)
    assert (
        vcpu.run(budget) == HaltExit()
        and (vcpu.regs.rax, vcpu.regs.r8) == (rax, 1)
        and steps(vcpu, 4)
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text, size, value", STORES)
def test_that_a_store_to_device_memory_is_handed_over_once(machine, text, size, value, budget):
    _, vcpu = machine(f"{text}; inc r8; hlt")
    assert vcpu.run(budget) == MmioExit(HOLE + 8, size, True, value)
    assert vcpu.run(budget) == HaltExit() and vcpu.regs.r8 == 1


ACCESSES = [  # what an instruction does to device memory, in order: (offset, bytes, is write, value read or written)
    ("add dword ptr [rbx],5", [(0, 4, False, 7), (0, 4, True, 12)]),
    ("lock inc qword ptr [rbx]", [(0, 8, False, 7), (0, 8, True, 8)]),
    ("xchg [rbx],rax", [(0, 8, False, 9), (0, 8, True, RAX)]),
    ("lock xadd [rbx],eax", [(0, 4, False, 1), (0, 4, True, 0x55667789)]),
    ("push qword ptr [rbx]", [(0, 8, False, 5)]),
    ("lea rsp,[rbx+8]; pop rcx", [(8, 8, False, 5)]),
    (
        "movups xmm0,[rbx]; movups [rbx+32],xmm0",
        [(0, 8, False, 1), (8, 8, False, 2), (32, 8, True, 1), (40, 8, True, 2)],
    ),
    ("lea rsi,[rbx]; lea rdi,[rbx+0x1000]; movsq", [(0, 8, False, 77), (0x1000, 8, True, 77)]),
    (
        "lea rsi,[rbx]; lea rdi,[rbx+0x1000]; cmpsb; sete al",
        [(0x1000, 1, False, 7), (0, 1, False, 7)],
    ),
    (
        "lea rdi,[rbx+4]; mov ecx,3; rep stosd",
        [(4, 4, True, 0x55667788), (8, 4, True, 0x55667788), (12, 4, True, 0x55667788)],
    ),
    ("mov rsi,rbx; mov ecx,2; rep lodsb", [(0, 1, False, 3), (1, 1, False, 4)]),
    ("mov rax,[rbx+0xffc]", [(0xFFC, 8, False, 0x1234567890ABCDEF)]),
    ("mov [rbx+0xffd],rax", [(0xFFD, 8, True, RAX)]),
]
KVM_ACCESSES = {  # its emulator reads DS:RSI first, and cuts an access at the end of a page
    "lea rsi,[rbx]; lea rdi,[rbx+0x1000]; cmpsb; sete al": [
        (0, 1, False, 7),
        (0x1000, 1, False, 7),
    ],
    "mov rax,[rbx+0xffc]": [(0xFFC, 4, False, 0x90ABCDEF), (0x1000, 4, False, 0x12345678)],
    "mov [rbx+0xffd],rax": [(0xFFD, 3, True, RAX & 0xFFFFFF), (0x1000, 5, True, RAX >> 24)],
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text, accesses", ACCESSES)
def test_that_all_accesses_of_an_instruction_leave_in_order(
    machine, backend, text, accesses, budget
):
    accesses = KVM_ACCESSES.get(text, accesses) if backend == "kvm" else accesses
    _, vcpu = machine(f"{text}; inc r8; hlt")
    for offset, size, is_write, value in accesses:
        assert vcpu.run(budget) == MmioExit(HOLE + offset, size, is_write, value if is_write else 0)
        if not is_write:
            vcpu.complete(value)
    assert vcpu.run(budget) == HaltExit() and vcpu.regs.r8 == 1


def test_that_a_load_that_nobody_answers_reads_zero_and_a_jump_away_forgets_it(machine):
    _, vcpu = machine("mov rax,[rbx]; hlt")
    assert (
        vcpu.run(9) == MmioExit(HOLE, 8, False, 0)
        and vcpu.run(9) == HaltExit()
        and vcpu.regs.rax == 0
    )
    vcpu.regs.rip = CODE
    assert vcpu.run(9) == MmioExit(HOLE, 8, False, 0)
    vcpu.regs.rip = CODE + 3
    assert vcpu.run(9) == HaltExit()
    with pytest.raises(lk.InvalidState):
        vcpu.complete(1)


@only_unicorn  # KVM cuts such an access in two: one half is memory, the other leaves as MMIO
def test_that_device_memory_beside_real_memory_is_refused_where_an_access_touches_both(machine):
    vm, vcpu = machine("mov rax,[rbx-4]; hlt")
    vm.machine.space.map(HOLE_GVA - 4096, vm.gva2gpa(DATA), 1)
    came = vcpu.run(9)
    assert (
        isinstance(came, InternalErrorExit)
        and "across the end of a memslot" in came.why
        and came.disassembly.startswith("mov rax")
    )


def test_that_hlt_leaves_behind_itself_and_goes_on(machine):
    _, vcpu = machine("hlt; hlt; inc r8; hlt")
    assert (
        [vcpu.run(9) for _ in range(3)] == [HaltExit()] * 3 and vcpu.regs.r8 == 1 and steps(vcpu, 4)
    )


@only_unicorn  # KVM answers hypercalls itself (capability hypercalls)
@pytest.mark.parametrize("text", ["vmcall", "vmmcall"])
def test_that_a_hypercall_shows_its_arguments_and_returns_the_answer(machine, text):
    _, vcpu = machine(f"mov eax,5; mov ebx,1; mov ecx,2; mov edx,3; mov esi,4; {text}; hlt")
    assert vcpu.run(9) == HypercallExit(5, (1, 2, 3, 4)) and vcpu.regs.rax == (1 << 64) - 1000
    vcpu.complete(77)
    assert vcpu.run(9) == HaltExit() and vcpu.regs.rax == 77


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "text",
    [
        "nop",
        "cpuid",
        "in al,dx",
        "rdtsc",
        "mov al,[rbx]",
        "pause",
        "lock inc qword ptr [rsi]",
        "rep stosb",
    ],
)
def test_that_a_breakpoint_stops_before_any_instruction_once_a_round(machine, text, budget):
    _, vcpu = machine(f"nop; 1: inc r8; {text}; inc r9; jmp 1b", rcx=5)
    vcpu.break_at(there := CODE + 4)
    for round in range(1, 4):
        while (came := vcpu.run(budget)) != DebugExit(there):
            assert isinstance(came, PioExit | MmioExit)
        assert (vcpu.pc, vcpu.regs.r8, vcpu.regs.r9) == (there, round, round - 1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_that_breakpoints_come_and_go_while_the_code_is_translated(machine, budget):
    _, vcpu = machine("1: inc r8; inc r9; inc r10; jmp 1b")
    vcpu.run(5000)
    vcpu.break_at(CODE + 3)
    assert vcpu.run(budget) == DebugExit(CODE + 3)
    vcpu.set_breakpoints({CODE + 6, CODE + 9})
    assert [vcpu.run(budget) for _ in range(3)] == [
        DebugExit(CODE + 6),
        DebugExit(CODE + 9),
        DebugExit(CODE + 6),
    ]
    vcpu.set_breakpoints(set())
    assert vcpu.run(999) == BudgetExit(999)


def test_that_a_breakpoint_where_we_stand_lets_us_go_and_one_in_a_handler_stops(machine):
    _, vcpu = machine("nop; ud2")
    vcpu.break_at(CODE, HANDLERS + 16 * 6)
    assert (
        vcpu.run(9) == DebugExit(HANDLERS + 16 * 6)
        and vcpu.step_count == 2
        and vcpu.run(9) == HaltExit()
    )


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 4096, 4097, 10_000])
def test_that_a_budget_is_kept_to_the_instruction(machine, budget):
    _, vcpu = machine("1: inc r8; jmp 1b")
    assert (
        vcpu.run(budget) == BudgetExit(budget)
        and vcpu.step_count == budget
        and vcpu.regs.r8 == (budget + 1) // 2
    )
