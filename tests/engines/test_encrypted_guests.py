"""Encrypted guests: they run as if nothing were, the host sees ciphertext through every path, and both views stay coherent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GUESTS, prebuilt_entries

import labkit as lk
from labkit.arch.x86_cpu import CpuModel
from labkit.explore import attacks
from labkit.sev.cpu import LEAF, encryption_leaf
from labkit.ucall.calls import BadUcallExit, Ucall

KINDS = ("sev", "snp", "tdx")
SOURCE = """#include "labkit.h"
void guest_code(uint64_t vcpu)
{
	static uint64_t secret = 0x1122334455667788;
	for (;;)
		GUEST_SYNC1(secret++);
}
void guest_write(uint64_t *where, uint64_t what) { *where = what; GUEST_DONE(); }
void guest_read(uint64_t *where) { GUEST_SYNC1(*where); }
void guest_calls(void (*where)(void)) { where(); }
"""
SHORT = """#include "labkit.h"
void guest_code(void) { GUEST_SYNC1(7); GUEST_DONE(); }
"""


@cache
def program() -> lk.Program:
    return lk.Program.compile(SOURCE)


@cache
def on_stack() -> lk.Program:
    """A guest that keeps its ucalls on its stack."""
    return lk.Program.compile(SHORT, defines=("LABKIT_UCALL_ON_STACK",))


def cpu(c_bit: int, kind: str = "sev") -> CpuModel:
    model = CpuModel()
    model.cpuid[LEAF, 0] = encryption_leaf(kind, c_bit)
    return model


def ucall(vm: lk.Vm) -> Ucall:
    """The next ucall."""
    came = vm.run(100_000)
    assert isinstance(came, Ucall), came
    return came


def log(vm: lk.Vm) -> list[tuple[object, ...]]:
    """What a guest did until its end."""
    try:
        vm.run_until_done(200_000)
    except lk.LabError as err:
        return [*events(vm), type(err).__name__]
    return events(vm)


def events(vm: lk.Vm) -> list[tuple[object, ...]]:
    return [(e.step, e.vcpu, e.kind, e.what) for e in vm.log.entries if e.kind != "bad-ucall"]


def entries() -> list[tuple[str, str]]:
    names = [path.stem for path in sorted(GUESTS.glob("*.elf"))]
    return [
        (name, entry)
        for name in names
        if name not in ("stack", "who")
        for entry in prebuilt_entries(name)
    ]


@pytest.mark.parametrize("kind", ["sev", "tdx"])
@pytest.mark.parametrize(("name", "entry"), entries())
def test_that_a_guest_does_the_same_encrypted_and_not(kind: str, name: str, entry: str) -> None:
    program = lk.Program.load(GUESTS / f"{name}.elf")
    with (
        lk.Vm.create(program, entry, nr_vcpus=2) as plain,
        lk.Vm.create(program, entry, nr_vcpus=2, protect=kind) as secret,
    ):
        assert log(plain) == log(secret)
        there, here = plain.page_table().leaves, secret.page_table().leaves
        assert here.c.any()
        assert there.drop(columns="entry").equals(here.drop(columns=["entry", "c"])), (
            "accessed and dirty bits too"
        )


@pytest.mark.parametrize("c_bit", [33, 45, 47, 50, 51])
def test_that_the_c_bit_is_where_cpuid_says(c_bit: int) -> None:
    with lk.Vm.create(program(), protect="sev", cpu=cpu(c_bit)) as vm:
        assert ucall(vm).args[0] == 0x1122334455667788
        leaf = vm.page_table().walk(program().symbol("guest_code").gva).steps[-1].entry
        assert (
            leaf >> c_bit & 1
            and vm.machine.space.mode.frame(vm.arch.mode.levels[-1], leaf) < 1 << 23
        )
        assert attacks.walk_without_mask(vm, program().symbol("guest_code").gva).gpa in (
            leaf & (1 << 52) - 4096,
            None,
        )


def private_and_shared(vm: lk.Vm) -> tuple[list[int], list[int]]:
    pages = [
        gpa + at
        for gpa, nr in ((part.gpa, part.nr_pages) for part in vm.memory_map().ranges)
        for at in range(0, 4096 * nr, 4096)
    ]
    return [p for p in pages if vm.machine.space.is_protected(p)], [
        p for p in pages if not vm.machine.space.is_protected(p)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_that_the_host_sees_ciphertext_of_every_private_page_and_plaintext_of_every_shared_one(
    kind: str,
) -> None:
    with lk.Vm.create(program(), protect=kind) as vm:
        ucall(vm)
        private, shared = private_and_shared(vm)
        assert len(private) > 10 and len(shared) == 138 + (kind == "snp")  # and a GHCB
        for gpa in private:
            host, guest = vm.memory.read(gpa, 4096), vm.machine.plain(gpa, 4096)
            assert host != guest and vm.guest.vm.cipher.decrypt(gpa, host) == guest
            assert not any(host[at : at + 16] == guest[at : at + 16] for at in range(0, 4096, 16))
        for gpa in shared:
            assert vm.eyes(gpa).host == vm.eyes(gpa).guest
        raw = b"".join(bytes(slot.data[:]) for slot in vm.memory.slots)
        assert (0x1122334455667788).to_bytes(8, "little") not in raw.replace(
            vm.memory.read(vm.pool.gpa, 1 << 12), b""
        )


REFUSED = {
    "gva2gpa": lambda vm: vm.gva2gpa(0x400000),
    "read": lambda vm: vm.read(0x400000, 4),
    "write": lambda vm: vm.write(0x400000, b"x"),
    "vcpu.read": lambda vm: vm.vcpus[0].read(0x400000, 4),
    "alloc": lambda vm: vm.alloc(4096),
    "alloc_shared": lambda vm: vm.alloc_shared(1),
    "write_guest_global": lambda vm: vm.write_guest_global("ucall_pool", 0),
    "launch": lk.Vm.launch,
    "sync_global_to_guest": lambda vm: vm.sync_global_to_guest("ucall_pool"),
    "add_vcpu": lambda vm: vm.add_vcpu("guest_code"),
    "sync_global_from_guest": lambda vm: vm.sync_global_from_guest("ucall_pool"),
    "private": lambda vm: vm.mem_set_private(0x2000, 4096),
    "handler": lambda vm: vm.install_exception_handler(14, "guest_code"),
    "shared": lambda vm: vm.mem_set_shared(0x2000, 4096),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", REFUSED)
def test_that_what_needs_the_guest_s_page_tables_is_refused_after_the_launch_and_says_why(
    kind: str, what: str
) -> None:
    with lk.Vm.create(program(), protect=kind) as vm:
        ucall(vm)
        with pytest.raises(lk.LabError, match=r"ciphertext|launch|GUEST_STATE|ACTIVE|EINVAL|EIO"):
            REFUSED[what](vm)
        assert ucall(vm).args[0] == 0x1122334455667789, "and the guest goes on"


def test_that_what_was_never_launched_is_noise_to_the_guest() -> None:
    with lk.Vm.create(program(), protect="sev", launch=False) as vm:
        gva = vm.alloc(4096)
        gpa = vm.gva2gpa(gva)
        vm.memory.write(gpa, b"A" * 4096)
        vm.mem_set_shared(gpa, 4096)
        vm.launch()
        assert vm.encryption_map().at(gpa).problem and vm.memory.read(gpa, 16) == b"A" * 16
        assert vm.vcpus[0].peek(gva, 16) != b"A" * 16


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_snapshot_and_a_fork_go_on_alike(kind: str) -> None:
    with lk.Vm.create(program(), protect=kind) as vm:
        ucall(vm)
        state, first = vm.snapshot(), [ucall(vm).args[0] for _ in range(3)]
        with vm.fork() as twin:
            after = [ucall(twin).args[0] for _ in range(3)]
            vm.restore(state)
            assert first == [ucall(vm).args[0] for _ in range(3)] and after == [
                value + 3 for value in first
            ]
            assert (
                twin.guest.measurement == vm.guest.measurement
                and twin.encryption_map().ranges == vm.encryption_map().ranges
            )
            private, _ = private_and_shared(vm)
            assert all(
                twin.guest.vm.cipher.decrypt(gpa, twin.memory.read(gpa, 4096))
                == twin.machine.plain(gpa, 4096)
                for gpa in private
            )


def secret_page(vm: lk.Vm) -> int:
    return vm.machine.space.walk(program().symbol("guest_code").gva).gpa & -4096


def garbled(vm: lk.Vm, gpa: int, before: bytes) -> list[int]:
    """The blocks of a page that the guest sees otherwise than before."""
    now = vm.machine.plain(gpa, 4096)
    return [at // 16 for at in range(0, 4096, 16) if now[at : at + 16] != before[at : at + 16]]


@pytest.mark.parametrize("kind", KINDS)
def test_that_attacks_do_what_the_protection_allows(kind: str) -> None:
    with lk.Vm.create(program(), protect=kind) as vm:
        ucall(vm)
        gpa = secret_page(vm)
        plain, old, beside = (
            vm.machine.plain(gpa, 4096),
            vm.memory.read(gpa, 4096),
            vm.machine.plain(gpa + 4096, 4096),
        )
        tries = {
            "flip": lambda: attacks.flip_ciphertext_bit(vm, gpa + 100, 3),
            "move": lambda: attacks.move_ciphertext(vm, gpa + 4096, gpa),
            "replay": lambda: attacks.replay(vm, gpa, old),
            "remap": lambda: attacks.remap(vm, gpa, gpa + 4096),
        }
        wanted = {
            "flip": [6],
            "move": list(range(256)),
            "replay": [],
            "remap": garbled(vm, gpa + 4096, plain),
        }
        for name, attack in tries.items():
            if kind == "snp" and name != "remap":
                with pytest.raises(lk.InvalidState, match="GUEST_VALID"):
                    attack()
                assert not garbled(vm, gpa, plain)
                continue
            attack()
            assert garbled(vm, gpa, plain) == wanted[name], name
            if name == "remap":
                assert vm.machine.plain(gpa, 4096) == beside, (
                    "each page decrypts well at the wrong place"
                )


def test_that_a_c_bit_turned_around_shows_the_guest_its_own_ciphertext() -> None:
    with lk.Vm.create(program(), protect="sev") as vm:
        ucall(vm)
        gva = program().symbol("ucall_pool").gva
        seen = vm.memory.read(vm.machine.space.walk(gva).gpa, 8)
        attacks.flip_c_bit(vm, gva)
        assert vm.vcpus[0].peek(gva, 8) == seen
        bad = vm.encryption_map().disagreements
        assert len(bad) == 1 and bad[0].gpa == vm.machine.space.walk(gva).gpa & -4096


def test_that_code_in_shared_memory_is_never_run_as_plaintext() -> None:
    with lk.Vm.create(program(), "guest_calls", protect="sev", launch=False) as vm:
        gva = vm.machine.space.alloc(4096, "shared code", nx=False, protected=False)
        vm.write(gva, b"\xc3" * 4096)  # ret
        vm.vcpus[0].args_set(gva)
        vm.launch()
        came = vm.run(2000)
        assert (
            vm.memory.read(vm.machine.space.walk(gva).gpa, 4) == b"\xc3" * 4
            and str(came)
            and vm.events.kind.iloc[0] != "ucall"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_launch_step_by_step_is_a_launch(kind: str) -> None:
    with (
        lk.Vm.create(program(), protect=kind, launch=False) as vm,
        lk.Vm.create(program(), protect=kind) as twin,
    ):
        vm.guest.start()
        assert vm.gva2gpa(program().symbol("guest_code").gva), "no page table is encrypted yet"
        vm.guest.update()
        with pytest.raises(lk.InvalidState, match="its page tables are ciphertext"):
            vm.gva2gpa(program().symbol("guest_code").gva)
        assert vm.guest.finish() == twin.guest.measurement and vm.run() == twin.run()
        assert vm.encryption_map().ranges == twin.encryption_map().ranges


def test_that_a_measurement_made_by_hand_is_the_one_that_counts() -> None:
    with lk.Vm.create(program(), protect="sev", launch=False) as vm:
        vm.guest.start()
        vm.guest.update()
        blob = vm.guest.command("LAUNCH_MEASURE", size=48)
        vm.guest.command("LAUNCH_FINISH")
        assert (
            vm.guest.launched
            and blob == vm.guest.measurement
            and vm.run().args[0] == 0x1122334455667788
        )


def test_that_the_owner_expects_what_was_launched_and_nothing_else() -> None:
    with lk.Vm.create(program(), protect="sev", launch=False) as vm:
        with pytest.raises(lk.InvalidState, match="UNINIT has no measurement"):
            vm.guest.expected(bytes(32))
        vm.launch()
        digest = vm.launch_progress().digest
        assert vm.guest.expected(digest) == vm.guest.measurement
        assert vm.guest.measurement not in (
            vm.guest.expected(bytes(32)),
            vm.guest.expected(digest, policy=1),
        )


def test_that_the_guest_s_eye_sees_noise_from_the_key_to_the_encryption() -> None:
    with lk.Vm.create(program(), protect="sev", launch=False) as vm:
        gpa = secret_page(vm)
        before = vm.eyes(gpa)
        vm.guest.start()
        between = vm.eyes(gpa)
        vm.guest.update()
        after = vm.eyes(gpa)
        assert (
            before.host == before.guest == between.host == after.guest
            and len({before.guest, between.guest, after.host}) == 3
        )


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_that_a_ucall_on_the_stack_is_readable_only_where_nothing_is_encrypted(
    kind: str | None,
) -> None:
    with lk.Vm.create(on_stack(), ucall="stack", protect=kind) as vm:
        if kind is None:
            assert [uc.cmd for uc in vm.run_until_done()] == ["SYNC", "DONE"] and vm.fork().vcpus[
                0
            ].state == "done"
        else:
            came = vm.run()
            assert (
                isinstance(came, BadUcallExit)
                and came.kind == "unreadable"
                and "ciphertext" in came.why
                and "PML4" in came.why
            )
            with pytest.raises(lk.GuestCrashed, match="unreadable"):
                vm.run_until_done()


@pytest.mark.parametrize(
    ("compiled", "design"), [(on_stack, "pool"), (program, "stack"), (program, "list")]
)
def test_that_a_program_for_another_design_is_refused(
    compiled: Callable[[], lk.Program], design: str
) -> None:
    with pytest.raises(lk.LabError, match=r"design|pool, stack"):
        lk.Vm.create(compiled(), ucall=design)


@pytest.mark.parametrize("wrong", ["sev2", "", "SEV"])
def test_that_there_is_no_other_protection(wrong: str) -> None:
    with pytest.raises(lk.NotAvailable, match="sev, sev-es, snp, tdx"):
        lk.Vm.create(program(), protect=wrong)


# --- the two views against a model: DRAM and a key

OFFSETS = st.integers(0, 511).map(lambda word: 8 * word)
Act = tuple[str, bool, int, int, int]
ACTS = st.lists(
    st.tuples(
        st.sampled_from(("guest private", "guest shared", "host")),
        st.booleans(),
        st.integers(0, 1),
        OFFSETS,
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=25,
)
ALIAS = 0x700000


@pytest.fixture(scope="module")
def two_views() -> lk.Vm:
    """Two pages, each mapped privately at one gva and shared at another; launched, all zeros."""
    vm = lk.Vm.create(program(), "guest_write", protect="sev", launch=False)
    gva = vm.alloc(2 * 4096)
    vm.machine.space.map(ALIAS, vm.gva2gpa(gva), 2, c=False)
    vm.launch()
    vm.places = gva, vm.machine.space.walk(gva).gpa  # type: ignore[attr-defined]
    return vm


def guest(vm: lk.Vm, entry: str, *args: int) -> int:
    vm.memory.write(
        vm.pool.gpa, bytes(64)
    )  # a guest that is never entered again keeps its slot, and there are 512
    vm.vcpus[0].set_entry(entry)
    vm.vcpus[0].args_set(*args)
    return int(vm.vcpus[0].run(5000).args[0])  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(acts=ACTS)
def test_that_the_views_stay_coherent_whoever_writes_through_whichever(
    two_views: lk.Vm, acts: list[Act]
) -> None:
    vm, (gva, gpa) = two_views, two_views.places  # type: ignore[attr-defined]
    cipher, dram = vm.guest.vm.cipher, bytearray(vm.memory.read(gpa, 8192))
    for who, writes, page, offset, value in acts:
        at, block = 4096 * page + offset, (4096 * page + offset) & -16
        plain = bytearray(cipher.decrypt(gpa + block, dram[block : block + 16]))
        word = value.to_bytes(8, "little")
        if who == "host":
            if writes:
                vm.memory.write(gpa + at, word)
                dram[at : at + 8] = word
            assert vm.memory.read(gpa + at, 8) == dram[at : at + 8]
        elif who == "guest shared":
            if writes:
                guest(vm, "guest_write", ALIAS + at, value)
                dram[at : at + 8] = word
            assert guest(vm, "guest_read", ALIAS + at) == int.from_bytes(
                dram[at : at + 8], "little"
            )
        else:
            if writes:
                guest(vm, "guest_write", gva + at, value)
                plain[at - block : at - block + 8] = word
                dram[block : block + 16] = cipher.encrypt(gpa + block, plain)
            assert guest(vm, "guest_read", gva + at) == int.from_bytes(
                plain[at - block : at - block + 8], "little"
            )
    assert vm.memory.read(gpa, 8192) == dram and vm.machine.plain(gpa, 8192) == cipher.decrypt(
        gpa, dram
    )
