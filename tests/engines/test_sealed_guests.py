"""SEV-ES guests on the engine: sealed registers, #VC, VMGEXIT through the MSR and through the GHCB page, hostile pages among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from errno import EINVAL, EIO, ENOTTY, EPERM
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sev_sample import ghcb_page as ghcb
from sev_sample import once

import labkit as lk
from labkit.arch.x86_cpu import CpuModel
from labkit.engines.exits import (
    Exit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    MmioExit,
    PioExit,
    SystemEventExit,
    VmgexitExit,
)
from labkit.errors import InvalidState, KvmError, MemoryFault, NotAvailable
from labkit.sev.cpu import encryption_leaf
from labkit.sev.dram import VMSA_AT
from labkit.sev.ghcb import EVENTS, GHCB, GhcbReason, parse_ghcb
from labkit.sev.ghcb_msr import MSR_REQUESTS
from labkit.sev.vmsa import VMSA, vmsa_registers

INSNS = {  # one instruction, its length, what is needed before it, the exit code it meets
    "cpuid": (2, "", 0x72),
    "in %%dx, %%al": (1, "", 0x7B),
    "outsb": (1, "", 0x7B),
    "out %%eax, $0x80": (2, "", 0x7B),
    "rdmsr": (2, "mov $0x1b, %%ecx", 0x7C),
    "wrmsr": (2, "mov $0x1b, %%ecx", 0x7C),
    "vmmcall": (3, "", 0x81),
    "rdpmc": (2, "", 0x6F),
    "wbinvd": (2, "", 0x89),
    "invd": (2, "", 0x76),
    "mov %%rax, %%dr7": (3, "", 0x37),
    "mov %%dr7, %%rax": (3, "", 0x27),
    ".byte 0xf3, 0x0f, 0x09": (3, "", 0x89),
    "rdtsc": (2, "", 0),
    "rdtscp": (3, "", 0),
    "rdrand %%rax": (4, "", 0),
    "pause": (2, "", 0),
    "rdmsr #efer": (2, "mov $0xc0000080, %%ecx", 0),
    "rdmsr #status": (2, "mov $0xc0010131, %%ecx", 0),
    "rdmsr #ghcb": (2, "mov $0xc0010130, %%ecx", 0),
    "rdmsr #pat": (2, "mov $0x277, %%ecx", 0),
}
SOURCE = r"""
#include "labkit.h"
static volatile uint64_t seen, skip;
static void vc(struct ex_regs *regs) { seen = regs->error_code; regs->rip += skip; }
#define VMGEXIT() __asm__ volatile("rep; vmmcall" : : : "memory")
void guest_code(int cpu) { GUEST_SYNC(cpu + 5); GUEST_PRINTF("vCPU %d", cpu); GUEST_DONE(); }
void guest_msr(uint64_t value) { wrmsr(MSR_AMD64_SEV_ES_GHCB, value); VMGEXIT(); GUEST_SYNC1(rdmsr(MSR_AMD64_SEV_ES_GHCB)); GUEST_DONE(); }
void guest_ghcb(uint64_t gpa) { for (;;) { wrmsr(MSR_AMD64_SEV_ES_GHCB, gpa); VMGEXIT(); } }
void guest_device(volatile uint32_t *where, uint64_t write)
{
	set_exception_handler(VC_VECTOR, vc);
	skip = 2; /* mov %eax, (%rdi) and back */
	if (write)
		__asm__ volatile("mov %%eax, (%0)" : : "D"(where), "a"(7) : "memory");
	else
		__asm__ volatile("mov (%0), %%eax" : : "D"(where) : "rax", "memory");
	GUEST_SYNC1(seen);
	GUEST_DONE();
}
void guest_halt(void) { __asm__ volatile("hlt"); GUEST_DONE(); }
void guest_vmcall(void) { __asm__ volatile("vmcall"); }
void guest_unhandled(void) { uint32_t a, b, c, d; cpuid(0, &a, &b, &c, &d); }
void guest_msrs(void)
{
	set_exception_handler(VC_VECTOR, vc);
	GUEST_SYNC2(rdmsr(MSR_AMD64_SEV), rdmsr(0xc0000080));
	GUEST_DONE();
}
"""
CASES = "".join(
    f"void insn_{n}(void)\n{{\n\tset_exception_handler(VC_VECTOR, vc);\n\tseen = 0, skip = {size};\n"
    f'\t__asm__ volatile("{before}{"; " if before else ""}{insn.split(" #")[0]}"\n'
    f'\t\t\t : : "a"(0), "d"(0), "S"(&skip) : "rbx", "rcx", "memory");\n'
    f"\tGUEST_SYNC1(seen);\n\tGUEST_DONE();\n}}\n"
    for n, (insn, (size, before, _)) in enumerate(INSNS.items())
)
BUDGET, MASK = 100_000, (1 << 64) - 1
Make = Callable[..., lk.Vm]


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE + CASES)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes SEV-ES VMs, with arguments for the entry function, and closes them."""
    made = []

    def vm(
        entry: str = "guest_code",
        *args: int,
        launch: bool = True,
        protect: str = "sev-es",
        **options: Any,
    ) -> lk.Vm:
        made.append(lk.Vm.create(program(), entry, protect=protect, launch=False, **options))
        if args:
            made[-1].vcpus[0].args_set(*args)
        if launch:
            made[-1].launch()
        return made[-1]

    yield vm
    for each in made:
        each.close()


