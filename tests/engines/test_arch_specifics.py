"""What each architecture has of its own: syndromes, access flags, large pages, broken tables, refused instructions."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

import labkit as lk
from labkit.arch.arm64 import ARM64_PXXV48_4K
from labkit.arch.riscv import RISCV_SV39, RISCV_SV48
from labkit.arch.s390 import S390_PXXV64_4K
from labkit.engines.exits import (
    BudgetExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    MmioExit,
    SbiExit,
)
from labkit.errors import GuestCrashed, InvalidState
from labkit.ucall.calls import BadUcallExit

GVA, HOLE = 0x7000_0000, 0x3_0000_0000


@cache
def program(arch: str, body: str) -> lk.Program:
    return lk.Program.compile(
        f'#include "labkit.h"\nvolatile uint64_t out;\nvoid guest_code(uint64_t a, uint64_t b)\n{{\n{body}\n'
        "\tGUEST_DONE();\n}\n",
        arch=arch,
    )


def vm_of(arch: str, body: str, *args: int, **options) -> lk.Vm:
    vm = lk.Vm.create(program(arch, body), **options)
    if args:
        vm.vcpus[0].args_set(*args)
    return vm


READ, WRITE = "\tout = *(volatile uint64_t *)a;", "\t*(volatile uint64_t *)a = b;"
CALL = "\t((void (*)(void))a)();"


def fault(vm: lk.Vm) -> tuple[int, int, int]:
    """(vector, syndrome, fault address) that the guest reports."""
    uc = vm.vcpus[0].run(20_000)
    assert uc.cmd == "UNHANDLED", uc
    return uc.args[0], uc.args[1], uc.args[3]


def map_page(vm: lk.Vm, **flags: bool) -> int:
    gpa = vm.machine.space.alloc_pages(1, "test")
    vm.machine.space.map(GVA, gpa, nx=flags.pop("nx", True), **flags)
    return gpa


# --- syndromes

DABT, IABT, BRK = 0x25, 0x21, 0x3C


@pytest.mark.parametrize(
    ("body", "writable", "mapped", "esr", "far"),
    [
        (READ, True, False, 0x9600_0005, GVA),
        (WRITE, True, False, 0x9600_0045, GVA),
        (WRITE, False, True, 0x9600_004F, GVA),
        (CALL, True, True, 0x8600_000F, GVA),
        (CALL, True, False, 0x8600_0005, GVA),
        ('\t__asm__("brk #7");', True, False, 0xF200_0007, 0),
        ('\t__asm__("svc #9");', True, False, 0x5600_0009, 0),
        ("\t((void (*)(void))(a + 2))();", True, True, 0x8A00_0000, GVA + 2),
    ],
)
def test_that_arm64_syndromes_are_the_manuals(body, writable, mapped, esr, far):
    """Arm ARM D24.2.40 ESR_EL1: translation fault level 1, permission fault level 3, WnR in bit 6."""
    vm = vm_of("arm64", body, GVA, 1)
    if mapped:
        map_page(vm, writable=writable)
    vector, syndrome, address = fault(vm)
    assert (syndrome, address) == (esr, far) and vector == 4 * 64 + (esr >> 26)


@pytest.mark.parametrize(
    ("body", "writable", "mapped", "cause"),
    [
        (READ, True, False, 13),
        (WRITE, True, False, 15),
        (WRITE, False, True, 15),
        (CALL, True, True, 12),
        (CALL, True, False, 12),
    ],
)
def test_that_riscv_causes_and_stval_are_the_manuals(body, writable, mapped, cause):
    vm = vm_of("riscv64", body, GVA, 1)
    if mapped:
        map_page(vm, writable=writable)
    assert fault(vm) == (cause, GVA, GVA)


@pytest.mark.parametrize(
    ("body", "writable", "mapped", "code", "teid"),
    [
        (READ, True, False, 0x3B - 0x2B, GVA | 0x800),
        (WRITE, True, False, 0x10, GVA | 0x400),
        (WRITE, False, True, 0x04, GVA | 0x404),
        (CALL, True, False, 0x10, GVA | 0x800),
    ],
)
def test_that_s390_codes_and_teid_are_the_manuals(body, writable, mapped, code, teid):
    """Principles of Operation: the translation-exception identification has a page address, and whether it was a store (bits 52, 53)."""
    vm = vm_of("s390x", body, GVA, 1)
    if mapped:
        map_page(vm, writable=writable)
    assert fault(vm) == (code, teid, GVA)


@pytest.mark.parametrize(
    ("arch", "body", "vector"),
    [
        ("riscv64", '\t__asm__ volatile("ebreak");', 3),
        ("riscv64", '\t__asm__ volatile("csrr %0, mstatus" : "=r"(a));', 2),
        ("s390x", '\t__asm__ volatile("lghi %%r4, 0\\n\\tdsgr %%r4, %%r4" : : : "r4", "r5");', 9),
        ("s390x", '\t__asm__ volatile(".short 0");', 1),
        ("s390x", "\tout = *(volatile uint64_t *)a;", 5),
    ],
)
def test_that_other_exceptions_have_their_number(arch, body, vector):
    vm = vm_of(arch, body, GVA, 1)
    if vector == 5:
        vm.machine.space.map(
            GVA, HOLE
        )  # storage that is not there: an addressing exception, not a device
    assert fault(vm)[0] == vector


ZEROS = {
    "riscv64": (2, GVA),
    "s390x": (1, GVA + 2),
}  # vector, program counter of what no processor has as an instruction


@pytest.mark.parametrize("arch", ZEROS)
def test_that_zeros_at_the_start_of_a_page_behind_a_hole_are_undefined(arch):
    """Unicorn wants the page before too, for a block without instructions."""
    vm = vm_of(arch, CALL, GVA)
    map_page(vm, nx=False)
    uc = vm.vcpus[0].run(20_000)
    assert (uc.cmd, uc.args[0], uc.args[2]) == ("UNHANDLED", *ZEROS[arch])


@pytest.mark.parametrize(
    ("insn", "vector"),
    [("amoadd.d t0, t1, (%0)", 15), ("amoswap.w.aq t0, t1, (%0)", 15), ("lr.d t0, (%0)", 13)],
)
def test_that_an_amo_faults_as_a_store_does(insn, vector):
    """Privileged Architecture 12.1.8: AMOs raise store/AMO exceptions, although they load first."""
    body = f'\t__asm__ volatile("{insn}" : : "r"(a) : "t0", "memory");'
    assert fault(vm_of("riscv64", body, GVA)) == (vector, GVA, GVA)
    assert fault(vm_of("riscv64", body, GVA + 1))[0] == (6 if vector == 15 else 4)


@pytest.mark.parametrize("body", ['\t__asm__ volatile("ex 0, 1(%r15)");', CALL])
def test_that_s390x_runs_nothing_at_odd_addresses(body):
    vm = vm_of("s390x", body, GVA + 1)
    map_page(vm)
    assert fault(vm)[0] == 6


SET_CLOCK = """
import labkit as lk
BODY = r'''#include "labkit.h"
void guest_code(void) { uint64_t now[1] = {}; for (int i = 0; i < 3; i++) { GUEST_SYNC(i); INSN } }'''
vcpu = lk.Vm.create(lk.Program.compile(BODY, arch="s390x")).vcpus[0]
print(*(str(vcpu.run(BUDGET)) for _ in range(3)), sep="|")
"""


@pytest.mark.parametrize("budget", [None, 5000])
@pytest.mark.parametrize(
    "insn",
    ['__asm__ volatile("sck %0" : : "Q"(now[0]));', '__asm__ volatile("diag 0, 0, 0x500; sck 0");'],
)
def test_that_set_clock_is_refused_and_python_lives(insn, budget):
    """libunicorn alone ends the process when it translates one."""
    code = SET_CLOCK.replace("INSN", insn).replace("BUDGET", str(budget))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and "SET CLOCK" in done.stdout, done.stderr


TARGETS = [
    ("lghi 1, 77", 77),
    ("agsi 160(%%r15), 0", 5),
    ("lg 1, 0(0)", 0x11),
    ("ex 0, 0(1)", 3),
    ("diag 0, 0, 0x500", None),
]


@pytest.mark.parametrize("budget", [1, 20_000])
@pytest.mark.parametrize(("target", "found"), TARGETS)
def test_that_execute_carries_out_any_target_once(target, found, budget):
    body = (
        '\t__asm__ volatile("lghi 1, 5; exrl 0, 1f; j 2f; 1: TARGET; 2: lgr %0, 1" : "=d"(a) : : "1", "memory");'
        "\tGUEST_SYNC1(a);"
    ).replace("TARGET", target)
    vcpu = vm_of("s390x", body).vcpus[0]
    came = next(
        came for came in (vcpu.run(budget) for _ in range(5000)) if not isinstance(came, BudgetExit)
    )
    assert came.args[0] == found if found is not None else "does not carry out" in came.why


# --- walks against the architecture's own walker


def test_that_every_arm64_walk_is_what_at_s1e1r_says():
    vm = vm_of("arm64", READ)
    space, regs = vm.machine.space, vm.vcpus[0].regs
    space.map(0x4000_0000, 0x40_0000, 1, 1 << 21, writable=False)
    space.map(0x80_0000_0000, 0x4000_0000, 1, 1 << 30)
    vm.vcpus[0].step()
    table = vm.page_table()
    gvas = [
        *table.gva.tolist(),
        0x4000_1238,
        0x401F_FFF8,
        0x80_1234_5678,
        0x1000,
        0x5000_0000,
        0xFFFF_F000_0000,
        0x100_0000_0000,
    ]
    for gva in gvas:
        regs["s1_0_c7_c8_0"] = gva  # AT S1E1R
        par, walk = regs.par_el1, table.walk(gva)
        assert (walk.gpa is None) == bool(par & 1), f"{gva:#x}: PAR_EL1 {par:#x}, {walk.status}"
        if walk.gpa is not None:
            assert (par & 0xFFFF_FFFF_F000) + gva % 4096 == walk.gpa
        else:
            level = len(walk.steps) - 1
            assert par >> 1 & 0x3F == 4 + level, (
                "a translation fault of the level at which the walk ended"
            )
        regs["s1_0_c7_c8_1"] = gva  # AT S1E1W
        assert bool(regs.par_el1 & 1) == (walk.gpa is None or not walk.flags["writable"])


@pytest.mark.parametrize("arch", ["arm64", "riscv64"])
def test_that_large_pages_are_built_walked_and_used(arch):
    vm = vm_of(arch, WRITE, 0x4000_0000 + 0x1238, 77, memory=16 << 20)
    mode, space = vm.arch.mode, vm.machine.space
    size = mode.page_sizes[1]
    gpa = space.alloc_pages(2 * size // 4096 - 1, "test")
    gpa = -(-gpa // size) * size
    space.map(0x4000_0000, gpa, 1, size, nx=True)
    walk = vm.page_table().walk(0x4000_1238)
    assert (walk.gpa, walk.page_size) == (gpa + 0x1238, size)
    assert vm.vcpus[0].run(10_000).cmd == "DONE"
    assert int.from_bytes(vm.memory.read(gpa + 0x1238, 8), mode.byteorder) == 77


def test_that_s390x_has_no_large_pages_and_says_so():
    vm = vm_of("s390x", READ)
    assert not next(
        c.have for c in vm.capabilities if c.name == "edat"
    ) and vm.arch.mode.page_sizes == (4096,)
    with pytest.raises(InvalidState, match="no pages of 0x100000 bytes, only 0x1000"):
        vm.machine.space.map(1 << 30, 0, 1, 1 << 20)


EXECUTE = """
	static char from[16] = "abcdefgh", to[16];
	register uint64_t length __asm__("r4") = 3, where __asm__("r2") = a ? a : (uint64_t)to, at __asm__("r3") = (uint64_t)from;
	for (int i = 0; i < 3; i++)
		__asm__ volatile("larl %%r5, 1f; INSN; j 2f; 1: mvc 0(1,%%r2), 0(%%r3); 2:"
			: : "d"(length), "a"(where), "a"(at) : "r5", "memory");
	out = *(uint64_t *)to;"""


@pytest.mark.parametrize("insn", ["ex %%r4, 0(%%r5)", "exrl %%r4, 1f"])
def test_that_execute_and_its_target_are_one_instruction(insn):
    """EXECUTE ors a length into a target that it fetches itself (Principles of Operation, 7-121); a fault names EXECUTE."""
    vm, stepped = (vm_of("s390x", EXECUTE.replace("INSN", insn), 0) for _ in range(2))
    assert vm.vcpus[0].run().cmd == "DONE" and vm.sync_global_from_guest("out") == int.from_bytes(
        b"abcd\0\0\0\0", "big"
    )
    names = []
    while stepped.vcpus[0].state != "done":
        names.append(stepped.vcpus[0].insn.mnemonic)
        stepped.vcpus[0].step()
    assert (
        names.count(insn.split()[0]) == 3 and "mvc" not in names[:100] and stepped.step == vm.step
    )
    vm = vm_of("s390x", EXECUTE.replace("INSN", insn), GVA)
    uc = vm.vcpus[0].run(5000)
    assert (
        uc.args[0] == 0x10
        and uc.args[3] == GVA
        and "ex" in vm.vcpus[0].disassemble(uc.args[2], 1).insns[0].mnemonic
    )


@pytest.mark.parametrize(
    ("insn", "found"),
    [
        ("risbhg %0, %1, 0, 159, 32", 0x9ABCDEF0_FFFFFFFF),
        ("risbhg %0, %1, 0, 31, 0", 0x12345678_FFFFFFFF),
        ("risbhg %0, %1, 8, 151, 0", 0x00345600_FFFFFFFF),
        ("risbhg %0, %1, 8, 23, 0", 0xFF3456FF_FFFFFFFF),
        ("risbhg %0, %1, 24, 7, 4", 0x23FFFF89_FFFFFFFF),
        ("risbhg %0, %1, 4, 4, 36", 0xFFFFFFFF_FFFFFFFF),
        ("risblg %0, %1, 0, 159, 32", 0xFFFFFFFF_12345678),
        ("risblg %0, %1, 0, 31, 0", 0xFFFFFFFF_9ABCDEF0),
        ("risblg %0, %1, 8, 151, 0", 0xFFFFFFFF_00BCDE00),
        ("risblg %0, %1, 28, 3, 4", 0xFFFFFFFF_AFFFFFF1),
    ],
)
def test_that_s390x_inserts_bits_into_halves_of_registers(insn, found):
    """As the Principles of Operation have it, chapter 7; Unicorn leaves the register as it was, and %p lost its zeros by it."""
    body = (
        f'\tuint64_t to = -1UL;\n\t__asm__ volatile("{insn}" : "+d"(to) : "d"(0x123456789abcdef0UL));\n'
        '\tGUEST_SYNC1(to);\n\tGUEST_PRINTF("%p", (void *)0x1234);'
    )
    sync, printed, _ = vm_of("s390x", body).run_until_done()
    assert hex(sync.args[0]) == hex(found) and printed.text == "0x00000000001234"


SMALLEST, SMALLEST32 = 1 << 63, 1 << 31
NEXT = "ipm %%r0; srl %%r0, 28"


@pytest.mark.parametrize(
    ("insn", "a", "b", "found", "cc"),
    [
        ("agr %%r2, %%r3", SMALLEST, SMALLEST, 0, 3),
        ("sgr %%r2, %%r3", 0, SMALLEST, SMALLEST, 3),
        ("sgr %%r2, %%r3", 5, 7, -2, 1),
        ("ar %%r2, %%r3", 7 << 32 | SMALLEST32, SMALLEST32, 7 << 32, 3),
        ("sr %%r2, %%r3", 0, SMALLEST32, SMALLEST32, 3),
        ("agrk %%r2, %%r3, %%r2", SMALLEST, SMALLEST, 0, 3),
        ("srk %%r2, %%r2, %%r3", 0, SMALLEST32, SMALLEST32, 3),
        ("ag %%r2, 0(%%r4)", SMALLEST, SMALLEST, 0, 3),
        ("sg %%r2, 0(%%r4)", 0, SMALLEST, SMALLEST, 3),
        ("ag %%r2, 0(%%r4)", 1, 2, 3, 2),
        ("a %%r2, 4(%%r4)", SMALLEST32, SMALLEST32, 0, 3),
        ("sy %%r2, 4(%%r4)", 0, SMALLEST32, SMALLEST32, 3),
        ("afi %%r2, -2147483648", SMALLEST32, 0, 0, 3),
        ("aih %%r2, -2147483648", SMALLEST, 0, 0, 3),
        ("shhhr %%r2, %%r2, %%r3", 9, SMALLEST, SMALLEST | 9, 3),
        ("ahhlr %%r2, %%r2, %%r3", SMALLEST, SMALLEST32, 0, 3),
        ("cgr %%r2, %%r3; locfhr %%r2, %%r3, 4", 1, 0x7_0000_0002, 0x7_0000_0001, 1),
        ("cgr %%r2, %%r3; locfhr %%r2, %%r3, 3", 1, 9 << 32, 1, 1),
        ("cghrl %%r2, halves", -7, 0, -7, 0),
        ("chrl %%r2, halves", 0xFFFF_FFF8, 0, 0xFFFF_FFF8, 1),
        ("cghrl %%r2, halves", 0xFFF9, 0, 0xFFF9, 2),
        ("icm %%r2, 11, 0(%%r4)", 0xFFFF, 0x8001027F << 32, 0x80000102, 1),
        ("icm %%r2, 14, 4(%%r4)", 9, 0x10000, 0x00010009, 2),
        ("icmh %%r2, 7, 0(%%r4)", 1 << 63, 0x8001027F << 32, 0x8080_0102_0000_0000, 1),
        ("icmy %%r2, 13, 0(%%r4)", 1 << 16, 0, 0, 0),
        ("rosbg %%r2, %%r3, 155, 47, 5", 0x80000001, 0x100000001, 0x80000001, 1),
        ("rnsbg %%r2, %%r3, 131, 3, 0", -1, 1 << 59, -1, 0),
        ("rxsbg %%r2, %%r3, 190, 1, 1", 1, 1 << 63, 1, 0),
        ("rxsbg %%r2, %%r3, 190, 1, 1", 1, 0, 1, 1),
    ],
)
def test_that_s390x_condition_codes_are_the_manuals(insn, a, b, found, cc):
    """Each of these Unicorn carries out wrongly, without a word; a later QEMU agrees with the Principles of Operation, chapter 7."""
    body = (
        "\tstatic const short halves[4] __attribute__((used, aligned(8))) = { -7 };\n"
        '\tregister uint64_t cc __asm__("r0"), to __asm__("r2") = a, with __asm__("r3") = b;\n'
        f'\tregister uint64_t *at __asm__("r4") = &b;\n\t__asm__ volatile("{insn.replace("halves", "%4")}; {NEXT}"'
        ' : "=d"(cc), "+d"(to) : "d"(with), "a"(at), "i"(halves) : "cc", "memory");\n\tGUEST_SYNC2(to, (uint32_t)cc);'
    )
    came = vm_of("s390x", body, a & (1 << 64) - 1, b).vcpus[0].run(10_000)
    assert [hex(n) for n in came.args[:2]] == [hex(found & (1 << 64) - 1), hex(cc)]


def test_that_a_compilers_overflow_checks_know_the_smallest_number():
    body = (
        "\tlong sum, less; int small;\n\tint minus = __builtin_sub_overflow(0L + (long)out, (long)b, &less);\n"
        "\tint plus = __builtin_add_overflow((long)a, (long)b, &sum);\n"
        "\tint half = __builtin_sub_overflow((int)out, (int)(b >> 32), &small);\n"
        "\tGUEST_SYNC3(plus, minus, half);"
    )
    assert vm_of("s390x", body, SMALLEST, SMALLEST).vcpus[0].run(10_000).args[:3] == (1, 1, 1)


@pytest.mark.parametrize(
    ("insn", "slow"),
    [
        ("agr %%r2, %%r3; jo 1f; 1:", True),
        ("agr %%r2, %%r3; jne 1f; 1:", True),
        ("agr %%r2, %%r3; alcgr %%r2, %%r3", True),
        ("sgr %%r2, %%r3; jne 1f; 1:", False),
        ("agr %%r2, %%r3; cgr %%r2, %%r3; jo 1f; 1:", False),
        ("sgr %%r2, %%r3; lgr %%r3, %%r2; jl 1f; 1:", True),
        ("ark %%r2, %%r3, %%r2; j 1f; 1:", False),
    ],
)
def test_that_only_sums_whose_condition_code_may_tell_are_the_hosts(insn, slow):
    vm = vm_of("s390x", f'\t__asm__ volatile("{insn}" : : : "r2", "r3", "cc");')
    assert vm.vcpus[0].run(10_000).cmd == "DONE"
    start, traps = vm.gva_of("guest_code"), vm.machine.vcpus[0].guards.traps.values()
    assert slow == any(trap.kind == "sum" and start <= trap.gva < start + 40 for trap in traps)


@pytest.mark.parametrize(
    "target",
    [
        "lr %%r5, %%r6",
        "cli 0(%%r3), 0",
        "mvn 0(1,%%r2), 0(%%r3)",
        "tm 0(%%r3), 1",
        "mvi 0(%%r2), 9",
    ],
)
@pytest.mark.parametrize("insn", ["ex %%r4, 0(%%r5)", "exrl %%r4, 1f"])
def test_that_execute_of_what_unicorn_has_no_helper_for_is_one_instruction_too(insn, target):
    source = EXECUTE.replace("INSN", insn).replace("mvc 0(1,%%r2), 0(%%r3)", target)
    vm, stepped = vm_of("s390x", source, 0), vm_of("s390x", source, 0)
    assert vm.vcpus[0].run(10_000).cmd == "DONE"
    while stepped.vcpus[0].state != "done":
        stepped.vcpus[0].step()
    assert stepped.step == vm.step


@pytest.mark.parametrize("mode", [RISCV_SV39, RISCV_SV48])
def test_that_riscv_has_two_modes_and_sets_accessed_and_dirty(mode):
    vm = vm_of("riscv64", WRITE, GVA, 1, paging=mode.name)
    map_page(vm)
    assert vm.arch.mode == mode and len(vm.page_table().walk(GVA).steps) == len(mode.levels)
    before = vm.page_table().walk(GVA).flags
    assert vm.vcpus[0].run(10_000).cmd == "DONE"
    after = vm.page_table().walk(GVA).flags
    assert not before["accessed"] and not before["dirty"] and after["accessed"] and after["dirty"]
    twin = vm.fork()
    assert twin.arch.mode == mode and twin.page_table().walk(GVA).flags == after


def test_that_a_paging_mode_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(InvalidState, match="riscv/SV48_4K, riscv/SV39_4K"):
        vm_of("riscv64", READ, paging="riscv/SV57_4K")


def test_that_arm64_faults_on_a_page_without_access_flag_and_the_guest_can_set_it():
    vm = vm_of("arm64", READ, GVA)
    map_page(vm)
    vm.machine.space.builder.protect(GVA, 1, accessed=False)
    assert fault(vm)[1] == 0x9600_000B  # access flag fault, level 3
    vm.machine.space.builder.protect(GVA, 1, accessed=True)
    vm.vcpus[0].set_entry("guest_code")
    vm.vcpus[0].args_set(GVA)
    assert vm.vcpus[0].run(10_000).cmd == "DONE"


BROKEN = [  # arch, levels above the last, bits to set, bits to clear, what the guest gets
    ("arm64", 0, 0, 2, 0x9600_0007),
    ("arm64", 3, 0, 2, None),
    ("riscv64", 0, 0, 0xE, 13),
    ("riscv64", 0, 0, 0x2, 13),
    ("riscv64", 1, 0x40, 0, None),
    ("s390x", 0, 0x800, 0, 0x12),
    ("s390x", 1, 0x4, 0, 0x12),
    ("s390x", 2, 0x8, 0, None),
    ("s390x", 0, 0x400, 0, 0x11),
]


@pytest.mark.parametrize(("arch", "above", "to_set", "to_clear", "wanted"), BROKEN)
def test_that_entries_with_invalid_bits_are_a_hole_in_the_view_and_a_fault_in_the_guest(
    arch, above, to_set, to_clear, wanted
):
    vm = vm_of(arch, READ, GVA)
    map_page(vm)
    order = vm.arch.mode.byteorder
    step = vm.page_table().walk(GVA).steps[-1 - above]
    vm.memory.write(step.entry_gpa, ((step.entry | to_set) & ~to_clear).to_bytes(8, order))
    walk = vm.page_table().walk(GVA)
    assert walk.gpa is None and walk.problem and walk.text
    if (
        wanted is not None
    ):  # above that, the guest's own code is gone too; and Unicorn does not look at A in a pointer
        vector, syndrome, _ = fault(vm)
        assert wanted in (vector, syndrome)


def test_that_hierarchical_rights_of_arm64_tables_count():
    vm = vm_of("arm64", WRITE, GVA, 1)
    map_page(vm)
    step = vm.page_table().walk(GVA).steps[1]
    vm.memory.write(
        step.entry_gpa, (step.entry | 1 << 62).to_bytes(8, "little")
    )  # APTable: no writes below
    table = vm.page_table()
    assert (
        not table.walk(GVA).flags["writable"] and not table.flag("writable")[table.gva == GVA].any()
    )
    assert "noW" in table.walk(GVA).text and fault(vm)[1] == 0x9600_004F


# --- exits


def test_that_two_arm64_vms_have_an_exit_address_each_and_one_for_both_is_broken():
    """The selftests' ucall_exit_mmio_addr was one for all VMs; commit 03b4750533fc gave each its own (vm->ucall_mmio_addr)."""
    body = "\tGUEST_SYNC(1);"
    small, large = vm_of("arm64", body, memory=8 << 20), vm_of("arm64", body, memory=16 << 20)
    assert (small.door.number, large.door.number) == (8 << 20, 16 << 20)
    for vm in (small, large):
        assert [uc.cmd for uc in vm.fork().run_until_done()] == ["SYNC", "DONE"]
    small.door = large.door  # as it was: the last VM that was made decides for all
    with pytest.raises(GuestCrashed, match="mmio"):
        small.run_until_done(10_000)
    assert (
        isinstance(small.vcpus[0].run(10), MmioExit | BadUcallExit)
        or small.vcpus[0].state == "running"
    )
    assert [uc.cmd for uc in large.run_until_done()] == ["SYNC", "DONE"]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("arch", ["arm64", "riscv64"])
