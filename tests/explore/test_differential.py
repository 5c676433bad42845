"""The same guests on Unicorn and on KVM, everything compared.

Ours, the kernel's selftests, and generated machine code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import guests
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import GUESTS

import labkit as lk
from labkit.engines.exits import HaltExit
from labkit.hosts.hosting import Hosted, play, require
from labkit.hosts.selftests import HOSTED

pytestmark = pytest.mark.usefixtures("kvm")
OURS = GUESTS
OURS_HERE = [  # guest, entry, number of vCPUs
    ("hello", "guest_code", 1),
    ("hello", "guest_code", 3),
    ("leak", "guest_code", 1),
    ("secret", "guest_code", 1),
    ("two_vms", "guest_code", 1),
    ("two_vcpus", "guest_code", 2),
    ("two_vcpus", "guest_code", 4),
    ("fault", "guest_code", 1),
    ("fault", "guest_handles", 1),
    ("fault", "guest_expects", 1),
    ("fault", "guest_fails", 1),
    ("bad", "guest_fills_bitmap", 1),
    ("bad", "guest_endless_text", 1),
    ("bad", "guest_unknown_command", 1),
    ("bad", "guest_halts", 1),
    ("bad", "guest_loses_idt", 1),
]


@pytest.mark.parametrize(("name", "entry", "nr_vcpus"), OURS_HERE)
def test_that_our_guests_are_equal_on_both_engines(name: str, entry: str, nr_vcpus: int) -> None:
    guest = OURS / f"{name}.elf"
    found = lk.compare(guest, ("unicorn", "kvm"), entry, nr_vcpus, schedule="sequential")
    assert found.equal, found.text


def test_that_a_counted_run_has_equal_steps() -> None:
    guest = OURS / "two_vcpus.elf"
    found = lk.compare(guest, nr_vcpus=2, max_insns=20_000, schedule="round_robin:50")
    assert found.equal, found.text
    assert not any("step" in cause for cause in found.causes) and found.df.equal.all()


@pytest.mark.parametrize("insns", [17, 333, 4999])
@pytest.mark.parametrize(
    ("name", "entry", "nr_vcpus"),
    [
        ("fault", "guest_handles", 1),
        ("fault", "guest_expects", 2),
        ("leak", "guest_code", 3),
        ("hello", "guest_code", 2),
        ("bad", "guest_loses_idt", 1),
    ],
)
def test_that_a_run_that_is_cut_is_equal_on_both_engines(
    name: str, entry: str, nr_vcpus: int, insns: int
) -> None:
    guest = OURS / f"{name}.elf"
    both = ("unicorn", "kvm")
    found = lk.compare(guest, both, entry, nr_vcpus, insns, schedule="round_robin:7")
    assert found.equal, found.text


STEPPED = {  # where a step is easily something else than an instruction
    "iretq": "push 0x10; push rsp; push 2; push 8; lea rax,[rip+5]; push rax; iretq; "
    "nop; nop; nop; hlt",
    "iretq with RF": "push 0x10; push rsp; push 0x10002; push 8; lea rax,[rip+3]; push rax; iretq; "
    "nop; nop; hlt",
    "far return": "push 8; lea rax,[rip+4]; push rax; .byte 0x48; retf; nop; nop; hlt",
    "fences": "lfence; sfence; mfence; nop; clflush [rsi]; nop; prefetcht0 [rsi]; nop; pause; hlt",
    "fxsave": "fxsave [rsi]; fxrstor [rsi]; nop; hlt",
    "endbr": "endbr64; nop; endbr64; endbr64; hlt",
    "bases": "swapgs; nop; swapgs; swapgs; rdfsbase rax; wrgsbase rax; rdgsbase rbx; wrfsbase rbx; "
    "nop; hlt",
    "mov ss": "mov eax,0x10; mov ss,eax; nop; mov ss,eax; mov ss,eax; nop; nop; mov ss,[rsi+64]; "
    "mov rbx,[rsi]; nop; hlt",
    "mov ss and out": "mov eax,0x10; mov ss,eax; out dx,al; nop; mov ss,eax; ud2; hlt",
    "system": "mov rax,cr3; mov cr3,rax; mov rax,cr0; mov cr0,rax; mov rax,cr4; mov cr4,rax; "
    "invlpg [rsi]; wbinvd; cli; sti; clts; hlt",
    "tables": "sgdt [rsi]; lgdt [rsi]; sidt [rsi+16]; lidt [rsi+16]; str ax; sldt ax; smsw ax; "
    "lmsw ax; mov rax,dr7; mov dr7,rax; hlt",
    "flags": "pushfq; popfq; std; cld; stc; lahf; sahf; push 0x202; popfq; hlt",
    "undefined": "nop; ud2",
    "page fault": "mov rbx,[rsi]; mov rbx,[0x70000000]",
    "division": "xor ecx,ecx; nop; div ecx",
    "fault of a rep": f"mov edi,{guests.DATA + 0x3FFE}; mov ecx,9; rep stosb",
    "protection": "mov eax,0x1238; nop; mov ds,eax",
    "rep": "mov ecx,3; rep stosb; nop; mov ecx,2; repe cmpsb; mov ecx,2; rep outsb; xor ecx,ecx; "
    "rep movsq; hlt",
}


@pytest.mark.parametrize("name", STEPPED)
def test_that_every_step_leads_to_the_same_place_on_both_engines(name: str) -> None:
    traces = []
    for backend in ("unicorn", "kvm"):
        with guests.bare(STEPPED[name], backend=backend) as vm:
            vm.write(guests.DATA, bytes(64) + b"\x10")
            vcpu = vm.vcpus[0]
            vcpu.cpu.set_regs({"cr4": vcpu.regs.cr4 | 1 << 16, "rbx": 0x18})  # FSGSBASE
            trace = list[Any]()
            while len(trace) < 40 and vcpu.state != "halted":
                came = vcpu.step()
                regs = [vcpu.regs[name] for name in ("rip", "rflags", "rsp", "rcx", "ss")]
                trace.append((came, vcpu.step_count, *regs))
            traces.append((trace, vcpu.read(guests.STACK_TOP - 1024, 1024)))
    assert traces[0] == traces[1] and len(traces[0][0]) > 2


# --- the kernel's

SIMD, CPUID, CLOCK = "simd", "cpuid", "deterministic"

# How a guest that asks for it goes on depends on the machine: it may come out equal, too.
HOSTS = "the host's CPUID"

# (selftest, ring or "") -> the capability whose lack makes a difference ("": it is there on every
# KVM), and words of it.
EXPLAINED = {
    ("xcr0_cpuid_test", "kernel"): (SIMD, "xgetbv"),
    ("state_test", "kernel"): (SIMD, "xgetbv"),
    ("vmx_pmu_caps_test", ""): (SIMD, "movq xmm0"),
    ("pmu_counters_test", "kernel"): (SIMD, "movq xmm0"),
    ("pmu_counters_test", "user"): (  # leaf 1 lies there
        CPUID,
        "movq xmm0 or memory gpa 0xcef60 = gva 0x99f60 stacks",
        HOSTS,
    ),
    ("monitor_mwait_test", "kernel"): (SIMD, "monitor"),
    ("monitor_mwait_test", "user"): (SIMD, "movq xmm0"),
    ("smaller_maxphyaddr_emulation_test", "kernel"): (SIMD, "fld dword"),
    ("smaller_maxphyaddr_emulation_test", "user"): (SIMD, "movq xmm0"),
    # KVM's emulator has no FLD, so there is no access.
    ("exit_on_emulation_failure_test", ""): ("", "unicorn mmio gpa=0x700000000"),
    # Leaf 1 lies there.
    ("cr4_cpuid_sync_test", "kernel"): (CPUID, "memory gpa 0xc7fc0 = gva 0x94fc0 stack"),
    ("state_test", "user"): (CPUID, "Unhandled exception '0xd'"),
    ("guest_sev_code", "user"): (CPUID, "this_cpu_has(X86_FEATURE_SEV)", HOSTS),
    ("kvm_clock_test", "kernel"): (CLOCK, "ucall.args[2]"),
    ("cpuid_test", ""): (CPUID, "the engine lacks cpuid: "),
    ("kvm_pv_test", ""): ("msr_table", "the engine lacks msr_table: "),
    ("platform_info_test", ""): ("msr_table", "the engine lacks msr_table: "),
    ("tsc_msrs_test", ""): (CLOCK, "the engine lacks deterministic: "),
    ("system_counter_offset_test", ""): ("tsc", "the engine lacks tsc: "),
    ("fix_hypercall_test", ""): ("hypercalls", "the engine lacks hypercalls: "),
}


@cache
def kvm_can() -> dict[str, bool]:
    with lk.Vm.create_barebones(backend="kvm") as vm:
        return {capability.name: capability.have for capability in vm.capabilities}


@cache
def _program(path: Path) -> lk.Program:
    return lk.Program.load(path)


SLOW = {"userspace_io_test"}  # thousands of exits, each of which is an event to compare


@pytest.mark.parametrize("privilege", ["kernel", "user"])
@pytest.mark.parametrize(
    "hosted",
    [
        pytest.param(hosted, marks=[pytest.mark.slow] if hosted.binary in SLOW else [])
        for hosted in HOSTED
    ],
    ids=lambda hosted: f"{hosted.binary}-{hosted.entry}",
)
def test_that_a_kernel_selftest_is_equal_on_both_engines_or_differs_as_declared(
    selftests: Path, hosted: Hosted, privilege: str
) -> None:
    places = (selftests / hosted.binary, selftests / "x86_64" / hosted.binary)
    path = next(path for path in places if path.is_file())
    said = []

    def host(vm: lk.Vm) -> None:
        require(hosted, vm)
        said.append(play(hosted, vm))

    found = lk.compare(
        _program(path),
        ("unicorn", "kvm"),
        hosted.entry,
        host=host,
        privilege=privilege,
        **hosted.create,
    )
    assert privilege == "user" or said[0] == ""  # as the test's C half wants it

    capability, words, *hosts = explained(hosted, privilege)
    if not words or (capability and kvm_can()[capability]):
        assert found.equal, found.text
    elif not hosts or not found.equal:
        told = " ".join((*map(str, found.differences), *found.whys))
        assert any(alternative in told for alternative in words.split(" or ")), found.text


def explained(hosted: Hosted, privilege: str) -> tuple[str, ...]:
    """The row of EXPLAINED for a guest function in a ring; empty words where there is none."""
    for name in (hosted.binary, hosted.entry):
        for ring in (privilege, ""):
            if (name, ring) in EXPLAINED:
                return EXPLAINED[name, ring]
    return "", ""


# --- generated: snippets with all flags defined behind them (SDM vol. 1 appendix A), so that whole
# registers can be compared

ARITHMETIC = [
    f"{op} {a}, {b}"
    for op in ("add", "sub", "adc", "sbb", "cmp")
    for a, b in (
        ("rax", "rbx"),
        ("ecx", "edx"),
        ("r8w", "r9w"),
        ("al", "bh"),
        ("r10", "0x7f"),
        ("rdx", "-1"),
    )
]
ARITHMETIC += [
    "inc rax; add rax, 0",
    "dec ecx; add ecx, 0",
    "neg rbx",
    "neg dl",
    "not r8",
    "bswap rax",
    "xchg rax, rbx",
    "cqo",
    "cdqe",
    "imul rax, rbx; cmp rax, rbx",
    "mul rcx; cmp rax, rdx",
    "shl rax, 1; cmp rax, rbx",
    "sar ecx, 3; cmp ecx, edx",
    "rol rdx, 5; cmp rdx, rax",
    "shld rax, rbx, 9; cmp rax, rbx",
    "bsf rcx, rbx; cmp rcx, rbx",
    "bt rax, 5; cmp rax, rcx",
    "mov r11, 7; xor edx, edx; div r11; cmp rax, rdx",
    "movzx eax, bl",
    "movsx rcx, dx",
    "lea rdx, [rax + rbx * 4 + 0x11]",
]
FLAGS = [
    "stc",
    "clc",
    "cmc",
    "pushfq; pop r9",
    "lahf",
    "sahf",
    "setc al",
    "setle bl",
    "setp cl",
    "cmovs rax, rbx",
    "cmovnz ecx, edx",
    "push r9; and qword ptr [rsp], 0xcd5; popfq; cld",
]
MEMORY = [
    f"mov {a}"
    for a in (
        "[rsi + 8], rax",
        "rbx, [rsi + 8]",
        "byte ptr [rdi + 3], 0x5a",
        "cx, [rsi + 0x111]",
        "[rsi + 0xffc], rdx",
        "dword ptr [rdi + 0x1ffe], 0x12345678",
    )
]
MEMORY += [
    "push rax; pop rbx",
    "add [rsi + 0x20], rcx",
    "sub dword ptr [rdi], 3",
    "adc rax, [rsi + 0x20]",
    "xchg [rsi + 0x28], rdx",
]
STRINGS = [
    f"push rsi; push rdi; mov ecx, {n}; {op}; pop rdi; pop rsi; mov ecx, 5"
    for n in (0, 1, 7, 33)
    for op in (
        "rep movsb",
        "rep stosd",
        "rep lodsw",
        "std; rep movsq; cld",
        "repe cmpsb",
        "repne scasb",
        "rep movsd",
    )
]
LOCKED = [
    f"lock {op}"
    for op in (
        "add [rsi + 0x40], rax",
        "xadd [rsi + 0x40], rbx",
        "inc dword ptr [rsi + 0x48]; cmp eax, ecx",
        "cmpxchg [rsi + 0x40], rcx",
        "bts qword ptr [rsi + 0x50], 9; cmp rax, rbx",
        "not byte ptr [rdi]",
        "dec qword ptr [rsi + 0x60]; cmp edx, eax",
    )
]
EXCEPTIONS = [
    "ud2",
    "xor edx, edx; div dl; nop",
    "mov al, [r15]",
    "mov [r15], al",
    "mov r11, 0x800000000000; mov al, [r11]",
]


def of_page(page: int) -> list[str]:
    """Clear accessed and dirty of one of the data's pages, look at its entry, read it, write it."""
    table = f"mov r11, {guests.TABLES:#x}"
    clear = f"and byte ptr [r11 + {8 * page}], 0x9f; invlpg [rsi + {page * 4096}]"
    place = f"[rsi + {page * 4096 + 16}]"
    return [
        f"{table}; {clear}",
        f"{table}; mov r9, [r11 + {8 * page}]",
        f"{table}; {clear}; mov r9, {place}",
        f"{table}; {clear}; mov {place}, r9",
    ]


