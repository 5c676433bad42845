"""The C guest library: layouts, ucalls, assertions and exception entries, on a bare Unicorn."""

from __future__ import annotations

import re
import shutil
from functools import cache

import capstone
import pytest
from bare_guest import HANDLERS, POOL, STACK, BareGuest, Exhausted
from hypothesis import given
from hypothesis import strategies as st
from unicorn import x86_const as x86

from labkit.guest.program import Program
from labkit.ucall import abi
from labkit.ucall.calls import Fields

DISASSEMBLER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
ERROR_CODES = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}  # SDM Vol. 3 table 6-1, APM Vol. 2 table 8-1


def compiled(*functions):
    return Program.compile('#include "labkit.h"\n' + "\n".join(functions))


def guest(body, *more):
    return BareGuest(
        compiled(*more, f"void guest_code(uint64_t a, uint64_t b) {{ {body} }}")
    ).enter("guest_code", 11, 22)


@cache
def together(bodies):
    """All the bodies of a table in one program, each in its own line and function.

    So the compiler runs once.
    """
    return compiled(
        *(f"void t{i}(uint64_t a, uint64_t b) {{ {body} }}" for i, body in enumerate(bodies))
    )


def one_of(table, body):
    bodies = tuple(row[0] for row in table)
    return BareGuest(together(bodies)).enter(f"t{bodies.index(body)}", 11, 22)


# --- layouts ---


def test_that_python_and_c_agree_on_every_size_and_offset():
    expressions = {
        "sizeof(struct ucall)": abi.UCALL_SIZE,
        "sizeof(struct ucall_header)": abi.HEADER_SIZE,
        "KVM_MAX_VCPUS": abi.NR_SLOTS,
        "offsetof(struct ucall, args)": abi.OFFSET_ARGS,
        "offsetof(struct ucall, buffer)": abi.OFFSET_BUFFER,
        "offsetof(struct ucall, hva)": abi.OFFSET_HVA,
        "offsetof(struct ucall_header, ucalls)": abi.BITMAP_BYTES,
        **{f"UCALL_{cmd.name}": int(cmd) for cmd in abi.UcallCmd},
        **{
            name: getattr(abi, name)
            for name in (
                "UCALL_PIO_PORT",
                "UCALL_BUFFER_LEN",
                "UCALL_MAX_ARGS",
                "GUEST_UCALL_FAILED",
                "GUEST_ERROR_STRING",
                "GUEST_FILE",
                "GUEST_LINE",
            )
        },
        "sizeof(struct ex_regs)": 22 * 8,
        "offsetof(struct ex_regs, vector)": 15 * 8,
        "offsetof(struct ex_regs, rip)": 17 * 8,
    }
    values = ", ".join(f"(uint64_t)({e})" for e in expressions)
    program = compiled(f"const uint64_t facts[] = {{ {values} }};")
    symbol = program.symbol("facts")
    segment = program.segment_at(symbol.gva)
    data = segment.data[symbol.gva - segment.gva :][: symbol.size]
    assert dict(zip(expressions, memoryview(data).cast("Q"), strict=True)) == expressions
    offsets = [abi.OFFSET_ARGS, abi.OFFSET_BUFFER, abi.OFFSET_HVA]
    assert [abi.UCALL.fields[name][1] for name in ("args", "buffer", "hva")] == offsets


def test_that_decoding_believes_nothing():
    raw = bytes(range(64)) + b"\xff" * 1032
    for order, cmd in (("little", "0x706050403020100?"), ("big", "0x1020304050607?")):
        found = Fields(order).ucall(raw, 0, 0, None, 0, str)
        assert (found.cmd, found.args[6], found.text) == (
            cmd,
            int.from_bytes(raw[56:64], order),
            None,
        )
    assert abi.decode_text(raw[64:]) == "�" * 1024
    assert abi.decode_text(b"ab\0cd") == "ab"
    assert abi.decode_text(b"") == ""
    assert [abi.cmd_name(n) for n in (0, 1, 5, 6, 0x17)] == [
        "NONE",
        "SYNC",
        "UNHANDLED",
        "0x6?",
        "0x17?",
    ]
    assert [abi.has_text(n) for n in range(7)] == [False, False, True, True, False, True, False]


