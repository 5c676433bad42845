"""What an instruction is about to read, write and decide, against what the engine then does.

For the other architectures tests/session/test_four_architectures.py asks the same of whole guests.
"""

from __future__ import annotations

from collections.abc import Iterator

import capstone
import pytest
from capstone import x86
from guests import CODE, DATA, STACK_TOP, asm_all, bare
from semantics import CONDITIONS

import labkit as lk
from labkit.engines.disasm import disassemble
from labkit.look import x86_operands
from labkit.look.access import Access, Operands
from labkit.look.touch import operands

WORD = 0x8123_4567_89AB_CDEF  # at every 8 bytes of the data pages
REGS = {
    "rax": 0x1111_2222_3333_8485,
    "rbx": 0xFFFF_FFFF_FFFF_FFF0,
    "rcx": 73,
    "rdx": (1 << 64) - 72,
    "rsi": DATA + 0x800,
    "r8": 0x9999_8888_7777_6665,
    "r9": 4,
    "rsp": STACK_TOP - 256,
}

STORES = (
    "mov dword ptr [rsi + 8], -5",
    "mov [rsi], ah",
    "mov [rsi + r9 * 8 - 8], r8d",
    "movabs [0x20000010], al",
    "add qword ptr [rsi], rbx",
    "lock add dword ptr [rsi], 0x7fffffff",
    "sub byte ptr [rsi], al",
    "or word ptr [rsi], r8w",
    "and qword ptr [rsi], rax",
    "xor byte ptr [rsi], bh",
    "xchg [rsi], r8w",
    "lock xadd [rsi], eax",
    "inc byte ptr [rsi]",
    "dec qword ptr [rsi]",
    "neg word ptr [rsi]",
    "not dword ptr [rsi]",
    "lock bts qword ptr [rsi], rcx",
    "btr qword ptr [rsi], rdx",
    "btc dword ptr [rsi], ecx",
    "bts word ptr [rsi], cx",
    "btr dword ptr [rsi], edx",
    "btr word ptr [rsi], dx",
    "btr dword ptr [rsi], 37",
    "mov [esi + ebx], eax",
    "mov [eip + 0x10], eax",
    "push rax",
    "push ax",
    "push -5",
    "call rax",
)
BITS = (
    "bt qword ptr [rsi], rcx",
    "bt qword ptr [rsi], rdx",
    "bt dword ptr [rsi], edx",
    "bt dword ptr [rsi], 13",
    "lock bts qword ptr [rsi], rcx",
    "btc word ptr [rsi], cx",
)
LOADS = ("mov rax, [rsi]", "movzx eax, byte ptr [rsi + r9]", "cmp [rsi], al", "test [rsi], rax")
POPS = {"pop rax": 8, "pop ax": 2, "ret": 8}  # with the bytes they take from the stack
NOTHING = ("lea rax, [rsi]", "nop dword ptr [rax]", "mov rax, rbx")
JUMPS = tuple(f"j{condition} 1f; .skip 18, 0x90; 1:" for condition in CONDITIONS)
FLAGS = (0x1, 0x4, 0x40, 0x80, 0x800, 0x880, 0x8C5, 0)
MOVES = {"push qword ptr [rsi]": 8, "push word ptr [rsi]": 2}  # with the bytes they copy
ALL = (*STORES, *MOVES, *BITS, *LOADS, *NOTHING, *JUMPS, *POPS)


@pytest.fixture(scope="module")
def code() -> dict[str, bytes]:
    """Machine code of every instruction here, assembled in one go."""
    return dict(zip(ALL, asm_all(*ALL), strict=True))


@pytest.fixture(scope="module")
def vcpu() -> Iterator[lk.Vcpu]:
    """A vCPU whose code is to be written."""
    with bare(b"\x90") as vm:
        yield vm.vcpus[0]


def ready(vcpu: lk.Vcpu, code: bytes) -> Operands:
    """What the instruction in `code` is about to do, with fresh registers and data."""
    vcpu.vm.write(CODE, code)
    vcpu.vm.write(DATA, WORD.to_bytes(8, "little") * 512)
    vcpu.cpu.set_regs({**REGS, "rip": CODE})
    return operands("x86_64", code, vcpu.regs.all(), CODE, vcpu.peek)


def held(vcpu: lk.Vcpu, access: Access) -> int:
    """What memory holds where an access goes."""
    return int.from_bytes(vcpu.peek(access.gva, access.size), "little")


@pytest.mark.parametrize("text", STORES)
def test_that_a_store_leaves_what_was_told(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str
) -> None:
    told = ready(vcpu, code[text]).accesses
    (store,) = [access for access in told if access.writes]
    assert store.before == held(vcpu, store) != store.after
    vcpu.step()
    assert store.after == held(vcpu, store)


@pytest.mark.parametrize("text", BITS)
def test_that_the_bit_that_is_tested_goes_to_the_carry_flag(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str
) -> None:
    told = ready(vcpu, code[text])
    assert told.bit is not None and told.bit.gva == told.accesses[0].gva
    vcpu.step()
    assert told.bit.is_set == (vcpu.regs.rflags & 1)


