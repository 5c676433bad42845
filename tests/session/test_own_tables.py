"""A vCPU that loads page tables of its own, or another format: the lab shows what the CPU uses."""

from __future__ import annotations

import pytest

import labkit as lk
from labkit.errors import NotAvailable
from labkit.look.selection import select

SOURCE = '#include "labkit.h"\nvoid guest_code(void)\n{\n\tGUEST_SYNC(1);\n\tGUEST_DONE();\n}\n'
HIGH = 0xFFFF_0000_0000_0000 | 300 << 39 | 5 << 30  # 1 GiB of its own
PRESENT_WRITABLE_HUGE, GIB = 0x83, 1 << 30


def at_sync(arch: str) -> lk.Vm:
    vm = lk.Vm.create(lk.Program.compile(SOURCE, arch=arch))
    assert vm.vcpus[0].run().cmd == "SYNC"
    return vm


def new_table(vm: lk.Vm, entries: dict[int, int], before: bytes = bytes(4096)) -> int:
    """The gpa of one more table with these entries."""
    gpa = vm.machine.space.alloc_pages(1, "test")
    table = bytearray(before)
    for index, entry in entries.items():
        table[8 * index : 8 * index + 8] = entry.to_bytes(8, "little")
    vm.memory.write(gpa, bytes(table))
    return gpa


def own_cr3(vm: lk.Vm) -> tuple[int, int]:
    """(root before, root) of an x86-64 guest that now has 1 GiB more."""
    root = vm.vcpus[0].regs.cr3
    pdpt = new_table(vm, {5: PRESENT_WRITABLE_HUGE})
    own = new_table(vm, {300: pdpt | 3}, vm.memory.read(root, 4096))
    vm.vcpus[0].regs.cr3 = own
    return root, own


def test_that_a_guests_own_root_is_the_one_that_is_shown():
    with at_sync("x86_64") as vm:
        before = vm.page_table()
        root, own = own_cr3(vm)
        table = vm.page_table()
        assert (before.root, table.root) == (root, own)
        assert table.walk(HIGH + 0x4000).gpa == 0x4000
        assert HIGH + 0x4000 in table.maps(0x4000)
        assert f"CR3 {own:#x}" in table.found_by
        assert HIGH in set(before.diff(table)["gva"])
        assert vm.page_table(root=root).walk(HIGH).gpa is None
        assert vm.look().page_table.root == own
        assert vm.vcpus[0].read(HIGH + 0x4000, 8) == vm.memory.read(0x4000, 8)
        assert vm.vcpus[0].run().cmd == "DONE"


def test_that_each_vcpu_is_shown_through_its_own_tables():
    guest = lk.Program.compile(SOURCE)
    with lk.Vm.create(guest, nr_vcpus=2) as vm:
        root, own = own_cr3(vm)
        one, other = vm.vcpus
        assert (one.page_table().root, other.page_table().root) == (own, root)
        assert vm.page_table(other).walk(HIGH).gpa is None


def test_that_a_selection_goes_through_the_tables_of_the_vcpu_in_front():
    guest = lk.Program.compile(SOURCE)
    with lk.Vm.create(guest, nr_vcpus=2) as vm:
        own_cr3(vm)
        found = [select(vm, "gva", HIGH + 0x4000, vcpu) for vcpu in vm.vcpus]
        assert [one.gpa for one in found] == [0x4000, None]
        assert vm.look(0).page_table.walk(HIGH).gpa == 0
        assert vm.look(1).page_table.walk(HIGH).gpa is None


def test_that_five_levels_are_walked_when_the_cpu_has_them():
    with at_sync("x86_64") as vm:
        vcpu = vm.vcpus[0]
        pml5 = new_table(vm, {0: vcpu.regs.cr3 | 3})
        code = vm.gva_of("guest_code")
        gpa = vm.page_table().walk(code).gpa
        vcpu.cpu.set_regs({"cr4": vcpu.regs.cr4 | 1 << 12, "cr3": pml5})
        table = vm.page_table()
        assert len(table.mode.levels) == 5
        assert table.walk(code).gpa == gpa
        assert "LA57=1" in table.found_by
        assert vcpu.read(code, 4) == vm.memory.read(gpa, 4)


@pytest.mark.parametrize(
    ("arch", "registers", "name"),
    [
        ("riscv64", lambda table: {"satp": 8 << 60 | table >> 12}, "SV39"),
        ("arm64", lambda table: {"tcr_el1": 25 | 1 << 23 | 2 << 32, "ttbr0_el1": table}, "39 bits"),
    ],
)
def test_that_a_smaller_format_is_walked_as_the_cpu_walks_it(arch, registers, name):
    with at_sync(arch) as vm:
        vcpu, code = vm.vcpus[0], vm.gva_of("guest_code")
        before = vm.page_table().walk(code)
        vcpu.cpu.set_regs(registers(before.steps[1].entry_gpa & -4096))
        table = vm.page_table()
        assert name in table.mode.name
        assert table.walk(code).gpa == before.gpa
        assert len(table.walk(code).steps) == 3
        assert vcpu.read(code, 4) == vm.memory.read(before.gpa, 4)
        assert vcpu.run().cmd == "DONE"


def test_that_a_format_that_labkit_does_not_know_is_said():
    with at_sync("arm64") as vm:
        vm.vcpus[0].regs.tcr_el1 |= 1 << 14  # 64 KiB
        with pytest.raises(NotAvailable, match="TG0"):
            vm.page_table()


def test_that_a_vcpu_without_paging_shows_the_vms_own_tables():
    with lk.Vm.create(lk.Program.compile(SOURCE, arch="riscv64")) as vm:
        root = vm.page_table().root
        vm.vcpus[0].regs.satp = 0
        assert vm.page_table().root == root
        assert "no paging" in vm.page_table().found_by
