"""One step of a vCPU against the machine's own single-step trap, and runs of many steps against single ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from guests import (
    CODE,
    DATA,
    HANDLERS,
    KERNEL_CS,
    KERNEL_SS,
    STACK_TOP,
    STACKS,
    asm,
    bare,
    lacks,
    start,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native import GPRS, SIZE, Native

import labkit as lk
from labkit.engines.disasm import Decoded, disassemble
from labkit.engines.exits import BudgetExit

DATA_AT_START = bytes(range(256)) * 2
FLAGS = 0xCD5  # CF PF AF ZF SF DF OF
ARITHMETIC = 0x8D5  # of a REP CMPS or SCAS under way: some CPUs show each iteration's, others those before it (SDM vol. 2 REP)
START = {
    "rip": CODE,
    "rsp": STACK_TOP - 256,
    "rsi": DATA,
    "rdi": DATA + 0x100,
    "rflags": 0x202,
    "rbp": DATA + 0x40,
    "rax": 0x2B,
    "rbx": 0x1_8000_0003,
    "rdx": 5,
    "r8": DATA + 8,
    "r9": 1 << 63,
}
SEQUENCES = {
    "rep": "mov ecx,3; rep stosb; nop; xor ecx,ecx; rep movsb; inc rcx; rep lodsw; mov ecx,2; rep movsq; nop",
    "repe": "mov ecx,5; repe cmpsb; mov ecx,3; mov rdi,rsi; repe cmpsd; nop; mov ecx,4; repe scasb; nop",
    "repne": "mov ecx,4; mov al,0x82; mov edi,0x20000080; repne scasb; mov ecx,9; repne cmpsw; nop",
    "rep to the last": "mov ecx,1; rep stosq; mov ecx,2; repe cmpsb; repne scasb; nop",
    "rep backwards": "std; mov ecx,3; rep stosw; cld; mov ecx,2; rep movsb; nop",
    "rep with other prefixes": ".byte 0xb9,3,0,0,0, 0xf3,0x2e,0xa4, 0x90, 0xb9,2,0,0,0, 0xf2,0xf3,0xaa, 0xb9,2,0,0,0, 0xf3,0xf2,0xa7, 0x90",
    "rep with narrow counter": "mov rcx,0x700000002; mov edi,0x20000100; mov esi,0x20000000; .byte 0x67,0xf3,0xa4,0xf3,0x67,0xaa; nop",
    "rep behind rep": "mov ecx,2; rep stosb; rep stosb; mov ecx,1; rep stosb; mov ecx,2; rep stosb; nop",
    "rep in a loop": "mov edx,3; 1: mov ecx,2; rep stosb; dec edx; jnz 1b; nop",
    "mov ss": "mov eax,0x2b; mov ss,eax; nop; nop; mov ss,eax; inc rdx; mov ss,eax; jmp 1f; nop; 1: nop",
    "mov ss twice": "mov eax,0x2b; mov ss,eax; mov ss,eax; nop; nop; mov ss,eax; mov ss,eax; mov ss,eax; nop; nop",
    "mov ss and rep": "mov eax,0x2b; mov ecx,3; mov ss,eax; rep stosb; nop; mov ss,eax; rep stosb; nop",
    "mov ss from memory": "mov dword ptr [rsi],0x2b; mov ss,[rsi]; nop; nop; mov ds,eax; nop",
    "other segments": "mov ds,eax; nop; mov es,eax; nop; mov eax,0; mov fs,eax; nop; mov eax,ss; mov edx,cs; nop",
    "flags": "pushfq; pop rax; stc; std; pushfq; cld; clc; popfq; lahf; sahf; pushfw; popfw; nop",
    "branches": "mov ecx,3; 1: dec ecx; jnz 1b; call 2f; jmp 3f; 2: ret; 3: mov ecx,2; 4: loop 4b; jrcxz 5f; nop; 5: nop",
    "indirect": "lea rax,[rip+9]; push rax; ret; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop",
    "locked": "lock inc qword ptr [rsi]; lock xadd [rsi],rdx; lock bts qword ptr [rsi],7; lock cmpxchg [rsi],rbx; xchg [rsi],rax",
    "stack": "push rax; push 7; pop rdx; enter 32,0; leave; push qword ptr [rsi]; pop qword ptr [rdi]; push ax; pop dx; nop",
    "pause": "pause; nop; pause; pause; nop; mov ecx,2; 1: pause; loop 1b; nop",
    "wide": "mul rbx; imul rdx,rbx,77; xor edx,edx; div rbx; cqo; cdqe; neg rax; bsf rdx,rbx; bsr rcx,rbx; popcnt rdx,rbx; bswap rax",
    "shifts": "mov ecx,3; shl rbx,cl; sar r9,1; ror rbx,5; rcl rdx,1; shld rbx,rdx,9; shrd rdx,rbx,cl; bt rbx,rdx; btc rbx,3",
    "sse": "movd xmm0,ebx; pshufd xmm1,xmm0,0; movq rax,xmm1; movups [rdi],xmm1; cvtsi2sd xmm2,rdx; cvttsd2si rcx,xmm2; nop",
    "x87": "fninit; fld1; fldpi; faddp; fistp qword ptr [rdi]; mov rax,[rdi]; fninit; fnstcw [rdi]; fldcw [rdi]; fnstcw [rdi]; nop",
}
UNDEFINED = {
    "mul": 0xD4,
    "imul": 0xD4,
    "div": 0x8D5,
    "bsf": 0x895,
    "bsr": 0x895,
    "shl": 0x810,
    "sar": 0x810,
    "ror": 0x800,
    "rcl": 0x800,
    "shld": 0x810,
    "shrd": 0x810,
    "bt": 0x894,
    "btc": 0x894,
    "bts": 0x894,
    "lock bts": 0x894,
}
DEFINED = {"add", "adc", "sub", "sbb", "cmp", "neg", "popf", "popfq"}


@pytest.fixture(scope="module", params=["unicorn", pytest.param("kvm", marks=pytest.mark.kvm)])
def machine(request):
    """A VM that can step: in ring 3, as the native process, or in ring 0 where the engine steps in that alone."""
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    with bare("nop", user=True, backend=request.param) as vm:
        vm.ring = 0 if lacks(vm, "step_user") else 3
        yield vm


def runs(vm: lk.Vm, code: bytes) -> bool:
    """Whether that is the same in the machine's ring: selectors of ring 3 are not, and what `simd` tells of may not be there."""
    insns = list(disassemble("x86_64", code, 0))
    return vm.ring == 3 or not any(
        re.search(r"\b(ss|ds|cs|xmm\d)\b", insn.text)
        or insn.mnemonic[0] == "f"
        or insn.mnemonic == "popcnt"
        for insn in insns
    )