def test_that_devices_are_read_and_written_whole(arch, size):
    body = f"\tvolatile uint{8 * size}_t *p = (void *)a;\n\tfor (int i = 0; i < 3; i++) *p = b + i;\n\tout = *p;\n\tGUEST_SYNC1(out);"
    vm = vm_of(arch, body, GVA + 8 * size, 0x1122334455667788)
    vm.machine.space.map(GVA, HOLE)
    vcpu, mask = vm.vcpus[0], (1 << 8 * size) - 1
    for i in range(3):
        assert vcpu.run(1000) == MmioExit(
            HOLE + 8 * size, size, True, 0x1122334455667788 + i & mask
        )
    assert vcpu.run(1000) == MmioExit(HOLE + 8 * size, size, False, 0)
    vcpu.complete(0xFEDCBA9876543210)
    assert vcpu.run(1000).args[0] == 0xFEDCBA9876543210 & mask


@pytest.mark.parametrize(
    ("store", "size", "data"),
    [
        ("str %1", 8, 0x1122334455667788),
        ("str %w1", 4, 0x55667788),
        ("strh %w1", 2, 0x7788),
        ("strb %w1", 1, 0x88),
        ("str xzr", 8, 0),
        ("strh wzr", 2, 0),
    ],
)
def test_that_an_arm64_device_hears_of_a_store_again_and_again(store, size, data):
    vm = vm_of(
        "arm64",
        f'\tfor (;;)\n\t\tasm volatile("{store}, [%0, #{8 * size}]" : : "r"(a), "r"(b));',
        GVA,
        0x1122334455667788,
    )
    vm.machine.space.map(GVA, HOLE)
    assert [vm.vcpus[0].run(1000) for _ in range(4)] == [
        MmioExit(HOLE + 8 * size, size, True, data)
    ] * 4


