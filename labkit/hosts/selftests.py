"""The guest functions of Linux 6.12's KVM selftests that labkit can host, and what the host half of each does."""

from __future__ import annotations

import struct
from typing import Any

from labkit.engines.base import Exit, HypercallExit, MmioExit, PioExit
from labkit.hosts.hosting import Hosted, clear_cpuid, hole

__all__ = ["HOSTED"]

PAGE, MIB, APIC = 4096, 1 << 20, 0xFEE00000
STEAL_TIME, PERF_CAPABILITIES, PLATFORM_INFO = 0x4B564D03, 0x345, 0xCE
UNITY = 1 << 30  # of tsc_msrs_test


def _msrs(*indices: int, value: int = 0) -> Any:
    return lambda vm: vm.cpu.msrs.update(dict.fromkeys(indices, value))


def _set(**regs: Any) -> Any:
    """Registers of the vCPU: a number, or a function of what it was."""

    def act(vcpu: Any) -> None:
        for name, value in regs.items():
            vcpu.regs[name] = value(vcpu.regs[name]) if callable(value) else value

    return act


def _cpuid_rows(vm: Any) -> None:
    """struct kvm_cpuid2 of the VM's own table."""
    rows = b"".join(
        struct.pack("<10I", *key, 0, *regs, 0, 0, 0) for key, regs in vm.cpu.cpuid.items()
    )
    vm.write(gva := vm.alloc(8 + len(rows)), struct.pack("<2I", len(vm.cpu.cpuid), 0) + rows)
    vm.vcpus[0].args_set(gva)


def _no_counters(vm: Any) -> None:
    a, b, c, d = vm.cpu.cpuid[1, 0]
    vm.cpu.cpuid[1, 0] = a, b, c | 1 << 15, d  # PDCM
    vm.cpu.msrs[PERF_CAPABILITIES] = (
        1 << 13
    )  # FW_WRITES: the guest leaves the P6 counters out, whose writes KVM drops


def _perf_capabilities(vm: Any) -> None:
    vm.cpu.msrs[PERF_CAPABILITIES], vm.cpu.read_only_msrs = (
        0x32C4,
        vm.cpu.read_only_msrs | {PERF_CAPABILITIES},
    )
    vm.vcpus[0].args_set(0x32C4)


def _monitor(case: int) -> Any:
    """KVM's quirk (never #UD) is a CPU that announces MONITOR."""

    def act(vcpu: Any) -> None:
        a, b, c, d = vcpu.vm.cpu.cpuid[1, 0]
        vcpu.vm.cpu.cpuid[1, 0] = a, b, c & ~8 if case & 5 == 5 else c | 8, d

    return act


def _sev(vm: Any) -> None:
    vm.cpu.cpuid[0x80000000, 0] = (0x8000001F, *vm.cpu.cpuid[0x80000000, 0][1:])
    vm.cpu.cpuid[0x8000001F, 0], vm.cpu.msrs[0xC0010131] = (0b1010, 0, 0, 0), 1


def _reserved_bit(vm: Any) -> None:
    """Map a page, then set the lowest frame bit that the CPU does not have."""
    vm.machine.space.map(gva := 0x123456789000, vm.gva2gpa(vm.alloc(PAGE)))
    entry = vm.page_table().walk(gva).steps[-1]
    vm.memory.write(
        entry.entry_gpa,
        (entry.entry | 1 << (vm.cpu.leaf(0x80000008, 0)[0] & 0xFF)).to_bytes(8, "little"),
    )
    vm.vcpus[0].args_set(False)


def _clock(time: int) -> Any:
    """struct pvclock_vcpu_time_info of a 1 GHz clock that stands at `time` now, in nanoseconds."""

    def act(vcpu: Any) -> None:
        vcpu.vm.write(
            vcpu.vm.clock_gva,
            struct.pack("<IIQQIbBxx", 2, 0, vcpu.regs["msr_0x10"], time, 1 << 31, 1, 0),
        )

    return act


def _allocate(vm: Any, size: int, gva: int, nx: bool = True) -> int:
    vm.machine.space.alloc(size, "test", gva, nx=nx)
    return gva


def _ring(vm: Any) -> None:
    hole(vm, mmio := 4 << 30)
    vm.write_guest_global(
        "kvm_builtin_io_ring", struct.pack("<QI4xQQB7x", 0, 170, mmio, mmio, 0x80)
    )
    vm.vcpus[0].args_set(vm.program.symbol("kvm_builtin_io_ring").gva)


