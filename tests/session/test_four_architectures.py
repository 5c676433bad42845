"""One guest source on every architecture: ucalls, stepping, page tables, exceptions, snapshots; each test runs for all of them."""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import cache

import pytest
from paths import GUESTS

import labkit as lk
from labkit.arch import ARCHES, find_arch
from labkit.cli import main
from labkit.engines.disasm import disassemble
from labkit.engines.exits import BudgetExit, DebugExit
from labkit.errors import ElfError, GuestAssertFailed, GuestCrashed, InvalidState
from labkit.look.touch import operands
from labkit.ucall.calls import Ucall

SOURCE = """
#include "labkit.h"
volatile uint64_t counter;
uint8_t page[3][4096] __attribute__((aligned(4096)));
int32_t number = -5;
volatile uint64_t caught, at;

void guest_code(uint64_t vcpu)
{
	GUEST_SYNC_ARGS(vcpu, 1, 2, 3, 4);
	number += 3;
	GUEST_PRINTF("vCPU %lu says %s %d %#x", vcpu, "hello", number, 0xabc);
	GUEST_DONE();
}
void guest_assert(uint64_t vcpu) { GUEST_ASSERT_EQ(number, 7); GUEST_DONE(); }
void guest_count(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		__atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
	GUEST_DONE();
}
void guest_loop(uint64_t n)
{
	uint64_t sum = 1;
	for (uint64_t i = 0; i < n; i++)
		sum = sum * 3 + i;
	GUEST_SYNC1(sum);
	GUEST_DONE();
}
void guest_nothing(void) { for (;;) __asm__ volatile(""); }
void guest_spin(void) { for (;;) counter = counter + 1; }
void guest_touch(uint64_t index) { page[index][8] = 1; GUEST_DONE(); }
void guest_read(uint64_t gva) { counter = *(volatile uint8_t *)gva; GUEST_DONE(); }
void guest_jump(uint64_t gva) { ((void (*)(void))gva)(); GUEST_DONE(); }
void guest_undefined(void)
{
#if defined(__x86_64__)
	__asm__ volatile("ud2");
#elif defined(__aarch64__)
	__asm__ volatile("udf #0");
#elif defined(__riscv)
	__asm__ volatile(".word -1");
#else
	__asm__ volatile(".short 0");
#endif
	GUEST_DONE();
}
#if defined(__x86_64__)
#define PC(regs) regs->rip
#define SKIP 2
#elif defined(__aarch64__)
#define PC(regs) regs->pc
#define SKIP 4
#elif defined(__riscv)
#define PC(regs) regs->epc
#define SKIP 4
#else
#define PC(regs) regs->psw_addr /* of an undefined instruction: behind it */
#define SKIP 0
#endif
void handler(struct ex_regs *regs) { caught++; at = PC(regs); GUEST_DONE(); }
void skipper(struct ex_regs *regs) { caught++; at = PC(regs); PC(regs) += SKIP; }
"""


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@cache
def program(arch: str) -> lk.Program:
    return lk.Program.compile(SOURCE, arch=arch, name="four.c")


def vm_of(arch: str, entry: str = "guest_code", *args: int, **options) -> lk.Vm:
    vm = lk.Vm.create(program(arch), entry, **options)
    if args:
        vm.vcpus[0].args_set(*args)
    return vm


def test_that_a_guest_says_the_same_on_every_architecture(arch):
    vm = vm_of(arch, nr_vcpus=2, schedule="sequential")
    said = [
        (u.vcpu, u.cmd, u.args[1:6] if u.cmd == "SYNC" else u.text) for u in vm.run_until_done()
    ]
    assert said == [
        (0, "SYNC", (0, 1, 2, 3, 4)),
        (0, "PRINTF", "vCPU 0 says hello -2 0xabc"),
        (0, "DONE", None),
        (1, "SYNC", (1, 1, 2, 3, 4)),
        (1, "PRINTF", "vCPU 1 says hello 1 0xabc"),
        (1, "DONE", None),
    ]
    assert vm.sync_global_from_guest("number") == 1


def test_that_an_assertion_names_its_line(arch):
    with pytest.raises(
        GuestAssertFailed, match=r"number == 7: found 0xfffffffffffffffb and 0x7 \(four.c:15\)"
    ):
        vm_of(arch, "guest_assert").run_until_done()