@pytest.mark.parametrize("body", [READ, WRITE])
@pytest.mark.parametrize("arch", ["x86_64", "arm64", "riscv64"])
def test_that_a_page_fault_behind_a_device_access_is_one(arch, body):
    """libunicorn makes a page fault of its own when a mapping goes; an x86 guest's next one was a double fault then."""
    vm = vm_of(arch, body + "\n\tout = *(volatile uint64_t *)(a + 4096);", GVA, 1)
    vm.machine.space.map(GVA, HOLE)
    assert isinstance(vm.vcpus[0].run(1000), MmioExit)
    vector, _, gva = fault(vm)
    assert vector in vm.arch.page_faults and gva == GVA + 4096


def test_that_an_arm64_store_that_met_a_device_goes_to_memory_again():
    vm = vm_of(
        "arm64",
        "\tfor (int i = 0; i < 6; i++) *(volatile uint64_t *)(i & 1 ? b : a) = i;",
        GVA,
        0x6000_0000,
    )
    vm.machine.space.map(GVA, HOLE)
    vm.machine.space.map(0x6000_0000, gpa := vm.machine.space.alloc_pages(1, "test"), nx=True)
    assert [vm.vcpus[0].run(1000).data for _ in range(3)] == [0, 2, 4]
    assert vm.vcpus[0].run(1000).cmd == "DONE" and vm.memory.read(gpa, 8) == (5).to_bytes(
        8, "little"
    )