PAGES = [snippet for page in range(4) for snippet in of_page(page)]
GRAMMAR = [*ARITHMETIC, *FLAGS, *MEMORY, *STRINGS, *LOCKED, *EXCEPTIONS, *PAGES]
BRANCHES = {"jc": 0x72, "jnz": 0x75, "js": 0x78, "jp": 0x7A, "jl": 0x7C, "jg": 0x7F, "jmp": 0xEB}

# Handlers: every faulting instruction above has two bytes, or three.
SKIP = "add qword ptr [rsp], 2; iretq"
SKIP_ERROR = "add rsp, 8; add qword ptr [rsp], 3; iretq"


@cache
def _code() -> list[bytes]:
    return guests.asm_all(
        *GRAMMAR,
        SKIP,
        SKIP_ERROR,
        "mov r15, 0x700000000000; mov rax, 0x123456789abcdef0; mov rbx, 0x8000000000000001; "
        "mov ecx, 5; mov rdx, 0xfedcba98; mov r8d, 0xffff; xor r9d, r9d; mov r10, 3; "
        "xor r11d, r11d; cmp rax, rbx",
        "hlt",
    )


STEP = st.one_of(
    st.sampled_from(range(len(GRAMMAR))),
    st.tuples(st.sampled_from(sorted(BRANCHES)), st.integers(1, 3)),
)
STEPS = st.lists(STEP, min_size=4, max_size=24)


