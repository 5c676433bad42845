"""The whole VM in one look: the vCPU in front in full, the others briefly."""

from __future__ import annotations

import pytest
from paths import GUESTS

import labkit as lk
from labkit.look.snapshots import VcpuBrief


@pytest.fixture
def vm():
    with lk.Vm.create(GUESTS / "two_vcpus.elf", nr_vcpus=4) as vm:
        yield vm


def test_that_only_the_vcpu_in_front_is_looked_at_in_full(vm: lk.Vm) -> None:
    seen = vm.look(2)
    assert seen.front.index == 2
    assert seen.front.registers
    assert [type(vcpu) for vcpu in seen.vcpus] == [VcpuBrief] * 4


def test_that_a_look_marks_nothing_by_itself(vm: lk.Vm) -> None:
    vm.look()
    vm.vcpus[0].step(3)
    assert not any(row.changed for row in vm.vcpus[0].look().registers)


def test_that_since_marks_the_registers_that_changed_in_between(vm: lk.Vm) -> None:
    vcpu = vm.vcpus[0]
    before = vcpu.look()
    vcpu.regs.rbx = 0x1234
    vcpu.look()
    marked = [row.name for row in vcpu.look().since(before).registers if row.changed]
    assert marked == ["rbx"]


def test_that_the_program_counter_is_never_marked(vm: lk.Vm) -> None:
    vcpu = vm.vcpus[0]
    before = vcpu.look()
    vcpu.step()
    assert "rip" not in [row.name for row in vcpu.look().since(before).registers if row.changed]


def test_that_eyes_are_compared_for_one_page_only(vm: lk.Vm) -> None:
    with pytest.raises(lk.InvalidState, match="0x1000"):
        vm.eyes(gpa=0).since(vm.eyes(gpa=0x1000))


def test_that_a_vm_takes_what_a_user_has_in_hand() -> None:
    source = '#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }\n'
    for guest in (GUESTS / "hello.elf", str(GUESTS / "hello.elf"), GUESTS / "hello.c", source):
        with lk.Vm.create(guest) as vm:
            assert vm.run_until_done()[-1].cmd == "DONE"


def test_that_what_is_no_guest_is_refused_in_words() -> None:
    with pytest.raises(lk.InvalidState, match="program takes a Program or text or a Path, not 17"):
        lk.Vm.create(17)  # type: ignore[arg-type]
