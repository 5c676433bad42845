"""Names of addresses: many at once are what each is alone, and come fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from paths import GUESTS

import labkit as lk


@pytest.fixture
def vm():
    """Two vCPUs with a pool, a page of each kind, and one that is mapped to the pool again."""
    with lk.Vm.create(lk.Program.load(GUESTS / "two_vcpus.elf"), nr_vcpus=2) as vm:
        vm.alloc(3 * 4096)
        vm.machine.space.map(0x7000_0000, vm.host_pool.gpa, 2)
        vm.machine.space.map(0x7100_0000, 0xC000_0000, 1)
        yield vm


def test_that_many_labels_at_once_are_those_of_each_alone(vm):
    table = vm.page_table()
    alone = [vm.names.label(gva) for gva in table.gva.tolist()]
    assert vm.names.labels(table.gva, table.gpa) == alone
    kinds = {"stack of vCPU 1", "in_use[0]", "tables", "alloc", ""}
    assert kinds <= set(alone), "one page of each kind is among them"


def test_that_addresses_inside_pages_have_their_labels_too(vm):
    table = vm.page_table()
    gvas = table.gva + np.uint64(0x123)
    alone = [vm.names.label(gva) for gva in gvas.tolist()]
    assert vm.names.labels(gvas, table.gpa + np.uint64(0x123)) == alone


def test_that_a_vm_without_program_and_pool_has_labels():
    with lk.Vm.create_barebones(memory=1 << 20) as vm:
        assert len(vm.page_table().df) == 0
        vm.alloc(4096)
        assert vm.page_table().df.what.tolist() == ["alloc"]


def test_that_the_ranges_of_a_gigabyte_come_within_a_second():
    nr_pages = 1 << 18
    with lk.Vm.create_barebones(memory=(1 << 30) + (8 << 20)) as vm:
        space = vm.machine.space
        gpa = space.alloc_pages(nr_pages, "alloc")
        space.map(1 << 30, gpa, nr_pages)
        for table in space.tables:
            make_every_second_leaf_read_only(vm.memory, table)
        found = vm.page_table()
        start = time.perf_counter()
        assert len(found.df) == nr_pages
        assert time.perf_counter() - start < 1
        assert set(found.df.what) == {"alloc"}


def make_every_second_leaf_read_only(memory, table):
    present, writable, user = (np.uint64(bit) for bit in (1, 2, 4))
    entries = np.frombuffer(memory.read(table, 4096), np.uint64).copy()
    leaves = (entries & (present | user)) == present  # tables that labkit makes grant user
    leaves[::2] = False
    entries[leaves] &= ~writable
    memory.write(table, entries.tobytes())


@pytest.mark.parametrize(
    "use",
    [
        lambda vm, place: vm.read(place, 8),
        lambda vm, place: vm.write(place, bytes(8)),
        lambda vm, place: vm.gva2gpa(place),
        lambda vm, place: vm.gva_of(place),
        lambda vm, place: vm.page_table().walk(place).gpa,
        lambda vm, place: vm.page_table().label(place),
        lambda vm, place: vm.eyes(gva=place).gpa,
        lambda vm, place: vm.vcpus[0].read(place, 8),
        lambda vm, place: vm.vcpus[0].peek(place, 8),
        lambda vm, place: vm.vcpus[0].write(place, bytes(8)),
        lambda vm, place: vm.vcpus[0].args_set(place),
        lambda vm, place: lk.attacks.walk_through_dram(vm, place).gpa,
    ],
)
@pytest.mark.parametrize(
    "place", ["ucall_pool", "guest_code+0x4", "in_use[0]", "ucalls[3].args[1]", "ucalls[511]"]
)
def test_that_a_name_is_taken_wherever_an_address_is(vm, use, place):
    assert use(vm, place) == use(vm, vm.gva_of(place))
    with pytest.raises(lk.SymbolNotFound, match="no symbol 'nowhere'"):
        use(vm, "nowhere")


@pytest.mark.parametrize(
    "use",
    [
        lambda vm, place: vm.vcpus[0].disassemble(place, 1)[0].gva,
        lambda vm, place: vm.vcpus[0].break_at(place) or vm.vcpus[0].breakpoints,
        lambda vm, place: vm.vcpus[0].set_entry(place) or vm.vcpus[0].pc,
        lambda vm, place: vm.add_vcpu(place).pc,
        lambda vm, place: lk.Vm.create(vm.program, place).vcpus[0].pc,
    ],
)
def test_that_code_is_found_by_name_and_line(vm, use):
    line = vm.program.line_at(vm.gva_of("guest_code"))
    for place in ("guest_code", f"{line.file}:{line.line}", "guest_code+0"):
        assert use(vm, place) == use(vm, vm.gva_of(place))


@pytest.mark.parametrize("offset", [0, 8, 56, 64, 64 + 8, 64 + 64, 64 + 1088, 64 + 511 * 1096 + 16])
def test_that_the_name_of_a_field_of_the_pool_leads_back_to_it(vm, offset):
    gva = vm.pool.gva + offset
    assert vm.gva_of(vm.names.label(gva)) == gva


@pytest.mark.parametrize("place", ["in_use[8]", "ucalls[512]", "ucalls[1].args[7]", "ucalls[0].q"])
def test_that_a_field_that_the_pool_has_not_is_no_place(vm, place):
    with pytest.raises(lk.SymbolNotFound):
        vm.read(place, 8)


def test_that_a_page_table_without_names_says_so():
    with lk.Vm.create_barebones(memory=1 << 20) as vm:
        vm.alloc(4096)
        with pytest.raises(lk.InvalidState, match="no program"):
            vm.page_table().walk("ucall_pool")
