"""A protected VM in a person's hands: its settings, its launch step by step, one page through two eyes, and the live dashboard."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from paths import GUESTS

import labkit as lk
from labkit.arch.x86_cpu import CpuModel
from labkit.engines.exits import MemoryFaultExit
from labkit.explore import attacks
from labkit.hosts.buttons import VmController
from labkit.sev.cpu import LEAF, encryption_leaf
from labkit.views import dashboard, launch
from labkit.views.scene import walked

KINDS = ("sev", "sev-es", "snp", "tdx")
Make = Callable[..., lk.Vm]


@cache
def program() -> lk.Program:
    """A guest that counts and tells."""
    return lk.Program.compile("""#include "labkit.h"
static volatile uint64_t count = 7;
void guest_code(void) { for (;;) GUEST_SYNC1(count++); }
static volatile uint64_t left[512] __aligned(4096) = {1}, right[512] __aligned(4096) = {2};
void guest_pages(void) { for (;;) GUEST_SYNC2(left[0], right[0]); }
""")


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes VMs of it and closes them."""
    made = list[lk.Vm]()

    def create(kind: str | None = "sev", **options: Any) -> lk.Vm:
        made.append(lk.Vm.create(program(), protect=kind, **options))
        return made[-1]

    yield create
    for vm in made:
        vm.close()


def count_gpa(vm: lk.Vm) -> int:
    """Where the guest counts."""
    return int(vm.machine.space.walk(program().symbol("count").gva).require())


