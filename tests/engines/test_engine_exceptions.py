"""Exceptions through the guest's own IDT: vectors, error codes, stacks, rings, any number of times, and those that do not come through."""

from __future__ import annotations

import pytest
from guests import (
    CODE,
    DATA,
    HANDLERS,
    IST_TOP,
    KERNEL_CS,
    KERNEL_SS,
    RING0_TOP,
    STACK_TOP,
    USER_CS,
    USER_SS,
    asm,
    frame,
    go,
    lacks,
    set_gate,
)

import labkit as lk
from labkit.engines.exits import BudgetExit, HaltExit, InternalErrorExit, PioExit, ShutdownExit

DE, DB, BP, UD, DF, TS, NP, SS, GP, PF = 0, 1, 3, 6, 8, 10, 11, 12, 13, 14
NOWHERE, BAD = 0x6000_0000, 1 << 63
TF, IF, RF, NT = 1 << 8, 1 << 9, 1 << 16, 1 << 14
only_unicorn = pytest.mark.parametrize("backend", ["unicorn"], indirect=True)
SKIP_TWO = (
    "add qword ptr [rsp],2; iretq"  # a handler that returns behind an instruction of two bytes
)
USER = 4  # what ring 3 adds to a page fault's error code

FAULTS = [  # "what comes before | the instruction", vector, error code, CR2
    ("xor ecx,ecx | div ecx", DE, None, None),
    ("| ud2", UD, None, None),
    ("| .byte 0x06", UD, None, None),
    ("| lock nop", UD, None, None),
    (f"mov eax,{NOWHERE} | mov rbx,[rax+8]", PF, 0, NOWHERE + 8),
    (f"mov eax,{NOWHERE} | mov [rax],rbx", PF, 2, NOWHERE),
    (f"mov eax,{NOWHERE} | lock inc dword ptr [rax]", PF, 2, NOWHERE),
    (f"| mov rax,[{CODE + 0x3FFC}]", PF, 0, CODE + 0x4000),
    (f"mov eax,{NOWHERE} | add [rax],rbx", PF, 2, NOWHERE),
    (f"mov eax,{NOWHERE} | bts qword ptr [rax],3", PF, 2, NOWHERE),
    (f"mov eax,{NOWHERE} | cmpxchg [rax],rbx", PF, 2, NOWHERE),
    (f"mov eax,{NOWHERE} | bt qword ptr [rax],3", PF, 0, NOWHERE),
    (f"mov eax,{NOWHERE} | push qword ptr [rax]", PF, 0, NOWHERE),
    (f"mov eax,{NOWHERE} | pop qword ptr [rax]", PF, 2, NOWHERE),
    (f"mov eax,{HANDLERS + 0x1000} | shl dword ptr [rax],1", PF, 2, HANDLERS + 0x1000),
    (f"mov edi,{DATA + 0x3FFE}; mov ecx,9; rep stosb | ", PF, 2, DATA + 0x4000),
    ("mov rax,0x8000000000000000 | mov rbx,[rax]", GP, 0, None),
    ("mov rsp,0x8000000000000000 | push rax", SS, 0, None),
    ("mov rsp,0x8000000000000000 | pop rax", SS, 0, None),
    ("mov rbp,0x8000000000000000 | mov [rbp-8],rax", SS, 0, None),
    ("mov rbp,0x8000000000000000 | mov fs:[rbp-8],rax", GP, 0, None),
    ("mov eax,0x1238 | mov ds,eax", GP, 0x1238, None),
    ("mov eax,0x38 | mov fs,eax", NP, 0x38, None),
    ("mov eax,0x20 | mov es,eax", GP, 0x20, None),
]
TRAPS = [
    ("int 0x77", 0x77),
    ("int3", BP),
    ("mov eax,3; mov ecx,5; int 3", BP),
    (".byte 0xf1", DB),
    ("int 6", UD),
    ("int 8", DF),
    ("int 13", GP),
    ("int 14", PF),
]


