"""Unmodified KVM selftests of Linux 6.12 as guests, and the kernel's own code the judge.

Each test is the host half of a C test's main(). What GUEST_ASSERT finds wrong ends a run; what the
C host asserts about SYNC values, exits and registers is asserted here.
"""

from __future__ import annotations

import struct

import pytest
from kernel_host import BUDGET, MASK64, run, synced, value_at

import labkit as lk
from labkit.engines.exits import (
    DebugExit,
    HypercallExit,
    MmioExit,
    PioExit,
    ShutdownExit,
    SystemEventExit,
)
from labkit.errors import GuestAssertFailed, InvalidState

# To self, to other destinations, in all flavours.
ICR = (0x44000, 0x440FF, 0x4000, 0xFE000000000043FF, 0xC4000)
BIG, BIG32 = 0x1234567890ABCDEF, 0x90ABCDEF
PRINTED = [  # guest_print_test: type, how Python writes such a value, pairs of values
    (0, "{:d}", [(-1, -1), (-1, 1), (BIG, BIG), (BIG, BIG - 1)]),
    (1, "{:d}", [(BIG, BIG), (BIG, BIG - 1)]),
    (2, "0x{:x}", [(BIG, BIG), (BIG, BIG - 1)]),
    (3, "0x{:X}", [(BIG, BIG), (BIG, BIG - 1)]),
    (4, "{:d}", [(BIG32, BIG32), (BIG32, BIG32 - 1)]),
    (5, "0x{:x}", [(BIG32, BIG32), (BIG32, BIG32 - 1)]),
    (6, "0x{:X}", [(BIG32, BIG32), (BIG32, BIG32 - 1)]),
    (7, "{:d}", [(-1, -1), (-1, 1), (1, 1)]),
    (8, "{:c}", [(97, 97), (97, 65), (97, 98)]),
    (9, "'{}'", [("foo", "foo"), ("foo", "bar")]),
    (10, "{:#x}", [(BIG, BIG), (BIG, BIG - 1)]),
]


def number(vm, value):
    """A value as the C test hands it over: a string by the address of its literal in the binary."""
    if isinstance(value, int):
        return value & MASK64
    literal = b"\0" + value.encode() + b"\0"
    segment = next(segment for segment in vm.program.segments if literal in segment.data)
    return segment.gva + segment.data.index(literal) + 1


def test_that_every_string_of_guest_print_test_is_as_python_formats_it(host):
    check_prints(host("guest_print_test"))


def test_that_it_is_so_on_every_architecture(cross_selftests):
    program = lk.Program.load(cross_selftests / "guest_print_test")
    code = next(
        symbol
        for symbol in program.all_symbols
        if symbol.name == "guest_code"  # of two static functions of that name
        and program.line_at(symbol.gva).file.endswith("guest_print_test.c")
    )
    with lk.Vm.create(program) as vm:
        vm.vcpus[0].set_entry(code.gva)
        check_prints(vm)


def check_prints(vm):
    order = {"little": "<", "big": ">"}[vm.program.byteorder]
    for kind, form, pairs in PRINTED:
        for a, b in pairs:
            vm.host_globals["vals"] = struct.pack(f"{order}3Q", number(vm, a), number(vm, b), kind)
            vm.sync_global_to_guest("vals")
            shown, other = form.format(a), form.format(b)
            uc = run(vm.vcpus[0])
            assert (uc.cmd, uc.text) == ("PRINTF", f"Got params a = {shown} and b = {other}")
            if a != b:
                uc = vm.vcpus[0].run(BUDGET)
                assert (uc.cmd, uc.text, uc.expr) == (
                    "ABORT",
                    f"Expected {shown}, got {other} instead",
                    "vals.a == vals.b",
                )
                assert uc.file == "guest_print_test.c" and uc.line > 0
            assert run(vm.vcpus[0]).cmd == "DONE"


def test_that_a_text_longer_than_the_buffer_is_asserted_against(host):
    with pytest.raises(GuestAssertFailed, match="str < end") as failed:
        host("guest_print_test", "guest_code_limits").vcpus[0].run_until_done(BUDGET)
    assert failed.value.file == "lib/guest_sprintf.c"