def assemble(steps: Sequence[Any]) -> bytes:
    """Machine code: snippets by number, and branches over the next few steps."""
    code = list[bytes]()
    for step in reversed(steps):
        if isinstance(step, tuple):
            over = sum(map(len, code[len(code) - step[1] :]))
            code.append(bytes([BRANCHES[step[0]], over]) if over < 128 else b"")
        else:
            code.append(_code()[step])
    return _code()[-2] + b"".join(reversed(code)) + _code()[-1]


def machine(code: bytes, backend: str) -> lk.Vm:
    """The code in ring 0, with handlers that step over what faulted.

    The page table of the data is mapped at TABLES.
    """
    vm = guests.bare(code, backend=backend, handler=_code()[len(GRAMMAR)])
    for vector in (13, 14):
        vm.write(guests.HANDLERS + 16 * vector, _code()[len(GRAMMAR) + 1].ljust(16, b"\xcc"))
    leaf = vm.machine.space.walk(guests.DATA).steps[-1]
    vm.machine.space.map(guests.TABLES, leaf.entry_gpa & -4096)
    vm.write(guests.DATA, bytes(range(256)) * 64)
    regs = {"rsp": guests.STACK_TOP - 256, "rsi": guests.DATA, "rdi": guests.DATA + 0x100}
    vm.vcpus[0].cpu.set_regs({**regs, "rflags": 2})
    return vm


def both(code: bytes) -> lk.Comparison:
    found = lk.compare(None, [partial(machine, code, backend) for backend in ("unicorn", "kvm")])
    assert found.ends[0] == HaltExit.end, found.text
    return found


@pytest.mark.parametrize("number", range(len(GRAMMAR)), ids=GRAMMAR)
def test_that_every_word_of_the_grammar_is_equal_on_both_engines(number: int) -> None:
    found = both(assemble([number] * 2))
    assert found.equal, found.text


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_that_generated_guests_are_equal_on_both_engines(steps: list[Any]) -> None:
    found = both(assemble(steps))
    assert found.equal, found.text