@given(st.binary(max_size=2000))
def test_that_any_buffer_decodes_to_bounded_text(data):
    text = abi.decode_text(data)
    assert len(text) <= 1024
    assert "\0" not in text


# --- ucalls ---

SENDING = [
    ("GUEST_SYNC(7);", 1, (None, 7, 0, 0, 0, 0, 0)),
    ("GUEST_SYNC(-1);", 1, (None, 2**64 - 1, 0, 0, 0, 0, 0)),
    ("int i = -2; GUEST_SYNC_ARGS(i, a, b, 3, i);", 1, (None, 2**64 - 2, 11, 22, 3, 2**64 - 2, 0)),
    ("GUEST_SYNC1(a);", 1, (11, 0, 0, 0, 0, 0, 0)),
    ("GUEST_SYNC4(1, 2, 3, 4);", 1, (1, 2, 3, 4, 0, 0, 0)),
    ("GUEST_SYNC6(1, 2, 3, 4, 5, 6);", 1, (1, 2, 3, 4, 5, 6, 0)),
    ("GUEST_DONE();", 4, (0,) * 7),
    ("ucall(0x17, 9, 1UL, 2UL, 3UL, 4UL, 5UL, 6UL, 7UL, 8UL, 9UL);", 0x17, (1, 2, 3, 4, 5, 6, 7)),
]


@pytest.mark.parametrize(("body", "cmd", "args"), SENDING)
def test_that_each_macro_sends_its_command_and_arguments(body, cmd, args):
    machine = one_of(SENDING, body)
    found = machine.run()
    assert (found[0], found[3]) == (cmd, 0)
    assert machine.in_use() == [0]
    assert found[1][1:] == args[1:]
    if args[0] is None:
        assert machine.cstring(found[1][0]) == "hello"
    else:
        assert found[1][0] == args[0]
    assert machine.run() is None
    assert machine.in_use() == []


FAILING = [
    ("GUEST_ASSERT(a == 12);", "a == 12", "a == 12"),
    ("GUEST_ASSERT(a % 2 == 0);", "a % 2 == 0", "a % 2 == 0"),
    ('__GUEST_ASSERT(!a, "a is %lu", a);', "!a", "a is 11"),
    ("GUEST_ASSERT_EQ(a, b);", "a == b", "a == b: found 0xb and 0x16"),
    ("GUEST_ASSERT_NE(a, 11);", "a != 11", "a != 11: found 0xb and 0xb"),
    ('GUEST_FAIL("%s %d", "so", -3);', "the guest gave up", "so -3"),
]


@pytest.mark.parametrize(("body", "exp", "text"), FAILING)
def test_that_a_failed_assertion_says_what_where_and_why(body, exp, text):
    machine = one_of(FAILING, body)
    line = [row[0] for row in FAILING].index(body) + 2
    cmd, args, said, _ = machine.run()
    assert (cmd, said, machine.cstring(args[0]), machine.cstring(args[1]), args[2]) == (
        2,
        text,
        exp,
        "guest.c",
        line,
    )


def test_that_assertions_that_hold_say_nothing():
    body = (
        "GUEST_ASSERT(a); GUEST_ASSERT_EQ(a, 11); GUEST_ASSERT_NE(a, b); "
        'if (a) GUEST_ASSERT(b); else GUEST_FAIL("x");'
    )
    assert guest(body).run() is None


def test_that_a_pool_without_free_slots_sends_the_magic_number():
    machine = guest("GUEST_SYNC(1);")
    machine.uc.mem_write(POOL, b"\xff" * 63 + b"\x7f")
    assert machine.run()[3] == 511
    machine.enter("guest_code")
    with pytest.raises(Exhausted):
        machine.run()
    assert machine.run() is None, "a host that goes on after all finds the guest alive"


def test_that_a_guest_without_a_pool_sends_the_magic_number():
    machine = guest("GUEST_DONE();")
    machine.write_u64(machine.program.symbol("ucall_pool").gva, 0)
    with pytest.raises(Exhausted):
        machine.run()