@pytest.mark.parametrize("user", [False, True], ids=["ring 0", "ring 3"])
@pytest.mark.parametrize("text, vector, error, cr2", FAULTS)
def test_that_a_fault_reaches_its_handler_at_its_instruction(guest, text, vector, error, cr2, user):
    before, insn = text.split("|")
    vm = guest(f"{before}; {insn}", user=user)
    vcpu = vm.vcpus[0]
    vcpu.regs.cr2 = 0x1234
    set_gate(vm, SS, ist=1)
    assert go(vcpu) == HaltExit() and vcpu.pc == HANDLERS + 16 * vector + 1
    pushed = frame(vcpu, error is not None)
    assert pushed.get("error") == (error if error is None or vector != PF else error | USER * user)
    assert (
        pushed["rip"] == CODE + len(asm(before)) - 2 * (insn.strip() == "")
        and pushed["rflags"] & (RF | IF) == RF | IF
    )
    assert (pushed["cs"], pushed["ss"]) == ((USER_CS, USER_SS) if user else (KERNEL_CS, KERNEL_SS))
    assert (
        vcpu.regs.cr2 == (0x1234 if cr2 is None else cr2)
        and vcpu.regs.rflags & (TF | IF | RF | NT) == 0
    )


def is_refused(vcpu: lk.Vcpu, came: object, offset: int) -> bool:
    """Whether a software interrupt went wrong as KVM says: an exit that names it at CPL0, #UD or #DB at the instruction at CPL3."""
    if isinstance(came, InternalErrorExit):
        return came.pc == vcpu.pc == CODE + offset and came.disassembly.startswith("int")
    at, pushed = vcpu.pc - HANDLERS - 1, frame(vcpu)
    return (
        came == HaltExit()
        and at in (16 * UD, 16 * DB)
        and (pushed["rip"], pushed["cs"]) == (CODE + offset, USER_CS)
    )


@pytest.mark.parametrize("user", [False, True], ids=["ring 0", "ring 3"])
@pytest.mark.parametrize("text, vector", TRAPS)
def test_that_a_software_interrupt_returns_behind_itself_and_has_no_error_code(
    guest, text, vector, user
):
    vm = guest(text, user=user)
    set_gate(vm, vector, kind=0xEE)
    vcpu, form = vm.vcpus[0], {0xCC: "INT3", 0xF1: "INT1"}.get(asm(text)[-1], "INT n")
    if f"{form} at CPL{3 * user}" in lacks(vm, "software_interrupts"):
        assert is_refused(vcpu, go(vcpu), len(asm(text)) - len(asm(text.split(";")[-1])))
        return
    assert go(vcpu) == HaltExit() and vcpu.pc == HANDLERS + 16 * vector + 1
    assert (pushed := frame(vcpu))["rip"] == CODE + len(asm(text)) and pushed["rflags"] & RF == 0
    assert vcpu.regs.rsp == (RING0_TOP if user else (STACK_TOP - 256)) - 40


@pytest.mark.parametrize("user", [False, True], ids=["ring 0", "ring 3"])
@pytest.mark.parametrize(
    "gva, error", [(NOWHERE, 0x10), (DATA + 0x3FFF, 0x10), (STACK_TOP - 64, 0x11)]
)
def test_that_a_jump_to_nowhere_faults_there_and_the_jump_counts(guest, gva, error, user):
    vm = guest(f"mov rax,{gva}; jmp rax", user=user)
    vm.machine.space.builder.protect(STACK_TOP - 4096, 1, nx=True) if gva < STACK_TOP else None
    vcpu = vm.vcpus[0]
    if not (user and lacks(vm, "step_user")):
        assert vcpu.step(2) is None and vcpu.pc == gva
    assert go(vcpu) == HaltExit() and (not vcpu.exact or vcpu.step_count == 4)
    assert frame(vcpu, True)["rip"] == gva


MANY = [
    ("ud2", UD, 2, 0),
    ("int3", BP, 0, 0),
    ("int 0x50", 0x50, 0, 0),
    ("xor ecx,ecx; div ecx", DE, 2, 0),
    (f"mov rax,[{NOWHERE}]", PF, 8, 8),
    ("mov eax,0x1238; mov ds,eax", GP, 2, 8),
]


