"""What x86-64 instructions owe beside their result: alignment, upper halves, flags, exceptions.

Expected values are the manuals'; x87 and SSE arithmetic is compared with the host in
test_semantics.py.
"""

from __future__ import annotations

import struct

import pytest
from guests import CODE, DATA, HANDLERS, asm, bare, frame, go, start

import labkit as lk
from labkit.engines.exits import HaltExit

UD, DB, NM, SS, GP, PF, MF, XM = 6, 1, 7, 12, 13, 14, 16, 19
SSE = 0x600  # CR4: OSFXSR, OSXMMEXCPT
NOT_CANONICAL, NOWHERE = 1 << 63, 0x6000_0000


def after(code: str, *, handler: str = "hlt", data: bytes = b"", **regs: int) -> lk.Vcpu:
    """A vCPU that ran this code up to an exception's handler, or to a last HLT."""
    vm = bare(f"{code}; hlt", handler=handler)
    vcpu = vm.vcpus[0]
    start(vcpu)
    vcpu.cpu.set_regs({"rip": CODE, "cr4": vcpu.regs.cr4 | SSE, **regs})
    if data:
        vm.write(DATA, data)
    assert go(vcpu) == HaltExit()
    return vcpu


def vector(vcpu: lk.Vcpu) -> int:
    """The exception that a vCPU stopped in, 0 for none."""
    at = vcpu.pc - 1 - HANDLERS
    return at // 16 if 0 <= at < 4096 else 0