@pytest.mark.parametrize(
    ("arch", "body", "exit"),
    [
        ("arm64", '\t__asm__ volatile("wfi");', HaltExit()),
        ("riscv64", '\t__asm__ volatile("wfi");', HaltExit()),
        (
            "arm64",
            '\tregister uint64_t x0 __asm__("x0") = 0x84000000; register uint64_t x1 __asm__("x1") = 1, x2 __asm__("x2") = 2,'
            ' x3 __asm__("x3") = 3, x4 __asm__("x4") = 4;'
            ' __asm__ volatile("hvc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x4));'
            " out = x0;",
            HypercallExit(0x84000000, (1, 2, 3, 4)),
        ),
        (
            "riscv64",
            "\tout = sbi_ecall(0x10, 3, 1, 2, 3, 4, 5, 6).error;",
            SbiExit(0x10, 3, (1, 2, 3, 4, 5, 6)),
        ),
        (
            "s390x",
            "\tstatic const uint64_t psw[2] __attribute__((aligned(8))) = { 0x0002000180000000, 0 };"
            ' __asm__ volatile("lpswe %0" : : "Q"(psw));',
            HaltExit(),
        ),
    ],
)
def test_that_a_guest_halts_and_calls(arch, body, exit):
    vm = vm_of(arch, body)
    assert vm.vcpus[0].run(1000) == exit
    if not isinstance(exit, HaltExit):
        vm.vcpus[0].complete(0x42)
        assert vm.vcpus[0].run(1000).cmd == "DONE" and vm.sync_global_from_guest("out") == 0x42


