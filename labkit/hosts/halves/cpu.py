"""The parts of host halves that set a CPU up: CPUID, MSRs, registers."""

from __future__ import annotations

import struct
from collections.abc import Callable

from labkit.hosts.hosting import Act, Prepare
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm

__all__ = [
    "clear_cpuid",
    "give_cpuid_table",
    "give_perf_capabilities",
    "leave_out_p6_counters",
    "set_cpu_to_sev",
    "set_monitor_of_case",
    "set_msrs",
    "set_regs",
    "take_away_msr",
    "take_away_xsave",
]

SEV_STATUS = 0xC001_0131
PERF_CAPABILITIES = 0x345
ECX = 2  # among the four registers that CPUID fills


def clear_cpuid(vm: Vm, leaf: int, register: int, bit: int) -> None:
    """Take a feature out of the VM's CPUID; registers are 0 to 3 for EAX to EDX.

    C: vcpu_clear_cpuid_feature.
    """
    value = vm.cpu.cpuid[leaf, 0][register]
    _set_cpuid(vm, leaf, register, value & ~(1 << bit))


def _set_cpuid(vm: Vm, leaf: int, register: int, value: int) -> None:
    regs = list(vm.cpu.cpuid[leaf, 0])
    regs[register] = value
    a, b, c, d = regs
    vm.cpu.cpuid[leaf, 0] = a, b, c, d


def give_cpuid_table(vm: Vm) -> None:
    """cpuid_test: struct kvm_cpuid2 of the VM's own table."""
    rows = b""
    for (leaf, subleaf), regs in vm.cpu.cpuid.items():
        # function, index, flags, the registers, padding
        rows += struct.pack("<10I", leaf, subleaf, 0, *regs, 0, 0, 0)
    gva = vm.alloc(8 + len(rows))
    vm.write(gva, struct.pack("<2I", len(vm.cpu.cpuid), 0) + rows)
    vm.vcpus[0].args_set(gva)


def set_cpu_to_sev(vm: Vm) -> None:
    """sev_smoke_test: a CPU that says that it has SEV and SEV-ES, and that SEV is on."""
    vm.cpu.cpuid[0x8000_0000, 0] = (0x8000_001F, *vm.cpu.cpuid[0x8000_0000, 0][1:])
    vm.cpu.cpuid[0x8000_001F, 0] = (0b1010, 0, 0, 0)
    vm.cpu.msrs[SEV_STATUS] = 1


def take_away_xsave(vm: Vm) -> None:
    """state_test: no XSAVE, since that part of the guest uses AVX; and no nested state."""
    clear_cpuid(vm, 1, ECX, 26)
    vm.vcpus[0].args_set(0)


def set_monitor_of_case(case: int) -> Act:
    """monitor_mwait_test: MONITOR in CPUID as the next case wants it.

    MWAIT raises #UD where both the quirk is off (bit 0 of the case) and CPUID has no MONITOR (bit
    2). KVM's quirk, never #UD, is here a CPU that announces it.
    """

    def act(vcpu: Vcpu) -> None:
        ecx = vcpu.vm.cpu.cpuid[1, 0][ECX]
        monitor = 1 << 3
        raises = case & 0b101 == 0b101
        _set_cpuid(vcpu.vm, 1, ECX, ecx & ~monitor if raises else ecx | monitor)

    return act


def leave_out_p6_counters(vm: Vm) -> None:
    """pmu_counters_test: PDCM, and FW_WRITES of PERF_CAPABILITIES.

    With it the guest leaves out the P6 counters, whose writes KVM drops.
    """
    pdcm = 1 << 15
    _set_cpuid(vm, 1, ECX, vm.cpu.cpuid[1, 0][ECX] | pdcm)
    vm.cpu.msrs[PERF_CAPABILITIES] = 1 << 13


def give_perf_capabilities(vm: Vm) -> None:
    """vmx_pmu_caps_test: PERF_CAPABILITIES, which the guest may read only."""
    value = 0x32C4
    vm.cpu.msrs[PERF_CAPABILITIES] = value
    vm.cpu.read_only_msrs |= {PERF_CAPABILITIES}
    vm.vcpus[0].args_set(value)


def set_msrs(*numbers: int, value: int = 0) -> Prepare:
    """The VM has these MSRs, all with this value."""

    def prepare(vm: Vm) -> None:
        for number in numbers:
            vm.cpu.msrs[number] = value

    return prepare


def take_away_msr(number: int) -> Act:
    """The VM has this MSR no longer."""

    def act(vcpu: Vcpu) -> None:
        del vcpu.vm.cpu.msrs[number]

    return act


def set_regs(**regs: int | Callable[[int], int]) -> Act:
    """Registers of the vCPU: a number, or a function of what it was."""

    def act(vcpu: Vcpu) -> None:
        for name, value in regs.items():
            vcpu.regs[name] = value(vcpu.regs[name]) if callable(value) else value

    return act
