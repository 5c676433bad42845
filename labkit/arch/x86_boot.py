"""x86-64 as labkit boots it: the state of kvm_util's vcpu_init_sregs(), and the names people use."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

from labkit.arch.desc import Field
from labkit.arch.model import Arch, BootTables, UcallExit
from labkit.arch.x86 import X86_PXXV48_4K
from labkit.arch.x86_cpu import MAXPHYADDR
from labkit.bits import genmask

__all__ = ["KERNEL_CS", "KERNEL_DS", "KERNEL_TSS", "X86_64"]

KERNEL_CS, KERNEL_DS, KERNEL_TSS = 0x08, 0x10, 0x18  # include/x86_64/processor.h
USER_DS, USER_CS = (
    0x2B,
    0x33,
)  # for guests at CPL3: Linux's own selectors, arch/x86/include/asm/segment.h
TSS_OFFSET, TSS_LIMIT = 0x100, 0x67
IO_BITMAP = (
    0x300  # bytes behind the TSS: ports below 0x1800, so that the ucall's 0x1000 is among them
)
CR0 = 0x80010021  # PG WP NE PE; the kernel's tests leave WP out, and then read-only pages do not bind their guests
CR4 = 0x620  # OSXMMEXCPT OSFXSR PAE
EFER = 0xD00  # NX LMA LME

VECTORS = {
    0: "#DE",
    1: "#DB",
    2: "NMI",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
    12: "#SS",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    18: "#MC",
    19: "#XM",
    20: "#VE",
    21: "#CP",
    28: "#HV",
    29: "#VC",
    30: "#SX",
}
FLAGS = {
    "CF": 0,
    "PF": 2,
    "AF": 4,
    "ZF": 6,
    "SF": 7,
    "TF": 8,
    "IF": 9,
    "DF": 10,
    "OF": 11,
    "NT": 14,
    "RF": 16,
    "AC": 18,
}
SHOWN = (
    "rip",
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rflags",
    "cr3",
)


def _tables(gva: int, ring0_stack: int = 0) -> bytes:
    """GDT (null, 64-bit code, data, TSS) and the TSS itself, in one page; with a stack for ring 0, what a guest at CPL3 needs too.

    That is segments of DPL 3, RSP0 and a bitmap that allows every port (SDM vol. 1 19.5.2), whose last byte is all ones.
    """
    tss, limit = gva + TSS_OFFSET, TSS_LIMIT + (IO_BITMAP if ring0_stack else 0)
    low = limit | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56
    gdt = struct.pack(
        "<7Q",
        0,
        0x00AF9B000000FFFF,
        0x00CF93000000FFFF,
        low,
        tss >> 32,
        0x00CFF3000000FFFF,
        0x00AFFB000000FFFF,
    )
    task = bytearray(limit + 1)
    struct.pack_into("<Q", task, 4, ring0_stack)
    struct.pack_into(
        "<H", task, 0x66, TSS_LIMIT + 1
    )  # where the I/O bitmap is; without one, that is beyond the limit
    if ring0_stack:
        task[-1] = 0xFF
    return (gdt if ring0_stack else gdt[:40]).ljust(TSS_OFFSET, b"\0") + bytes(task)


def _idt(handlers: Sequence[int]) -> bytes:
    """Interrupt gates to these addresses, IST 0 (idt_set_entry() in lib/x86_64/processor.c)."""
    return b"".join(map(_gate, handlers))


@lru_cache(4096)
def _gate(handler: int) -> bytes:
    return struct.pack(
        "<HHBBHII", handler & 0xFFFF, KERNEL_CS, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0
    )


def _reset(tables: BootTables) -> dict[str, int]:
    code, data = (USER_CS, USER_DS) if tables.user else (KERNEL_CS, KERNEL_DS)
    return {
        "efer": EFER,
        "cr4": CR4,
        "cr3": tables.root_gpa,
        "cr0": CR0,
        "gdt_base": tables.gdt,
        "gdt_limit": 0x37 if tables.user else 0x27,
        "idt_base": tables.idt,
        "idt_limit": 0xFFF,
        "cs": code,
        **dict.fromkeys(("ds", "es", "gs", "ss", "fs"), data),
        "tr": KERNEL_TSS,
        "tr_base": tables.tss,
        "tr_limit": TSS_LIMIT + (IO_BITMAP if tables.user else 0),
        "rflags": 2,
    }


def _level(regs: Mapping[str, int]) -> str:
    mode = (
        "long mode"
        if regs["efer"] & 0x400
        else "protected mode"
        if regs["cr0"] & 1
        else "real mode"
    )
    return f"ring {regs['cs'] & 3}, {mode}"


X86_64 = Arch(
    name="x86_64",
    modes=(X86_PXXV48_4K.with_maxphyaddr(MAXPHYADDR),),
    pc="rip",
    sp="rsp",
    flags="rflags",
    shown=SHOWN,
    arguments=("rdi", "rsi", "rdx", "rcx", "r8", "r9"),
    root="cr3",
    root_field=Field(genmask(51, 12)),
    ucall=UcallExit("pio", 0x1000, "rdi"),
    flag_names=FLAGS,
    vectors=VECTORS,
    page_faults=frozenset({14}),
    stubs="idt_handlers",
    nr_vectors=256,
    stack_bias=8,
    level=_level,
    reset=_reset,
    tables=_tables,
    idt=_idt,
    tss_offset=TSS_OFFSET,
)
