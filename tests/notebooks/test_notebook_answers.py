"""The answers of the exercises are right, for the seeds that they name."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from committed import BITS, FOUR, LAUNCH, REAL_KVM, TOUR, cells, ran, read, said
from paths import GUESTS

import labkit as lk


def answer(letter: str, path: Path = TOUR) -> str:
    """The folded answer of an exercise."""
    [cell] = [cell for cell in cells(path, "markdown") if f"**{letter}. " in cell.source]
    return str(cell.source.partition("<details>")[2])


def shown(path: Path, letter: str, seed: int) -> str:
    """What the code cell of an exercise shows, in a copy of the notebook with another seed."""
    [at] = [at for at, cell in enumerate(read(path).cells) if f"**{letter}. " in cell.source]
    before = [cell for cell in read(path).cells[:at] if cell.cell_type == "code"]
    return said(ran(path, seed).notebook)[len(before)][0]


def hello(**options: Any) -> Any:
    return lk.Vm.create(lk.Program.load(GUESTS / "hello.elf"), **options)


@pytest.mark.parametrize(("seed", "index"), [(1, "0x29"), (2, "0x14")])
def test_that_answer_a_is_right(seed: int, index: str) -> None:
    vm = hello()
    slot = random.Random(seed).randrange(512)
    assert str(vm.page_table().walk(vm.pool.gva + 64 + 1096 * slot).steps[-1]) == f"PT[{index}]"
    assert re.search(rf"seed {seed}\D*{index}\b", answer("A"))


@pytest.mark.parametrize(("seed", "slot"), [(1, 1), (4, 3)])
def test_that_answer_b_is_right(seed: int, slot: int) -> None:
    vm = hello()
    vm.write(vm.pool.gva, random.Random(seed).getrandbits(512).to_bytes(64, "little"))
    assert vm.run().slot == slot and re.search(rf"seed {seed}\D*slot {slot}\b", answer("B"))


@pytest.mark.parametrize("seed", range(10))
def test_that_answer_c_is_right(seed: int) -> None:
    vm = hello(nr_vcpus=4, schedule=f"random:{seed}:30")
    assert {uc.slot for uc in vm.run_until_done()} == {0, 1, 2, 3}
    assert "Slots 0 to 3, whatever the seed" in answer("C")


@pytest.mark.parametrize("seed", [1, 2])
def test_that_answer_a_about_exits_is_right(seed: int, backend: str) -> None:
    sources = [cell.source for cell in cells(REAL_KVM, "code")]
    [source] = [source for source in sources if source.startswith("%%guest string\n")]
    program = lk.Program.compile(source.partition("\n")[2])
    vm = lk.Vm.create(program, backend=backend)
    count = random.Random(seed).randrange(1, 33)
    vm.write_guest_global("count", count)
    assert len([vm.run() for _ in range(40) if vm.vcpus[0].state != "done"]) == count + 1
    assert re.search(rf"seed {seed} it is {count} times", answer("A", REAL_KVM))


@pytest.mark.parametrize(("seed", "function"), [(1, "ucall"), (3, "ucall_alloc")])
def test_that_answer_b_about_steps_is_right(seed: int, function: str, backend: str) -> None:
    vcpu = hello(backend=backend, privilege="kernel").vcpus[0]
    vcpu.step(random.Random(seed).randrange(80))
    assert vcpu.where().partition("+")[0] == function
    assert f"seed {seed} it is <code>{function}</code>" in answer("B", REAL_KVM)


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("seed", range(3))
def test_that_answer_c_about_schedules_is_right(seed: int) -> None:
    program = lk.Program.load(GUESTS / "hello.elf")
    assert lk.compare(program, nr_vcpus=4, schedule=f"random:{seed}:30", max_insns=20_000).equal


@pytest.mark.parametrize(
    ("path", "letter", "seed", "told", "comes"),
    [
        (
            BITS,
            "A",
            1,
            "for seed 1 that is bit 46, 0x800040000000a003",
            "(46, '0x800000000000a003')",
        ),
        (BITS, "A", 2, "for seed 2 bit 51, 0x800800000000a003", "(51, '0x800000000000a003')"),
        (BITS, "B", 1, "the one at 0x440 for seed 1", "* 440 "),
        (BITS, "B", 2, "the one at 0x1c0 for seed 2", "* 1c0 "),
        (BITS, "C", 1, "For seed 1 (sev, stack) it is set", "('sev', 'stack', '0x8008"),
        (BITS, "C", 4, "for seed 4 (sev, pool) it is clear", "('sev', 'pool', '0x8000000"),
        (BITS, "C", 5, "for seed 5 (tdx, pool) it is set", "('tdx', 'pool', '0x80008"),
        (LAUNCH, "A", 1, "differ (seed 1: code", "('code', False)"),
        (LAUNCH, "A", 7, "seed 7: stack)", "('stack', False)"),
        (LAUNCH, "A", 5, "no measurement tells (seed 5)", "('pool', True)"),
        (LAUNCH, "B", 1, "For seed 1 it is <code>LAUNCH_UPDATE_VMSA", "LAUNCH_UPDATE_VMSA: ENOTTY"),
        (
            LAUNCH,
            "B",
            2,
            "for seed 2 <code>GUEST_STATUS",
            "GUEST_STATUS GuestStatus(policy=0, asid=8, ",
        ),
        (
            LAUNCH,
            "B",
            5,
            "for seed 5 <code>LAUNCH_FINISH",
            "LAUNCH_FINISH: EIO, the firmware says INVALID_GUEST_STATE (0x02)",
        ),
        (LAUNCH, "C", 1, "the digest is another", "(False, 'my secret is 2"),
        (FOUR, "A", 1, "For seed 1 (arm64, slot 137) it is L3[0x28]", "('arm64', 137, 'L3[0x28]')"),
        (FOUR, "A", 2, "for seed 2 (x86_64, slot 57) PT[0x14]", "('x86_64', 57, 'PT[0x14]')"),
        (FOUR, "B", 1, "For seed 1 that is 12 MiB, 0xc00000", "(12, '0xc00000', 'SYNC')"),
        (FOUR, "B", 2, "for seed 2 59 MiB, 0x3b00000", "(59, '0x3b00000', 'SYNC')"),
        (FOUR, "C", 1, "Seed 1 picks arm64", "('arm64', ['vCPU 0 is number 1 to"),
        (FOUR, "C", 2, "Never, whatever the seed", "is number 2 to"),
        (LAUNCH, "C", 5, "Seed 5 gives the old order", "(True, 'my secret is 2"),
    ],
)
def test_that_an_answer_is_what_its_cell_shows(
    path: Path, letter: str, seed: int, told: str, comes: str
) -> None:
    assert told in answer(letter, path) and comes in shown(path, letter, seed)
