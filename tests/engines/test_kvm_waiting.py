"""What waits in a vCPU's run page on /dev/kvm: values that the host owes, and exits that nobody took."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests import DATA, bare

import labkit as lk
from labkit.engines.exits import Exit, HaltExit, MmioExit, PioExit

pytestmark = pytest.mark.usefixtures("kvm")
HOLE_GVA, HOLE = 0x7000_0000, 0xC000_0000  # four mapped pages where no memslot is
BUDGETS = [1000, None]  # stepped, free


@pytest.fixture
def machine() -> Iterator[object]:
    """machine(text, **regs) makes a guest with device memory at RBX and a port in DX."""
    vms = []

    def make(text: str, **regs: int) -> lk.Vm:
        vm = bare(text, backend="kvm")
        vms.append(vm)
        vm.machine.space.map(HOLE_GVA, HOLE, 4)
        vm.vcpus[0].cpu.set_regs({"rbx": HOLE_GVA, "rdx": 0x99} | regs)
        return vm

    yield make
    for vm in vms:
        vm.close()


def load(offset: int, size: int = 1) -> MmioExit:
    return MmioExit(HOLE + offset, size, False, 0)


def store(offset: int, data: int, size: int = 1) -> MmioExit:
    return MmioExit(HOLE + offset, size, True, data)


def there_and_back(vm: lk.Vm) -> None:
    vm.restore(vm.snapshot())


def all_exits(vm: lk.Vm, budget: int | None, between=lambda vm: None) -> list[Exit]:
    """Run to the HLT; what the n-th exit reads is n; `between` comes before an answer and behind."""
    came: list[Exit] = []
    while not came or not isinstance(came[-1], HaltExit):
        assert len(came) < 20
        exit = vm.vcpus[0].run(budget)
        came.append(exit)
        between(vm)
        if isinstance(exit, PioExit | MmioExit) and not exit.is_write:
            vm.vcpus[0].complete(len(came))
        between(vm)
    return came[:-1]


ANSWERED = [
    ("mov rax,[rbx]; hlt", load(0, 8)),
    ("add rax,[rbx]; hlt", load(0, 8)),
    ("xor eax,eax; in eax,dx; hlt", PioExit(0x99, 4, False, 0)),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("how", ["restore", "fork"])
@pytest.mark.parametrize("text, came", ANSWERED)
def test_that_an_answer_can_be_given_anew_after_going_back(machine, text, came, how, budget):
    vm, answers = machine(text), []
    assert vm.vcpus[0].run(budget) == came
    state = vm.snapshot()
    for answer in (7, 9, None):
        twin = vm.fork() if how == "fork" else vm
        if twin is vm:
            vm.restore(state)
        if answer is not None:
            twin.vcpus[0].complete(answer)
        assert twin.vcpus[0].run(budget) == HaltExit()
        answers.append(twin.vcpus[0].regs.rax)
        if twin is not vm:
            twin.close()
    assert answers == [7, 9, 0]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "text, wanted, result",
    [
        ("movups xmm0,[rbx]; hlt", [load(0, 8), load(8, 8)], {"xmm0": 2 << 64 | 1}),
        (
            "mov rsi,rbx; lea rdi,[rbx+64]; cmpsb; setb r8b; hlt",
            [load(0), load(64)],
            {"r8": 1},
        ),
        (
            "mov rsi,rbx; lea rdi,[rbx+64]; mov ecx,2; rep movsb; hlt",
            [load(0), store(64, 1), load(1), store(65, 3)],
            {"rcx": 0},
        ),
    ],
    ids=["parts", "two", "rep"],
)
def test_that_an_insn_that_loads_twice_keeps_its_answers_over_a_restore(
    machine, text, wanted, result, budget
):
    vm = machine(text)
    assert all_exits(vm, budget, there_and_back) == wanted
    regs = vm.vcpus[0].regs.all()
    assert {name: regs[name] for name in result} == result


@pytest.mark.parametrize(
    "text, wanted, r8",
    [
        (  # another gpa, and the same RIP and RCX
            "mov r9d,3; 1: movzx eax,byte ptr [rbx]; add r8,rax; inc rbx; dec r9d; jnz 1b; hlt",
            [load(0), load(1), load(2)],
            1 + 2 + 3,
        ),
        (  # registers as they were at the store
            "add byte ptr [rbx],5; movzx r8d,byte ptr [rbx+8]; hlt",
            [load(0), store(0, 6), load(8)],
            3,
        ),
    ],
    ids=["loop", "behind a store"],
)
def test_that_an_answer_to_another_insn_is_none_of_this_one(machine, text, wanted, r8):
    vm = machine(text)
    vcpu = vm.vcpus[0]
    for number, exit in enumerate(wanted, 1):
        assert vcpu.run() == exit
        if not exit.is_write:
            vcpu.complete(number)
    there_and_back(vm)
    assert vcpu.run() == HaltExit() and vcpu.regs.r8 == r8


@pytest.mark.parametrize(
    "text, steps",
    [
        ("mov r9d,3; 1: mov [rbx],al; dec r9d; jnz 1b; hlt", 11),
        ("mov rdi,rbx; mov ecx,3; rep stosb; hlt", 6),
        ("mov rdi,rbx; mov ecx,3; rep movsb; hlt", 6),
        ("add [rbx],rax; xchg [rbx],rax; hlt", 3),
        ("mov rdi,rbx; insb; insb; hlt", 4),
    ],
)
@pytest.mark.parametrize("between", [lambda vm: None, there_and_back], ids=["on", "restored"])
def test_that_a_store_to_a_hole_is_one_step_of_a_counted_run(machine, text, steps, between):
    vm = machine(text)
    all_exits(vm, 1000, between)
    assert vm.step == steps


def test_that_the_clock_of_a_free_run_moves_with_each_store_and_alike_after_a_restore(machine):
    vm = machine("1: mov [rbx],al; jmp 1b")
    state = vm.snapshot()
    for _ in range(2):
        vm.restore(state)
        steps = []
        for _ in range(3):
            assert vm.vcpus[0].run() == store(0, 0)
            steps.append(vm.step)
        assert steps == [1, 2, 3]


def test_that_what_an_ins_stores_to_a_hole_leaves_before_the_next_element(machine):
    cpu = machine("rep insb; hlt", rcx=3, rdi=HOLE_GVA).vcpus[0].cpu
    element = PioExit(0x99, 1, False, 0)
    for i in range(3):  # nobody looks at registers in between
        assert (cpu.run(), cpu.run()) == (element, store(i, 0))
    assert cpu.run() == HaltExit()


def test_that_nothing_can_be_answered_where_nothing_was_asked(machine):
    vm = machine("mov [rbx],al; out dx,al; in al,dx; nop; hlt")
    for _ in range(2):
        vm.vcpus[0].run(9)
        with pytest.raises(lk.InvalidState, match="nothing to complete"):
            vm.vcpus[0].complete(1)
    assert vm.vcpus[0].run(9) == PioExit(0x99, 1, False, 0)
    vm.vcpus[0].complete(1)
    assert vm.vcpus[0].step() is None
    with pytest.raises(lk.InvalidState, match="nothing to complete"):
        vm.vcpus[0].complete(1)


def test_that_ins_is_answered_where_it_stood_after_a_restore(machine):
    vm = machine("mov rcx,2; rep insb; hlt")
    assert vm.vcpus[0].run(20) == PioExit(0x99, 1, False, 0)
    state = vm.snapshot()
    for answer in (3, 4):
        vm.vcpus[0].complete(answer)
        assert vm.read(DATA + 0x100, 1) == bytes([answer])
        vm.restore(state)
    assert vm.vcpus[0].run(9) == PioExit(0x99, 1, False, 0) and vm.vcpus[0].run(9) == HaltExit()