def test_that_globals_go_both_ways(arch):
    vm = vm_of(arch)
    vm.host_globals["number"] = -1000
    vm.sync_global_to_guest("number")
    vm.run_until_done()
    assert (vm.sync_global_from_guest("number"), vm.host_globals["number"]) == (-997, -997)
    vm.write_guest_global("counter", 1 << 63)
    assert vm.sync_global_from_guest("counter") == 1 << 63


def test_that_every_global_keeps_its_sign(arch):
    """Where LLVM merges globals, on riscv64, DWARF gives all but the first as an offset."""
    sizes = (8, 16, 32, 64)
    text = "".join(f"int{n}_t signed{n} = -1; uint{n}_t plain{n} = -1;\n" for n in sizes)
    uses = " ".join(f"signed{n}--; plain{n}--;" for n in sizes)
    vm = lk.Vm.create(
        lk.Program.compile(
            f'#include "labkit.h"\n{text}void guest_code(void) {{ {uses} GUEST_DONE(); }}',
            arch=arch,
        )
    )
    vm.run_until_done()
    assert [vm.sync_global_from_guest(f"signed{n}") for n in sizes] == [-2] * 4
    assert [vm.sync_global_from_guest(f"plain{n}") for n in sizes] == [(1 << n) - 2 for n in sizes]


def test_that_the_pool_shows_who_holds_what(arch):
    vm = vm_of(arch)
    vm.run()
    pool = vm.pool
    assert (
        pool.in_use.nonzero()[0].tolist() == [0]
        and pool.held[0].vcpu == 0
        and pool.held[0].hva_ok
        and pool.held[0].cmd == "SYNC"
    )
    assert 0 < pool.held[0].since < vm.step and pool.held[0].args[1:6] == (0, 1, 2, 3, 4)


def trace(vcpu, count: int, size: int) -> list[int]:
    """The program counter after each `size` instructions."""
    out = []
    for _ in range(count):
        came = vcpu.run(size)
        out.append((vcpu.pc, vcpu.step_count))
        assert isinstance(came, BudgetExit | Ucall)
    return out


def test_that_a_step_is_one_instruction_and_many_are_a_run(arch):
    """The independent witness is capstone: without a branch the next program counter is behind the instruction."""
    vcpu, twin = vm_of(arch).vcpus[0], vm_of(arch).vcpus[0]
    for _ in range(400):
        insn = vcpu.insn
        end, mnemonic, before = insn.gva + insn.size, insn.mnemonic, vcpu.step_count
        came = vcpu.step()
        assert vcpu.step_count == before + 1 and (came is None or isinstance(came, Ucall))
        if vcpu.pc != end:
            assert (
                mnemonic[0] in "bcrjt"
                or "ex" in mnemonic
                or mnemonic in ("lock jmp", "iretq", "exrl")
            ), f"{insn} went to {vcpu.pc:#x}"
    while twin.step_count < 400:
        twin.run(400 - twin.step_count)
    assert twin.pc == vcpu.pc and twin.regs.all() == vcpu.regs.all()


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_that_budgets_do_not_change_what_happens(arch, size):
    vm, once = vm_of(arch, "guest_loop", 3000), vm_of(arch, "guest_loop", 3000)
    sums = [u.args[0] for u in once.run_until_done() if u.cmd == "SYNC"]
    vcpu, said = vm.vcpus[0], []
    while vcpu.state != "done":
        came = vcpu.run(size)
        said += [came.args[0]] if isinstance(came, Ucall) and came.cmd == "SYNC" else []
    assert said == sums and vm.step == once.step and vcpu.exact


def test_that_what_an_instruction_is_about_to_do_comes_true(arch):
    """Of each branch whether it is taken, of each store where it goes and what it leaves there."""
    vm = vm_of(arch)
    vcpu, told = vm.vcpus[0], {"jumps": 0, "falls": 0, "stores": 0, "loads": 0}
    while vcpu.state != "done":
        regs, insn = vcpu.regs.all(), vcpu.insn
        ops = operands(arch, vcpu.peek(insn.gva, insn.size), regs, insn.gva, vcpu.peek)
        vcpu.step()
        if ops.taken is not None:
            told["jumps" if ops.taken else "falls"] += 1
            assert vcpu.pc == (ops.target if ops.taken else insn.gva + insn.size), (
                f"{insn} with {regs}"
            )
        for access in ops.accesses:
            assert access.before is not None or insn.gva == vm.gva_of("ucall_arch_do_ucall") + 8, (
                f"{insn} with {regs}"
            )
            told["loads"] += access.reads
            if access.after is not None:
                told["stores"] += 1
                found = int.from_bytes(vcpu.peek(access.gva, access.size), vm.arch.mode.byteorder)
                assert found == access.after, f"{insn} with {regs}"
    assert min(told.values()) > 20, told


