"""Unmodified KVM selftests of Linux 6.12 where KVM itself is the device under test.

Here the Python host plays that device. A local APIC, hypercall pages, a filter of MSR accesses,
memory that is private or shared: all of it out of exits.
"""

from __future__ import annotations

import struct

import pytest
from kernel_host import BUDGET, hole, run, synced

from labkit.arch.x86_cpu import CpuModel
from labkit.engines.exits import BudgetExit, DebugExit, HypercallExit, MmioExit, ShutdownExit

# To self, to other destinations, in all flavours.
ICR = (0x44000, 0x440FF, 0x4000, 0xFE000000000043FF, 0xC4000)
PAGE, MIB = 4096, 1 << 20
APIC = 0xFEE00000


def test_that_a_patched_hypercall_runs_as_what_it_now_is(host):
    vmcall, vmmcall = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
    vm = host.ready("fix_hypercall_test", "guest_main")
    vcpu = vm.vcpus[0]
    assert vcpu.run(BUDGET) == MmioExit(APIC + 0x20, 4, False, 0)
    exit = vcpu.run(BUDGET)
    gva = vm.gva_of("hypercall_insn")
    assert (exit.nr, exit.args[0]) == (11, 0)
    assert vm.read(gva, 3) == vmcall  # on what says it is an AMD
    vm.write(gva, vmmcall)  # what KVM's quirk does
    vcpu.complete(0)
    assert run(vcpu).cmd == "DONE"


