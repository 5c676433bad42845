"""The guest-hypervisor communication block: the shared page, read by a host that does not trust it.

Source: GHCB specification (AMD 56421) chapters 2 (layout) and 4 (events); what a request must bring
along and how a bad one is answered as KVM does it (sev_es_validate_vmgexit() in
arch/x86/kvm/svm/sev.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from labkit.sev.vmsa import Layout

__all__ = [
    "EVENTS",
    "GHCB",
    "SHARED_BUFFER",
    "Event",
    "GhcbReason",
    "GhcbRequest",
    "Port",
    "answer_ghcb",
    "decode_io",
    "parse_ghcb",
    "scratch_offset",
]

# Offset and bytes
SHARED_BUFFER = (0x800, 2032)

GHCB = Layout.of(
    (0xCB, 1, "cpl"),
    (0x140, 8, "xss"),
    (0x160, 8, "dr7"),
    (0x178, 8, "rip"),
    (0x1D8, 8, "rsp"),
    (0x1F8, 8, "rax"),
    (0x308, 8, "rcx rdx rbx"),
    (0x328, 8, "rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15"),
    (0x390, 8, "sw_exit_code sw_exit_info_1 sw_exit_info_2 sw_scratch"),
    (0x3E8, 8, "xcr0"),
    (0x3F0, 16, "valid_bitmap"),
    (0x400, 8, "x87_state_gpa"),
    (0xFFA, 2, "protocol_version"),
    (0xFFC, 4, "ghcb_usage"),
)
assert GHCB.size == 4096

# Field -> its bit in valid_bitmap: there is one for each eight bytes before the bitmap itself
_VALID_BITS = {
    name: offset // 8
    for name, (offset, _) in GHCB.fields.items()
    if offset < GHCB.fields["valid_bitmap"][0]
}


class GhcbReason(IntEnum):
    """Why a page was refused; the guest finds 2 in sw_exit_info_1 and this in sw_exit_info_2."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class Port(NamedTuple):
    """An I/O instruction as IOIO's exit information tells it (APM vol. 2 figure 15-2).

    size is in bytes, 0 when the guest set no size bit or several.
    """

    port: int
    size: int
    is_write: bool
    is_string: bool


def decode_io(info_1: int) -> Port:
    """The port access in sw_exit_info_1."""
    size = info_1 >> 4 & 7
    return Port(
        port=info_1 >> 16 & 0xFFFF,
        size=size if size in (1, 2, 4) else 0,
        is_write=not info_1 & 1,
        is_string=bool(info_1 & 4),
    )


@dataclass(frozen=True)
class GhcbRequest:
    """A VMGEXIT's page as it was at one moment.

    regs has only the fields that the guest marked valid; `refused` is set when a host must not act
    on the request.
    """

    name: str
    code: int
    info_1: int
    info_2: int
    scratch: int
    regs: dict[str, int]
    refused: GhcbReason | None = None


def _nothing(request: GhcbRequest) -> str:
    return ""


def _cpuid_needs(request: GhcbRequest) -> str:
    leaf = request.regs["rax"] & 0xFFFFFFFF
    return "xcr0" if leaf == 0xD else ""


def _io_needs(request: GhcbRequest) -> str:
    port = decode_io(request.info_1)
    if port.is_string:
        return "sw_scratch"
    return "rax" if port.is_write else ""


def _msr_needs(request: GhcbRequest) -> str:
    is_write = request.info_1
    return "rax rdx" if is_write else ""


class Event(NamedTuple):
    """One exit code: its name, and what a request must bring along.

    needs are the fields that must be valid, more(request) those that some values need beside them
    (called once needs are there).
    """

    name: str
    needs: str = ""
    more: Callable[[GhcbRequest], str] = _nothing
    snp_only: bool = False