@pytest.mark.parametrize("budget", [None, 100_000])
@pytest.mark.parametrize("text, vector, skip, pop", MANY)
def test_that_a_thousand_exceptions_in_a_row_are_all_delivered(
    guest, text, vector, skip, pop, budget
):
    vm = guest(f"xor ebx,ebx; 1: inc ebx; {text}; cmp ebx,1000; jne 1b; hlt")
    vm.write(HANDLERS + 16 * vector, asm(f"add rsp,{pop}; add qword ptr [rsp],{skip}; iretq"))
    vcpu, came = vm.vcpus[0], vm.vcpus[0].run(budget)
    if text.startswith("int") and lacks(vm, "software_interrupts"):
        assert is_refused(vcpu, came, 4) and vcpu.regs.rbx == 1
        return
    assert (
        came == HaltExit()
        and vcpu.regs.rbx == 1000
        and len(vm.events) == (1 if lacks(vm, "exceptions") else 1001)
    )
    by_steps = vcpu.step_count if vcpu.exact else 0
    vcpu.cpu.set_regs({"rip": CODE, "rsp": STACK_TOP - 256})
    for _ in range(by_steps - 1):
        assert vcpu.step() is None
    assert not by_steps or vcpu.step() == HaltExit()


@only_unicorn  # KVM keeps TF for itself while it steps a guest
def test_that_a_guest_can_step_itself_and_meets_the_same_places_as_we(guest):
    text = (
        "mov ecx,2; rep stosb; mov eax,0x10; mov ss,eax; nop; cpuid; nop; pushfq; popfq; rdtsc; nop; in al,dx; mov ss,ax; cpuid;"
        "nop; ud2"
    )
    vm, places, by_hand = guest(text), [], []
    vm.write(HANDLERS + 16 * DB, asm("hlt; iretq"))
    (vcpu,) = vm.vcpus
    vcpu.regs.rflags = IF | TF | 2
    while vcpu.pc < HANDLERS + 16 * UD:
        if vcpu.run(50) == HaltExit():
            places.append(frame(vcpu)["rip"])
            assert frame(vcpu)["rflags"] & TF and vcpu.regs.dr6 & 1 << 14
    (twin,) = guest(text).vcpus
    while twin.pc < HANDLERS:
        twin.step()
        by_hand.append(twin.pc)
    assert places[:-1] == by_hand[:-1] and len(places) == 15


def test_that_ring_3_can_step_itself_on_every_engine(guest):
    vm = guest(
        "mov ecx,2; rep stosb; nop; cpuid; nop; pushfq; popfq; rdtsc; movq xmm0,r9; nop; jmp 1f; nop; 1: ud2",
        user=True,
    )
    vm.write(HANDLERS + 16 * DB, asm("hlt; iretq"))
    (vcpu,), places = vm.vcpus, []
    vcpu.regs.rflags = IF | TF | 2
    while vcpu.pc < HANDLERS + 16 * UD and vcpu.run() == HaltExit():
        places.append(frame(vcpu)["rip"] - CODE)
    assert places == [5, 5, 7, 8, 10, 11, 12, 13, 15, 20, 21, 24, 24]


SET_TF = [
    f"pushfq; or dword ptr [rsp],{TF}; popfq; nop; nop",
    f"push 0x10; push rsp; pushfq; or dword ptr [rsp],{TF}; push 8; lea rax,[rip+3]; push rax; iretq; nop; nop",
]


@pytest.mark.parametrize("text", SET_TF)
def test_that_a_new_trap_flag_traps_behind_the_instruction_that_follows(guest, text):
    (vcpu,) = guest(text).vcpus
    assert vcpu.run() == HaltExit() and vcpu.pc == HANDLERS + 16 * DB + 1
    assert frame(vcpu)["rip"] == CODE + len(asm(text)) - 1


@pytest.mark.parametrize("kind, flags", [(0x8E, 0), (0x8F, IF)])
def test_that_an_interrupt_gate_takes_if_away_and_a_trap_gate_does_not(guest, kind, flags):
    vm = guest("ud2")
    set_gate(vm, UD, kind=kind)
    assert vm.vcpus[0].run(9) == HaltExit() and vm.vcpus[0].regs.rflags & IF == flags