def test_that_hypercall_pages_of_xen_and_hyperv_reach_the_host(host):
    region, back, invalid_alignment = 0xC0000000, 0xCAFEF00DFBFBFFFF, 4
    mov_eax, vmcall_ret = b"\xb8", b"\x0f\x01\xc1\xc3"
    vm = host("xen_vmcall_test")
    vm.cpu.msrs |= dict.fromkeys((0x40000200, 0x40000000, 0x40000001), 0)
    assert vm.machine.space.alloc(8192, "hypercalls", region, nx=False) == region
    stubs = [mov_eax + struct.pack("<I", nr) + vmcall_ret.ljust(27) for nr in range(128)]
    vm.write(region, b"".join(stubs) + vmcall_ret)

    vcpu = vm.vcpus[0]
    for _ in range(2):  # Xen's, by the page and by VMCALL
        exit = vcpu.run(BUDGET)
        args = [vcpu.regs[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9")]
        assert exit.nr == 17 and args == [0xDEADBEEF5A5A0000 + i for i in range(1, 7)]
        vcpu.complete(back)
    vcpu.run(BUDGET)  # Hyper-V's
    assert (vcpu.regs.rcx, vcpu.regs.rdx) == (0x5D, 0x5A5A5A5A)
    vcpu.complete(invalid_alignment)
    assert run(vcpu).cmd == "DONE" and vcpu.regs["msr_0x40000001"] == region + 4097


def test_that_a_hyperv_hypercall_gets_what_the_host_writes(host):
    vm = host("hyperv_extended_hypercalls")
    vm.cpu.msrs |= {0x40000000: 0, 0x40000001: 0}
    given, taken = vm.alloc(4096), vm.alloc(4096)
    vm.vcpus[0].args_set(vm.gva2gpa(given), vm.gva2gpa(taken), taken)
    exit = vm.vcpus[0].run(BUDGET)
    assert isinstance(exit, HypercallExit) and vm.vcpus[0].regs.rcx == 0x8001
    vm.memory.write(vm.vcpus[0].regs.r8, (0xB).to_bytes(8, "little"))
    vm.vcpus[0].complete(0)
    assert run(vm.vcpus[0]).cmd == "DONE"


def msr_exits(vm, functions, mine):
    """Run to the end with an MSR filter: yields what it stops, and each ucall.

    That is ("rdmsr" or "wrmsr", number, value), where `mine` says so. What is sent back answers a
    read; None leaves the instruction to the CPU.
    """
    vcpu = vm.vcpus[0]
    insns = [insn for name in functions for insn in vcpu.disassemble(name, 70)]
    vcpu.break_at(*(insn.gva for insn in insns if insn.mnemonic in ("rdmsr", "wrmsr")))
    kinds = {insn.gva: insn.mnemonic for insn in insns}
    while vcpu.state != "done":
        came = run(vcpu)
        if not isinstance(came, DebugExit):
            yield came.cmd, came.args[1], None
        elif mine(kinds[came.pc], vcpu.regs.rcx):
            answer = yield kinds[came.pc], vcpu.regs.rcx, vcpu.regs.rdx << 32 | vcpu.regs.rax
            if answer is not None:
                vcpu.regs.rax, vcpu.regs.rdx = answer & 0xFFFFFFFF, answer >> 32
                vcpu.regs.rip += 2


def filtered(vm, functions, mine, answers):
    """The exits of a filter whose answers come from a function of (kind, number, value)."""
    exits, seen = msr_exits(vm, functions, mine), []
    try:
        came = next(exits)
        while True:
            seen.append(came[:2])
            came = exits.send(answers(*came))
    except StopIteration:
        return seen


def test_that_a_host_can_take_msrs_the_cpu_lacks(host):
    made_up = 0x474F4F00
    kept = {}
    vm = host("userspace_msr_exit_test", "guest_code_filter_allow")
    vm.install_exception_handler(13, "guest_gp_handler")

    def answers(kind, index, value):
        """None: the CPU raises its own #GP."""
        if kind == "wrmsr":
            good = index == made_up or value == {0xDA0: 0, 0x10B: 1}[index]
            return kept.setdefault(index, value) if good else None
        return {0xDA0: 0, made_up: kept.get(made_up)}.get(index)

    seen = filtered(vm, ("test_rdmsr", "test_wrmsr"), lambda kind, index: True, answers)
    assert seen == [
        ("rdmsr", 0xDA0),
        ("wrmsr", 0xDA0),
        ("wrmsr", 0xDA0),
        ("rdmsr", 0x10B),
        ("wrmsr", 0x10B),
        ("wrmsr", 0x10B),
        ("wrmsr", made_up),
        ("rdmsr", made_up),
        ("DONE", 0),
    ]


def test_that_an_msr_filter_can_be_switched_off(host):
    denied = {("wrmsr", 0x1FC), ("rdmsr", 0xC0000084), ("rdmsr", 0xC0000101)}
    vm = host("userspace_msr_exit_test", "guest_code_filter_deny")
    vm.cpu.msrs[0x1FC] = 0

    def is_denied(kind, index):
        return index == 0xDEADBEEF or (kind, index) in denied

    def answers(kind, index, value):
        if kind == "SYNC":
            denied.clear()
        return index

    seen = filtered(vm, ("guest_msr_calls",), is_denied, answers)
    kinds = [kind for kind, _ in seen]
    assert [kinds.count(kind) for kind in ("rdmsr", "wrmsr", "DONE")] == [4, 3, 1]


def test_that_a_filter_of_reads_changes_between_two_ucalls(host):
    vm = host("userspace_msr_exit_test", "guest_code_permission_bitmap")
    mine = {0xC0000100}

    def answers(kind, index, value):
        if kind == "SYNC":
            mine.symmetric_difference_update({0xC0000100, 0xC0000101})
        return index

    seen = filtered(vm, ("test_rdmsr",), lambda kind, index: index in mine, answers)
    assert seen == [("rdmsr", 0xC0000100), ("SYNC", 0), ("rdmsr", 0xC0000101), ("DONE", 0)]


def test_that_an_apic_timer_of_the_hosts_keeps_time(host):
    bus_mhz = 25
    tmict, tmcct, tdcr = 0x380, 0x390, 0x3E0
    vm = host("apic_bus_clock_test", "apic_guest_code", cpu=CpuModel(tsc_khz=1000))
    hole(vm, APIC)
    vcpu = vm.vcpus[0]
    vcpu.args_set(bus_mhz * 1_000_000, 10)
    regs, start = {}, 0
    while isinstance(exit := vcpu.run(), MmioExit):
        at = exit.gpa - APIC
        if exit.is_write:
            regs[at] = exit.data
            if at == tmict:
                start = vcpu.regs["msr_0x10"]
        elif at == tmcct:
            shift = (regs[tdcr] & 3 | regs[tdcr] >> 1 & 4) + 1 & 7
            ticks = (vcpu.regs["msr_0x10"] - start) * bus_mhz
            vcpu.complete(regs[tmict] - (ticks >> shift))
        else:
            vcpu.complete(regs.get(at, 0))
    assert exit.cmd == "DONE", exit


@pytest.mark.parametrize("icr", ICR)
def test_that_an_xapics_registers_are_the_hosts(host, icr):
    vcpu = host.ready("xapic_state_test", "xapic_guest_code").vcpus[0]
    regs = {0x200: icr & 0xFFFFFFFF, 0x210: icr >> 32}
    while isinstance(exit := vcpu.run(BUDGET), MmioExit):
        if exit.is_write:
            regs[exit.gpa - APIC] = exit.data
        else:
            vcpu.complete(regs.get(exit.gpa - APIC, 0))
    assert (exit.cmd, exit.args[1], regs[0x300] | regs[0x310] << 32) == ("SYNC", icr, icr)


def test_that_a_region_that_comes_and_goes_is_mmio_in_between(host):
    gva, value = 0xC0000000, 0xBEEF
    vm = host("set_memory_region_test", "guest_code_delete_memory_region")
    vm.machine.space.map(gva, vm.gva2gpa(vm.alloc(4096)))
    vcpu = vm.vcpus[0]
    synced(vcpu, 0)
    assert isinstance(vcpu.run(10_000), BudgetExit)
    for hole_gpa in (gva, gva + 0x10000):
        vm.machine.space.builder.unmap(gva)
        hole(vm, hole_gpa, gva)
        assert vcpu.run(BUDGET) == MmioExit(hole_gpa, 8, False, 0)
        vcpu.complete(value)
        synced(vcpu, 0)
        if hole_gpa == gva:
            slot = vm.memory.add(gva, 0x10000)  # the guest has seen the hole; now there is memory
            vm.machine.engine.add_memslot(slot.gpa, slot.hva, slot.size)
            synced(vcpu, 0)
    vcpu.regs.cr3 = 0x20000000  # instead of deleting the memslot that holds the page tables
    assert isinstance(vcpu.run(BUDGET), ShutdownExit)


@pytest.mark.slow
def test_that_private_and_shared_pages_are_two_memories(host):
    vm = host("private_mem_conversions_test", memory=16 * MIB)
    vcpu = vm.vcpus[0]
    vcpu.args_set(vm.alloc(2 * MIB + PAGE, 4 << 30))
    hidden = {True: {}, False: {}}  # the pages that the guest does not see now: private, shared
    private = set()
    while getattr(came := vcpu.run(), "cmd", "") != "DONE":
        if isinstance(came, HypercallExit):
            gpa, nr_pages, flags = came.args[:3]
            for page in range(gpa, gpa + nr_pages * PAGE, PAGE):
                convert(vm, hidden, private, page, flags)
            vcpu.complete(0)
            continue
        assert came.cmd == "SYNC", came
        kind, gpa, size, wanted, new = came.args[:5]
        for page in range(gpa, gpa + size, PAGE):
            seen = hidden[False][page] if page in private else vm.read(page, PAGE)
            assert seen == bytes([wanted]) * PAGE
            if kind == 0:  # SYNC_SHARED
                vm.write(page, bytes([new]) * PAGE)


def convert(vm, hidden, private, page, flags):
    """KVM_HC_MAP_GPA_RANGE on one page: flags are set attributes, shared, fallocate."""
    was_private, shared = page in private, flags >> 1 & 1
    if shared and flags & 4:  # PUNCH_HOLE
        hidden[True].pop(page, None)
        if was_private:
            vm.write(page, bytes(PAGE))
    if flags & 1 and shared == was_private:
        hidden[was_private][page] = vm.read(page, PAGE)
        vm.write(page, hidden[not was_private].pop(page, bytes(PAGE)))
        private.symmetric_difference_update({page})