def asks(make: Make, page: bytes, protect: str = "sev-es") -> tuple[lk.Vm, Exit | Any, bytearray]:
    """A guest that hands over this GHCB page: its VM, what came of it, and the page behind it."""
    vm = make("guest_ghcb", launch=False, protect=protect)
    gpa = vm.gva2gpa(vm.alloc_shared(4096))
    vm.vcpus[0].args_set(gpa)
    vm.launch()
    vm.memory.write(gpa, page)
    return vm, once(vm.vcpus[0], BUDGET), bytearray(vm.memory.read(gpa, 4096))


# --- registers


def test_that_guests_reach_their_host_through_the_ghcb(make: Make) -> None:
    vm = make(nr_vcpus=2)
    said = [(uc.vcpu, uc.cmd, uc.text or uc.args[1]) for uc in vm.run_until_done(BUDGET)]
    assert said == [
        (v, *what)
        for v in (0, 1)
        for what in (("SYNC", v + 5), ("PRINTF", f"vCPU {v}"), ("DONE", 0))
    ]


TOUCHES: dict[str, Callable[[lk.Vm], object]] = {
    "read": lambda vm: vm.vcpus[0].regs.rip,
    "item": lambda vm: vm.vcpus[0].regs["xmm0"],
    "all": lambda vm: vm.vcpus[0].regs.all(),
    "write": lambda vm: setattr(vm.vcpus[0].regs, "rax", 1),
    "args": lambda vm: vm.vcpus[0].args_set(1),
    "entry": lambda vm: vm.vcpus[0].set_entry("guest_code"),
}


@pytest.mark.parametrize("name", TOUCHES)
@pytest.mark.parametrize(
    ("protect", "errno"), [("sev", 0), ("sev-es", EINVAL), ("snp", EINVAL), ("tdx", 0)]
)
def test_that_registers_are_closed_where_they_are_encrypted(
    make: Make, name: str, protect: str, errno: int
) -> None:
    vm = make(protect=protect, launch=False)
    TOUCHES[name](vm)
    vm.launch()
    if not errno:
        TOUCHES[name](vm)
        return
    with pytest.raises(KvmError, match="the registers of vCPU 0 are encrypted") as refused:
        TOUCHES[name](vm)
    assert refused.value.facts["errno"] == errno and "cannot see" in repr(vm.vcpus[0].regs)


@pytest.mark.parametrize("protect", ["sev-es", "snp"])
def test_that_a_guest_at_cpl3_would_reach_no_host(make: Make, protect: str) -> None:
    with pytest.raises(NotAvailable, match="GHCB"):
        make(protect=protect, privilege="user")


def test_that_the_view_is_dark_and_the_lab_still_steps(make: Make) -> None:
    vcpu = make().vcpus[0]
    before = vcpu.pc
    assert vcpu.step(3) is None and vcpu.pc != before and vcpu.where().startswith("guest_code")
    seen = vcpu.look()
    assert seen.sealed and not (seen.registers or seen.disassembly or seen.stack or seen.touches)
    assert "sealed" in vcpu.vm.look().status and vcpu.step_count == 3