@pytest.mark.parametrize(
    "user, ist, top",
    [(False, 0, STACK_TOP - 256), (False, 1, IST_TOP), (True, 0, RING0_TOP), (True, 1, IST_TOP)],
)
def test_that_the_handler_s_stack_is_the_right_one_and_aligned(guest, user, ist, top):
    vm = guest("sub rsp,3; ud2; nop", user=user)
    set_gate(vm, UD, ist=ist)
    (vcpu,) = vm.vcpus
    assert (
        go(vcpu) == HaltExit()
        and vcpu.regs.rsp == (top - 3 & -16 if top == STACK_TOP - 256 else top) - 40
    )
    assert frame(vcpu)["rsp"] == STACK_TOP - 259 and vcpu.regs.ss == (0 if user else KERNEL_SS)
    vm.write(HANDLERS + 16 * UD + 1, asm(SKIP_TWO))
    if user and lacks(vm, "step_user"):
        with pytest.raises(lk.NotAvailable, match="no step_user"):
            vcpu.step(3)
        assert (vcpu.pc, vcpu.regs.cs) == (
            HANDLERS + 16 * UD + 1 + len(asm(SKIP_TWO)) - 2,
            KERNEL_CS,
        )  # in front of the IRETQ
        return
    assert (
        vcpu.step(3) is None
        and vcpu.pc == CODE + 7
        and vcpu.regs.cs == (USER_CS if user else KERNEL_CS)
    )
    assert vcpu.regs.rsp == STACK_TOP - 259 and vcpu.regs.ss == (USER_SS if user else KERNEL_SS)


REFUSED_IN_RING_3 = [
    "hlt",
    "cli",
    "in al,dx",
    "out dx,al",
    "rdmsr",
    "wrmsr",
    "mov cr3,rax",
    "mov rax,cr0",
    "lidt [rsi]",
    "invlpg [rsi]",
    "wbinvd",
    "insb",
    "swapgs",
    "clts",
    "ltr ax",
    "iretq",
    "sysretq",
    "xsetbv",
    "int 0x20",
    "mov dr7,rax",
]


@pytest.mark.parametrize("text", REFUSED_IN_RING_3)
def test_that_ring_3_may_not(guest, text):
    vm = guest(text, user=True)
    vm.vcpus[0].cpu.set_regs({"cr4": vm.vcpus[0].regs.cr4 | 1 << 18, "efer": 0xD01})
    came = go(vm.vcpus[0])
    if text.startswith("int ") and "INT n at CPL3" in lacks(vm, "software_interrupts"):
        assert is_refused(vm.vcpus[0], came, 0)
        return
    assert came == HaltExit() and vm.vcpus[0].pc == HANDLERS + 16 * GP + 1
    assert frame(vm.vcpus[0], True) | {"rflags": 0} == {
        "error": 0x102 if "int" in text else 0,
        "rip": CODE,
        "cs": USER_CS,
        "rflags": 0,
        "rsp": STACK_TOP - 256,
        "ss": USER_SS,
    }


@pytest.mark.parametrize("how", ["iopl", "bitmap"])
def test_that_ring_3_may_do_io_where_it_was_allowed(guest, how):
    vm = guest("mov edx,0x3f9; in al,dx; mov edx,0x3fe; in ax,dx; in eax,dx", user=True)
    (vcpu,) = vm.vcpus
    tss = vm.machine.tables_gva + vm.arch.tss_offset
    if how == "iopl":
        vcpu.regs.rflags |= 3 << 12
    else:
        vcpu.regs.tr_limit = 0x68 + 0x80
        vm.write(
            tss + 0x68, bytes(0x7F) + b"\x0d" + b"\xff"
        )  # of 0x3f8 to 0x3ff are 0x3f9 and 0x3fc on allowed
    if how == "iopl" and lacks(vm, "iopl"):
        assert (
            go(vcpu) == HaltExit()
            and vcpu.pc == HANDLERS + 16 * GP + 1
            and frame(vcpu, True)["rip"] == CODE + 5
        )
        return
    assert go(vcpu) == PioExit(0x3F9, 1, False, 0) and go(vcpu) == PioExit(0x3FE, 2, False, 0)
    assert go(vcpu) == (PioExit(0x3FE, 4, False, 0) if how == "iopl" else HaltExit())