def begin(vm: lk.Vm, code: bytes) -> lk.Vcpu:
    """The machine with fresh memory and this code; ring 3 has Linux's selectors."""
    for gva in (CODE, DATA, STACKS):
        vm.write(gva, bytes(SIZE))
    vm.write(CODE, code)
    vm.write(DATA, DATA_AT_START)
    vcpu = vm.vcpus[0]
    start(vcpu, vm.ring == 3)
    vcpu.cpu.set_regs({} if vm.ring else {"cs": KERNEL_CS, "ss": KERNEL_SS})
    vcpu.cpu.set_regs(
        dict.fromkeys(set(GPRS) - {"rip", "rflags"}, 0)
        | dict.fromkeys(("ds", "es", "fs", "gs"), 0)
        | START
    )
    return vcpu


def memory(reader) -> bytes:
    return reader.read(DATA, 1024) + reader.read(STACK_TOP - 1024, 1024)


def step_natively(native: Native, code: bytes, here: Decoded, end: int) -> int:
    """One step, as long as ours: only the first of several MOV SS in a row is sure to hold off a trap (SDM vol. 2 MOV)."""
    fault = native.step()
    while here.text.startswith("mov ss,") and not fault and (at := native.regs()["rip"]) != end:
        between = disassemble("x86_64", code[here.gva - CODE : at - CODE], here.gva)
        if not CODE <= at < end or not all(insn.text.startswith("mov ss,") for insn in between):
            break
        fault = native.step()
    return fault


def compare(native: Native, vm: lk.Vm, code: bytes) -> int:
    """Step both to the end of the code or to a fault; everything must be equal after every step. Returns the steps."""
    vcpu, end, unsure = begin(vm, code), CODE + len(code), 0
    native.begin({CODE: code, DATA: DATA_AT_START}, START)
    for steps in range(500):
        pc = vcpu.pc
        if not CODE <= pc < end:
            return steps
        here = next(disassemble("x86_64", code[pc - CODE :], pc))
        assert vcpu.step() is None
        fault = step_natively(native, code, here, vcpu.pc)
        if fault or HANDLERS <= vcpu.pc < HANDLERS + 4096:
            assert fault and HANDLERS <= vcpu.pc < HANDLERS + 4096, (
                f"{here}: signal {fault}, {vcpu.where()}"
            )
            return steps
        unsure = UNDEFINED.get(here.mnemonic, 0) | (0 if here.mnemonic in DEFINED else unsure)
        ours, theirs = {name: vcpu.regs[name] for name in GPRS}, native.regs()
        between = ARITHMETIC if vcpu.pc == pc and here.mnemonic.startswith("rep") else 0
        for regs in (ours, theirs):
            regs["rflags"] &= FLAGS & ~unsure & ~between
        assert ours == theirs, f"after {here} at step {steps}"
        assert memory(vcpu) == memory(native), f"after {here} at step {steps}"
    raise AssertionError("the code does not end")


