"""Forms of x86-64 instructions to compare with the processor, and what may differ.

A form is a whole snippet: it loads what it needs, runs one instruction, and stores what is not in
a general register. RSI points to data, RDI to where results go, RBX near the end of a page.
"""

from __future__ import annotations

from itertools import product

__all__ = ["TOLERATED", "forms", "tolerated"]

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ALL = CF | PF | AF | ZF | SF | OF


def _words(text: str) -> list[str]:
    return text.split()


SIZES = {
    "byte": ("al", "cl"),
    "word": ("ax", "cx"),
    "dword": ("eax", "ecx"),
    "qword": ("rax", "rcx"),
}
CONDITIONS = [
    "o",
    "no",
    "b",
    "ae",
    "e",
    "ne",
    "be",
    "a",
    "s",
    "ns",
    "p",
    "np",
    "l",
    "ge",
    "le",
    "g",
]

# (mnemonics, what may differ, why): flags are bits of RFLAGS. SDM vol. 2 calls them undefined
TOLERATED: tuple[tuple[str, int, str], ...] = (
    ("and or xor test", AF, "AF is undefined behind logic"),
    ("mul imul", PF | AF | ZF | SF, "only CF and OF are defined behind a multiplication"),
    ("div idiv", ALL, "no flag is defined behind a division"),
    ("shl shr sar", AF | OF, "AF is undefined, OF is where the count is not 1"),
    ("rol ror rcl rcr", OF, "OF is undefined where the count is not 1"),
    ("shld shrd", AF | OF, "AF is undefined, OF is where the count is not 1"),
    ("bsf bsr", CF | PF | AF | SF | OF, "only ZF is defined behind a bit scan"),
    ("bt bts btr btc", PF | AF | SF | OF, "only CF (and ZF, unchanged) is defined behind BT"),
)


def tolerated(mnemonic: str) -> int:
    """The flags that may differ behind an instruction."""
    name = mnemonic.removeprefix("lock ").split()[0]
    return sum(flags for names, flags, _ in TOLERATED if name in names.split())


def forms() -> list[tuple[str, str]]:
    """(mnemonic, snippet) of every form."""
    return [*_integers(), *_vectors(), *_floats(), *_x87()]


def _integers() -> list[tuple[str, str]]:
    found: list[str] = []
    for size, (a, c) in SIZES.items():
        at, edge = f"{size} ptr [rsi+8]", f"{size} ptr [rbx-8]"
        for name in _words("add or adc sbb and sub xor cmp"):
            found += [f"{name} {a},{c}", f"{name} {at},{c}", f"{name} {a},{edge}"]
            found += [f"{name} {at},0x55"]
        found += [f"{name} {a},{c}" for name in ("test", "mov", "xchg", "xadd", "cmpxchg")]
        found += [f"{name} {at},{c}" for name in ("test", "mov", "xchg", "xadd", "cmpxchg")]
        for name in ["inc", "dec", "neg", "not"]:
            found += [f"{name} {a}", f"{name} {at}"]
        for name in _words("add or adc sbb and sub xor xadd cmpxchg"):
            found.append(f"lock {name} {at},{c}")
        found += [f"lock {name} {at}" for name in ("inc", "dec", "not")]  # LOCK NEG is refused
        for name, count in product(_words("shl shr sar rol ror rcl rcr"), ("1", "5", "cl")):
            found += [f"{name} {a},{count}", f"{name} {at},{count}"]
        found += [f"mul {c}", f"imul {c}", f"mul {at}"]
        if size != "byte":
            found += [f"imul {a},{c}", f"imul {a},{at},77", f"bsf {a},{c}", f"bsr {a},{c}"]
            found += [f"popcnt {a},{c}", f"shld {a},{c},7", f"shrd {at},{c},cl"]
            found += [f"{n} {a},{c}" for n in ("bt", "bts", "btr", "btc")]
            found += [f"{n} {at},3" for n in ("bt", "bts", "btr", "btc")]
            found += [f"cmov{cc} {a},{c}" for cc in CONDITIONS]
    found += [f"set{cc} al" for cc in CONDITIONS] + [f"set{cc} byte ptr [rdi]" for cc in CONDITIONS]
    found += [f"movzx {a},{c}" for a, c in (("ax", "cl"), ("eax", "cl"), ("rax", "cx"))]
    found += [f"movsx {a},{c}" for a, c in (("ax", "cl"), ("eax", "cx"), ("rax", "cl"))]
    found += [
        "movsxd rax,ecx",
        "bswap eax",
        "bswap rax",
        "cbw",
        "cwde",
        "cdqe",
        "cwd",
        "cdq",
        "cqo",
    ]
    found += ["lahf", "sahf", "stc", "clc", "cmc", "lea rax,[rcx+rdx*4+7]", "lea ax,[rcx+rdx]"]
    found += ["crc32 eax,cl", "crc32 eax,cx", "crc32 rax,rcx", "xor edx,edx; div cx"]
    found += ["xor edx,edx; div rcx", "cdq; idiv ecx", "div cl", "movnti [rdi],rax", "xlatb"]
    return [(text.split("; ")[-1], text) for text in found if text != "xlatb"]