def test_that_the_stepper_says_what_comes(arch):
    vcpu = vm_of(arch, "guest_read", 0x12345678).vcpus[0]
    while not (before := vcpu.look().outlook).startswith("gva 0x12345678 is not mapped"):
        assert vcpu.step() is None
    vcpu = vm_of(arch, "guest_loop", 3).vcpus[0]
    said = set()
    while vcpu.step() is None:
        said.add(vcpu.look().outlook)
    assert {"The jump will be taken.", "The jump will not be taken."} <= said and before


def test_that_lines_are_stepped_and_code_is_shown(arch):
    vcpu = vm_of(arch).vcpus[0]
    lines = []
    for _ in range(3):
        assert vcpu.step_line() is None
        lines.append(vcpu.source_line())
    assert lines[0].file == "four.c" and all(line.text for line in lines)
    listing = vcpu.disassemble("guest_loop")
    assert (
        len(listing) == 12
        and str(vcpu.look().disassembly[0].gva)
        and find_arch(arch).pc in repr(vcpu.regs)
    )


def test_that_breakpoints_stop_before_their_instruction(arch):
    vm = vm_of(arch, "guest_loop", 100_000)
    vcpu = vm.vcpus[0]
    vcpu.break_at("ucall")
    assert vcpu.run() == DebugExit(vm.gva_of("ucall")) and vcpu.pc == vm.gva_of("ucall")
    vcpu.set_breakpoints(set())
    assert vcpu.run().cmd == "SYNC"


def test_that_registers_have_their_own_names_and_can_be_set(arch):
    vcpu = vm_of(arch, "guest_loop").vcpus[0]
    name = vcpu.vm.arch.arguments[1]
    vcpu.regs[name] = 0x1122334455667788
    assert getattr(vcpu.regs, name) == 0x1122334455667788 == vcpu.regs.all()[name]
    with pytest.raises(AttributeError, match="has no register"):
        _ = vcpu.regs.nonsense
    with pytest.raises(InvalidState, match="64 bits"):
        vcpu.regs[name] = 1 << 64


def test_that_a_walk_a_scan_and_memory_agree(arch):
    vm = vm_of(arch)
    vm.run()
    table = vm.page_table()
    assert not table.nr_bad and not table.truncated
    for gva, gpa in zip(table.gva.tolist(), table.gpa.tolist(), strict=True):
        assert vm.gva2gpa(gva) == gpa == table.walk(gva).gpa
        assert vm.machine.engine.vcpus[0].memory.translate(gva) == gpa, (
            f"the CPU translates {gva:#x} otherwise"
        )
    walk = table.walk(program(arch).symbol("page").gva)
    assert (
        len(walk.steps) == len(vm.arch.mode.levels)
        and walk.flags["writable"]
        and "number" in table.text
    )
    hole = table.walk(0x1000)
    assert (
        hole.gpa is None
        and "not present" in hole.problem
        and vm.machine.engine.vcpus[0].memory.translate(0x1000) is None
    )


def test_that_changes_of_the_tables_show_and_bind_the_guest(arch):
    vm = vm_of(arch, "guest_touch", 1)
    gva = program(arch).symbol("page").gva
    before = vm.page_table()
    vm.machine.space.builder.protect(gva + 4096, 1, writable=False)
    diff = vm.page_table().diff(before)
    assert [(row.sign, row.gva, row.nr_pages) for row in diff.itertuples()] == [
        ("~", gva + 4096, 1)
    ]
    assert vm.vcpus[0].run(10000).cmd == "UNHANDLED"
    vm.machine.space.builder.protect(gva + 4096, 1, writable=True)
    vm.vcpus[0].set_entry("guest_touch")
    vm.vcpus[0].args_set(1)
    assert vm.vcpus[0].run(10000).cmd == "DONE" and vm.read(gva + 4096 + 8, 1) == b"\1"