EVENTS = {
    0x27: Event("READ_DR7"),
    0x37: Event("WRITE_DR7", "rax"),
    0x6E: Event("RDTSC"),
    0x6F: Event("RDPMC", "rcx"),
    0x72: Event("CPUID", "rax rcx", _cpuid_needs),
    0x76: Event("INVD"),
    0x7B: Event("IOIO", "", _io_needs),
    0x7C: Event("MSR", "rcx", _msr_needs),
    0x81: Event("VMMCALL", "rax cpl"),
    0x87: Event("RDTSCP"),
    0x89: Event("WBINVD"),
    0x8A: Event("MONITOR", "rax rcx rdx"),
    0x8B: Event("MWAIT", "rax rcx"),
    0x8000_0001: Event("MMIO_READ", "sw_scratch"),
    0x8000_0002: Event("MMIO_WRITE", "sw_scratch"),
    0x8000_0003: Event("NMI_COMPLETE"),
    0x8000_0004: Event("AP_HLT_LOOP"),
    0x8000_0005: Event("AP_JUMP_TABLE"),
    0x8000_0010: Event("PAGE_STATE", "sw_scratch", snp_only=True),
    0x8000_FFFD: Event("HV_FEATURES"),
    0x8000_FFFE: Event("TERM"),
    0x8000_FFFF: Event("UNSUPPORTED_EVENT"),
}


def parse_ghcb(page: bytes | bytearray, snp: bool = False) -> GhcbRequest:
    """The request in a GHCB page, of an SNP guest or not.

    A page of any 4096 bytes is understood; what is wrong with it is in `refused`.
    """
    # One copy: checks and use agree then, whatever the guest writes meanwhile
    page = bytes(page)

    bitmap = GHCB.get(page, "valid_bitmap")
    regs = {name: GHCB.get(page, name) for name, bit in _VALID_BITS.items() if bitmap >> bit & 1}
    code = GHCB.get(page, "sw_exit_code")
    event = EVENTS.get(code)
    request = GhcbRequest(
        name=event.name if event else f"{code:#x}?",
        code=code,
        info_1=GHCB.get(page, "sw_exit_info_1"),
        info_2=GHCB.get(page, "sw_exit_info_2"),
        scratch=GHCB.get(page, "sw_scratch"),
        regs=regs,
    )
    if GHCB.get(page, "ghcb_usage"):
        return replace(request, refused=GhcbReason.INVALID_USAGE)
    return replace(request, refused=_refused(request, event, snp))


def _refused(request: GhcbRequest, event: Event | None, snp: bool) -> GhcbReason | None:
    valid = request.regs.keys()
    if not {"sw_exit_code", "sw_exit_info_1", "sw_exit_info_2"} <= valid:
        return GhcbReason.MISSING_INPUT
    if event is None:
        return GhcbReason.INVALID_EVENT
    if event.snp_only and not snp:
        return GhcbReason.MISSING_INPUT
    if not set(event.needs.split()) <= valid:
        return GhcbReason.MISSING_INPUT
    if not set(event.more(request).split()) <= valid:
        return GhcbReason.MISSING_INPUT
    return None


def scratch_offset(ghcb_gpa: int, scratch: int, size: int) -> int | None:
    """Where in the page a scratch area of `size` bytes lies.

    None when it is not wholly in the shared buffer, as version 2 of the protocol wants it.
    """
    start, room = SHARED_BUFFER
    offset = scratch - ghcb_gpa
    is_inside = size >= 0 and start <= offset and offset + size <= start + room
    return offset if is_inside else None


def answer_ghcb(
    page: bytearray, regs: Mapping[str, int] | None = None, refused: GhcbReason | None = None
) -> None:
    """Write the host's answer into the page: registers, or the reason of a refusal.

    What is written is marked valid.
    """
    answer = {"sw_exit_info_1": 0, "sw_exit_info_2": 0}
    if refused is not None:
        answer = {"sw_exit_info_1": 2, "sw_exit_info_2": int(refused)}
    if regs is not None:
        answer |= regs

    bitmap = GHCB.get(page, "valid_bitmap")
    for name, value in answer.items():
        GHCB.put(page, name, value)
        bitmap |= 1 << _VALID_BITS[name]
    GHCB.put(page, "valid_bitmap", bitmap)
