"""The parts of host halves that give a guest memory, and what is in it."""

from __future__ import annotations

import struct

from labkit.errors import InvalidState
from labkit.machine.memory import PAGE
from labkit.session.vm import Vm

__all__ = [
    "alloc_at",
    "fill_with_returns",
    "give_each_a_part",
    "give_memstress_args",
    "give_reserved_bit",
    "hole",
    "log_dirty_pages",
]

MIB = 1 << 20

# Where guests and their host halves find it, by gva.
CODE = 4 << 30
PARTS = 1 << 32
STRESSED = 0xC000_0000


def hole(vm: Vm, gpa: int, gva: int | None = None) -> None:
    """Map a guest-physical page where no memslot is: accesses become MMIO exits.

    It is mapped identically unless a gva is given.
    """
    vm.machine.space.map(gpa if gva is None else gva, gpa)


def alloc_at(vm: Vm, size: int, gva: int, nx: bool = True) -> None:
    """Zeroed memory of so many bytes at this gva; raises InvalidState where it is not free."""
    found = vm.machine.space.alloc(size, "test", gva, nx=nx)
    if found != gva:
        raise InvalidState(f"{size} bytes at gva {gva:#x}: there is room at {found:#x} only")


def fill_with_returns(vm: Vm) -> None:
    """nx_huge_pages_test: code of 6 MiB that returns at once, wherever it is called."""
    alloc_at(vm, 6 * MIB, CODE, nx=False)
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
    alloc_at(vm, nr_pages * PAGE, STRESSED)


def give_memstress_args(vm: Vm) -> None:
    """demand_paging_test and its like: memstress_args, and memory with a part for each vCPU."""
    nr_pages = 128
    size = nr_pages * PAGE
    alloc_at(vm, len(vm.vcpus) * size, STRESSED)

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
    alloc_at(vm, len(vm.vcpus) * size, PARTS)
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