@pytest.mark.parametrize(("entry", "gva"), [("guest_read", 0x12345678), ("guest_jump", 0x12345678)])
def test_that_a_page_fault_reaches_the_guest_with_its_address(arch, entry, gva):
    vm = vm_of(arch, entry, gva)
    uc = vm.vcpus[0].run(10000)
    assert uc.cmd == "UNHANDLED" and uc.args[0] in vm.arch.page_faults
    assert uc.args[3] & -4096 == gva & -4096 and (uc.args[3] == gva or arch == "s390x")
    assert (uc.args[2] == gva) == (entry == "guest_jump")
    assert f"fault address {uc.args[3]:#x}" in vm.explain(uc)


@pytest.mark.parametrize(
    ("entry", "handler"),
    [("guest_read", "handler"), ("guest_jump", "handler"), ("guest_undefined", "skipper")],
)
def test_that_a_guest_handles_its_own_exceptions(arch, entry, handler):
    vm = vm_of(arch, entry, 0x12345678)
    vector = vm.vcpus[0].run(10000).args[0]
    vm = vm_of(arch, entry, 0x12345678)
    vm.install_exception_handler(vector, handler)
    assert vm.vcpus[0].run(10000).cmd == "DONE"
    assert vm.sync_global_from_guest("caught") == 1 and (vm.events.kind == "exception").sum() == 1
    assert (vm.sync_global_from_guest("at") == 0x12345678) == (entry == "guest_jump")


def test_that_vcpus_share_memory_atomically(arch):
    vm = lk.Vm.create(program(arch), "guest_count", nr_vcpus=3, schedule="random:5:13")
    for vcpu in vm.vcpus:
        vcpu.args_set(200)
    vm.run_until_done()
    assert vm.sync_global_from_guest("counter") == 600


def test_that_a_snapshot_is_a_place_to_come_back_to(arch):
    vm = vm_of(arch, nr_vcpus=2, schedule="round_robin:11")
    for _ in range(3):
        vm.run()
    state = vm.snapshot()
    twin = vm.fork()
    first = [(u.vcpu, u.cmd, u.text, u.step) for u in vm.run_until_done()]
    vm.restore(state)
    assert [(u.vcpu, u.cmd, u.text, u.step) for u in vm.run_until_done()] == first
    assert [(u.vcpu, u.cmd, u.text, u.step) for u in twin.run_until_done()] == first


def test_that_every_view_draws_it(arch):
    vm = vm_of(arch)
    vm.run()
    snapshot = vm.look()
    for view in (
        snapshot,
        vm.pool,
        vm.page_table(),
        vm.memory_map(),
        vm.page_table().walk(0x400000),
    ):
        bundle = view._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert data["text/plain"] and "<" in data["text/html"]
    assert (
        snapshot.arch == arch
        and find_arch(arch).level(vm.vcpus[0].regs.all()) == snapshot.front.mode
    )


@pytest.mark.parametrize("guest", ["hello", "two_vcpus"])
def test_that_prebuilt_guests_are_there_and_run(arch, guest):
    path = GUESTS / ("" if arch == "x86_64" else arch) / f"{guest}.elf"
    built = lk.Program.compile(GUESTS / f"{guest}.c", arch=arch, compiler="zig", name=f"{guest}.c")
    assert path.read_bytes() == built.image
    vm = lk.Vm.create(lk.Program.load(path), nr_vcpus=2 if guest == "two_vcpus" else 1)
    assert vm.arch.name == arch and vm.run_until_done()[-1].cmd == "DONE"