def test_that_the_vmsa_is_measured(make: Make) -> None:
    vm, other = make(), make("guest_msr", 0x100)
    data, vmsa = vm.guest.measured[:-1], vm.guest.measured[-1]
    assert (vmsa.command, vmsa.spa, vmsa.size) == ("VMSA", VMSA_AT, 4096) and vmsa.digest != data[
        -1
    ].digest
    assert [m.digest for m in other.guest.measured[:-1]] == [
        m.digest for m in data
    ] and other.guest.measured[-1].digest != vmsa.digest


def test_that_the_digest_is_that_of_plaintext_and_registers(make: Make) -> None:
    vm = make(launch=False)
    plain = b"".join(vm.memory.read(pfn * 4096, n * 4096) for pfn, n in vm.guest.protected.ranges())
    regs = vm.vcpus[0].regs.all()
    vm.launch()
    vmsa = vm.guest.command("DBG_DECRYPT", spa=VMSA_AT, size=4096)
    assert vm.guest.measured[-1].digest == hashlib.sha256(plain + vmsa).digest()
    found = vmsa_registers(vmsa)
    assert {
        name: found[name] for name in ("rip", "rsp", "rdi", "cr3", "cr0", "cs", "gdt_base")
    } == {name: regs[name] for name in ("rip", "rsp", "rdi", "cr3", "cr0", "cs", "gdt_base")}
    assert (
        VMSA.get(vmsa, "efer") == regs["efer"] | 0x1000
        and VMSA.get(vmsa, "g_pat") == 0x0007_0406_0007_0406
    )


