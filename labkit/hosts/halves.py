"""What the host halves of the kernel's selftests do, beyond expecting ucalls.

Before a guest runs, between what it says, and about its exits. Layouts and numbers are those of the
C sources in tools/testing/selftests/kvm of Linux 6.12.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from labkit.engines.base import Exit, HypercallExit, MmioExit, PioExit
from labkit.errors import InvalidState
from labkit.hosts.hosting import Act, Prepare
from labkit.machine.memory import PAGE
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm

__all__ = [
    "APIC",
    "ask_no_counters",
    "ask_perf_capabilities",
    "clear_cpuid",
    "fill_with_returns",
    "give_cpuid_table",
    "give_each_a_part",
    "give_io_ring",
    "give_memstress_args",
    "give_reserved_bit",
    "give_steal_time",
    "hole",
    "let_patch_itself",
    "log_dirty_pages",
    "place_clock",
    "play_fpu",
    "play_hypercall_quirk",
    "play_string_port",
    "set_clock",
    "set_cpu_to_sev",
    "set_monitor_of_case",
    "set_msrs",
    "set_regs",
    "set_stolen",
    "take_msr",
    "take_xsave",
]

MIB = 1 << 20

APIC = 0xFEE0_0000
SEV_STATUS = 0xC001_0131
PERF_CAPABILITIES = 0x345
SYSTEM_TIME_NEW = 0x4B56_4D01
STEAL_TIME = 0x4B56_4D03
TSC = "msr_0x10"
ECX = 2  # among the four registers that CPUID fills

# Where the host halves put what several of their parts must find again, by gva.
CLOCK = 1 << 30
STOLEN = 1 << 30
CODE = 4 << 30
PARTS = 1 << 32
STRESSED = 0xC000_0000

STOLEN_SIZE = 64
"""Bytes of struct kvm_steal_time."""


# --- memory


def hole(vm: Vm, gpa: int, gva: int | None = None) -> None:
    """Map a guest-physical page where no memslot is: accesses become MMIO exits.

    It is mapped identically unless a gva is given.
    """
    vm.machine.space.map(gpa if gva is None else gva, gpa)


def _alloc_at(vm: Vm, size: int, gva: int, nx: bool = True) -> None:
    """Zeroed memory of so many bytes at this gva; raises InvalidState where it is not free."""
    found = vm.machine.space.alloc(size, "test", gva, nx=nx)
    if found != gva:
        raise InvalidState(f"{size} bytes at gva {gva:#x}: there is room at {found:#x} only")


def fill_with_returns(vm: Vm) -> None:
    """nx_huge_pages_test: code of 6 MiB that returns at once, wherever it is called."""
    _alloc_at(vm, 6 * MIB, CODE, nx=False)
    ret = b"\xc3"
    vm.write(CODE, ret * (6 * MIB))


def log_dirty_pages(vm: Vm) -> None:
    """dirty_log_test: its globals, and memory whose writes it would log."""
    nr_pages = 2048
    vm.write_guest_global("guest_page_size", PAGE)
    vm.write_guest_global("host_page_size", PAGE)
    vm.write_guest_global("guest_num_pages", nr_pages)
    vm.write_guest_global("iteration", 1)
    vm.write_guest_global("guest_rng", bytes([7, 0, 0, 0]))  # struct guest_random_state: a seed
    _alloc_at(vm, nr_pages * PAGE, STRESSED)


def give_memstress_args(vm: Vm) -> None:
    """demand_paging_test and its like: memstress_args, and memory with a part for each vCPU."""
    nr_pages = 128
    size = nr_pages * PAGE
    _alloc_at(vm, len(vm.vcpus) * size, STRESSED)

    # struct memstress_args: vm, gpa, size, guest_page_size; random_seed, write_percent; nested,
    # random_access, pin_vcpus. vcpu_args comes after vcpu_to_pcpu[KVM_MAX_VCPUS].
    head = struct.pack("<4Q2I3?", 0, STRESSED, 0, PAGE, 1234, 30, False, True, False)
    # struct memstress_vcpu_args: gpa, gva, pages, vcpu, vcpu_idx.
    rows = b""
    for index in range(len(vm.vcpus)):
        rows += struct.pack("<4Qi4x", 0, STRESSED + index * size, nr_pages, 0, index)

    gva = vm.gva_of("memstress_args")
    vm.write(gva, head)
    vm.write(gva + 2096, rows)
    vm.write_guest_global("guest_random_seed", 1234)


def give_each_a_part(vm: Vm) -> None:
    """max_guest_memory_test: a part of memory for each vCPU, as start, end and stride."""
    size = 64 * PAGE
    _alloc_at(vm, len(vm.vcpus) * size, PARTS)
    for vcpu in vm.vcpus:
        start = PARTS + vcpu.index * size
        vcpu.args_set(start, start + size, PAGE)


def give_reserved_bit(vm: Vm) -> None:
    """smaller_maxphyaddr_emulation_test: a page whose entry has a frame bit that the CPU lacks."""
    gva = 0x1234_5678_9000
    vm.machine.space.map(gva, vm.gva2gpa(vm.alloc(PAGE)))
    leaf = vm.page_table().walk(gva).steps[-1]
    physical_bits = vm.cpu.leaf(0x8000_0008, 0)[0] & 0xFF
    entry = leaf.entry | 1 << physical_bits
    vm.memory.write(leaf.entry_gpa, entry.to_bytes(8, "little"))
    vm.vcpus[0].args_set(False)


# --- devices


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
    _alloc_at(vm, 32, CLOCK)
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
    _alloc_at(vm, 4 * STOLEN_SIZE, STOLEN)
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


def play_hypercall_quirk(vcpu: Vcpu, exit: Exit, seen: dict[int, int]) -> None:
    """fix_hypercall_test: what KVM's quirk does, VMMCALL for VMCALL; the APIC reads 0."""
    vmmcall = b"\x0f\x01\xd9"
    if isinstance(exit, HypercallExit):
        vcpu.vm.write(vcpu.vm.gva_of("hypercall_insn"), vmmcall)
        vcpu.complete(0)
    elif isinstance(exit, MmioExit) and not exit.is_write:
        vcpu.complete(0)


# --- the CPU: CPUID, MSRs, registers


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


def take_xsave(vm: Vm) -> None:
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


def ask_no_counters(vm: Vm) -> None:
    """pmu_counters_test: PDCM, and FW_WRITES of PERF_CAPABILITIES.

    With it the guest leaves out the P6 counters, whose writes KVM drops.
    """
    pdcm = 1 << 15
    _set_cpuid(vm, 1, ECX, vm.cpu.cpuid[1, 0][ECX] | pdcm)
    vm.cpu.msrs[PERF_CAPABILITIES] = 1 << 13


def ask_perf_capabilities(vm: Vm) -> None:
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


def take_msr(number: int) -> Act:
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


def let_patch_itself(vm: Vm) -> None:
    """fix_hypercall_test: an APIC, and a guest that may write to its code.

    The kernel's own page tables allow that; here WP of CR0 is clear.
    """
    write_protect = 1 << 16
    hole(vm, APIC)
    vm.vcpus[0].regs.cr0 &= ~write_protect
    vm.install_exception_handler(6, "guest_ud_handler")