@pytest.mark.parametrize("compiler", ["zig", "gcc"])
@pytest.mark.parametrize("opt", ["-O0", "-O1", "-O2"])
def test_that_a_slot_is_taken_by_one_locked_instruction(compiler, opt):
    if compiler == "gcc" and not shutil.which("gcc"):
        pytest.skip("no gcc on this machine")
    program = Program.compile(
        '#include "labkit.h"\nvoid guest_code(void) { GUEST_DONE(); }', compiler=compiler, opt=opt
    )
    found = {}
    for name in ("ucall_alloc", "ucall_free"):
        symbol = program.symbol(name)
        code = program.segments[0]
        insns = DISASSEMBLER.disasm(code.data[symbol.gva - code.gva :][: symbol.size], 0)
        found[name] = [i.mnemonic for i in insns if i.mnemonic.startswith("lock")]
    assert found == {"ucall_alloc": ["lock bts"], "ucall_free": ["lock btr"]}
    assert BareGuest(program).enter("guest_code").run() == (4, (0,) * 7, "", 0)


# --- exceptions ---


def take(machine, vector, rip=0x1234, **registers):
    """What a processor does: the frame on the stack, and off to the stub that the table names."""
    rsp = STACK + 0x8000
    frame = [*([0xE0 + vector] if vector in ERROR_CODES else []), rip, 8, 2, rsp, 0x10]
    for i, value in enumerate(frame):
        machine.write_u64(rsp - 8 * len(frame) + 8 * i, value)
    for name, value in registers.items():
        machine.uc.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), value)
    machine.uc.reg_write(x86.UC_X86_REG_RSP, rsp - 8 * len(frame))
    machine.uc.reg_write(x86.UC_X86_REG_CR2, 0xC2)
    machine.uc.reg_write(
        x86.UC_X86_REG_RIP,
        machine.read_u64(machine.program.symbol("idt_handlers").gva + 8 * vector),
    )
    code = machine.program.segments[0]
    return code.gva + code.data.index(
        b"\x48\xcf", machine.program.symbol("handle_exception").gva - code.gva
    )  # iretq


def test_that_an_unhandled_exception_of_every_vector_reaches_the_host():
    machine = guest("")
    for vector in range(256):
        iretq = take(machine, vector)
        error_code = 0xE0 + vector if vector in ERROR_CODES else 0
        cmd, args, text, _ = machine.run(iretq)
        assert (cmd, args) == (5, (vector, error_code, 0x1234, 0xC2, 0, 0, 0))
        assert text == (
            f"no handler for exception {vector} at 0x1234 "
            f"(error code {error_code:#x}, fault address 0xc2)"
        )
        assert machine.run(iretq) is None
        assert machine.uc.reg_read(x86.UC_X86_REG_RSP) == STACK + 0x8000 - 40


def test_that_a_handler_sees_and_changes_every_register():
    names = [
        "rax",
        "rcx",
        "rdx",
        "rbx",
        "rbp",
        "rsi",
        "rdi",
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
    ]
    handler = "void handler(struct ex_regs *regs) { seen = *regs; regs->rip += 2; regs->r12 = 99; }"
    machine = guest("", "struct ex_regs seen;", handler)
    machine.write_u64(HANDLERS + 8 * 14, machine.program.symbol("handler").gva)
    iretq = take(machine, 14, **{name: 0x100 + i for i, name in enumerate(names)})
    assert machine.run(iretq) is None
    seen = [machine.read_u64(machine.program.symbol("seen").gva + 8 * i) for i in range(22)]
    assert seen == [*range(0x100, 0x10F), 14, 0xEE, 0x1234, 8, 2, STACK + 0x8000, 0x10]
    after = [machine.uc.reg_read(getattr(x86, f"UC_X86_REG_{name.upper()}")) for name in names]
    assert after == [99 if name == "r12" else 0x100 + i for i, name in enumerate(names)]
    assert machine.read_u64(STACK + 0x8000 - 40) == 0x1236


def test_that_an_expected_fault_comes_back_as_its_vector():
    machine = guest("GUEST_SYNC2(rdmsr_safe(0x10, &b), b);")
    code = machine.program.segments[0]
    at = code.gva + code.data.index(b"\x0f\x32\x45\x31\xc9")  # rdmsr; xor %r9d, %r9d
    assert machine.run(at) is None
    r10, r11 = (machine.uc.reg_read(r) for r in (x86.UC_X86_REG_R10, x86.UC_X86_REG_R11))
    assert r10 == at
    assert machine.uc.reg_read(x86.UC_X86_REG_R9) != 0
    iretq = take(machine, 13, rip=at)
    assert machine.run(iretq) is None
    assert machine.read_u64(STACK + 0x8000 - 40) == r11
    assert [machine.uc.reg_read(r) for r in (x86.UC_X86_REG_R9, x86.UC_X86_REG_R10)] == [
        13,
        0xE0 + 13,
    ]