def test_that_a_guest_goes_to_ring_3_and_comes_back_by_syscall(guest):
    user, kernel = CODE + 0x1000, CODE + 0x2000
    setup = (
        f"mov ecx,0xc0000081; xor eax,eax; mov edx,{0x20 << 16 | 0x8}; wrmsr; inc ecx; mov eax,{kernel}; xor edx,edx; wrmsr;"
        f"mov ecx,0xc0000084; mov eax,0x200; wrmsr; mov ecx,0xc0000080; rdmsr; or eax,1; wrmsr;"
        f"push {USER_SS}; push {STACK_TOP - 1024}; push 0x202; push {USER_CS}; push {user}; iretq"
    )
    vm = guest(setup)
    vm.write(user, asm("mov ebx,5; 1: syscall; dec ebx; jnz 1b; mov rax,cr3"))
    vm.write(kernel, asm("mov edx,cs; in al,dx; sysretq"))
    (vcpu,) = vm.vcpus
    if lacks(vm, "syscall"):
        assert vcpu.run() == HaltExit() and vcpu.pc == HANDLERS + 16 * GP + 1
        assert (frame(vcpu, True)["rip"], frame(vcpu, True)["cs"], vcpu.regs.rcx) == (
            kernel + 2,
            USER_CS,
            user + 7,
        )  # the IN, at CPL3
        return
    for _ in range(5):
        assert vcpu.run() == PioExit(8, 1, False, 0)
        regs = vcpu.regs
        assert (regs.cs, regs.ss, regs.rcx, regs.r11 & IF, regs.rflags & IF) == (
            8,
            16,
            user + 7,
            IF,
            0,
        )
        assert vcpu.step() is None and (regs.cs, regs.ss, regs.rflags & IF, vcpu.pc) == (
            USER_CS,
            USER_SS,
            IF,
            user + 7,
        )
    assert vcpu.run(9) == HaltExit() and vcpu.pc == HANDLERS + 16 * GP + 1 and vcpu.regs.rbx == 0


BROKEN = [  # what is done to the guest, what it then runs, the vectors on the way, the error code its last handler got (None: shutdown)
    ("gate not present", "ud2", (UD, NP), 8 * UD + 3),
    ("gate of a bad type", "ud2", (UD, GP), 8 * UD + 3),
    ("gate with a null selector", "ud2", (UD, GP), 1),
    ("gate with a data selector", "ud2", (UD, GP), 0x11),
    ("gate beyond the GDT", "ud2", (UD, GP), 0x1001),
    ("gate that is not canonical", "ud2", (UD, GP), 1),
    ("gate not present", "int 6", (UD, NP), 8 * UD + 2),
    ("short IDT", "int 0x80", (0x80, GP), 0x402),
    ("IST without a page", "ud2", (UD, PF), 2),
    ("IST that is not canonical", "ud2", (UD, SS), 1),
    ("short TSS", "ud2", (UD, TS), 0x19),
    ("stack without a page", "ud2", (UD, PF, DF), None),
    ("no IDT", "ud2", (UD, PF, DF), None),
    ("no page for the IDT", "ud2", (UD, PF, DF), None),
    ("no handler for PF", f"mov rax,[{NOWHERE}]", (PF, DF), 0),
    ("GP without a page", "mov rax,1<<63; mov rax,[rax]", (GP, PF), 2),
    ("PF without a page", f"mov rax,[{NOWHERE}]", (PF, DF), 0),
    ("DF without a page too", f"mov rax,[{NOWHERE}]", (PF, DF), None),
    ("every step of the way", "ud2", (UD, NP, PF, DF), 0),
]