@pytest.mark.parametrize(
    ("arch", "body"),
    [
        ("arm64", "\tuint64_t t[3]; for (int i = 0; i < 3; i++) t[i] = read_sysreg(cntvct_el0);"),
        ("riscv64", "\tuint64_t t[3]; for (int i = 0; i < 3; i++) t[i] = csr_read(time);"),
        (
            "s390x",
            '\tvolatile uint64_t t[3]; for (int i = 0; i < 3000; i++) __asm__ volatile("stckf %0" : "=Q"(t[i / 1000]) : : "cc");',
        ),
    ],
)
def test_that_time_is_the_vms_own_and_repeats(arch, body):
    runs = []
    for _ in range(2):
        vm = vm_of(
            arch,
            body
            + "\n\tGUEST_ASSERT(t[0] < t[1] && t[1] < t[2]);\n\tGUEST_SYNC3(t[0], t[1], t[2]);",
        )
        runs.append([uc.args for uc in vm.run_until_done()])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arch", "word", "name"),
    [
        ("arm64", ".inst 0x19000441", "cpyf"),
        ("s390x", ".long 0xb9390000; .short 0x0700", "prno"),
        ("riscv64", ".word 0x6000c5b3", ""),
    ],
)
def test_that_an_instruction_that_unicorn_lacks_is_refused_or_undefined(arch, word, name):
    """One that capstone knows is refused with its text; one that nobody knows is the guest's undefined instruction."""
    vm = vm_of(arch, f'\t__asm__ volatile("{word}");')
    came = vm.vcpus[0].run(20_000)
    if isinstance(came, InternalErrorExit):
        assert came.disassembly and "does not have this instruction" in came.why
    else:
        assert came.cmd == "UNHANDLED" and came.args[0] in (4 * 64, 1, 2, 6)