_INTEGER_VECTORS = [
    "paddb",
    "paddw",
    "paddd",
    "paddq",
    "psubb",
    "psubw",
    "psubd",
    "psubq",
    "paddsb",
    "paddsw",
    "paddusb",
    "paddusw",
    "psubsb",
    "psubsw",
    "psubusb",
    "psubusw",
    "pmullw",
    "pmulhw",
    "pmulhuw",
    "pmuludq",
    "pmaddwd",
    "pavgb",
    "pavgw",
    "pminub",
    "pmaxub",
    "pminsw",
    "pmaxsw",
    "pand",
    "pandn",
    "por",
    "pxor",
    "pcmpeqb",
    "pcmpeqw",
    "pcmpeqd",
    "pcmpgtb",
    "pcmpgtw",
    "pcmpgtd",
    "punpcklbw",
    "punpcklwd",
    "punpckldq",
    "punpcklqdq",
    "punpckhbw",
    "punpckhwd",
    "punpckhdq",
    "punpckhqdq",
    "packsswb",
    "packssdw",
    "packuswb",
    "psadbw",
    "psllw",
    "pslld",
    "psllq",
    "psrlw",
    "psrld",
    "psrlq",
    "psraw",
    "psrad",
    "pshufb",
    "phaddw",
    "phaddd",
    "phaddsw",
    "phsubw",
    "phsubd",
    "phsubsw",
    "pmaddubsw",
    "pmulhrsw",
    "psignb",
    "psignw",
    "psignd",
    "pabsb",
    "pabsw",
    "pabsd",
    "pminsb",
    "pminsd",
    "pminuw",
    "pminud",
    "pmaxsb",
    "pmaxsd",
    "pmaxuw",
    "pmaxud",
    "pmulld",
    "pmuldq",
    "pcmpeqq",
    "pcmpgtq",
    "packusdw",
    "andps",
    "andpd",
    "andnps",
    "andnpd",
    "orps",
    "orpd",
    "xorps",
    "xorpd",
    "movsd",
    "movss",
    "movapd",
    "unpcklps",
    "unpckhps",
    "unpcklpd",
    "unpckhpd",
    "pmovsxbw",
    "pmovsxbd",
    "pmovsxbq",
    "pmovsxwd",
    "pmovsxwq",
    "pmovsxdq",
    "pmovzxbw",
    "pmovzxbd",
    "pmovzxbq",
    "pmovzxwd",
    "pmovzxwq",
    "pmovzxdq",
    "phminposuw",
    "movshdup",
    "movsldup",
    "movddup",
]
_IMMEDIATES = [
    "pshufd",
    "pshufhw",
    "pshuflw",
    "shufps",
    "shufpd",
    "palignr",
    "pblendw",
    "blendps",
    "blendpd",
    "mpsadbw",
    "insertps",
]


def _vector(text: str) -> str:
    """A snippet around an instruction of XMM0 and XMM1."""
    return f"movdqu xmm0,[rsi]; movdqu xmm1,[rsi+16]; {text}; movdqu [rdi],xmm0"


def _vectors() -> list[tuple[str, str]]:
    found = [f"{name} xmm0,xmm1" for name in _INTEGER_VECTORS]
    found += [f"{name} xmm0,[rsi+32]" for name in _INTEGER_VECTORS if name != "movapd"]
    found += [f"{name} xmm0,xmm1,{n}" for name in _IMMEDIATES for n in (0, 5, 0x1B)]
    found += [
        f"{name} xmm0,{n}" for name in ("pslldq", "psrldq", "psllw", "psrad") for n in (3, 40)
    ]
    found += ["pmovmskb eax,xmm0", "movmskps eax,xmm0", "movmskpd eax,xmm1", "ptest xmm0,xmm1"]
    found += ["pextrb eax,xmm0,3", "pextrw eax,xmm0,3", "pextrd eax,xmm0,1", "pextrq rax,xmm0,1"]
    found += ["pinsrb xmm0,ecx,3", "pinsrw xmm0,ecx,3", "pinsrd xmm0,ecx,1", "pinsrq xmm0,rcx,1"]
    found += ["movd eax,xmm0", "movq rax,xmm1", "movd xmm0,ecx", "movq xmm0,rcx", "movq xmm0,xmm1"]
    found += [
        "movhlps xmm0,xmm1",
        "movlhps xmm0,xmm1",
        "movlps xmm0,[rsi+9]",
        "movhps xmm0,[rsi+9]",
    ]
    return [(text, _vector(text)) for text in found]