RING3 = {
    "mov ss",
    "mov ss twice",
    "mov ss and rep",
    "mov ss from memory",
    "other segments",
    "a block of two lengths",
}  # by selectors
SIMD = {"sse", "x87", "wide"}  # where ring 0 is emulated, see the capability simd


def places(names: Iterable[str]) -> list[Any]:
    """Every name on every engine that can run it: (machine, name)."""
    rows = [("unicorn", name) for name in names]
    rows += [("kvm", name) for name in names if name not in RING3 | SIMD]
    return [pytest.param(*row, marks=[pytest.mark.kvm] * (row[0] == "kvm")) for row in rows]


@pytest.mark.parametrize("machine, name", places(SEQUENCES), indirect=["machine"])
def test_that_a_step_is_what_the_cpu_s_own_trap_gives(native, machine, name):
    assert compare(native, machine, asm(SEQUENCES[name])) > 3


def trace(vm: lk.Vm, code: bytes) -> list[tuple[int, int]]:
    """(program counter, steps so far) after each step."""
    vcpu, seen = begin(vm, code), []
    before = vcpu.step_count
    while CODE <= vcpu.pc < CODE + len(code):
        assert vcpu.step() is None
        seen.append((vcpu.pc, vcpu.step_count - before))
    return seen


@pytest.mark.parametrize("rcx", [0, 2])
def test_that_an_instruction_may_take_the_place_of_one_that_counts_otherwise(rcx):
    rep, shadow = (
        bytes([0xB9, rcx, 0, 0, 0, 0xF3, 0xA4, 0x90]),
        b"\xb8\x2b\0\0\0\x8e\xd0\x8e\xd0\x48\x03\x45\x0a\x90",
    )
    with bare("nop", user=True) as used, bare("nop", user=True) as fresh:
        used.ring = fresh.ring = 3
        trace(used, rep)
        assert trace(used, shadow) == trace(fresh, shadow)


# One line each: machine code with a hole for bytes that hypothesis fills
REG = st.sampled_from((0, 1, 2, 3, 6, 7))  # rax rcx rdx rbx rsi rdi
SMALL, OFFSET, CONDITION = st.integers(0, 3), st.integers(0, 64), st.integers(0, 15)
ON_MEMORY = st.sampled_from((0x01, 0x03, 0x29, 0x3B, 0x87, 0x89, 0x8B))


def modrm(reg: int, rm: int) -> int:
    return 0xC0 | reg << 3 | rm


def alu(opcode: int, reg: int, rm: int) -> bytes:
    return bytes([0x48, opcode, modrm(reg, rm)])