def _dirty_log(vm: Any) -> None:
    for name, value in (
        ("guest_page_size", PAGE),
        ("host_page_size", PAGE),
        ("guest_num_pages", 2048),
        ("iteration", 1),
        ("guest_rng", bytes([7, 0, 0, 0])),
    ):
        vm.write_guest_global(name, value)
    _allocate(vm, 2048 * PAGE, 0xC0000000)


def _memstress(vm: Any) -> None:
    gva, base, nr_pages = vm.gva_of("memstress_args"), 0xC0000000, 128
    _allocate(vm, len(vm.vcpus) * nr_pages * PAGE, base)
    rows = b"".join(
        struct.pack("<4Qi4x", 0, base + i * nr_pages * PAGE, nr_pages, 0, i)
        for i in range(len(vm.vcpus))
    )
    vm.write(gva, struct.pack("<4Q2I3?", 0, base, 0, PAGE, 1234, 30, False, True, False))
    vm.write(gva + 2096, rows)
    vm.write_guest_global("guest_random_seed", 1234)


def _parts(vm: Any) -> None:
    """A part of memory for each vCPU: start, end, stride."""
    gva, size = _allocate(vm, len(vm.vcpus) * 64 * PAGE, 1 << 32), 64 * PAGE
    for vcpu in vm.vcpus:
        vcpu.args_set(gva + vcpu.index * size, gva + (vcpu.index + 1) * size, PAGE)


def _steal_time(vm: Any) -> None:
    vm.cpu.msrs[STEAL_TIME] = 0
    base = vm.alloc(256, 1 << 30)
    vm.write_guest_global("st_gva", struct.pack("<4Q", *range(base, base + 256, 64)))
    for vcpu in vm.vcpus:
        vcpu.args_set(vcpu.index)
        vcpu.regs[f"msr_{STEAL_TIME:#x}"] = base + 64 * vcpu.index | 1


def _stolen(time: int, version: int) -> Any:
    return lambda vcpu: vcpu.vm.write(
        (1 << 30) + 64 * vcpu.index, struct.pack("<QI", time, version)
    )


def _stuff(vcpu: Any, exit: Exit, ram: dict[int, int]) -> None:
    """userspace_io_test: 0xAA for every byte, and RCX changed once, behind the first byte of two and of three."""
    if isinstance(exit, PioExit):
        vcpu.complete(0xAA)
        vcpu.regs.rcx = (
            ram.setdefault(rcx, {1: 0, 2: 8191}.get(rcx, rcx))
            if (rcx := vcpu.regs.rcx) not in ram
            else rcx
        )


def _float(vcpu: Any, exit: Exit, ram: dict[int, int]) -> None:
    """exit_on_emulation_failure_test: 1.0 for FLD where it is emulated, else step over it."""
    if isinstance(exit, MmioExit):
        vcpu.complete(0x3F800000)
    else:
        vcpu.regs.rip += 2


def _patch(vcpu: Any, exit: Exit, ram: dict[int, int]) -> None:
    """fix_hypercall_test: what KVM's quirk does, VMMCALL for VMCALL."""
    if isinstance(exit, HypercallExit):
        vcpu.vm.write(vcpu.vm.gva_of("hypercall_insn"), b"\x0f\x01\xd9")
    if isinstance(exit, HypercallExit) or (isinstance(exit, MmioExit) and not exit.is_write):
        vcpu.complete(0)


def _state(vm: Any) -> None:
    clear_cpuid(vm, 1, 2, 26)  # XSAVE: that part of the guest uses AVX
    vm.vcpus[0].args_set(0)


def _xapic(vm: Any) -> None:
    hole(vm, APIC)


def _self_patching(vm: Any) -> None:
    _xapic(vm)
    vm.vcpus[0].regs.cr0 &= ~(
        1 << 16
    )  # WP: the guest writes to its code, which the kernel's own page tables allow
    vm.install_exception_handler(6, "guest_ud_handler")


def _kvm_clock(vm: Any) -> None:
    vm.clock_gva, vm.cpu.msrs[0x4B564D01] = vm.alloc(32), 0
    vm.vcpus[0].args_set(vm.gva2gpa(vm.clock_gva), vm.clock_gva)
    _clock(0)(vm.vcpus[0])


def _code(vm: Any) -> None:
    vm.write(_allocate(vm, 6 * MIB, 4 << 30, nx=False), b"\xc3" * (6 * MIB))  # RET