def test_that_the_command_runs_it(arch, capsys, tmp_path):
    (tmp_path / "g.c").write_text(SOURCE)
    assert main(["run", str(tmp_path / "g.c"), "--arch", arch, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("cmd", line.get("end")) for line in lines] == [
        "SYNC",
        "PRINTF",
        "DONE",
        "done",
    ]
    (tmp_path / "g.elf").write_bytes(program(arch).image)
    other = next(name for name in ARCHES if name != arch)
    assert (
        main(["run", str(tmp_path / "g.elf"), "--json"]) == 0
        and main(["run", str(tmp_path / "g.elf"), "--arch", other]) != 0
    )


@pytest.mark.parametrize(
    ("at", "byte", "what"),
    [
        (4, 1, "32-bit"),
        (4, 3, "unknown class"),
        (5, 0, "byte order"),
        (5, None, "-endian"),
        (18, 0x7F, "another machine"),
        (19, 0x7F, "another machine"),
    ],
)
def test_that_the_wrong_class_order_or_machine_is_said(arch, at, byte, what):
    image = bytearray(program(arch).image)
    image[at] = 3 - image[5] if byte is None else byte
    with pytest.raises(ElfError, match=what):
        lk.Program.load(bytes(image))


def test_that_its_own_library_decodes(arch):
    """Every function of the guest library, to its end: no instruction is unknown to the disassembler."""
    prog = program(arch)
    for symbol in prog.symbols.values():
        if symbol.kind == "func" and symbol.size and symbol.name != "guest_undefined":
            segment = prog.segment_at(symbol.gva)
            data = segment.data[symbol.gva - segment.gva :][: symbol.size]
            assert sum(insn.size for insn in disassemble(arch, data, symbol.gva)) == symbol.size, (
                symbol.name
            )


@pytest.mark.parametrize("entry", ["guest_spin", "guest_nothing"])
def test_that_ctrl_c_ends_a_guest_that_never_would(arch, entry):
    vm = vm_of(arch, entry)
    for _ in range(2):
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.run()
        timer.join()
        assert vm.program.describe(vm.vcpus[0].pc).startswith(entry)
    before = vm.vcpus[0].pc
    assert vm.vcpus[0].run(1000) == BudgetExit(1000) and vm.program.describe(before).startswith(
        entry
    )
    assert entry == "guest_nothing" or vm.sync_global_from_guest("counter") > 10_000


def test_that_plain_code_is_counted_block_by_block_and_exactly(arch):
    """Long budgets are counted by blocks, short ones by instruction: both must come to the same."""
    whole, parts = vm_of(arch, "guest_loop", 1 << 40), vm_of(arch, "guest_loop", 1 << 40)
    assert whole.vcpus[0].run(50_000) == BudgetExit(50_000)
    for _ in range(50):
        assert parts.vcpus[0].run(1000) == BudgetExit(1000)
    assert (
        whole.vcpus[0].regs.all() == parts.vcpus[0].regs.all()
        and whole.step == parts.step == 50_000
    )


DEEP = """
#include "labkit.h"
int deep(volatile int *p, int n) { volatile char b[512]; b[0] = n; return deep((volatile int *)b, n + 1) + b[0] + *p; }
void guest_code(uint64_t vcpu) { deep(0, 1); }
"""


@pytest.mark.parametrize("arch", ARCHES)
def test_that_a_stack_that_overflows_is_traced_to_where_it_did(arch):
    """Elsewhere than on x86-64, whose double fault ends it, handlers fault one after the other on the same stack."""
    vm = lk.Vm.create(lk.Program.compile(DEEP, arch=arch, name="deep.c"))
    words = (
        r"triple fault.*at deep\+"
        if arch == "x86_64"
        else r"exceptions in a row.*began with .* at deep\+.*:"
    )
    with pytest.raises(GuestCrashed, match=words):
        vm.run_until_done(100_000)
    vm = lk.Vm.create(
        lk.Program.compile(
            DEEP.replace("deep(0, 1)", "*(volatile int *)8"), arch=arch, name="null.c"
        )
    )
    with pytest.raises(GuestCrashed, match=r"fault|abort|translation") as caught:
        vm.run_until_done(100_000)
    assert "in a row" not in str(caught.value) and "guest_code+" in str(caught.value)


def test_that_arm64_says_which_half_its_table_maps():
    vm = lk.Vm.create_barebones("arm64")
    with pytest.raises(
        InvalidState, match="not canonical in arm64/P40V48_4K, whose table maps the lower half"
    ):
        vm.machine.space.map(0xFFFF_8000_0000_0000, 0x4000)
    vm = lk.Vm.create_barebones("s390x")  # which has no halves: it maps all of 64 bits
    with pytest.raises(InvalidState, match=r"is not canonical in s390/\S+$"):
        vm.machine.space.map((1 << 63) - 4096, 0x4000, 2)
