"""What a protected VM has beside, of VMs that run: its encryption map, its launch, its eyes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import labkit as lk
from labkit.explore import attacks
from labkit.look.encryption import EncryptionRange

Make = Callable[..., lk.Vm]
SOURCE = """#include "labkit.h"
static volatile uint64_t count = 7;
void guest_code(void) { for (;;) GUEST_SYNC1(count++); }
"""


@pytest.fixture(scope="module")
def program() -> lk.Program:
    """A guest that counts and tells."""
    return lk.Program.compile(SOURCE)


@pytest.fixture
def make(program: lk.Program) -> Iterator[Make]:
    """Makes protected VMs of it and closes them."""
    made: list[lk.Vm] = []

    def create(kind: str = "sev", **options: Any) -> lk.Vm:
        made.append(lk.Vm.create(program, protect=kind, **options))
        return made[-1]

    yield create
    for vm in made:
        vm.close()


@pytest.fixture
def count_gva(program: lk.Program) -> int:
    """Where the guest counts."""
    return program.symbol("count").gva


def range_at(vm: lk.Vm, gpa: int) -> EncryptionRange:
    """The part of the map that holds a gpa."""
    part = vm.encryption_map().at(gpa)
    assert part is not None
    return part


# --- eyes


def test_that_eyes_take_either_address(make: Make, count_gva: int) -> None:
    vm = make()
    gpa = vm.machine.space.walk(count_gva).require()
    assert vm.eyes(gva=count_gva).gpa == vm.eyes(gpa).gpa == gpa & -4096


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        ({}, lk.InvalidState, "neither"),
        ({"gpa": 0, "gva": 0}, lk.InvalidState, "both"),
        ({"gva": 0x1234}, lk.PageFault, "gva 0x1234"),
        ({"gpa": 1 << 39}, lk.MemoryFault, "gpa 0x8000000000"),
    ],
)
def test_that_eyes_need_one_address_where_memory_is(
    make: Make, where: dict[str, int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make().eyes(**where)


# --- the launch


def test_that_a_refusal_behind_measured_pages_is_told(make: Make) -> None:
    vm = make("snp", launch=False)
    vm.guest.start()
    first = next(iter(vm.guest.protected.ranges()))[0] * 4096
    vm.guest.command("SNP_LAUNCH_UPDATE", gpa=first + 4096, size=4096)
    with pytest.raises(lk.LabError, match="private already"):
        vm.guest.command("SNP_LAUNCH_UPDATE", gpa=first, size=3 * 4096)
    progress = vm.launch_progress()
    assert [step.gpa for step in progress.steps[2:]] == [first + 4096, first, None]
    assert "private already" in progress.status


# --- the map


@pytest.mark.parametrize("kind", ["sev", "tdx"])
@pytest.mark.parametrize("runs", [False, True], ids=["launched", "written"])
def test_that_the_map_follows_pages_that_a_host_exchanged(
    make: Make, count_gva: int, kind: str, runs: bool
) -> None:
    vm = make(kind)
    if runs:
        vm.run()
    private = vm.machine.space.walk(count_gva).require()
    shared = vm.pool.gpa
    attacks.remap(vm, private, shared)
    assert "never launched" in range_at(vm, private).problem
    assert "memory still ciphertext" in range_at(vm, shared).problem
    attacks.remap(vm, private, shared)
    assert not vm.encryption_map().disagreements


def test_that_a_received_guest_is_encrypted_on_the_map(make: Make) -> None:
    source, target = make(), make(launch=False)
    session = source.guest.command("SEND_START", pdh=target.guest.host.psp.pdh)
    target.guest.command("RECEIVE_START", pdh=source.guest.host.psp.pdh, session=session)
    for pfn, count in source.guest.protected.ranges():
        for spa in range(4096 * pfn, 4096 * (pfn + count), 4096):
            header, data = source.guest.command("SEND_UPDATE_DATA", spa=spa, size=4096)
            target.guest.command("RECEIVE_UPDATE_DATA", spa=spa, header=header, data=data)
    target.guest.command("RECEIVE_FINISH")
    assert not target.encryption_map().disagreements
    assert target.run().args[0] == 7  # type: ignore[union-attr]
    with target.fork() as twin:
        assert not twin.encryption_map().disagreements


def test_that_a_secret_is_encrypted_on_the_map(make: Make) -> None:
    vm = make(launch=False)
    gpa = vm.gva2gpa(vm.alloc(4096, kind="secret"))
    vm.mem_set_shared(gpa, 4096)
    vm.guest.start()
    vm.guest.update()
    vm.guest.command("LAUNCH_MEASURE", size=48)
    assert "plaintext" in range_at(vm, gpa).problem
    vm.guest.command("LAUNCH_SECRET", spa=gpa, **vm.guest.wrap_secret(bytes(range(256)) * 16))
    assert not vm.encryption_map().disagreements
    assert vm.eyes(gpa=gpa).private