def double(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


ALIGNED = [
    "movaps xmm0,[rsi+8]",
    "movaps [rsi+1],xmm0",
    "movdqa xmm8,[rsi+rbx*8]",
    "paddd xmm0,[rsi+4]",
    "addps xmm0,[rsi+8]",
    "movntdq [rsi+8],xmm0",
    "pshufb xmm0,[rsi+8]",
    "andpd xmm0,[rsi+8]",
    "fxsave [rsi+8]",
    "fxrstor [rsi+8]",
    "lock cmpxchg16b [rsi+8]",
    "movaps xmm0,fs:[rsi]",
    "unpcklps xmm0,[rsi+2]",
    "cvtdq2ps xmm0,[rsi+4]",
    "shufpd xmm0,[rsi+4],1",
]
ANYWHERE = [
    "movups xmm0,[rsi+1]",
    "lddqu xmm0,[rsi+1]",
    "movdqu [rsi+3],xmm0",
    "addss xmm0,[rsi+1]",
    "pmovzxbw xmm0,[rsi+1]",
    "pcmpistri xmm0,[rsi+1],0",
    "movaps xmm0,[rsi+rbx*8+8]",
    "movaps xmm0,fs:[rsi+8]",
    "paddd xmm0,[rsi+16]",
]


@pytest.mark.parametrize("insn", ALIGNED)
def test_that_an_operand_of_sixteen_bytes_must_be_aligned(insn):
    vcpu = after(insn, fs_base=8, rbx=1)
    assert (vector(vcpu), frame(vcpu, True)["error"], frame(vcpu, True)["rip"]) == (GP, 0, CODE)


@pytest.mark.parametrize("insn", ANYWHERE)
def test_that_other_operands_may_lie_anywhere(insn):
    assert vector(after(insn, fs_base=8, rbx=1)) == 0


@pytest.mark.parametrize("lock", ["", "lock "])
@pytest.mark.parametrize("present, is_equal", [(7, True), (6, False)])
def test_that_cmpxchg_of_32_bits_keeps_what_it_does_not_write(lock, present, is_equal):
    data = struct.pack("<Q", 0xAAAA_AAAA_0000_0000 | present)
    vcpu = after(f"{lock}cmpxchg [rsi],ecx", data=data, rax=0x1111_1111_0000_0007, rcx=9)
    assert vcpu.regs.rax == (0x1111_1111_0000_0007 if is_equal else 6)
    assert int.from_bytes(vcpu.read(DATA, 8), "little") & 0xFFFFFFFF == (9 if is_equal else 6)
    assert bool(vcpu.regs.rflags & 0x40) == is_equal


def test_that_cmpxchg_of_registers_keeps_an_upper_half():
    regs = {"rax": 0x1111_1111_0000_0007, "rcx": 0x2222_2222_0000_0006, "rdx": 5}
    vcpu = after("cmpxchg ecx,edx", **regs)
    assert (vcpu.regs.rax, vcpu.regs.rcx) == (6, 0x2222_2222_0000_0006)
    vcpu = after("cmpxchg ecx,edx", **regs | {"rcx": 0x2222_2222_0000_0007})
    assert (vcpu.regs.rax, vcpu.regs.rcx) == (0x1111_1111_0000_0007, 5)


@pytest.mark.parametrize(
    "insn, flags",
    [
        ("divsd xmm0,xmm1", 4),
        ("divsd xmm1,xmm1", 1),
        ("mulsd xmm2,xmm2", 0x28),
        ("cvttsd2si eax,xmm2", 1),
        ("addsd xmm0,xmm2", 0x20),
        ("sqrtsd xmm3,xmm4", 1),
        ("addsd xmm5,xmm5", 2),
        ("ucomisd xmm0,xmm0", 0),
    ],
)
def test_that_mxcsr_says_what_happened(insn, flags):
    values = [1.0, 0.0, 1.7e308, 0.0, -1.0, 5e-324]
    regs = {f"xmm{i}": double(value) for i, value in enumerate(values)}
    vcpu = after(f"{insn}; stmxcsr [rsi]", **regs)
    assert int.from_bytes(vcpu.read(DATA, 4), "little") & 0x3F == flags
    masked = 0x1F80 & ~(flags << 7)
    vcpu = after(insn, mxcsr=masked, **regs)
    assert vector(vcpu) == (XM if flags else 0)
    vcpu = after(insn, mxcsr=masked, **regs, cr4=0x220)
    assert vector(vcpu) == (UD if flags else 0)


def test_that_an_unmasked_exception_leaves_the_register_as_it_was():
    regs = {"xmm0": double(1.0), "xmm1": 0}
    vcpu = after("divsd xmm0,xmm1", mxcsr=0x1F80 & ~(4 << 7), **regs)
    assert (vector(vcpu), vcpu.regs.xmm0, vcpu.regs.mxcsr & 0x3F) == (XM, double(1.0), 4)


X87 = [  # code that leaves FNSTSW in AX, the flags of the status word
    ("fld1; push 3; fild dword ptr [rsp]; fdivp; fnstsw ax", 0x20),
    ("fstp st(0); fnstsw ax", 0x41),
    (".rept 9; fld1; .endr; fnstsw ax", 0x41),
    ("fldz; fld1; fdivrp; fnstsw ax", 0x04),
    ("fldz; fchs; fsqrt; fnstsw ax", 0),
    ("fld1; fchs; fsqrt; fnstsw ax", 0x01),
]


@pytest.mark.parametrize("code, flags", X87)
def test_that_the_x87_status_word_says_what_happened(code, flags):
    vcpu = after(f"fninit; {code}")
    assert vcpu.regs.rax & 0x7F == flags


@pytest.mark.parametrize("waits", ["fwait", "fld1", "fstp qword ptr [rsi]", "fnop"])
def test_that_an_unmasked_x87_exception_comes_at_the_next_that_waits(waits):
    code = "fninit; mov word ptr [rsi],0x37b; fldcw [rsi]; fld1; fldz; fdivp"
    vcpu = after(f"{code}; fnstsw ax; nop; {waits}", cr0=0x8001_0031)
    assert (vector(vcpu), vcpu.regs.rax & 0x80FF) == (MF, 0x8084)
    assert frame(vcpu)["rip"] == CODE + len(asm(f"{code}; fnstsw ax; nop"))


def test_that_the_x87_computes_with_64_bits():
    vcpu = after("fninit; fldl2t; fldpi; fprem1; fstp tbyte ptr [rsi]")
    assert vcpu.read(DATA, 10).hex() == "908c2cbb9adaa9b8fcbf"


SMALL = [
    ("mov rax,0x8000000000000000; wrfsbase rax", GP, {"cr4": 0x1_0620}),
    ("mov rax,0x8000000000000000; wrgsbase rax", GP, {"cr4": 0x1_0620}),
    ("xor eax,eax; ltr ax", GP, {}),
    ("mov eax,0x10; ltr ax", GP, {}),
    (f"mov eax,{NOWHERE}; clflush [rax]", PF, {}),
    ("mov rax,0x8000000000000000; clflush [rax]", GP, {}),
    (".rept 12; .byte 0x2e; .endr; mov eax,0x12345678", GP, {}),
    ("mov rax,0x8000000000000000; mov rbx,[rsp+rax]", SS, {}),
    ("mov rax,0x8000000000000000; mov rbx,[rbp+rax*1+8]", SS, {}),
    ("mov ecx,0x277; mov eax,2; xor edx,edx; wrmsr", GP, {}),
    ("mov ecx,0x2ff; mov eax,0x1000; xor edx,edx; wrmsr", GP, {}),
    ("mov dword ptr [rsi],0x10000; ldmxcsr [rsi]", GP, {}),
    ("stac", UD, {"cs": 0x33, "ss": 0x2B}),
]


@pytest.mark.parametrize("code, wanted, regs", SMALL)
def test_that_an_instruction_raises_what_it_owes(code, wanted, regs):
    assert vector(after(code, **regs)) == wanted


# CPUID's bits that are not announced: (instruction, leaf, register, bit)
ABSENT = [
    ("movbe eax,[rsi]", 1, 2, 22),
    ("aesenc xmm0,xmm1", 1, 2, 25),
    ("pclmulqdq xmm0,xmm1,1", 1, 2, 1),
    ("adcx eax,ebx", 7, 1, 19),
    ("clflushopt [rsi]", 7, 1, 23),
    ("clwb [rsi]", 7, 1, 24),
    ("extrq xmm0,1,2", 0x8000_0001, 2, 6),
]
PRESENT = [
    ("rdfsbase rax", 7, 1, 0),
    ("stac; clac", 7, 1, 20),
    ("popcnt eax,ebx", 1, 2, 23),
    ("crc32 eax,ebx", 1, 2, 20),
    ("pcmpistrm xmm0,xmm1,0", 1, 2, 20),
    ("pshufb xmm0,xmm1", 1, 2, 9),
    ("blendps xmm0,xmm1,1", 1, 2, 19),
    ("haddps xmm0,xmm1", 1, 2, 0),
    ("cmpxchg16b [rsi]", 1, 2, 13),
    ("rdrand eax", 1, 2, 30),
    ("rdseed eax", 7, 1, 18),
    ("clflush [rsi]", 1, 3, 19),
    ("rdtscp", 0x8000_0001, 3, 27),
    ("lahf", 0x8000_0001, 2, 0),
]


@pytest.mark.parametrize("insn, leaf, register, bit", ABSENT)
def test_that_what_cpuid_does_not_announce_is_undefined(insn, leaf, register, bit):
    vcpu = after(insn, cr4=0x1_0620)
    assert not vcpu.cpu.vm.cpu.leaf(leaf, 0)[register] >> bit & 1
    assert vector(vcpu) == UD


@pytest.mark.parametrize("insn, leaf, register, bit", PRESENT)
def test_that_what_cpuid_announces_works(insn, leaf, register, bit):
    vcpu = after(insn, cr4=0x1_0620)
    assert vcpu.cpu.vm.cpu.leaf(leaf, 0)[register] >> bit & 1
    assert vector(vcpu) == 0