@pytest.mark.parametrize("text", LOADS)
def test_that_a_load_reads_and_writes_nothing(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str
) -> None:
    (load,) = ready(vcpu, code[text]).accesses
    assert (load.reads, load.writes, load.after) == (True, False, None)
    assert load.before == held(vcpu, load)


@pytest.mark.parametrize(("text", "size"), POPS.items())
def test_that_pop_and_ret_read_the_top_of_the_stack(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str, size: int
) -> None:
    rsp = REGS["rsp"]
    top = CODE + 16
    vcpu.vm.write(rsp, top.to_bytes(8, "little"))
    before = top & (1 << 8 * size) - 1
    assert ready(vcpu, code[text]).accesses == (Access(rsp, size, True, False, before, None),)
    vcpu.step()
    assert vcpu.regs.rsp == rsp + size


@pytest.mark.parametrize(("text", "size"), MOVES.items())
def test_that_a_push_of_memory_reads_and_writes_as_much(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str, size: int
) -> None:
    load, store = ready(vcpu, code[text]).accesses
    assert (load.reads, load.gva, load.size) == (True, REGS["rsi"], size)
    assert (store.writes, store.gva, store.size) == (True, REGS["rsp"] - size, size)
    vcpu.step()
    assert held(vcpu, store) == load.before


@pytest.mark.parametrize("text", NOTHING)
def test_that_what_touches_no_memory_says_so(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str
) -> None:
    assert ready(vcpu, code[text]) == Operands()


@pytest.mark.parametrize("rflags", FLAGS, ids=hex)
@pytest.mark.parametrize("text", JUMPS)
def test_that_a_jump_is_taken_as_told(
    vcpu: lk.Vcpu, code: dict[str, bytes], text: str, rflags: int
) -> None:
    vcpu.cpu.set_regs({"rflags": rflags | 2})
    told = ready(vcpu, code[text])
    assert told.target == CODE + 20 and told.taken is not None
    vcpu.step()
    assert (vcpu.pc == told.target) == told.taken


def test_that_memory_that_is_not_mapped_is_unknown(vcpu: lk.Vcpu, code: dict[str, bytes]) -> None:
    ready(vcpu, code["neg word ptr [rsi]"])
    vcpu.cpu.set_regs({"rsi": 0x666000})
    data = code["neg word ptr [rsi]"]
    told = operands("x86_64", data, vcpu.regs.all(), CODE, vcpu.peek)
    assert told.accesses == (Access(0x666000, 2, True, True, None, None),)


@pytest.mark.parametrize(
    ("arch", "data"), [("x86_64", b"\x06"), ("arm64", bytes(4)), ("riscv64", b""), ("s390x", b"")]
)
def test_that_bytes_that_are_no_instruction_touch_nothing(arch: str, data: bytes) -> None:
    assert operands(arch, data, {}, 0, lambda gva, size: bytes(size)) == Operands()


def test_that_operand_types_have_the_numbers_of_capstone() -> None:
    ours = (x86_operands.OP_REG, x86_operands.OP_IMM, x86_operands.OP_MEM)
    assert ours == (x86.X86_OP_REG, x86.X86_OP_IMM, x86.X86_OP_MEM)
    assert x86_operands.READS == capstone.CS_AC_READ
    assert x86_operands.WRITES == capstone.CS_AC_WRITE


NINES = 0x9999_9999_9999_9999


@pytest.mark.parametrize(
    ("text", "word", "size", "after"),
    [
        ("str x9, [x10]", 0xF9000149, 8, NINES),
        ("str w9, [x10]", 0xB9000149, 4, NINES >> 32),
        ("strb w9, [x10]", 0x39000149, 1, 0x99),
        ("str xzr, [x10]", 0xF900015F, 8, 0),
        ("stp w9, w10, [x10]", 0x29002949, 8, None),
        ("stxr w8, x9, [x10]", 0xC8087D49, 8, None),  # it may fail
        ("stxr w8, w9, [x10]", 0x88087D49, 4, None),
        ("stlxr w8, x9, [x10]", 0xC808FD49, 8, None),
        ("str d0, [x10]", 0xFD000140, 8, None),  # a register that nobody read
        ("str s0, [x10]", 0xBD000140, 4, None),
        ("str q0, [x10]", 0x3D800140, 16, None),
        ("stp q0, q1, [x10]", 0xAD000540, 32, None),
        ("stp s0, s1, [x10]", 0x2D000540, 8, None),
    ],
)
def test_that_a_store_of_arm64_is_as_wide_as_its_register(
    text: str, word: int, size: int, after: int | None
) -> None:
    data = word.to_bytes(4, "little")
    assert [insn.text for insn in disassemble("arm64", data, 0)] == [text]
    regs = {"x9": NINES, "x10": 0x5000}
    told = operands("arm64", data, regs, 0, lambda gva, nr_bytes: bytes(nr_bytes))
    assert told.accesses == (Access(0x5000, size, False, True, 0, after),)