def test_that_the_host_sees_ciphertext_of_registers_as_they_are_now(make: Make) -> None:
    vm = make()
    before = vm.guest.dram.read(VMSA_AT, 4096)
    vm.vcpus[0].step(2)
    after = vm.guest.dram.read(VMSA_AT, 4096)
    blocks = {at // 16 for at in range(4096) if before[at] != after[at]}
    assert VMSA.fields["rip"][0] // 16 in blocks and len(blocks) < 8
    assert (
        vmsa_registers(vm.guest.command("DBG_DECRYPT", spa=VMSA_AT, size=4096))["rip"]
        == vm.vcpus[0].pc
    )


@pytest.mark.parametrize(
    ("spa", "error"),
    [(VMSA_AT, NotAvailable), (VMSA_AT + 4096, MemoryFault), (VMSA_AT + 1, MemoryFault)],
)
def test_that_a_vmsa_takes_no_writes(make: Make, spa: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        make().guest.dram.write(spa, bytes(4096))


@pytest.mark.parametrize(
    ("protect", "command", "fields", "errno"),
    [
        ("sev", "LAUNCH_UPDATE_VMSA", {}, ENOTTY),
        ("sev-es", "LAUNCH_UPDATE_VMSA", {}, EINVAL),
        ("snp", "LAUNCH_UPDATE_VMSA", {}, EPERM),
        ("sev-es", "LAUNCH_UPDATE_DATA", {"spa": 0x3000, "size": 4096}, EIO),
        ("sev-es", "LAUNCH_FINISH", {}, EIO),
        ("sev-es", "LAUNCH_START", {"policy": 4}, EIO),
        ("sev-es", "INIT2", {}, EINVAL),
        ("sev-es", "SNP_LAUNCH_FINISH", {}, ENOTTY),
        ("sev-es", "NO_SUCH", {}, EINVAL),
    ],
)
def test_that_a_command_after_the_launch_is_refused(
    make: Make, protect: str, command: str, fields: dict[str, int], errno: int
) -> None:
    vm = make(protect=protect)
    with pytest.raises(KvmError) as refused:
        vm.guest.command(command, **fields)
    assert (
        refused.value.facts["errno"] == errno
        and vm.guest.done[-1].command == command
        and vm.guest.done[-1].refused
    )
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ["SYNC", "PRINTF", "DONE"]


def test_that_nodbg_hides_the_vmsa(make: Make) -> None:
    with pytest.raises(KvmError, match="POLICY_FAILURE"):
        make(policy=0b101).guest.command("DBG_DECRYPT", spa=VMSA_AT, size=4096)


@pytest.mark.parametrize("protect", ["sev-es", "snp"])
def test_that_a_fork_goes_on_and_a_snapshot_comes_back(make: Make, protect: str) -> None:
    vm = make(protect=protect)
    assert isinstance(once(vm.vcpus[0], BUDGET), VmgexitExit if protect == "snp" else tuple)
    state = vm.snapshot()
    with vm.fork() as twin:
        ends = [[uc.cmd for uc in each.run_until_done(BUDGET)] for each in (vm, twin)]
        assert ends[0] == ends[1] and ends[0][-1] == "DONE" and twin.vcpus[0].sealed
        assert twin.guest.dram.read(VMSA_AT, 4096) == vm.guest.dram.read(VMSA_AT, 4096)
    vm.restore(state)
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ends[0]


@pytest.mark.parametrize("c_bit", [47, 51])
@pytest.mark.parametrize("protect", ["sev", "sev-es", "snp"])
def test_that_the_c_bit_is_where_cpuid_says(make: Make, protect: str, c_bit: int) -> None:
    cpu = CpuModel()
    cpu.cpuid[0x8000_001F, 0] = encryption_leaf(protect, c_bit, 5, 15, 8)
    vm = make(protect=protect, cpu=cpu)
    assert (
        vm.machine.space.mode.c_bit == c_bit
        and [uc.cmd for uc in vm.run_until_done(BUDGET)][-1] == "DONE"
    )
    if protect != "sev":
        vm = make("guest_msr", 2, protect=protect, cpu=cpu)
        assert vm.run_until_done(BUDGET)[0].args[0] == 1 | c_bit << 24 | 1 << 32 | 2 << 48


# --- #VC


@pytest.mark.parametrize(
    ("n", "code"), [(n, code) for n, (_, _, code) in enumerate(INSNS.values())], ids=list(INSNS)
)
def test_that_what_is_intercepted_is_vc(make: Make, n: int, code: int) -> None:
    vm = make(f"insn_{n}")
    assert vm.run_until_done(BUDGET)[0].args[0] == code


@pytest.mark.parametrize("write", [0, 1])
@pytest.mark.parametrize(
    ("protect", "seen"), [("sev", None), ("tdx", None), ("sev-es", 0x400), ("snp", 0x400)]
)
def test_that_a_device_in_memory_is_vc_where_registers_are_encrypted(
    make: Make, protect: str, seen: int | None, write: int
) -> None:
    vm = make("guest_device", 0xFEC0_0000, write, protect=protect, launch=False)
    vm.machine.space.map(0xFEC0_0000, 0xFEC0_0000)
    vm.launch()
    came = vm.vcpus[0].run(BUDGET)
    if seen is None:
        assert came == MmioExit(0xFEC0_0000, 4, bool(write), 7 if write else 0)
    else:
        assert came.args[0] == seen, (
            "the host cannot emulate an instruction that it cannot read: the guest asks through its GHCB"
        )


def test_that_a_halt_leaves_by_itself_and_vmcall_does_not_exist(make: Make) -> None:
    assert once(make("guest_halt").vcpus[0], BUDGET) == HaltExit()
    came = once(make("guest_vmcall").vcpus[0], BUDGET)
    assert came.cmd == "UNHANDLED" and came.args[0] == 6


def test_that_an_unhandled_vc_is_told_with_its_exit_code(make: Make) -> None:
    vm = make("guest_unhandled")
    came = once(vm.vcpus[0], BUDGET)
    assert (
        came.args[:2] == (29, 0x72)
        and "#VC (error code 0x72)" in vm.explain(came)
        and "cpuid" in vm.explain(came)
    )


def test_that_the_status_msr_needs_no_help(make: Make) -> None:
    assert make("guest_msrs").run_until_done(BUDGET)[0].args[:2] == (3, 0xD00)


# --- VMGEXIT: the MSR protocol


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (0x002, 0x0002_0001_3300_0001),
        (0x4 | 0 << 32, 0x5 | 0xD << 32),
        (0x4 | 1 << 32 | 1 << 30, 0x800 << 32 | 1 << 30 | 5),
        (0x080, 0x1081),
        (0xABC, 0xABC),
        (0x7777_0000_0FFF, 0x7777_0000_0FFF),
    ],
)
def test_that_the_msr_answers(make: Make, asked: int, answer: int) -> None:
    vm = make("guest_msr", asked)
    first, *rest = vm.run_until_done(BUDGET)
    assert first.args[0] == answer and [uc.cmd for uc in rest] == ["DONE"]
    assert (
        vm.events.kind.tolist() == ["vmgexit", "ucall", "ucall"]
        and f"{answer:#x}" in vm.events.what[0]
    )


