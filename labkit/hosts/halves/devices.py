"""The parts of host halves that play devices: clocks, rings, ports, an APIC."""

from __future__ import annotations

import struct

from labkit.engines.exits import Exit, HypercallExit, MmioExit, PioExit
from labkit.hosts.halves.memory import alloc_at, hole
from labkit.hosts.hosting import Act
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm

__all__ = [
    "APIC",
    "give_io_ring",
    "give_steal_time",
    "let_patch_itself",
    "place_clock",
    "play_fpu",
    "play_hypercall_quirk",
    "play_string_port",
    "set_clock",
    "set_stolen",
]

APIC = 0xFEE0_0000
SYSTEM_TIME_NEW = 0x4B56_4D01
STEAL_TIME = 0x4B56_4D03
TSC = "msr_0x10"

# Where a guest and several parts of its host half find it, by gva.
CLOCK = 1 << 30
STOLEN = 1 << 30

# Bytes of struct kvm_steal_time.
STOLEN_SIZE = 64


def give_io_ring(vm: Vm) -> None:
    """coalesced_io_test: struct kvm_coalesced_io with a ring that nobody fills, a page, a port."""
    mmio = 4 << 30
    hole(vm, mmio)
    # ring, ring_size, mmio_gpa, mmio, pio_port
    ring = struct.pack("<QI4xQQB7x", 0, 170, mmio, mmio, 0x80)
    vm.write_guest_global("kvm_builtin_io_ring", ring)
    vm.vcpus[0].args_set(vm.gva_of("kvm_builtin_io_ring"))


def place_clock(vm: Vm) -> None:
    """kvm_clock_test: a page for the time, which stands at 0, and the MSR that names it."""
    alloc_at(vm, 32, CLOCK)
    vm.cpu.msrs[SYSTEM_TIME_NEW] = 0
    vm.vcpus[0].args_set(vm.gva2gpa(CLOCK), CLOCK)
    set_clock(0)(vm.vcpus[0])


def set_clock(time: int) -> Act:
    """struct pvclock_vcpu_time_info of a 1 GHz clock that stands at this time now, in ns."""

    def act(vcpu: Vcpu) -> None:
        # version, pad0, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags
        facts = struct.pack("<IIQQIbBxx", 2, 0, vcpu.regs[TSC], time, 1 << 31, 1, 0)
        vcpu.vm.write(CLOCK, facts)

    return act


def give_steal_time(vm: Vm) -> None:
    """steal_time: a struct kvm_steal_time for each vCPU, and MSRs that say where."""
    vm.cpu.msrs[STEAL_TIME] = 0
    alloc_at(vm, 4 * STOLEN_SIZE, STOLEN)
    gvas = [STOLEN + STOLEN_SIZE * index for index in range(4)]
    vm.write_guest_global("st_gva", struct.pack("<4Q", *gvas))
    for vcpu in vm.vcpus:
        vcpu.args_set(vcpu.index)
        enabled = 1
        vcpu.regs[f"msr_{STEAL_TIME:#x}"] = gvas[vcpu.index] | enabled


def set_stolen(time: int, version: int) -> Act:
    """So many ns were stolen from the vCPU; the version is even when they are all written."""

    def act(vcpu: Vcpu) -> None:
        vcpu.vm.write(STOLEN + STOLEN_SIZE * vcpu.index, struct.pack("<QI", time, version))

    return act


def play_string_port(vcpu: Vcpu, exit: Exit, seen: dict[int, int]) -> None:
    """userspace_io_test: 0xAA for every byte that is read from the port.

    RCX is changed once behind the first byte of two and once behind that of three. The test makes 1
    of 2 and 8192 of 3 there; here the byte is already counted.
    """
    if not isinstance(exit, PioExit):
        return
    vcpu.complete(0xAA)
    rcx = vcpu.regs.rcx
    if rcx not in seen:
        seen[rcx] = {1: 0, 2: 8191}.get(rcx, rcx)
        vcpu.regs.rcx = seen[rcx]


def play_fpu(vcpu: Vcpu, exit: Exit, seen: dict[int, int]) -> None:
    """exit_on_emulation_failure_test: 1.0 for FLD where it is emulated, else step over it."""
    if isinstance(exit, MmioExit):
        vcpu.complete(0x3F80_0000)
    else:
        vcpu.regs.rip += 2


def let_patch_itself(vm: Vm) -> None:
    """fix_hypercall_test: an APIC, and a guest that may write to its code.

    The kernel's own page tables allow that; here WP of CR0 is clear.
    """
    write_protect = 1 << 16
    hole(vm, APIC)
    vm.vcpus[0].regs.cr0 &= ~write_protect
    vm.install_exception_handler(6, "guest_ud_handler")


def play_hypercall_quirk(vcpu: Vcpu, exit: Exit, seen: dict[int, int]) -> None:
    """fix_hypercall_test: what KVM's quirk does, VMMCALL for VMCALL; the APIC reads 0."""
    vmmcall = b"\x0f\x01\xd9"
    if isinstance(exit, HypercallExit):
        vcpu.vm.write(vcpu.vm.gva_of("hypercall_insn"), vmmcall)
        vcpu.complete(0)
    elif isinstance(exit, MmioExit) and not exit.is_write:
        vcpu.complete(0)