def test_that_a_guest_installs_its_own_handler():
    machine = guest("set_exception_handler(3, handler);", "void handler(struct ex_regs *regs) { }")
    assert machine.run() is None
    assert machine.read_u64(HANDLERS + 24) == machine.program.symbol("handler").gva


# --- words of the kernel ---


def test_that_pasted_kernel_guest_code_compiles_with_the_kernels_headers():
    program = Program.compile("""
#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "ucall_common.h"
static atomic_t n = ATOMIC_INIT(3);
static DECLARE_BITMAP(map, 100);
static void guest_code(void)
{
	u32 eax, ebx, ecx, edx;
	__cpuid(0, 0, &eax, &ebx, &ecx, &edx);
	wrmsr(0x10, rdmsr(0x10) + rdtsc());
	outb(0x80, inb(0x81)), outl(0x80, inl(0x81)), outw(0x80, inw(0x81));
	set_cr4(get_cr4() | BIT(9));
	WRITE_ONCE(map[0], READ_ONCE(map[1]) | GENMASK(5, 2));
	barrier(); cpu_relax();
	GUEST_ASSERT(!test_and_set_bit(70, map) && test_bit(70, map) && ARRAY_SIZE(map) == 2);
	GUEST_ASSERT_EQ(atomic_inc_return(&n), 4);
	GUEST_ASSERT_EQ(kvm_asm_safe("wrmsr", "a"(0), "d"(0), "c"(1)), GP_VECTOR);
	GUEST_PRINTF("%s %d\\n", "x", (int)min(3, 4));
	GUEST_UCALL_NONE();
	GUEST_DONE();
}
void *keep = guest_code;
""")
    assert program.compiler_output == ""
    assert program.symbol("guest_code").kind == "func"


WORDS = [
    ("GENMASK(5, 2)", 0x3C),
    ("GENMASK(63, 0)", 2**64 - 1),
    ("BIT(63)", 1 << 63),
    ("PAGE_MASK", 2**64 - 4096),
    ("max(3, -4)", 3),
    ('strlen("four")', 4),
    ('strcmp("a", "b") < 0', 1),
    ('strcmp("a", "a")', 0),
    ('memcmp("abc", "abd", 2)', 0),
    ('memcmp("b", "a", 1) > 0', 1),
    ('strnlen("abc", 2)', 2),
    ("memmove(text, text + 3, 9), text[8]", ord("b")),
    ("memmove(text + 3, text, 9), text[11]", ord("8")),
]


@pytest.mark.parametrize(("expression", "value"), WORDS)
def test_that_small_words_mean_what_they_mean_in_the_kernel(expression, value):
    table = [(f'char text[] = "0123456789abc"; GUEST_SYNC1(({row[0]}));',) for row in WORDS]
    assert one_of(table, table[[row[0] for row in WORDS].index(expression)][0]).run()[1][0] == value


# --- text (what it looks like is test_guest_printf.py's) ---


def test_that_text_that_does_not_fit_becomes_an_abort_and_nothing_is_overwritten():
    machine = guest(
        "char big[1100]; memset(big, 97, sizeof(big)); big[1099] = 0; "
        'GUEST_PRINTF("%s", big); GUEST_DONE();'
    )
    cmd, args, text, slot = machine.run()
    assert (cmd, slot, text, machine.cstring(args[1])) == (
        2,
        1,
        "the text does not fit in 1024 bytes",
        "labkit/printf.c",
    )
    assert machine.run()[:1] + machine.run()[:1] == (3, 4), "a host that goes on gets what did fit"
    assert guest('GUEST_PRINTF("%1023d", 5);').run()[0] == 3
    assert guest('GUEST_PRINTF("%1024d", 5);').run()[0] == 2


def test_that_the_library_has_no_float_instruction():
    program = compiled("void guest_code(void) { GUEST_DONE(); }")
    code = program.segments[0].data
    names = " ".join(i.op_str for i in DISASSEMBLER.disasm(code, 0))
    assert "rsp" in names
    assert not re.search(r"\b[xyz]mm\d|\bst\(", names)