@pytest.mark.parametrize(
    "asked", [0x100, 0x100 | 1 << 12 | 2 << 16, 0x010, 0x012 | 5 << 12, 0x014 | 5 << 12 | 1 << 52]
)
def test_that_terminate_and_what_only_snp_has_end_the_guest(make: Make, asked: int) -> None:
    vm = make("guest_msr", asked)
    came = once(vm.vcpus[0], BUDGET)
    assert isinstance(came, SystemEventExit) and (came.type, came.data, came.end) == (
        6,
        (asked,),
        "terminated",
    )
    assert vm.vcpus[0].state == "terminated"
    with pytest.raises(InvalidState, match="no vCPU can run"):
        vm.run()


def test_that_reset_hold_halts(make: Make) -> None:
    assert once(make("guest_msr", 0x006).vcpus[0], BUDGET) == HaltExit()


# --- VMGEXIT: the page


@pytest.mark.parametrize(
    ("page", "came"),
    [
        (ghcb(0x7B, 0x80 << 16 | 1 << 4, rax=0x1234), PioExit(0x80, 1, True, 0x34)),
        (ghcb(0x7B, 0x80 << 16 | 1 << 6, rax=0x1_2345_6789), PioExit(0x80, 4, True, 0x2345_6789)),
        (ghcb(0x7B, 0x80 << 16 | 1 << 5 | 1), PioExit(0x80, 2, False, 0)),
        (ghcb(0x7B, 0x1000 << 16 | 1 << 4 | 1), PioExit(0x1000, 1, False, 0)),
        (ghcb(0x81, rax=7, rbx=1, rcx=2, cpl=0), HypercallExit(7, (1, 2, 0, 0))),
        (ghcb(0x8000_0004), HaltExit()),
    ],
)
def test_that_a_page_becomes_the_exit_it_describes(make: Make, page: bytes, came: Exit) -> None:
    assert asks(make, page)[1] == came


def test_that_a_ucall_of_a_foreign_address_is_reported_as_ever(make: Make) -> None:
    assert asks(make, ghcb(0x7B, 0x1000 << 16 | 1 << 6, rax=0xDEAD_BEEF))[1].kind == "foreign"


