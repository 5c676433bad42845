"""x86-64 as labkit boots it: the state of kvm_util's vcpu_init_sregs(), and names for it."""

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

# Selectors: include/x86_64/processor.h.
KERNEL_CS = 0x08
KERNEL_DS = 0x10
KERNEL_TSS = 0x18

# For guests at CPL3 Linux's own: arch/x86/include/asm/segment.h.
USER_DS = 0x2B
USER_CS = 0x33

TSS_OFFSET = 0x100  # in the descriptor page
TSS_LIMIT = 0x67
# Bytes behind the TSS: ports below 0x1800, so that the ucall's 0x1000 is among them.
IO_BITMAP = 0x300

# PG WP NE PE. The kernel's tests leave WP out, and then read-only pages do not bind their guests.
CR0 = 0x80010021
CR4 = 0x620  # OSXMMEXCPT OSFXSR PAE
EFER = 0xD00  # NX LMA LME
EFER_LMA = 0x400

# Descriptors: 64-bit code and data, for the kernel and, with DPL 3, for users.
KERNEL_CODE = 0x00AF9B000000FFFF
KERNEL_DATA = 0x00CF93000000FFFF
USER_DATA = 0x00CFF3000000FFFF
USER_CODE = 0x00AFFB000000FFFF
KERNEL_GDT_SIZE = 5 * 8  # bytes; a TSS takes two entries
USER_GDT_SIZE = 7 * 8

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
    """GDT (null, 64-bit code, data, TSS) and the TSS itself, in one page at gva.

    With a stack for ring 0, what a guest at CPL3 needs too: segments of DPL 3, RSP0 and a bitmap
    that allows every port (SDM vol. 1 19.5.2), whose last byte is all ones.
    """
    tss = gva + TSS_OFFSET
    limit = TSS_LIMIT
    if ring0_stack:
        limit += IO_BITMAP
    low = limit | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56
    high = tss >> 32
    descriptors = [0, KERNEL_CODE, KERNEL_DATA, low, high]
    if ring0_stack:
        descriptors += [USER_DATA, USER_CODE]
    gdt = struct.pack(f"<{len(descriptors)}Q", *descriptors)

    task = bytearray(limit + 1)
    struct.pack_into("<Q", task, 4, ring0_stack)
    # Where the I/O bitmap is; without one, that is beyond the limit.
    struct.pack_into("<H", task, 0x66, TSS_LIMIT + 1)
    if ring0_stack:
        task[-1] = 0xFF
    return gdt.ljust(TSS_OFFSET, b"\0") + bytes(task)


def _idt(handlers: Sequence[int]) -> bytes:
    """Interrupt gates to these addresses, IST 0 (idt_set_entry() in lib/x86_64/processor.c)."""
    return b"".join(_gate(handler) for handler in handlers)


@lru_cache(4096)
def _gate(handler: int) -> bytes:
    low = handler & 0xFFFF
    middle = handler >> 16 & 0xFFFF
    high = handler >> 32
    return struct.pack("<HHBBHII", low, KERNEL_CS, 0, 0x8E, middle, high, 0)


MXCSR = 0x1F80  # after reset (SDM vol. 3A table 10-1)


def _reset(tables: BootTables) -> dict[str, int]:
    code = USER_CS if tables.user else KERNEL_CS
    data = USER_DS if tables.user else KERNEL_DS
    gdt_size = USER_GDT_SIZE if tables.user else KERNEL_GDT_SIZE
    io_bitmap = IO_BITMAP if tables.user else 0
    return {
        "efer": EFER,
        "cr4": CR4,
        "cr3": tables.root_gpa,
        "cr0": CR0,
        "gdt_base": tables.gdt,
        "gdt_limit": gdt_size - 1,
        "idt_base": tables.idt,
        "idt_limit": 0xFFF,
        "cs": code,
        **dict.fromkeys(("ds", "es", "gs", "ss", "fs"), data),
        "tr": KERNEL_TSS,
        "tr_base": tables.tss,
        "tr_limit": TSS_LIMIT + io_bitmap,
        "rflags": 2,
        "mxcsr": MXCSR,
    }


def _level(regs: Mapping[str, int]) -> str:
    if regs["efer"] & EFER_LMA:
        mode = "long mode"
    elif regs["cr0"] & 1:
        mode = "protected mode"
    else:
        mode = "real mode"
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