@pytest.mark.parametrize("name, faults", [("xcr0_cpuid_test", 62), ("vmx_pmu_caps_test", 66)])
def test_that_each_bad_write_faults_in_the_guests_own_handler(host, name, faults):
    vm = host.ready(name)
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ["DONE"]
    assert sum(vm.events.what.str.startswith("vector 0xd")) == faults


def test_that_msrs_and_hypercalls_that_are_not_there_fault_or_say_so(host):
    vm = host("kvm_pv_test", "guest_main")
    came = list(vm.stream(BUDGET))
    assert came[-1].cmd == "DONE" and sum(vm.events.kind == "exception") == 20
    calls = [exit for exit in came if isinstance(exit, HypercallExit)]
    ucalls = [uc for uc in came if not isinstance(uc, HypercallExit)]
    said = [value_at(vm, uc.args[0], 4) for uc in ucalls if uc.cmd == "0xdeadbeef?"]
    numbers = [0x12, 0x4B564D01, 0x11, 0x4B564D00]  # asm/kvm_para.h
    assert said == numbers + [0x4B564D00 + i for i in (2, 3, 4, 5, 6, 7)]
    assert [exit.nr for exit in calls] == [5, 10, 11]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize(
    "index, writable",
    [
        (0x40000000, True),
        (0x40000001, True),
        (0x40000010, False),
        (0x40000020, False),
        (0x40000002, False),
        (0x40000003, True),
        (0x40000021, True),
        (0x40000084, True),
    ],
)
def test_that_hyperv_msrs_are_there_when_the_table_has_them(host, index, writable, present):
    vm = host("hyperv_features", "guest_msr")
    if present:
        vm.cpu.msrs[index] = 0
        if not writable:
            vm.cpu.read_only_msrs |= {index}
    for write in (False, True):
        faults = not present or (write and not writable)
        gva = vm.alloc(16)
        vm.write(gva, struct.pack("<I??xxQ", index, faults, write, 0))
        vm.vcpus[0].set_entry("guest_msr")
        vm.vcpus[0].args_set(gva)
        assert run(vm.vcpus[0]).cmd == "DONE"


