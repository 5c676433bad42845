"""The guest functions of Linux 6.12's KVM selftests that labkit can host, a row each.

What is not here needs a device, a filter or nested virtualization that one loop cannot play.
"""

from __future__ import annotations

import struct

from labkit.hosts.halves import cpu, devices, memory
from labkit.hosts.hosting import Hosted

__all__ = ["HOSTED"]

MIB = 1 << 20
SECOND = 10**9  # in ns

PLATFORM_INFO = 0xCE
UNITY = 1 << 30  # of tsc_msrs_test

# The cases of monitor_mwait_test in its order, each a GUEST_SYNC.
MONITOR_CASES = (4, 5, 6, 2, 7, 3)

# Selftests whose guest is the library's memstress_guest_code().
MEMSTRESS = (
    "demand_paging_test",
    "dirty_log_perf_test",
    "access_tracking_perf_test",
    "memslot_modification_stress_test",
)

HOSTED = (
    # --- the guest library
    Hosted(
        "guest_print_test",
        before=lambda vm: vm.write_guest_global("vals", struct.pack("<3Q", 7, 7, 0)),
        says=("PRINTF", "DONE"),
    ),
    Hosted("guest_print_test", "guest_code_limits", says=("ABORT",)),
    Hosted("rseq_test", says=(0,) * 100),
    # --- CPUID, MSRs and registers
    Hosted("xcr0_cpuid_test"),
    Hosted("vmx_pmu_caps_test", before=cpu.give_perf_capabilities),
    Hosted(
        "cr4_cpuid_sync_test",
        says=(0, "DONE"),
        then={0: cpu.set_regs(cr4=lambda cr4: cr4 & ~(1 << 18))},  # OSXSAVE
    ),
    Hosted(
        "cpuid_test",
        "guest_main",
        before=cpu.give_cpuid_table,
        says=(1, 2, "DONE"),
        needs=("cpuid",),
    ),
    Hosted("pmu_counters_test", "guest_test_gp_counters", before=cpu.leave_out_p6_counters),
    Hosted("pmu_counters_test", "guest_test_fixed_counters", before=cpu.leave_out_p6_counters),
    Hosted(
        "kvm_pv_test",
        "guest_main",
        says=(*["0xdeadbeef?"] * 10, *["0xdeadc0de?"] * 3, "DONE"),
        needs=("msr_table",),
    ),
    Hosted(
        "platform_info_test",
        before=cpu.set_msrs(PLATFORM_INFO, value=0xFF00),
        says=(1, 0, "DONE"),
        then={1: cpu.take_away_msr(PLATFORM_INFO)},
        needs=("msr_table",),
    ),
    Hosted(
        "monitor_mwait_test",
        says=(*MONITOR_CASES, "DONE"),
        then={at: cpu.set_monitor_of_case(case) for at, case in enumerate(MONITOR_CASES)},
    ),
    Hosted("sync_regs_test", says=("bad-ucall",) * 10),
    Hosted("state_test", before=cpu.take_away_xsave, says=(1, 2, "DONE")),
    Hosted("set_boot_cpu_id", "guest_bsp_vcpu", says=(1, "DONE")),
    Hosted("sev_smoke_test", "guest_sev_code", before=cpu.set_cpu_to_sev),
    Hosted("sev_smoke_test", "guest_shutdown_code", says=("shutdown",)),
    # --- clocks
    Hosted(
        "tsc_msrs_test",
        says=(2, 3, 4, 5, "DONE"),
        then={
            1: cpu.set_regs(msr_0x10=72 * UNITY),
            2: cpu.set_regs(msr_0x3b=8 * UNITY),
        },
        needs=("deterministic",),
    ),
    Hosted(
        "system_counter_offset_test",
        "guest_main",
        says=(0, 1, 2),
        then={
            0: cpu.set_regs(tsc_offset=180 * SECOND),
            1: cpu.set_regs(tsc_offset=-180 * SECOND),
        },
        needs=("tsc",),
    ),
    Hosted(
        "kvm_clock_test",
        "guest_main",
        before=devices.place_clock,
        says=(0, 1, 2, 3),
        then={seconds: devices.set_clock(seconds * SECOND) for seconds in range(3)},
    ),
    Hosted(
        "steal_time",
        before=devices.give_steal_time,
        says=(0, 1, "DONE"),
        then={0: devices.set_stolen(1000, version=2), 1: devices.set_stolen(5000, version=4)},
        create={"nr_vcpus": 4},
    ),
    # --- devices
    Hosted("userspace_io_test", answer=devices.play_string_port),
    Hosted("coalesced_io_test", before=devices.give_io_ring, says=(0, 0, 0)),
    Hosted(
        "exit_on_emulation_failure_test",
        before=lambda vm: memory.hole(vm, 0x7_0000_0000),
        answer=devices.play_fpu,
    ),
    Hosted(
        "xapic_state_test",
        "xapic_guest_code",
        before=lambda vm: memory.hole(vm, devices.APIC),
        says=(0,),
    ),
    Hosted(
        "xapic_state_test",
        "x2apic_guest_code",
        before=cpu.set_msrs(0x80F, 0x820, 0x821, 0x830),
        says=(0,),
    ),
    Hosted(
        "fix_hypercall_test",
        "guest_main",
        before=devices.let_patch_itself,
        answer=devices.play_hypercall_quirk,
        needs=("hypercalls",),
    ),
    # --- memory
    Hosted("smaller_maxphyaddr_emulation_test", before=memory.give_reserved_bit),
    Hosted(
        "pre_fault_memory_test",
        before=lambda vm: vm.vcpus[0].args_set(vm.alloc(2 * MIB + 4096, 1 << 38)),
        create={"memory": 16 * MIB},
    ),
    Hosted(
        "nx_huge_pages_test",
        before=memory.fill_with_returns,
        says=(1, 2, 3, 4, 5, 6),
        create={"memory": 16 * MIB},
    ),
    Hosted(
        "dirty_log_test",
        before=memory.log_dirty_pages,
        says=(1, 1),
        create={"memory": 24 * MIB},
    ),
    Hosted(
        "max_guest_memory_test",
        before=memory.give_each_a_part,
        says=(0, 0),
        create={"nr_vcpus": 4},
    ),
    *(
        Hosted(
            name,
            "memstress_guest_code",
            before=memory.give_memstress_args,
            says=(1,),
            create={"nr_vcpus": 3},
        )
        for name in MEMSTRESS
    ),
)
"""One row a guest function."""