INSN = st.one_of(
    st.builds(
        alu,
        st.sampled_from((0x01, 0x11, 0x19, 0x29, 0x39, 0x31, 0x21, 0x09, 0x85, 0x89, 0x03, 0x3B)),
        REG,
        REG,
    ),
    st.builds(
        lambda reg, value: bytes([0x48, 0xC7, 0xC0 | reg, value, 0, 0, 0]), REG, st.integers(0, 127)
    ),
    st.builds(
        lambda op, rm: bytes([0x48, 0xFF, modrm(op, rm)]), st.sampled_from((0, 1)), REG
    ),  # inc, dec
    st.builds(lambda op, disp: bytes([0x48, op, 0x45, disp]), ON_MEMORY, OFFSET),
    st.builds(
        lambda disp: bytes([0xF0, 0x48, 0x0F, 0xC1, 0x45, disp]), OFFSET
    ),  # lock xadd [rbp+disp], rax
    st.builds(
        lambda value: bytes([0x51, 0x6A, value, 0x5A, 0x58]), st.integers(0, 127)
    ),  # push rcx; push n; pop rdx; pop rax
    st.builds(
        lambda cc, far: bytes([0x70 | cc, far]) + b"\x90" * far, CONDITION, SMALL
    ),  # a conditional jump
    st.builds(
        lambda cc, reg: bytes([0x48, 0x0F, 0x40 | cc, modrm(reg, 0)]), CONDITION, REG
    ),  # cmov
    st.builds(
        lambda n, prefix, op: b"\xb9" + bytes([n, 0, 0, 0]) + prefix + op + b"\x48\x39\xc8",
        SMALL,  # mov ecx,n; rep ...; cmp rax,rcx
        st.sampled_from((b"\xf3", b"\xf2", b"\x66\xf3", b"\xf3\x2e", b"\xf2\x48", b"\xf3\xf2")),
        st.sampled_from(
            (b"\xa4", b"\xa5", b"\xaa", b"\xab", b"\xac", b"\xa6", b"\xa7", b"\xae", b"\xaf")
        ),
    ),
    st.sampled_from(
        (
            b"\xb8\x2b\0\0\0\x8e\xd0",
            b"\xb8\x2b\0\0\0\x8e\xd0\x8e\xd0",
            b"\xf3\x90",
            b"\x90",
            b"\xfc",
            b"\xfd",
            b"\xf5",
            b"\x9c\x58",
            b"\x9f",
            b"\x48\x98",
            b"\x48\x99",
            b"\x48\x87\xd1",
            b"\xc8\x10\0\0\xc9",
            b"\xe8\0\0\0\0\x58",
            b"\x48\x8b\x45\x7f",
            b"\x0f\x0b",
            b"\x8b\x04\x25\0\0\0\x55",
            b"\xb9\x02\0\0\0\xff\xc8\xe2\xfc",
        )
    ),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(insns=[b"\xb9\x02\0\0\0\xf3\xa4\x48\x39\xc8", b"\xb8\x2b\0\0\0\x8e\xd0", b"\x0f\x0b"])
@given(insns=st.lists(INSN, min_size=1, max_size=12))
def test_that_any_sequence_steps_as_on_the_cpu(native, machine, insns):
    compare(native, machine, b"".join(insn for insn in insns if runs(machine, insn)) + b"\x90")


def states(vm: lk.Vm, code: bytes, budgets: list[int]) -> tuple[dict[str, int], bytes, int]:
    """Everything that running these budgets one after the other leaves behind."""
    vcpu = begin(vm, code)
    before = vcpu.step_count
    for budget in budgets:
        assert vcpu.run(budget) == BudgetExit(budget)
    return {name: vcpu.regs[name] for name in GPRS}, memory(vcpu), vcpu.step_count - before


@pytest.mark.parametrize("machine, name", places(SEQUENCES), indirect=["machine"])
def test_that_a_run_of_n_is_n_steps_wherever_it_ends(machine, name):
    code = asm(SEQUENCES[name]) + b"\x90" * 16
    for n in range(1, 16):
        singly = states(machine, code, [1] * n)
        assert (
            singly
            == states(machine, code, [n])
            == states(machine, code, [n // 2, n - n // 2][n < 2 :])
        )
        assert singly[2] == n


LOOPS = {
    "alu": "1: add rax,rbx; inc r8; cmp r8,7; jne 2f; xor r8,r8; 2: jmp 1b",
    "rep": "1: mov ecx,5; mov rdi,rsi; rep stosb; inc rdx; jmp 1b",
    "rep alone": "1: mov ecx,100000; mov rdi,rsi; rep lodsb; jmp 1b",
    "mov ss": "mov eax,0x2b; 1: mov ss,eax; inc rdx; mov ss,eax; jmp 1b",
    "pause": "1: pause; inc rdx; jmp 1b",
    "cpuid": "1: xor eax,eax; cpuid; inc r8; jmp 1b",
    "locked": "1: lock inc qword ptr [rsi]; call 2f; jmp 1b; 2: push rax; pop rdx; ret",
    "itself": "1: jmp 1b",
    "a block of two lengths": "mov eax,0x2b; 1: mov ss,eax; 2: inc rdx; inc r8; inc r9; dec ecx; jg 2b; mov ecx,3; jmp 1b",
    "writes its own block": "1: inc r8; inc byte ptr [rip+1]; mov dl,0; add r9,rdx; jmp 1b",
    "writes the next block": "1: inc byte ptr [rip+3]; jmp 2f; 2: mov dl,0; add r9,rdx; jmp 1b",
    "long": "1: .rept 700; inc rax; .endr; jmp 1b",
}


@pytest.mark.parametrize("machine, name", places(LOOPS), indirect=["machine"])
def test_that_long_budgets_are_exact_too(machine, name):
    code = asm(LOOPS[name])
    budgets = (4095, 4096, 4097, 5000, 5001, 5002, 5003, 9999) if machine.ring else (4097,)
    for n in budgets:
        parts = states(machine, code, [1000] * (n // 1000) + [n % 1000] * (n % 1000 > 0))
        assert parts == states(machine, code, [n])
        assert parts[2] == n