HOSTED = (
    Hosted(
        "guest_print_test",
        before=lambda vm: vm.write_guest_global("vals", struct.pack("<3Q", 7, 7, 0)),
        says=("PRINTF", "DONE"),
    ),
    Hosted("guest_print_test", "guest_code_limits", says=("ABORT",)),
    Hosted("xcr0_cpuid_test"),
    Hosted("vmx_pmu_caps_test", before=_perf_capabilities),
    Hosted(
        "cr4_cpuid_sync_test", says=(0, "DONE"), then={0: _set(cr4=lambda cr4: cr4 & ~(1 << 18))}
    ),
    Hosted("cpuid_test", "guest_main", before=_cpuid_rows, says=(1, 2, "DONE"), needs=("cpuid",)),
    *(
        Hosted("pmu_counters_test", f"guest_test_{kind}_counters", before=_no_counters)
        for kind in ("gp", "fixed")
    ),
    Hosted(
        "kvm_pv_test",
        "guest_main",
        says=(*["0xdeadbeef?"] * 10, *["0xdeadc0de?"] * 3, "DONE"),
        needs=("msr_table",),
    ),
    Hosted(
        "platform_info_test",
        before=_msrs(PLATFORM_INFO, value=0xFF00),
        says=(1, 0, "DONE"),
        then={1: lambda vcpu: vcpu.vm.cpu.msrs.pop(PLATFORM_INFO)},
        needs=("msr_table",),
    ),
    Hosted(
        "monitor_mwait_test",
        says=(cases := (4, 5, 6, 2, 7, 3)) + ("DONE",),
        then={i: _monitor(case) for i, case in enumerate(cases)},
    ),
    Hosted(
        "tsc_msrs_test",
        says=(2, 3, 4, 5, "DONE"),
        then={1: _set(msr_0x10=72 * UNITY), 2: _set(msr_0x3b=8 * UNITY)},
        needs=("deterministic",),
    ),
    Hosted(
        "system_counter_offset_test",
        "guest_main",
        says=(0, 1, 2),
        then={0: _set(tsc_offset=180 * 10**9), 1: _set(tsc_offset=-180 * 10**9)},
        needs=("tsc",),
    ),
    Hosted(
        "kvm_clock_test",
        "guest_main",
        before=_kvm_clock,
        says=(0, 1, 2, 3),
        then={i: _clock(10**9 * i) for i in range(3)},
    ),
    Hosted("userspace_io_test", answer=_stuff),
    Hosted("coalesced_io_test", before=_ring, says=(0, 0, 0)),
    Hosted(
        "exit_on_emulation_failure_test", before=lambda vm: hole(vm, 0x700000000), answer=_float
    ),
    Hosted("smaller_maxphyaddr_emulation_test", before=_reserved_bit),
    Hosted("sync_regs_test", says=("bad-ucall",) * 10),
    Hosted("state_test", before=_state, says=(1, 2, "DONE")),
    Hosted("sev_smoke_test", "guest_sev_code", before=_sev),
    Hosted("sev_smoke_test", "guest_shutdown_code", says=("shutdown",)),
    Hosted("xapic_state_test", "xapic_guest_code", before=_xapic, says=(0,)),
    Hosted(
        "xapic_state_test", "x2apic_guest_code", before=_msrs(0x80F, 0x820, 0x821, 0x830), says=(0,)
    ),
    Hosted(
        "fix_hypercall_test",
        "guest_main",
        before=_self_patching,
        answer=_patch,
        needs=("hypercalls",),
    ),
    Hosted(
        "pre_fault_memory_test",
        before=lambda vm: vm.vcpus[0].args_set(vm.alloc(2 * MIB + PAGE, 1 << 38)),
        create={"memory": 16 * MIB},
    ),
    Hosted(
        "nx_huge_pages_test", before=_code, says=(1, 2, 3, 4, 5, 6), create={"memory": 16 * MIB}
    ),
    Hosted("dirty_log_test", before=_dirty_log, says=(1, 1), create={"memory": 24 * MIB}),
    *(
        Hosted(name, "memstress_guest_code", before=_memstress, says=(1,), create={"nr_vcpus": 3})
        for name in (
            "demand_paging_test",
            "dirty_log_perf_test",
            "access_tracking_perf_test",
            "memslot_modification_stress_test",
        )
    ),
    Hosted("max_guest_memory_test", before=_parts, says=(0, 0), create={"nr_vcpus": 4}),
    Hosted(
        "steal_time",
        before=_steal_time,
        says=(0, 1, "DONE"),
        then={0: _stolen(1000, 2), 1: _stolen(5000, 4)},
        create={"nr_vcpus": 4},
    ),
    Hosted("set_boot_cpu_id", "guest_bsp_vcpu", says=(1, "DONE")),
    Hosted("rseq_test", says=(0,) * 100),
)
"""One row a guest function; what is not here needs a device, a filter or nested virtualization that one loop cannot play."""
