"""MOV to control registers: what a CPU takes and what it refuses with #GP, on every engine; KVM is the oracle."""

from __future__ import annotations

import pytest
from guests import CODE, DATA, HANDLERS

from labkit.engines.exits import HaltExit

UD, GP = 6, 13
WRONG = [  # register, bits to set, bits to clear
    ("cr0", 0, 1 << 31),
    ("cr0", 0, 1),
    ("cr0", 1 << 29, 1 << 30),
    ("cr3", 1 << 40, 0),
    ("cr3", 1 << 51, 0),
    ("cr3", 1 << 63, 0),
    ("cr4", 1 << 12, 0),
    ("cr4", 1 << 13, 0),
    ("cr4", 1 << 14, 0),
    ("cr4", 1 << 15, 0),
    ("cr4", 1 << 19, 0),
    ("cr4", 1 << 31, 0),
    ("cr4", 0, 1 << 5),
    ("cr4", (1 << 64) - 1, 0),
    ("cr8", 1 << 4, 0),
    ("cr8", 1 << 63, 0),
]
RIGHT = [
    ("cr0", 1 << 1 | 1 << 5, 0),
    ("cr0", 0, 1 << 16),
    ("cr0", 3 << 29, 0),
    ("cr0", 1 << 3, 0),
    ("cr3", 1 << 3 | 1 << 4, 0),
    ("cr4", 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8, 0),
    ("cr4", 1 << 9 | 1 << 10, 0),
    ("cr8", 9, 15),
]


def moved(vm, register, on, off):
    """A guest that changes bits of a control register; the value it asked for."""
    value = vm.vcpus[0].regs[register] & ~off | on
    vm.write(DATA, value.to_bytes(8, "little"))
    return value


def refused(vm, register, on, off):
    """Whether the guest gets #GP(0), and the register keeps its value."""
    (vcpu,) = vm.vcpus
    before = vcpu.regs[register]
    moved(vm, register, on, off)
    came = vcpu.run(10), vcpu.pc, int.from_bytes(vcpu.read(vcpu.regs.rsp, 8), "little")
    return came == (HaltExit(), HANDLERS + 16 * GP + 1, 0) and vcpu.regs[register] == before


@pytest.mark.parametrize(("register", "on", "off"), WRONG)
def test_that_a_value_which_the_cpu_does_not_take_is_a_general_protection_fault(
    guest, register, on, off
):
    assert refused(guest(f"mov rax,[rsi]; mov {register},rax; hlt"), register, on, off)


@pytest.mark.parametrize(
    "backend", ["unicorn"], indirect=True
)  # KVM for PVM drops the upper halves instead of looking at them
@pytest.mark.parametrize(
    ("register", "on"), [(register, 1 << bit) for register in ("cr0", "cr4") for bit in (32, 63)]
)
def test_that_the_upper_halves_of_cr0_and_cr4_are_reserved(guest, register, on):
    assert refused(guest(f"mov rax,[rsi]; mov {register},rax; hlt"), register, on, 0)


@pytest.mark.parametrize(("register", "on", "off"), RIGHT)
def test_that_a_value_which_it_takes_is_there_afterwards(guest, register, on, off):
    vm = guest(f"mov rax,[rsi]; mov {register},rax; mov rbx,{register}; hlt")
    (vcpu,) = vm.vcpus
    value = moved(vm, register, on, off)
    assert vcpu.run(10) == HaltExit() and vcpu.pc == CODE + 10 + (register == "cr8") * 2
    assert (
        vcpu.regs.rbx == vcpu.regs[register] == value | (register == "cr0") << 4
    )  # ET is always set


def test_that_bits_of_cr0_that_mean_nothing_are_dropped(guest):
    vm = guest("mov rax,[rsi]; mov cr0,rax; mov rbx,cr0; hlt")
    value = moved(vm, "cr0", 1 << 28 | 1 << 17 | 1 << 6, 1 << 4)
    assert (
        vm.vcpus[0].run(10) == HaltExit()
        and vm.vcpus[0].regs.rbx == value & ~(1 << 28 | 1 << 17 | 1 << 6) | 1 << 4
    )  # ET stays


@pytest.mark.parametrize("number", [1, 5, 6, 7, 9, 15])
def test_that_control_registers_which_are_none_are_undefined_instructions(guest, number):
    rex, low = (b"\x44" if number > 7 else b""), 0xC0 | (number & 7) << 3
    vm = guest(rex + b"\x0f\x22" + bytes([low]) + b"\xf4")
    assert vm.vcpus[0].run(10) == HaltExit() and vm.vcpus[0].pc == HANDLERS + 16 * UD + 1