# --- settings


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"policy": 0}, "policy=0"),
        ({"c_bit": 47}, "c_bit=47"),
        ({"launch": False}, "launch=False"),
        ({"policy": 1, "launch": False}, "policy=1 and launch=False"),
    ],
)
def test_that_settings_of_encryption_are_refused_without_it(
    make: Make, setting: dict[str, Any], says: str
) -> None:
    with pytest.raises(lk.InvalidState, match=f"{says}: only an encrypted guest has that"):
        make(None, **setting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c_bit", [32, 40, 47, 51])
def test_that_the_encryption_bit_is_where_one_wants_it(make: Make, kind: str, c_bit: int) -> None:
    vm = make(kind, c_bit=c_bit)
    assert vm.run().args[0] == 7 and vm.machine.space.mode.c_bit == c_bit  # type: ignore[union-attr]
    gva = program().symbol("count").gva
    assert bool(vm.page_table().walk(gva).steps[-1].entry >> c_bit & 1) == (kind != "tdx")
    twin = vm.fork()
    assert twin.machine.space.mode.c_bit == c_bit and twin.run().args[0] == 8  # type: ignore[union-attr]
    twin.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c_bit", [-1, 0, 11, 52, 63, 64])
def test_that_a_bit_that_no_frame_number_has_is_refused(make: Make, kind: str, c_bit: int) -> None:
    with pytest.raises(lk.InvalidState, match=f"{c_bit}"):
        make(kind, c_bit=c_bit)


def test_that_cpuid_and_the_setting_must_agree(make: Make) -> None:
    cpu = CpuModel()
    cpu.cpuid[LEAF, 0] = encryption_leaf("sev", 47)
    with pytest.raises(
        lk.InvalidState, match="c_bit=51, but CPUID 0x8000001f of the CPU model says 47"
    ):
        make(cpu=cpu, c_bit=51)
    assert make(cpu=cpu, c_bit=47).machine.space.mode.c_bit == 47


# --- a launch that is not finished


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_that_a_guest_runs_only_when_its_launch_is_finished(
    make: Make, kind: str, steps: int
) -> None:
    vm = make(kind, launch=False)
    for step in (vm.guest.start, vm.guest.update)[:steps]:
        step()
    for run in (
        vm.run,
        vm.run_until_done,
        vm.vcpus[0].run,
        vm.vcpus[0].step,
        vm.vcpus[0].step_line,
    ):
        with pytest.raises(
            lk.InvalidState,
            match=f"KVM_RUN of vCPU 0: this {kind} guest is in state {vm.guest.state.name}",
        ):
            run()
    assert (
        vm.vcpus[0].state == "not started"
        and vm.step == 0
        and "run" not in VmController(vm).actions
    )
    (vm.launch, lambda: (vm.guest.update(), vm.guest.finish()), vm.guest.finish)[steps]()
    assert vm.run().args[0] == 7 and "run" in VmController(vm).actions  # type: ignore[union-attr]


def test_that_commands_by_hand_are_a_launch_too(make: Make) -> None:
    vm = make(launch=False)
    assert vm.machine.plain(count_gpa(vm), 8) == vm.memory.read(count_gpa(vm), 8), (
        "there is no key yet"
    )
    vm.guest.command("LAUNCH_START", policy=1)
    assert (
        vm.machine.plain(count_gpa(vm), 8) != vm.memory.read(count_gpa(vm), 8)
        and vm.guest.policy == 1
    )
    vm.guest.update()
    vm.guest.finish()
    assert vm.launch_progress().policy == 1 and vm.run().args[0] == 7  # type: ignore[union-attr]


# --- snapshots


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_snapshot_of_another_shape_leaves_the_guest_launched(make: Make, kind: str) -> None:
    vm, other = make(kind), make(kind, nr_vcpus=2)
    with pytest.raises(lk.InvalidState, match="not of this one"):
        vm.restore(other.snapshot())
    assert vm.guest.launched and vm.guest.why_sealed and vm.run().args[0] == 7  # type: ignore[union-attr]
    if kind == "snp":
        with pytest.raises(lk.InvalidState, match="host write"):
            vm.memory.write(count_gpa(vm), b"x")


@pytest.mark.parametrize("other", [("snp", None), (None, None), ("sev", 50)])
def test_that_a_snapshot_of_another_protection_is_refused(
    make: Make, other: tuple[str | None, int | None]
) -> None:
    kind, c_bit = other
    vm, state = make("sev"), make(kind, c_bit=c_bit).snapshot()
    with pytest.raises(lk.InvalidState, match="the snapshot is of one with"):
        vm.restore(state)


def test_that_a_snapshot_goes_back_into_pages_that_the_rmp_guards(make: Make) -> None:
    vm = make("snp")
    state, first = vm.snapshot(), [vm.run() for _ in range(3)]
    vm.restore(state)
    assert [vm.run() for _ in range(3)] == first


# --- paths of the host


def test_that_a_view_of_memory_is_guarded_as_a_write(make: Make) -> None:
    vm = make("snp")
    with pytest.raises(lk.InvalidState, match=f"host write to gpa {count_gpa(vm):#x}"):
        vm.memory.view(count_gpa(vm), 8)
    vm = make("sev")
    vm.run()
    assert bytes(vm.memory.view(count_gpa(vm), 16)) == vm.memory.read(count_gpa(vm), 16), (
        "what the guest wrote is encrypted first"
    )


# --- the dashboard


@pytest.mark.parametrize("kind", KINDS)
def test_that_the_dashboard_has_the_three_views_and_a_plain_vm_has_not(
    make: Make, kind: str
) -> None:
    seen = [dashboard.render(VmController(vm).snapshot()) for vm in (make(kind), make(None))]
    extra = {"problems", "dump", "blocks", "words", "states", "owner"}
    assert (
        extra <= set(seen[0].panes)
        and not extra & set(seen[1].panes)
        and "each page twice" in seen[0].panes["memory"]
    )
    assert (
        f"{kind.upper()}, {'S' if kind == 'tdx' else 'C'}-bit" in seen[0].panes["title"]
        and "RUNNING" in seen[0].panes["title"]
    )


def test_that_one_selection_goes_through_strip_walk_and_eyes(make: Make) -> None:
    vm = make()
    vm.run()
    control, gpa = VmController(vm), count_gpa(vm)
    control.act("select", kind="block", value=gpa)
    seen = control.snapshot()
    assert seen.selection is not None and seen.eyes is not None
    assert (seen.selection.gpa, seen.selection.size, seen.eyes.gpa) == (gpa & -16, 16, gpa & -4096)
    panes = dashboard.render(seen).panes
    assert (
        f"gpa {gpa & -16:#x}" in panes["rail"]
        and "c-sel" in panes["memory"]
        and 'class="sel"' in panes["dump"]
    )
    assert walked(seen).gpa == gpa & -16


def test_that_what_the_guest_wrote_is_marked_in_both_eyes_and_only_on_the_same_page(
    make: Make,
) -> None:
    vm = make()
    control = VmController(vm)
    control.act("select", kind="page", value=count_gpa(vm))
    before = control.snapshot()
    vm.run()
    assert 'class="cb"' in dashboard.render(control.snapshot(), before).panes["dump"]
    control.act("select", kind="page", value=vm.pool.gpa)
    assert 'class="cb"' not in dashboard.render(control.snapshot(), before).panes["dump"]


@pytest.mark.parametrize("kind", KINDS)
def test_that_without_a_selection_it_shows_a_page_that_disagrees_else_the_stack(
    make: Make, kind: str
) -> None:
    vm = make(kind)
    vm.run()
    control, gpa = VmController(vm), count_gpa(vm)
    assert control.snapshot().eyes.what == "stack of vCPU 0"  # type: ignore[union-attr]
    assert walked(control.snapshot()).gpa is not None, "sealed or not, the walk ends at a page"
    attacks.flip_c_bit(vm, program().symbol("count").gva)
    assert control.snapshot().eyes.gpa == gpa & -4096  # type: ignore[union-attr]
    assert "disagree" in dashboard.render(control.snapshot(), kind="encryption").panes["title"]


# --- live


@pytest.mark.parametrize("kind", dashboard.SECRETS)
def test_that_a_plain_vm_has_no_such_widget(make: Make, kind: str) -> None:
    with pytest.raises(lk.InvalidState, match="not protected"):
        make(None).show(kind)


def test_that_a_view_that_does_not_exist_leaves_nothing_to_clean_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    lost = list[Any]()
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with pytest.raises(lk.InvalidState, match="no view 'nope'"):
        make().show("nope")
    gc.collect()
    assert not lost


@pytest.mark.parametrize("kind", [*dashboard.SECRETS, "vm"])
def test_that_every_live_view_of_a_protected_vm_has_its_panes(make: Make, kind: str) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    made = make("snp").show(kind)
    wanted = [name.split('"')[0] for name in made.layout_html.split('data-pane="')[1:]]
    assert {"dump", "states", "memory"} & set(wanted) and all(
        f"pane_{name}" in made.get_state() for name in wanted
    )


def test_that_a_live_launch_follows_each_command(make: Make) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    vm = make(launch=False)
    made, seen = vm.show("launch"), list[str]()
    for step in (vm.guest.start, vm.guest.update, vm.guest.finish):
        step()
        vm._hub.settle()  # as when a cell ends
        seen.append(made.pane_status.split(">")[1].split(":")[0])
    assert (
        seen == ["LAUNCH_UPDATE", "LAUNCH_UPDATE", "RUNNING"]
        and "pages measured" in made.pane_title
    )


def test_that_a_live_view_follows_an_attack_and_a_click_on_a_block(make: Make) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    vm = make()
    gpa, made = count_gpa(vm), vm.show("eyes")
    made._receive(made, {"act": "select", "kind": "page", "value": gpa >> 12}, [])
    attacks.flip_ciphertext_bit(vm, gpa)
    vm._hub.settle()
    assert 'class="cb"' in made.pane_dump
    made._receive(made, {"act": "select", "kind": "block", "value": 255, "arg": "1"}, [])
    assert f"gpa {(gpa & -4096) + 4080:#x}" in made.pane_rail and 'class="ad">ff0' in made.pane_dump


def test_that_the_owner_brings_a_secret_into_the_launch_that_was_measured(make: Make) -> None:
    vm = make(launch=False)
    with pytest.raises(lk.InvalidState, match="UNINIT has no measurement"):
        vm.guest.wrap_secret(bytes(16))
    gpa = count_gpa(vm)
    vm.guest.start()
    vm.guest.update()
    digest, beside = vm.launch_progress().digest, vm.machine.plain(gpa + 8, 8)
    vm.guest.command("LAUNCH_MEASURE", size=48)
    vm.guest.command(
        "LAUNCH_SECRET", spa=gpa, **vm.guest.wrap_secret((41).to_bytes(8, "little") + beside)
    )
    vm.guest.finish()
    assert vm.run().args[0] == 41 and vm.launch_progress().digest == digest  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("attack", "kind", "says"),
    [
        (lambda vm: attacks.flip_ciphertext_bit(vm, count_gpa(vm), 8), "sev", "bits 0 to 7, not 8"),
        (lambda vm: attacks.flip_c_bit(vm, program().symbol("count").gva), None, "not protected"),
        (lambda vm: attacks.flip_c_bit(vm, 0x1234_5000), "sev", "gva 0x12345000 is not mapped"),
        (lambda vm: attacks.remap(vm, 0x2000, 0x3000), None, "not protected"),
        (lambda vm: attacks.remap(vm, 0x2000, 1 << 39), "sev", "not both lie in memslots"),
    ],
)
def test_that_an_attack_on_nothing_says_so(
    make: Make, attack: Callable[[lk.Vm], None], kind: str | None, says: str
) -> None:
    with pytest.raises(lk.InvalidState, match=says):
        attack(make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_remapped_page_is_read_well_at_the_wrong_place_and_only_snp_stops_it(
    make: Make, kind: str
) -> None:
    vm = make(kind, entry="guest_pages")
    assert vm.run().args[:2] == (1, 2)  # type: ignore[union-attr]
    state, (left, right) = (
        vm.snapshot(),
        (
            int(vm.machine.space.walk(program().symbol(name).gva).require())
            for name in ("left", "right")
        ),
    )
    attacks.remap(vm, left, right)
    came = vm.vcpus[0].run(100_000)
    if kind == "snp":
        assert (
            isinstance(came, MemoryFaultExit)
            and f"belongs at gpa {right:#x}, the nested table has it at {left:#x}" in came.why
        )
        assert "another's page" in vm.encryption_map().at(left).problem
    else:
        assert came.args[:2] == (2, 1)  # type: ignore[union-attr]
    twin = vm.fork()
    assert twin.guest.nested.spa(left + 5) == right + 5 and twin.guest.nested.gpa(right) == left
    twin.close()
    vm.restore(state)
    assert vm.run().args[:2] == (1, 2) and vm.guest.nested.spa(left) == left  # type: ignore[union-attr]


def test_that_two_exchanges_are_none(make: Make) -> None:
    vm = make("snp")
    for _ in range(2):
        attacks.remap(vm, count_gpa(vm), 0x2000)
    assert vm.run().args[0] == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_pool_in_private_memory_is_noticed_at_the_first_ucall(make: Make, kind: str) -> None:
    vm = make(kind, launch=False)
    attacks.pool_in_private_memory(vm)
    vm.launch()
    assert "ciphertext" in vm.encryption_map().at(vm.pool.gpa).problem
    came = vm.vcpus[0].run(100_000)
    assert isinstance(came, MemoryFaultExit) if kind == "snp" else came.kind == "foreign"
    with pytest.raises(lk.InvalidState, match="after the launch"):
        attacks.pool_in_private_memory(vm)


def test_that_other_architectures_have_no_such_encryption() -> None:
    hello = lk.Program.load(GUESTS / "arm64" / "hello.elf")
    with pytest.raises(lk.NotAvailable, match="only x86-64 has it"):
        lk.Vm.create(hello, protect="sev")


def test_that_a_command_that_kvm_refused_is_marked_in_the_table(make: Make) -> None:
    vm = make("sev", launch=False)
    with pytest.raises(lk.LabError, match="ENOTTY"):
        vm.guest.command("LAUNCH_UPDATE_VMSA")
    vm.launch()
    view = launch.render(vm.launch_progress())
    assert (
        view.panes["steps"].count("✕ KVM") == view.panes["steps"].count('class="bad"') == 1
        and "refused by KVM: ENOTTY" in view.text
    )
    assert "1</b> refused" in view.panes["title"]


def test_that_the_secure_processor_finds_a_page_of_dram_wherever_the_host_put_it(
    make: Make,
) -> None:
    vm = make("sev", entry="guest_pages", launch=False)
    left, right = (vm.gva2gpa(program().symbol(name).gva) for name in ("left", "right"))
    attacks.remap(vm, left, right)
    vm.launch()
    assert vm.run().args[:2] == (2, 1)  # type: ignore[union-attr]
    before = vm.guest.command("DBG_DECRYPT", spa=left + 16, size=8192 - 32)
    attacks.remap(vm, left, right)
    assert vm.guest.command(
        "DBG_DECRYPT", spa=left + 16, size=8192 - 32
    ) == before and vm.run().args[:2] == (1, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("forked", [False, True])
def test_that_an_snp_launch_takes_pages_from_where_the_nested_table_has_them(
    make: Make, forked: bool
) -> None:
    vm = make("snp", launch=False)
    attacks.remap(vm, vm.gva2gpa(program().symbol("count").gva), vm.memory.slots[0].size - 4096)
    with vm.fork() if forked else vm as launched:
        launched.launch()
        assert launched.run().args[0] == 0, "the bytes went along"  # type: ignore[union-attr]
        assert not launched.encryption_map().disagreements


@pytest.mark.parametrize(
    ("gpa", "size"), [(1 << 41, 4096), (1 << 40, 4096), ((8 << 20) - 4096, 8192), (0, 1 << 50)]
)
def test_that_only_memory_can_be_private(make: Make, gpa: int, size: int) -> None:
    vm = make("sev-es", launch=False, memory=8 << 20)
    with pytest.raises(lk.InvalidState, match="no memslot holds all of it"):
        vm.mem_set_private(gpa, size)
