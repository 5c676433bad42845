"""Where the kvm engine says that this KVM cannot do something, a C program without labkit meets the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import lacking
from guests import CODE, STACK_TOP, USER_CS, USER_SS, asm, bare, frame

import labkit as lk
from labkit.engines.exits import HaltExit
from labkit.engines.kvm.abi import EXITS
from labkit.guest.compilers import find_compiler

pytestmark = pytest.mark.usefixtures("kvm")
HLT, DEBUG = EXITS["KVM_EXIT_HLT"], EXITS["KVM_EXIT_DEBUG"]
HEADER = Path("/usr/include/linux/kvm.h")
INCLUDES = ("-isystem", "/usr/include", "-isystem", "/usr/include/x86_64-linux-gnu")
RIGHT = {  # case of the C program -> what a CPU does: exit reason, RIP, CS, RIP on the stack behind an exception
    "step": (DEBUG, 0x6001, 8, 0),
    "step_user": (DEBUG, 0x6001, 0x33, 0),
    "step_iretq": (DEBUG, 0x6900, 0x33, 0),
    "syscall": (HLT, 0x6881, 8, 0),
    "syscall_user": (HLT, 0x6881, 8, 0),
    "gib": (HLT, 0x6008, 8, 0),
    **{
        f"{name}{ring}": (HLT, 0x6801, 8, 0x6000 + size)
        for name, size in (("int3", 1), ("int_n", 2))
        for ring in ("", "_user")
    },
}
SAYS = {
    "step": ("step",),
    "step_user": ("step_user", "step_iretq"),
    "syscall": ("syscall_user",),
    "huge_pages": ("gib",),
    "software_interrupts": ("int3", "int3_user", "int_n", "int_n_user"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """What the C program saw of this machine's KVM, by case."""
    if not HEADER.exists():
        lacking(f"no {HEADER} (Debian: apt-get install linux-libc-dev)")
    binary = tmp_path_factory.mktemp("rings") / "rings"
    source = Path(__file__).with_name("kvm_rings.c")
    built = subprocess.run(
        [*find_compiler().command, "-w", *INCLUDES, source, "-o", binary],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([binary], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: tuple(int(word, 0) for word in words) for name, *words in rows}


def declared() -> dict[str, bool]:
    with lk.Vm.create_barebones(backend="kvm") as vm:
        return {capability.name: capability.have for capability in vm.capabilities}


@pytest.mark.parametrize("capability", SAYS)
def test_that_a_capability_is_there_exactly_when_a_c_program_finds_it(
    seen: dict[str, tuple[int, ...]], capability: str
) -> None:
    assert declared()[capability] == all(seen[case] == RIGHT[case] for case in SAYS[capability]), (
        seen
    )


def test_that_syscall_at_cpl0_is_right_everywhere(seen: dict[str, tuple[int, ...]]) -> None:
    assert seen["syscall"] == RIGHT["syscall"]


LEAVES = [
    f"push {USER_SS}; push {STACK_TOP - 1024}; push 0x202; push {USER_CS}; push {CODE + 0x1000}; iretq",
    f"mov ecx,{CODE + 0x1000}; mov r11d,0x202; nop; nop; nop; sysretq",
]


@pytest.mark.parametrize("text", LEAVES, ids=["iretq", "sysretq"])
def test_that_a_step_to_cpl3_is_one_instruction_or_refused_and_a_free_run_gets_there(
    text: str,
) -> None:
    with bare(text, backend="kvm") as vm:
        (vcpu,) = vm.vcpus
        vm.write(CODE + 0x1000, asm("mov ebx,7; mov rax,cr3"))
        vcpu.cpu.set_regs({"efer": 0xD01, "star": 0x0020_0008 << 32})
        assert vcpu.step(5) is None
        before = vcpu.pc
        if declared()["step_user"]:
            assert vcpu.step() is None and (vcpu.pc, vcpu.regs.cs) == (CODE + 0x1000, USER_CS)
        else:
            for refused in (vcpu.step, lambda: vcpu.run(100)):
                with pytest.raises(lk.NotAvailable, match=r'no step_user.*privilege="kernel"'):
                    refused()
            assert (vcpu.pc, vcpu.regs.cs) == (before, 8)
        assert (
            vcpu.run() == HaltExit()
            and vcpu.regs.rbx == 7
            and frame(vcpu, True)["rip"] == CODE + 0x1005
        )


def test_that_a_1_gib_page_is_mapped_or_refused_with_the_reason() -> None:
    with bare("mov rbx,[rsi]; hlt", backend="kvm") as vm:
        if declared()["huge_pages"]:
            vm.machine.space.map(1 << 39, 0, page_size=1 << 30)
            vm.vcpus[0].regs.rsi = 1 << 39
            assert vm.vcpus[0].run() == HaltExit()
        else:
            with pytest.raises(lk.NotAvailable, match=r"no huge_pages: .* smaller pages"):
                vm.machine.space.map(1 << 39, 0, page_size=1 << 30)
            assert vm.page_table().walk(1 << 39).gpa is None