def test_that_tsc_and_tsc_adjust_move_as_guest_and_host_write_them(host):
    vcpu = host("tsc_msrs_test").vcpus[0]
    unity = 1 << 30
    adjust, step = 64 * unity, 4 * unity

    def rounded(value):
        return (value + unity // 2) // unity * unity

    def both():
        return rounded(vcpu.regs["msr_0x10"]), rounded(vcpu.regs["msr_0x3b"])

    assert both() == (0, 0)
    synced(vcpu, 2)
    assert both() == (step, step)
    synced(vcpu, 3)
    vcpu.regs["msr_0x10"] = adjust + 2 * step
    assert both() == (adjust + 2 * step, 2 * step)
    synced(vcpu, 4)
    vcpu.regs["msr_0x3b"] = unity * 123456
    assert both() == (adjust + 2 * step, unity * 123456)
    vcpu.regs["msr_0x3b"] = 2 * step
    synced(vcpu, 5)
    assert both() == (adjust + 3 * step, 3 * step)
    assert run(vcpu).cmd == "DONE" and both() == (4 * step, 4 * step - adjust & MASK64)


@pytest.mark.parametrize("name", ["msr_0x12345", "msr_", "msr_tsc"])
def test_that_an_msr_that_is_not_there_is_refused(host, name):
    regs = host("tsc_msrs_test").vcpus[0].regs
    with pytest.raises(InvalidState, match="has no MSR"):
        regs[name]
    with pytest.raises(InvalidState, match="has no MSR"):
        regs[name] = 1


def test_that_the_tsc_is_offset_as_told(host):
    vcpu = host("system_counter_offset_test", "guest_main").vcpus[0]
    for stage, offset in enumerate((0, 180 * 10**9, -180 * 10**9)):
        vcpu.regs["tsc_offset"] = offset
        start = vcpu.regs["msr_0x10"]
        assert 0 < synced(vcpu, stage).args[2] - start <= vcpu.regs["msr_0x10"] - start < 1000


def test_that_the_clock_page_gives_nanoseconds(host):
    vm = host("kvm_clock_test", "guest_main")
    vcpu, gva = vm.vcpus[0], vm.alloc(32)
    vm.cpu.msrs[0x4B564D01] = 0
    vcpu.args_set(vm.gva2gpa(gva), gva)
    for stage, base in enumerate((0, 180 * 10**9, 17, 10**18)):
        tsc = vcpu.regs["msr_0x10"]
        vm.write(gva, struct.pack("<IIQQIbBxx", 2, 0, tsc, base, 1 << 31, 1, 0))  # 1 GHz
        assert base < synced(vcpu, stage).args[2] <= base + vcpu.regs["msr_0x10"] - tsc
    assert vcpu.regs["msr_0x4b564d01"] == vm.gva2gpa(gva) | 1


def test_that_every_io_write_leaves_in_order(host):
    ring_size, mmio, port = 170, 4 << 30, 0x80
    vcpu = host.ready("coalesced_io_test").vcpus[0]

    def write_to_port(i):
        return PioExit(port, 4, True, port + i)

    def write_to_page(i):
        return MmioExit(mmio, 8, True, mmio + i)

    last = ring_size - 1
    ring = [write_to_port(i) if i & 1 else write_to_page(i) for i in range(last)]
    for turn in range(3):
        wanted = [*ring, write_to_page(last), *ring, write_to_port(last)]
        if turn > 0:
            wanted = [write_to_page(last), write_to_port(last), *wanted]
        assert [vcpu.run(BUDGET) for _ in wanted] == wanted
        synced(vcpu, 0)


@pytest.mark.parametrize("skip", [False, True])
def test_that_an_x87_load_from_mmio_is_carried_out_or_skipped(host, skip):
    vm = host.ready("exit_on_emulation_failure_test")
    assert vm.vcpus[0].run(BUDGET) == MmioExit(0x700000000, 4, False, 0)
    if skip:  # as the C host does after KVM's emulation failure
        vm.vcpus[0].regs.rip += 2
    else:
        vm.vcpus[0].complete(0x3F800000)
    assert run(vm.vcpus[0]).cmd == "DONE"


def test_that_a_physical_address_beyond_maxphyaddr_is_a_reserved_bit(host):
    vm = host.ready("smaller_maxphyaddr_emulation_test")
    assert run(vm.vcpus[0]).cmd == "DONE" and "error 0x9" in vm.events.what[0]


def test_that_breakpoints_and_single_steps_stop_where_debug_regs_wants_them(host):
    vm = host("debug_regs")
    vm.cpu.msrs |= dict.fromkeys((0x80F, 0x830, 0x6E0), 0)  # x2APIC SVR and ICR, IA32_TSC_DEADLINE
    vcpu = vm.vcpus[0]
    names = ("sw_bp", "hw_bp", "write_data", "ss_start", "bd_start")
    gva = {name: vm.gva_of(name) for name in names}
    vcpu.break_at(*names)
    assert vcpu.run(BUDGET) == DebugExit(gva["sw_bp"])
    vcpu.regs.rip += 1
    assert vcpu.pc == gva["hw_bp"]
    assert vcpu.run(BUDGET) == DebugExit(gva["write_data"])  # a run goes on from a breakpoint
    assert value_at(vm, vm.gva_of("guest_value"), 4) == 1234
    assert gva["ss_start"] == gva["write_data"]
    for size in (1, 2, 2, 5, 2, 1):  # sti xor cpuid mov wrmsr cli
        before = vcpu.pc
        assert vcpu.step() is None and vcpu.pc == before + size
    assert vcpu.pc == gva["bd_start"] and run(vcpu).cmd == "DONE"


def test_that_a_ucall_of_a_foreign_address_is_reported_and_registers_are_the_hosts(host):
    vcpu = host("sync_regs_test").vcpus[0]
    assert vcpu.run(BUDGET).kind == "foreign"
    vcpu.regs.rbx = 0xBAD1DEA
    for i in range(1, 10):
        assert vcpu.run(BUDGET).kind == "foreign" and vcpu.regs.rbx == 0xBAD1DEA + i


def test_that_state_moves_to_another_vm_at_every_stage(host):
    vm = host.ready("state_test")
    for stage in (1, 2):
        synced(vm.vcpus[0], stage)
        before, vm = vm, host.keep(vm.fork())
        assert vm.vcpus[0].regs.all() == before.vcpus[0].regs.all()
    assert run(vm.vcpus[0]).cmd == "DONE"


def test_that_a_guest_with_sev_bits_runs_as_one_without_encryption(host):
    vm = host.ready("sev_smoke_test", "guest_sev_code")
    vm.cpu.msrs[0xC0010130] = 0
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ["DONE"]
    vm.cpu.msrs[0xC0010131] = 3
    vm.vcpus[0].set_entry("guest_sev_es_code")
    exit = vm.vcpus[0].run(BUDGET)
    assert isinstance(exit, HypercallExit)  # VMGEXIT is VMMCALL outside SEV-ES (APM vol. 3)
    assert vm.vcpus[0].regs["msr_0xc0010130"] == 0x100  # GHCB_MSR_TERM_REQ


def test_that_the_kernels_sev_guest_is_done_under_sev(host):
    vm = host("sev_smoke_test", "guest_sev_code", protect="sev")
    assert [uc.cmd for uc in vm.run_until_done(BUDGET)] == ["DONE"]


@pytest.mark.parametrize("policy", [4, 5])  # ES; ES and NODBG, as the C test has them
@pytest.mark.parametrize("protect", ["sev-es", "snp"])
def test_that_the_kernels_sev_es_guest_terminates(host, protect, policy):
    options = {"protect": protect}
    if protect == "sev-es":
        options["policy"] = policy
    vcpu = host("sev_smoke_test", "guest_sev_es_code", **options).vcpus[0]
    exit = vcpu.run(BUDGET)
    assert (type(exit), exit.type, exit.data) == (SystemEventExit, 6, (0x100,))
    assert vcpu.state == "terminated"


@pytest.mark.parametrize("protect", ["sev", "sev-es", "snp"])
def test_that_the_kernels_shutdown_guest_shuts_down_encrypted_too(host, protect):
    exit = host("sev_smoke_test", "guest_shutdown_code", protect=protect).vcpus[0].run(BUDGET)
    assert isinstance(exit, ShutdownExit) and exit.vectors[0] == 6


def test_that_a_ucall_by_port_is_one_vc_after_the_other_under_sev_es(host):
    # The kernel's library has no GHCB: its assertions and its ucalls only make more #VC.
    exit = host("sev_smoke_test", "guest_sev_code", protect="sev-es").vcpus[0].run(BUDGET)
    assert isinstance(exit, ShutdownExit)


def test_that_a_sev_guest_without_sev_says_what_it_misses(host):
    with pytest.raises(GuestAssertFailed, match="this_cpu_has\\(X86_FEATURE_SEV\\)") as failed:
        host("sev_smoke_test", "guest_sev_code").run_until_done(BUDGET)
    assert len(failed.value.expr) > 512 and failed.value.file == "x86_64/sev_smoke_test.c"


def test_that_a_guest_without_idt_shuts_down(host):
    exit = host("sev_smoke_test", "guest_shutdown_code").vcpus[0].run(BUDGET)
    assert isinstance(exit, ShutdownExit) and exit.vectors[0] == 6


@pytest.mark.parametrize("icr", ICR)
def test_that_x2apic_registers_are_msrs(host, icr):
    vm = host.ready("xapic_state_test", "x2apic_guest_code")
    regs = vm.vcpus[0].regs
    regs["msr_0x820"], regs["msr_0x821"] = icr & 0xFFFFFFFF, icr >> 32
    synced(vm.vcpus[0], icr)
    assert regs["msr_0x830"] == icr