def spoil(vm, how: str) -> None:
    """Break the guest's tables; handlers of #SS, #GP, #NP, #TS, #PF and #DF stay reachable unless the case says otherwise."""
    tables, (vcpu,) = vm.machine.tables_gva + vm.arch.tss_offset, vm.vcpus
    gates = {
        "gate not present": {"kind": 0x0E},
        "gate of a bad type": {"kind": 0x8C},
        "gate with a null selector": {"selector": 3},
        "gate with a data selector": {"selector": 0x10},
        "gate beyond the GDT": {"selector": 0x1000},
        "gate that is not canonical": {"gva": BAD},
    }
    ist = {
        "IST without a page": (UD,),
        "IST that is not canonical": (UD,),
        "short TSS": (UD,),
        "GP without a page": (GP,),
        "PF without a page": (PF,),
        "DF without a page too": (PF, DF),
        "every step of the way": (NP, PF),
    }.get(how, ())
    for vector in ist:
        set_gate(vm, vector, ist=2)
    vm.write(tables + 0x2C, (BAD if "canonical" in how else NOWHERE).to_bytes(8, "little"))
    if how in gates:
        set_gate(vm, UD, **gates[how])
    if how in ("no handler for PF", "every step of the way"):
        set_gate(vm, PF if "PF" in how else UD, kind=0x0E)
    changes = {
        "short IDT": {"idt_limit": 0x7FF},
        "short TSS": {"tr_limit": 0x2B},
        "no IDT": {"idt_base": NOWHERE, "idt_limit": 0xFFF},
        "stack without a page": {"rsp": NOWHERE},
    }
    vcpu.cpu.set_regs(changes.get(how, {}))
    if how == "no page for the IDT":
        vm.machine.space.builder.unmap(vm.machine.idt_gva, 1)


@pytest.mark.parametrize("how, text, chain, error", BROKEN)
def test_that_a_fault_on_the_way_to_a_handler_leads_where_the_manual_says(
    guest, how, text, chain, error
):
    vm = guest(text)
    spoil(vm, how)
    (vcpu,) = vm.vcpus
    came = vcpu.run()
    if text.startswith("int") and lacks(vm, "software_interrupts"):
        assert is_refused(vcpu, came, 0)
    elif error is None:
        told = chain if not lacks(vm, "triple_fault_vectors") else ()
        assert (
            isinstance(came, ShutdownExit)
            and came.vectors == told
            and came.pc == vcpu.pc
            and ("gva" in came.why or not told)
        )
        assert (
            vcpu.state == "shutdown"
            and vm.page_table().df is not None
            and "triple fault" in vm.events.what.iloc[-1]
        )
    elif lacks(vm, "nested_faults"):
        assert came == HaltExit() and (vcpu.pc - 1 - HANDLERS) // 16 in (DF, chain[0], chain[-1])
    else:
        assert (
            came == HaltExit()
            and vcpu.pc == HANDLERS + 16 * chain[-1] + 1
            and frame(vcpu, True)["error"] == error
        )
        assert lacks(vm, "exceptions") or vm.log.entries[-2].facts["chain"] == chain
        assert lacks(vm, "exceptions") or vm.log.entries[-2].facts["pc"] == frame(vcpu, True)["rip"]


@pytest.mark.parametrize(
    "text",
    ["ud2; nop; nop; nop; hlt", "ud2; 1: jmp 1b", "ud2; mov rbx,[rsi]; nop; jmp 1f; 1: nop; hlt"],
)
def test_that_the_resume_flag_lasts_for_the_one_instruction_behind_an_iret(guest, text):
    def stopped(*budgets: int) -> tuple[int, bool]:
        vm = guest(text)
        vm.write(HANDLERS + 16 * UD, asm(SKIP_TWO))
        assert [vm.vcpus[0].run(budget) for budget in budgets] == [
            BudgetExit(budget) for budget in budgets
        ]
        return vm.vcpus[0].pc, bool(vm.vcpus[0].regs.rflags & RF)

    assert stopped(3) == stopped(1, 1, 1) == (CODE + 2, True)
    for n in (4, 5, 6):
        assert stopped(n) == stopped(*[1] * n) == stopped(3, n - 3) and not stopped(n)[1]


@pytest.mark.parametrize(
    "text, came",
    [
        ("nop; mov rbx,[rsi]; jmp 1f; 1: hlt", HaltExit()),
        ("hlt", HaltExit()),
        ("in al,dx; hlt", PioExit(0, 1, False, 0)),
    ],
)
def test_that_no_resume_flag_is_left_where_a_run_ends(guest, text, came):
    vm = guest(f"ud2; {text}")
    vm.write(HANDLERS + 16 * UD, asm(SKIP_TWO))
    assert vm.vcpus[0].run() == came and not vm.vcpus[0].regs.rflags & RF