@pytest.mark.parametrize(
    ("page", "regs"),
    [
        (ghcb(0x72, rax=0x8000_001F, rcx=0), {"rax": 0x40A, "rbx": 51}),
        (ghcb(0x7C, rcx=0x1B), {"rax": 0xFEE0_0900, "rdx": 0}),
        (ghcb(0x7C, rcx=0x12345), {"sw_exit_info_1": 1, "sw_exit_info_2": 0x8000_030D}),
        (
            ghcb(0x7C, 1, rcx=0x179, rax=0, rdx=0),
            {"sw_exit_info_1": 1, "sw_exit_info_2": 0x8000_030D},
        ),
        (ghcb(0x7C, 1, rcx=0x1B, rax=0xFEE0_0800, rdx=0), {"sw_exit_info_1": 0}),
        (ghcb(0x6F, rcx=0), {"sw_exit_info_2": 0x8000_030D}),
        (ghcb(0x7C, 1, rcx=0x10, rax=5, rdx=1), {"sw_exit_info_1": 0}),
        (ghcb(0x27), {"rax": 0x400}),
        (ghcb(0x37, rax=0x401), {}),
        (ghcb(0x89), {}),
        (ghcb(0x8000_FFFD), {"sw_exit_info_2": 1}),
        (ghcb(0x8000_0005, 0, 0x5000), {"sw_exit_info_2": 0}),
        (ghcb(0x8000_0005, 1), {"sw_exit_info_2": 0}),
        (ghcb(0x8000_0001, 0xFEC0_0000, 0, sw_scratch=0), {"sw_exit_info_1": 0}),
        (ghcb(0x7B, 0x80 << 16 | 1), {"sw_exit_info_1": 0}),
        (ghcb(0x7B, 0x80 << 16 | 4 | 1 << 4, 0, sw_scratch=0), {"sw_exit_info_1": 0}),
        (ghcb(0x81, rax=7, cpl=3), {"rax": (1 << 64) - 1}),
    ],
)
def test_that_a_page_is_answered_and_the_guest_goes_on(
    make: Make, page: bytes, regs: dict[str, int]
) -> None:
    vm, came, after = asks(make, page)
    assert isinstance(came, VmgexitExit) and came.request and vm.vcpus[0].state == "running"
    assert {name: GHCB.get(after, name) for name in regs} == regs
    valid = GHCB.get(after, "valid_bitmap")
    assert all(valid >> GHCB.fields[name][0] // 8 & 1 for name in regs)


@pytest.mark.parametrize(
    ("page", "at", "size"),
    [
        (ghcb(0x7B, 0x80 << 16 | 1 << 5 | 1, rax=0x1234_5678), GHCB.fields["rax"][0], 2),
        (ghcb(0x81, rax=1, cpl=0), GHCB.fields["rax"][0], 8),
    ],
)
def test_that_what_user_space_gives_lands_in_the_page(
    make: Make, page: bytes, at: int, size: int
) -> None:
    vm, _, _ = asks(make, page)
    vm.vcpus[0].complete(0xFEDC_BA98_7654_3210)
    assert vm.memory.read(vm.guest.awaited[0].gpa + at, size) == (
        0xFEDC_BA98_7654_3210 & (1 << 8 * size) - 1
    ).to_bytes(size, "little")


@pytest.mark.parametrize("is_write", [False, True])
def test_that_mmio_and_string_io_go_through_the_shared_buffer(make: Make, is_write: bool) -> None:
    vm = make("guest_ghcb", launch=False)
    gpa = vm.gva2gpa(vm.alloc_shared(4096))
    vm.vcpus[0].args_set(gpa)
    vm.launch()
    for code, info_1, info_2, size in (
        (0x8000_0001 + is_write, 0xFEC0_0000, 4, 4),
        (0x7B, 0x80 << 16 | 4 | 1 << 5 | (not is_write), 3, 6),
    ):
        page = bytearray(ghcb(code, info_1, info_2, sw_scratch=gpa + 0x800))
        page[0x800:0x806] = b"abcdef"
        vm.memory.write(gpa, bytes(page))
        data = int.from_bytes(b"abcdef"[:size], "little") if is_write else 0
        wanted = (
            MmioExit(0xFEC0_0000, 4, is_write, data)
            if size == 4
            else PioExit(0x80, 6, is_write, data)
        )
        assert once(vm.vcpus[0], BUDGET) == wanted
        vm.vcpus[0].complete(int.from_bytes(b"ABCDEF", "little"))
        assert vm.memory.read(gpa + 0x800, 6) == (
            b"abcdef" if is_write else b"ABCDEF"[:size] + b"abcdef"[size:]
        )


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (bytes(4096), GhcbReason.MISSING_INPUT),
        (b"\xff" * 4096, GhcbReason.INVALID_USAGE),
        (ghcb(0x72, rax=0), GhcbReason.MISSING_INPUT),
        (ghcb(0x666), GhcbReason.INVALID_EVENT),
        (ghcb(0x7B, 0x80 << 16 | 0x70 | 1), GhcbReason.INVALID_INPUT),
        (ghcb(0x8000_0001, 0xFEC0_0000, 4, sw_scratch=0), GhcbReason.INVALID_SCRATCH_AREA),
        (ghcb(0x8000_0001, 0xFEC0_0000, 9, sw_scratch=0), GhcbReason.INVALID_INPUT),
        (
            ghcb(0x7B, 0x80 << 16 | 4 | 1 << 4, 2033, sw_scratch=0x800),
            GhcbReason.INVALID_SCRATCH_AREA,
        ),
        (ghcb(0x8000_0010, sw_scratch=0), GhcbReason.MISSING_INPUT),
        (
            ghcb(0x8000_0002, 0xFEC0_0000, (1 << 64) - 1, sw_scratch=0x1000),
            GhcbReason.INVALID_INPUT,
        ),
        (ghcb(0x8000_0005, 2), GhcbReason.INVALID_INPUT),
    ],
)
def test_that_a_bad_page_is_refused_with_its_reason(
    make: Make, page: bytes, reason: GhcbReason
) -> None:
    vm, came, after = asks(make, page)
    assert (
        isinstance(came, VmgexitExit)
        and reason.name in str(came)
        and vm.vcpus[0].state == "running"
    )
    assert [GHCB.get(after, f"sw_exit_info_{n}") for n in (1, 2)] == [2, reason]


