"""The VM save area: one encrypted page that holds a SEV-ES vCPU's registers.

It is built from labkit's register names. Layout: APM vol. 2 (24593) table B-4, in Linux struct
sev_es_save_area (arch/x86/include/asm/svm.h), 0x670 bytes of a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from labkit.errors import InvalidState

__all__ = [
    "SNP_ACTIVE",
    "VMSA",
    "VMSA_GPA",
    "VMSA_SIZE",
    "Hidden",
    "Layout",
    "vmsa_page",
    "vmsa_registers",
]

VMSA_SIZE = 4096

# KVM's INITIAL_VMSA_GPA, which SNP measures
VMSA_GPA = 0xFFFF_FFFF_F000

# Of the field sev_features
SNP_ACTIVE = 1 << 0

# A segment's base, limit and second descriptor word, as an engine keeps them
Hidden = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Where the little-endian fields of a page lie: name -> (offset, bytes).

    size is up to the end of the last field.
    """

    fields: Mapping[str, tuple[int, int]]
    size: int

    def get(self, page: bytes | bytearray, name: str) -> int:
        """One field's value."""
        offset, size = self.fields[name]
        return int.from_bytes(page[offset : offset + size], "little")

    def put(self, page: bytearray, name: str, value: int) -> None:
        """Set one field; raises InvalidState for a value that does not fit."""
        offset, size = self.fields[name]
        if not 0 <= value < 1 << 8 * size:
            raise InvalidState(
                f"{name} has {8 * size} bits in this page, not {value:#x}", name=name, value=value
            )
        page[offset : offset + size] = value.to_bytes(size, "little")

    @classmethod
    def of(cls, *rows: tuple[int, int, str]) -> Layout:
        """A layout from runs of fields of one size: (offset of the first, bytes of each, names)."""
        fields = {}
        for offset, size, names in rows:
            for i, name in enumerate(names.split()):
                fields[name] = (offset + size * i, size)
        return cls(fields, max(offset + size for offset, size in fields.values()))


def _segment_rows() -> Iterator[tuple[int, int, str]]:
    """The ten segments, 16 bytes each from the page's start on."""
    segments = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
    for index, name in enumerate(segments):
        at = 16 * index
        yield at, 2, f"{name}_selector"
        yield at + 2, 2, f"{name}_attrib"
        yield at + 4, 4, f"{name}_limit"
        yield at + 8, 8, f"{name}_base"


VMSA = Layout.of(
    *_segment_rows(),
    (0xA0, 8, "vmpl0_ssp vmpl1_ssp vmpl2_ssp vmpl3_ssp u_cet"),
    (0xCA, 1, "vmpl cpl"),
    (0xD0, 8, "efer"),
    (0x140, 8, "xss cr4 cr3 cr0 dr7 dr6 rflags rip dr0 dr1 dr2 dr3"),
    (0x1A0, 8, "dr0_addr_mask dr1_addr_mask dr2_addr_mask dr3_addr_mask"),
    (0x1D8, 8, "rsp s_cet ssp isst_addr rax"),
    (0x200, 8, "star lstar cstar sfmask kernel_gs_base sysenter_cs sysenter_esp sysenter_eip cr2"),
    (0x268, 8, "g_pat dbgctl br_from br_to last_excp_from last_excp_to"),
    (0x2E8, 4, "pkru tsc_aux"),
    (0x308, 8, "rcx rdx rbx"),
    (0x328, 8, "rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15"),
    (0x390, 8, "guest_exit_info_1 guest_exit_info_2 guest_exit_int_info guest_nrip"),
    (0x3B0, 8, "sev_features vintr_ctrl guest_exit_code virtual_tom"),
    (0x3D0, 8, "tlb_id pcpu_id event_inj xcr0"),
    (0x400, 8, "x87_dp"),
    (0x408, 4, "mxcsr"),
    (0x40C, 2, "x87_ftw x87_fsw x87_fcw x87_fop x87_ds x87_cs"),
    (0x418, 8, "x87_rip"),
    (0x420, 80, "fpreg_x87"),
    (0x470, 16, "xmm0 xmm1 xmm2 xmm3 xmm4 xmm5 xmm6 xmm7"),
    (0x4F0, 16, "xmm8 xmm9 xmm10 xmm11 xmm12 xmm13 xmm14 xmm15"),
    (0x570, 256, "fpreg_ymm"),
)

# EXPECTED_SEV_ES_SAVE_AREA_SIZE
assert VMSA.size == 0x670

# labkit's name of a register -> the layout's, where they differ
_NAMES = {
    "gdt_base": "gdtr_base",
    "gdt_limit": "gdtr_limit",
    "idt_base": "idtr_base",
    "idt_limit": "idtr_limit",
    "tr": "tr_selector",
    "ldt": "ldtr_selector",
}

# Registers of labkit that are selectors, with the rest of their segment hidden
_SELECTORS = ("es", "cs", "ss", "ds", "fs", "gs")

# Segments as labkit boots them
_FLAT_CODE: Hidden = (0, 0xFFFFFFFF, 0x00AF9B00)
_FLAT_DATA: Hidden = (0, 0xFFFFFFFF, 0x00CF9300)
_NULL: Hidden = (0, 0, 0)
_BUSY_TSS: Hidden = (0, 0, 0x8B00)


def vmsa_page(regs: Mapping[str, int], hidden: Mapping[str, Hidden] | None = None) -> bytes:
    """The plaintext page of a vCPU with these registers (sev_es_sync_vmsa()).

    Names are labkit's or the layout's; what is missing is 0. Registers that a VMSA has no place for
    (cr8, numbered MSRs) are left out. `hidden` gives segments other than flat 64-bit ones. Raises
    InvalidState for a value that does not fit.
    """
    page = bytearray(VMSA_SIZE)
    hidden = hidden or {}

    for name in _SELECTORS:
        selector = regs.get(name, 0)
        _put_segment(page, name, selector, hidden.get(name, _usual_segment(name, selector)))
    _put_segment(page, "ldtr", 0, hidden.get("ldtr", _NULL))
    _put_segment(page, "tr", 0, hidden.get("tr", _BUSY_TSS))

    for name, value in regs.items():
        field = _NAMES.get(name, name)
        if field in VMSA.fields:
            VMSA.put(page, field, value)
    if "cpl" not in regs:
        VMSA.put(page, "cpl", regs.get("cs", 0) & 3)
    return bytes(page)


def _usual_segment(name: str, selector: int) -> Hidden:
    is_null = not selector & ~3
    if is_null:
        return _NULL
    return _FLAT_CODE if name == "cs" else _FLAT_DATA


def _put_segment(page: bytearray, name: str, selector: int, hidden: Hidden) -> None:
    base, limit, word = hidden
    VMSA.put(page, f"{name}_selector", selector)
    VMSA.put(page, f"{name}_attrib", word >> 8 & 0xFF | word >> 12 & 0xF00)
    VMSA.put(page, f"{name}_limit", limit)
    VMSA.put(page, f"{name}_base", base)


def vmsa_registers(page: bytes) -> dict[str, int]:
    """The registers in a plaintext page, by labkit's names.

    Raises InvalidState for what is no page.
    """
    if len(page) != VMSA_SIZE:
        raise InvalidState(f"a VMSA is one page, not {len(page)} bytes")
    ours = {field: name for name, field in _NAMES.items()}
    ours |= {f"{name}_selector": name for name in _SELECTORS}
    return {ours.get(field, field): VMSA.get(page, field) for field in VMSA.fields}