def test_that_a_resume_flag_that_was_set_by_hand_or_restored_lasts_for_one_instruction_too(guest):
    (vcpu,) = (vm := guest("nop; nop; hlt")).vcpus
    vcpu.regs.rflags = RF | 2
    state = vm.snapshot()
    for restore in (lambda: None, lambda: vm.restore(state)):
        restore()
        assert vcpu.regs.rflags & RF and vcpu.step() is None and not vcpu.regs.rflags & RF


@only_unicorn
@pytest.mark.parametrize("user", [True, False], ids=["ring 3", "ring 0"])
def test_that_a_software_interrupt_after_a_resumed_instruction_pushes_no_resume_flag(guest, user):
    vm = guest("ud2; nop; int3", user=user)
    set_gate(vm, BP, kind=0xEE)
    vm.write(HANDLERS + 16 * UD, asm(SKIP_TWO))
    assert (
        vm.vcpus[0].run() == HaltExit()
        and vm.vcpus[0].pc == HANDLERS + 16 * BP + 1
        and not frame(vm.vcpus[0])["rflags"] & RF
    )


@pytest.mark.parametrize(
    "text",
    [
        "mov rax,cr3",
        "mov cr3,rax",
        "mov rax,dr7",
        "lidt [rsi+8]",
        "lgdt [rip+0x100]",
        "invlpg [rsi+4096]",
        "lmsw [rsi+8]",
        "lldt [rsi+8]",
        "ltr [rsi+rax*2]",
        "lidt fs:[rsi+8]",
    ],
)
def test_that_ring_3_is_refused_behind_an_instruction_that_is_looked_at(guest, text):
    vm = guest(f"movq xmm0,r9; {text}", user=True)
    assert (
        vm.vcpus[0].run() == HaltExit()
        and vm.vcpus[0].pc == HANDLERS + 16 * GP + 1
        and frame(vm.vcpus[0], True)["rip"] == CODE + 5
    )


END = 1 << 47  # the first address that is not canonical


@pytest.mark.parametrize("budget", [1, 100, 10_000])
@pytest.mark.parametrize(
    "text, insns", [("nop", 1), ("mov eax,1", 1), ("nop; nop; nop", 3), ("mov ecx,2; rep lodsb", 3)]
)
def test_that_code_cannot_run_off_the_last_canonical_address(guest, text, insns, budget):
    vm = guest("nop")
    vm.machine.space.map(END - 4096, vm.machine.space.alloc_pages(1, "test"), 1)
    code = asm(text)
    vm.write(END - len(code), code)
    vcpu = vm.vcpus[0]
    vcpu.regs.rip = END - len(code)
    came = vcpu.run(budget)
    while isinstance(came, BudgetExit):
        came = vcpu.run(budget)
    assert came == HaltExit() and vcpu.pc == HANDLERS + 16 * GP + 1
    assert frame(vcpu, True)["rip"] == END
    assert vcpu.step_count == insns + 2  # the delivery, and HLT


FPU = ["fld1", "addps xmm0,xmm1", "paddb mm0,mm1", "pshufb xmm0,xmm1", "movups xmm0,[rsi]", "fxsave [rsi]", "ldmxcsr [rsi]", "fadd dword ptr [rsi]", "cvtsi2sd xmm8,rax", "roundpd xmm1,xmm2,1", "emms"]  # fmt: skip
NM = 7


@only_unicorn
@pytest.mark.parametrize("before", ["nop", "lock inc dword ptr [rsi]", "xchg eax,[rsi]"])
@pytest.mark.parametrize("insn", FPU)
def test_that_lazy_switching_of_the_fpu_faults_once_whatever_stands_before(guest, insn, before):
    vm = guest(f"mov rax,cr0; or eax,8; mov cr0,rax; {before}; {insn}")
    vcpu = vm.vcpus[0]
    vcpu.regs.cr4 |= 0x600
    assert go(vcpu) == HaltExit() and vcpu.pc == HANDLERS + 16 * NM + 1
    assert frame(vcpu)["rip"] == CODE + len(asm(f"mov rax,cr0; or eax,8; mov cr0,rax; {before}"))