def test_that_formats_are_what_their_names_say():
    assert [mode.va_bits for mode in (ARM64_PXXV48_4K, RISCV_SV39, RISCV_SV48, S390_PXXV64_4K)] == [
        48,
        39,
        48,
        64,
    ]
    assert [level.table_size for level in S390_PXXV64_4K.levels] == [16384] * 4 + [2048]


@pytest.mark.parametrize(
    ("arch", "insn", "drop", "vector"),
    [
        ("arm64", "svc #3", {"pstate": 0x3C0}, 8 * 64 + 0x15),
        ("arm64", "ldr x0, [xzr, #0]", {"pstate": 0x3C0}, 8 * 64 + 0x24),
        ("riscv64", "ecall", {"priv": 0}, 8),
        ("riscv64", "csrr a0, sstatus", {"priv": 0}, 2),
        ("riscv64", "ld a0, 0(zero)", {"priv": 0}, 13),
        ("s390x", "diag %r0,%r1,0x501", {"pswm": 0x0401000180000000}, 2),
        ("s390x", "lctlg %c1,%c1,0(%r15)", {"pswm": 0x0401000180000000}, 2),
    ],
)
def test_that_an_exception_comes_from_below_into_the_kernel(arch, insn, drop, vector):
    """A guest that was taken its privileges: its exception enters the kernel with the kernel's stack and rights."""
    insn = insn.replace("[xzr, #0]", "[x9]")
    vm = vm_of(arch, f'\t__asm__ volatile("{insn}");')
    space, vcpu = vm.machine.space, vm.vcpus[0]
    for _ in range(20):
        if insn.split()[0] != vcpu.insn.mnemonic.removeprefix("c."):
            assert vcpu.step() is None
    if "user" in vm.arch.mode.flags:
        for segment in vm.program.segments:
            space.builder.protect(segment.gva & -4096, -(-segment.memsz // 4096), user=True)
        space.builder.protect(vm.machine.stacks[0], 5, user=True)
        if arch == "riscv64":  # S-mode runs no code of U-mode's pages: its own lies elsewhere
            gpa = vm.gva2gpa(vm.gva_of("exception_vectors") & -4096)
            space.map(0x6000_0000, gpa, -(-vm.program.segments[0].memsz // 4096))
            vcpu.regs.stvec = 0x6000_0000 + vm.gva_of("exception_vectors") % 4096
            vcpu.regs.sstatus = 1 << 18  # SUM
    if arch == "arm64":
        vcpu.regs.x9, vcpu.regs.sp_el1 = 0x10, vm.machine.stacks[0] + 8192
    for name, value in drop.items():
        vcpu.regs[name] = value
    at = vcpu.pc
    assert vcpu.step() is None and vm.log.entries[-1].facts["vector"] == vector
    assert vm.log.entries[-1].facts["pc"] - at == (
        4 if "svc" in insn else 0
    )  # a call goes on behind itself
    assert vcpu.pc != at and not any(vcpu.regs[name] == value for name, value in drop.items())


def test_that_s390_says_where_a_suppressed_instruction_was_and_has_no_fault_of_the_hosts():
    """The old PSW names the next instruction then (Principles of Operation, figure 6-1), and TEID is what the guest's own faults left."""
    vms = [
        vm_of("s390x", '\t__asm__ volatile("lghi %%r4, 0\\n\\tdsgr %%r4, %%r4" : : : "r4", "r5");')
        for _ in range(2)
    ]
    counted, stepped = vms[0].vcpus[0].run(), None
    while stepped is None:
        stepped = vms[1].vcpus[0].step()
    assert counted.args == stepped.args and counted.args[:2] == (9, 0)
    assert all(
        "dsgr %r4, %r4" in vm.explain(uc) for vm, uc in zip(vms, (counted, stepped), strict=True)
    )
    assert vms[0].vcpus[0].source_line() is not None and counted.step == stepped.step


# --- what a guest's own debugger and lazy switching get

DEBUG_ARM64 = """
	write_sysreg(0, oslar_el1);
	write_sysreg(read_sysreg(mdscr_el1) | 1 << 15 | 1 << 13, mdscr_el1); /* MDE, KDE */
"""


@pytest.mark.parametrize("budget", [1, 1000, 100_000])
@pytest.mark.parametrize(
    ("body", "exception_class", "at"),
    [
        (
            "write_sysreg((uint64_t)&&here, dbgbvr0_el1);\n"
            "write_sysreg(0xf << 5 | 3 << 1 | 1, dbgbcr0_el1); isb();\n"
            '__asm__ volatile("msr daifclr, #8");\nout++;\nhere: out++;',
            0x31,
            None,
        ),
        (
            "write_sysreg(read_sysreg(mdscr_el1) | 1, mdscr_el1); isb();\n"
            '__asm__ volatile("mov x0, #0x145\\n\\torr x0, x0, #0x200000\\n\\tmsr spsr_el1, x0\\n\\t"\n'
            '"adr x0, 1f\\n\\tmsr elr_el1, x0\\n\\teret\\n1:\\tnop\\n\\tnop\\n\\tnop" : : : "x0");',
            0x33,
            None,
        ),
    ],
)
def test_that_arm64_breakpoints_and_software_steps_are_the_guests_own(
    body, exception_class, at, budget
):
    counts = set()
    for parts in (budget, 1_000_000):
        vcpu = vm_of("arm64", DEBUG_ARM64 + body).vcpus[0]
        came = vcpu.run(parts)
        while isinstance(came, BudgetExit):
            came = vcpu.run(parts)
        assert came.cmd == "UNHANDLED" and came.args[1] >> 26 == exception_class
        counts.add(vcpu.step_count)
    assert len(counts) == 1


@pytest.mark.parametrize(
    "insn",
    [
        "fcvt.d.l fa0, a0",
        "fld fa0, 0(sp)",
        "fadd.s fa0, fa1, fa2",
        "frcsr a0",
        "c.fldsp fa0, 0(sp)",
    ],
)
def test_that_riscv_floating_point_is_illegal_while_it_is_off(insn):
    body = (
        "csr_write(sstatus, csr_read(sstatus) & ~(3ul << 13));\n"
        f'__asm__ volatile(".option push\\n\\t.option arch, +d,+c\\n\\t{insn}\\n\\t.option pop" : : : "a0");'
    )
    assert fault(vm_of("riscv64", body))[0] == 2
