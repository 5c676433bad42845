"""Memslots, allocation, translation: what fits is found, what does not is said with its address."""

from __future__ import annotations

import pytest
from guests import CODE, DATA, bare

import labkit as lk
from labkit.machine.memory import LIMIT, Memory

PAGE = 4096


@pytest.fixture
def memory() -> Memory:
    """Two slots that touch, and one apart."""
    memory = Memory()
    for gpa, pages in ((0, 2), (2 * PAGE, 1), (0x100000, 1)):
        memory.add(gpa, pages * PAGE)
    return memory


def test_that_an_access_runs_on_into_the_neighbouring_slot(memory):
    told = []
    memory.on_write.append(lambda gpa, size: told.append((gpa, size)))
    memory.write(PAGE, bytes(range(256)) * 32)
    assert memory.read(PAGE + 4000, 300) == (bytes(range(256)) * 32)[4000:4300]
    assert told == [(PAGE, 8192)]


@pytest.mark.parametrize(
    "gpa, size",
    [(3 * PAGE, 1), (3 * PAGE - 1, 2), (-1, 1), (0x101000 - 4, 8), (1 << 60, 1), (0, -1)],
)
def test_that_an_access_outside_says_where_and_changes_nothing(memory, gpa, size):
    before = [slot.data[:] for slot in memory.slots]
    with pytest.raises(lk.MemoryFault, match="no memslot there"):
        memory.read(gpa, size)
    for touch in (memory.view, memory.zero):
        with pytest.raises(lk.MemoryFault, match="view of"):
            touch(gpa, size)
    if size > 0:
        with pytest.raises(lk.MemoryFault, match="write of"):
            memory.write(gpa, b"x" * size)
    assert [slot.data[:] for slot in memory.slots] == before


NO_SLOTS = [
    (1, PAGE),
    (0x200000, 0),
    (0x200000, -PAGE),
    (0x200000, 100),
    (PAGE, PAGE),
    (0, 1 << 30),
    (LIMIT, PAGE),
    (-PAGE, PAGE),
    (0x200000, 1 << 39),
]


@pytest.mark.parametrize("gpa, size", NO_SLOTS)
def test_that_a_slot_which_cannot_be_is_refused(memory, gpa, size):
    with pytest.raises(lk.InvalidState, match="memslot of"):
        memory.add(gpa, size)
    assert len(memory.slots) == 3


def test_that_host_addresses_lead_back(memory):
    for gpa in (0, 2 * PAGE - 1, 2 * PAGE, 0x100FFF):
        assert memory.gpa(memory.hva(gpa)) == gpa
    with pytest.raises(lk.MemoryFault, match="in no memslot"):
        memory.gpa(12345)
    with pytest.raises(lk.MemoryFault):
        memory.hva(0x50000)


def test_that_a_second_slot_is_seen_by_host_and_guest(guest):
    vm = guest("mov rax,[0x60000000]; mov [0x60000008],rax; hlt")
    slot = vm.memory.add(1 << 32, 1 << 20)
    vm.machine.engine.add_memslot(slot.gpa, slot.hva, slot.size)
    vm.machine.space.map(0x60000000, 1 << 32, 1)
    vm.write(0x60000000, b"abcdefgh")
    assert vm.vcpus[0].run(9).end == "halted"
    assert vm.memory.read((1 << 32) + 8, 8) == b"abcdefgh"


def test_that_allocation_takes_the_lowest_gap_and_ends_with_an_error_that_helps():
    vm = lk.Vm.create_barebones(memory=1 << 20)
    first = vm.alloc(1)
    second = vm.alloc(3 * PAGE, min_gva=0x10001)
    assert (first, second) == (0x2000, 0x11000)
    assert vm.gva2gpa(second) % PAGE == 0
    with pytest.raises(lk.OutOfMemory, match=r"no 256 free guest pages .* give the VM more"):
        vm.alloc(1 << 20)
    assert vm.alloc(PAGE) == 0x3000
    with pytest.raises(lk.InvalidState):
        vm.alloc(0)
    with pytest.raises(lk.InvalidState, match="min_gva -0x1 is no address"):
        vm.alloc(PAGE, min_gva=-1)


def test_that_memory_which_cannot_be_mapped_is_given_back():
    vm = lk.Vm.create_barebones(memory=8 << 20)
    vm.alloc(0x17D * PAGE)  # up to the page tables
    before = vm.page_table()
    uses = set(vm.machine.space.uses)
    with pytest.raises(lk.OutOfMemory, match="for page tables"):
        # All but one page of the rest, under a table of its own each side.
        vm.alloc(0x67B * PAGE, min_gva=0x4000000000 - PAGE)
    assert len(vm.page_table()) == len(before)
    assert {use.kind for use in set(vm.machine.space.uses) - uses} == {"page tables"}
    assert vm.alloc(4 << 20)


@pytest.mark.parametrize("gva", [0x7000_0000, 1 << 46, 1 << 63, (1 << 64) - 8, DATA + 4 * PAGE - 4])
def test_that_a_virtual_access_outside_says_which_table_ends_it(guest, gva):
    vm = guest("nop")
    with pytest.raises(lk.PageFault, match="gva") as caught:
        vm.read(gva, 8)
    assert caught.value.walk is not None
    with pytest.raises(lk.PageFault):
        vm.write(gva, bytes(8))
    assert vm.read(DATA + 4 * PAGE - 4, 4) == bytes(4), "nothing was written"


def test_that_a_page_mapped_to_nowhere_can_be_walked_but_not_read(guest):
    vm = guest("nop")
    vm.machine.space.map(0x7000_0000, 0xC000_0000, 1)
    assert vm.gva2gpa(0x7000_0123) == 0xC000_0123
    with pytest.raises(lk.PageFault, match=r"gpa 0xc0000123, where no memslot is"):
        vm.read(0x7000_0123, 1)
    with pytest.raises(lk.MemoryFault):
        vm.gpa2hva(0xC000_0123)


def test_that_a_vcpu_reads_through_its_own_page_tables(guest):
    vm = guest("nop")
    vm.vcpus[0].regs.cr3 = 0x5000
    with pytest.raises(lk.PageFault):
        vm.vcpus[0].read(CODE, 1)
    assert vm.read(CODE, 1) == b"\x90"


@pytest.mark.parametrize("size", [2 << 20, 1 << 30])
def test_that_huge_pages_work_for_guest_and_host(size):  # 1 GiB is a reserved bit to kvm_pvm
    with bare("mov rax,[rbx+0x1234]; hlt") as vm:
        gva = 1 << 40
        vm.machine.space.map(gva, 0, 1, page_size=size)
        vm.memory.write(0x1234, b"12345678")
        vm.vcpus[0].regs.rbx = gva
        assert vm.read(gva + 0x1234, 8) == b"12345678"
        assert vm.vcpus[0].run(9).end == "halted"
        assert vm.vcpus[0].regs.rax == int.from_bytes(b"12345678", "little")