def test_that_string_io_without_end_is_kvm_s_einval(make: Make) -> None:
    _, came, _ = asks(make, ghcb(0x7B, 0x80 << 16 | 4 | 1 << 6, 1 << 40, sw_scratch=0))
    assert isinstance(came, InternalErrorExit) and "EINVAL" in came.why


@pytest.mark.parametrize("code", [0x6E, 0x87, 0x8000_FFFF])
def test_that_what_kvm_does_not_know_stops_the_vcpu(make: Make, code: int) -> None:
    vm, came, _ = asks(make, ghcb(code))
    assert (
        isinstance(came, InternalErrorExit)
        and EVENTS[code].name in came.why
        and vm.vcpus[0].state == "stuck"
    )


def test_that_a_page_can_end_the_guest(make: Make) -> None:
    assert asks(make, ghcb(0x8000_FFFE))[1].end == "terminated"


@pytest.mark.parametrize("gpa", [0, 1 << 39, (1 << 64) - 4096])
def test_that_a_ghcb_that_is_nowhere_is_not_answered(make: Make, gpa: int) -> None:
    came = once(make("guest_ghcb", gpa).vcpus[0], BUDGET)
    assert isinstance(came, VmgexitExit) and "no answer" in str(came)


def test_that_a_private_page_as_ghcb_is_noise_to_the_host(make: Make) -> None:
    vm = make("guest_ghcb", launch=False)
    gva = vm.alloc(4096)
    vm.write(gva, ghcb(0x72, rax=0, rcx=0))
    vm.vcpus[0].args_set(vm.gva2gpa(gva))
    vm.launch()
    assert "refused" in str(once(vm.vcpus[0], BUDGET))


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from([*EVENTS, 0, 1 << 63]),
    info=st.tuples(*[st.integers(0, MASK)] * 2),
    bitmap=st.integers(0, (1 << 128) - 1),
    scratch=st.integers(0, MASK) | st.integers(0x7F0, 0x1000),
    tail=st.binary(max_size=64),
)
def test_that_no_page_breaks_the_host(
    code: int, info: tuple[int, int], bitmap: int, scratch: int, tail: bytes
) -> None:
    page = bytearray(ghcb(code, *info, sw_scratch=scratch))
    page[0x800 : 0x800 + len(tail)] = tail
    GHCB.put(page, "valid_bitmap", bitmap | 7 << 114)
    vm, gpa = hostile()
    vm.memory.write(gpa, bytes(page))
    came = once(vm.vcpus[0], BUDGET)
    assert (
        came.end
        in (
            "vmgexit",
            "pio",
            "mmio",
            "hypercall",
            "halted",
            "terminated",
            "internal-error",
            "bad-ucall",
        )
        or came.cmd == "NONE"
    )
    assert parse_ghcb(vm.memory.read(gpa, 4096)).code == code


@cache
def hostile() -> tuple[lk.Vm, int]:
    """One VM for all hostile pages, and where its GHCB is."""
    vm = lk.Vm.create(program(), "guest_ghcb", protect="sev-es", launch=False)
    gpa = vm.gva2gpa(vm.alloc_shared(4096))
    vm.vcpus[0].args_set(gpa)
    vm.launch()
    return vm, gpa


def test_that_every_msr_request_ends_well(make: Make) -> None:
    for code in MSR_REQUESTS:
        came = once(make("guest_msr", code | 0xFFFF_FFFF_FFFF_F000).vcpus[0], BUDGET)
        assert came.end in ("vmgexit", "terminated", "halted")