_ARITHMETIC = _words("add sub mul div min max")
_CONVERSIONS = [
    "cvtdq2ps",
    "cvtps2dq",
    "cvttps2dq",
    "cvtpd2dq",
    "cvttpd2dq",
    "cvtps2pd",
    "cvtpd2ps",
    "cvtss2sd",
    "cvtsd2ss",
    "cvtdq2pd",
]


def _floats() -> list[tuple[str, str]]:
    found = [f"{n}{s} xmm0,xmm1" for n in _ARITHMETIC for s in ("ps", "pd", "ss", "sd")]
    found += [f"{n}{s} xmm0,[rsi+32]" for n in _ARITHMETIC for s in ("ps", "pd", "ss", "sd")]
    found += [f"sqrt{s} xmm0,xmm1" for s in ("ps", "pd", "ss", "sd")]
    found += [f"cmp{s} xmm0,xmm1,{n}" for s in ("ps", "pd", "ss", "sd") for n in range(8)]
    found += [f"{n}{s} xmm0,xmm1" for n in ("comi", "ucomi") for s in ("ss", "sd")]
    found += [f"{n} xmm0,xmm1" for n in _CONVERSIONS]
    found += [f"{n} {r},xmm0" for n in ("cvtss2si", "cvttss2si") for r in ("eax", "rax")]
    found += [f"{n} {r},xmm1" for n in ("cvtsd2si", "cvttsd2si") for r in ("eax", "rax")]
    found += [f"{n} xmm0,{r}" for n in ("cvtsi2ss", "cvtsi2sd") for r in ("ecx", "rcx")]
    found += [f"round{s} xmm0,xmm1,{n}" for s in ("ps", "pd", "ss", "sd") for n in range(5)]
    found += [f"{n}{s} xmm0,xmm1" for n in ("hadd", "hsub", "addsub") for s in ("ps", "pd")]
    found += ["dpps xmm0,xmm1,0xf1", "dppd xmm0,xmm1,0x31"]
    for name in ("pcmpistri", "pcmpistrm", "pcmpestri", "pcmpestrm"):
        found += [f"{name} xmm0,xmm1,{n}" for n in (0, 4, 8, 12, 0x18, 0x1A, 0x44)]
    fresh = "mov dword ptr [rdi+60],0x1f80; ldmxcsr [rdi+60]; "
    return [(t, fresh + _vector(f"{t}; stmxcsr [rdi+16]")) for t in found]


def _x87() -> list[tuple[str, str]]:
    both = "fninit; fld qword ptr [rsi]; fld qword ptr [rsi+8]; "
    store = "; fnstsw ax; mov [rdi+32],ax; fnclex; fstp tbyte ptr [rdi]; fstp tbyte ptr [rdi+16]"
    found = [f"{n} st,st(1)" for n in _words("fadd fsub fsubr fmul fdiv fdivr")]
    found += [f"{n} st(1)" for n in ["fxch", "fcom", "fucom"]]
    found += [f"{n} st(1),st" for n in _words("fadd fsub fsubr fmul fdiv fdivr")]
    found += [
        "fsqrt",
        "fabs",
        "fchs",
        "frndint",
        "fscale",
        "fprem",
        "fprem1",
        "ftst",
        "fxam",
        "f2xm1",
        "fnop",
    ]
    found += [f"{n} st,st(1)" for n in _words("fcomi fucomi fcmovb fcmove fcmovbe fcmovu")]
    found += [f"{n} dword ptr [rsi+4]" for n in _words("fadd fsub fmul fdiv fcom fiadd fidiv")]
    found += ["fist dword ptr [rdi+40]", "fst dword ptr [rdi+40]", "fst qword ptr [rdi+40]"]
    found += ["fist word ptr [rdi+40]", "fxtract; fstp tbyte ptr [rdi+48]"]
    return [(text, both + text + store) for text in found]
