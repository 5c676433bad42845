"""The guest-hypervisor communication block: the MSR protocol and the shared page, read by a host that trusts neither.

Source: GHCB specification (AMD 56421) chapters 2 (MSR protocol, layout) and 4 (events); what a request must bring along and how a
bad one is answered as KVM does it (sev_es_validate_vmgexit(), sev_handle_vmgexit_msr_protocol() in arch/x86/kvm/svm/sev.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from labkit.bits import genmask
from labkit.sev.vmsa import Layout

__all__ = [
    "EVENTS",
    "GHCB",
    "KVM_SYSTEM_EVENT_SEV_TERM",
    "MSR_REQUESTS",
    "MSR_RESPONSES",
    "SHARED_BUFFER",
    "Event",
    "GhcbReason",
    "GhcbRequest",
    "MsrHost",
    "MsrRequest",
    "Port",
    "answer_ghcb",
    "answer_msr",
    "decode_io",
    "msr_response",
    "parse_ghcb",
    "parse_msr",
    "scratch_offset",
    "term_text",
]

KVM_SYSTEM_EVENT_SEV_TERM = 6  # ndata 1, data[0] = the MSR's value
SHARED_BUFFER = (0x800, 2032)  # offset and bytes
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

Bits = tuple[tuple[str, int, int], ...]  # name, high and low bit
_GFN = (("gfn", 63, 12),)
# The low twelve bits say what is asked; (name, fields, only for SNP)
MSR_REQUESTS: dict[int, tuple[str, Bits, bool]] = {
    0x002: ("SEV_INFO", (), False),
    0x004: ("CPUID", (("leaf", 63, 32), ("register", 31, 30)), False),
    0x006: ("AP_RESET_HOLD", (), False),
    0x010: ("PREFERRED_GPA", (), True),
    0x012: ("REGISTER_GPA", _GFN, True),
    0x014: ("PAGE_STATE", (("gfn", 51, 12), ("op", 55, 52)), True),
    0x080: ("HV_FEATURES", (), False),
    0x100: ("TERM", (("reason_set", 15, 12), ("reason", 23, 16)), False),
}
MSR_RESPONSES: dict[str, tuple[int, Bits]] = {
    "SEV_INFO": (0x001, (("max", 63, 48), ("min", 47, 32), ("c_bit", 31, 24))),
    "CPUID": (0x005, (("value", 63, 32), ("register", 31, 30))),
    "AP_RESET_HOLD": (0x007, (("result", 63, 12),)),
    "PREFERRED_GPA": (0x011, _GFN),
    "REGISTER_GPA": (0x013, _GFN),
    "PAGE_STATE": (0x015, (("error", 63, 32),)),
    "HV_FEATURES": (0x081, (("features", 63, 12),)),
}
NO_PREFERENCE = genmask(51, 0)
_TERM = {
    (0, 0): "general termination",
    (0, 1): "GHCB protocol not supported",
    (0, 2): "SNP features not supported",
}


class MsrRequest(NamedTuple):
    """What a guest wrote to MSR 0xc0010130: a request by name, "GHCB" for a page at `gpa`, "UNKNOWN" for anything else."""

    name: str
    fields: dict[str, int]
    snp_only: bool = False


@dataclass(frozen=True)
class MsrHost:
    """What a host tells a guest through the MSR."""

    c_bit: int
    cpuid: Callable[[int, int], tuple[int, int, int, int]]  # (leaf, subleaf) -> eax ebx ecx edx
    snp: bool = False
    versions: tuple[int, int] = (1, 2)  # least and greatest
    features: int = 0
    page_state: Callable[[int, int], int] = lambda gfn, op: (
        1
    )  # (gfn, 1 private | 2 shared) -> 0 or an error


def parse_msr(value: int) -> MsrRequest:
    """The request in an MSR value; any 64 bits are understood."""
    if not value & 0xFFF:
        return MsrRequest("GHCB", {"gpa": value})
    name, bits, snp_only = MSR_REQUESTS.get(value & 0xFFF, ("UNKNOWN", (), False))
    return MsrRequest(
        name, {field: (value & genmask(hi, lo)) >> lo for field, hi, lo in bits}, snp_only
    )


def msr_response(name: str, **fields: int) -> int:
    """The MSR value of a response; a field too wide for its place is cut."""
    code, bits = MSR_RESPONSES[name]
    return code | sum(fields[field] << lo & genmask(hi, lo) for field, hi, lo in bits)


def answer_msr(value: int, host: MsrHost) -> int | None:
    """The MSR after VMGEXIT with this value; None ends the VM with SYSTEM_EVENT 6. What KVM does not know it leaves as it is."""
    request = parse_msr(value)
    if request.name == "TERM" or (request.snp_only and not host.snp):
        return None
    match request:
        case MsrRequest("SEV_INFO"):
            return msr_response(
                "SEV_INFO", min=host.versions[0], max=host.versions[1], c_bit=host.c_bit
            )
        case MsrRequest("CPUID", {"leaf": leaf, "register": register}):
            return msr_response("CPUID", register=register, value=host.cpuid(leaf, 0)[register])
        case MsrRequest("AP_RESET_HOLD"):
            return msr_response("AP_RESET_HOLD", result=0)
        case MsrRequest("PREFERRED_GPA"):
            return msr_response("PREFERRED_GPA", gfn=NO_PREFERENCE)
        case MsrRequest("REGISTER_GPA", {"gfn": gfn}):
            return msr_response("REGISTER_GPA", gfn=gfn)
        case MsrRequest("PAGE_STATE", {"gfn": gfn, "op": op}):
            return msr_response("PAGE_STATE", error=host.page_state(gfn, op))
        case MsrRequest("HV_FEATURES"):
            return msr_response("HV_FEATURES", features=host.features)
    return value


def term_text(value: int) -> str:
    """A TERM request in words (GHCB specification, table of reason codes)."""
    fields = parse_msr(value).fields
    known = _TERM.get((fields["reason_set"], fields["reason"]), "a reason of the guest's own")
    return f"the guest asked to be terminated: set {fields['reason_set']}, reason {fields['reason']} ({known})"


class GhcbReason(IntEnum):
    """Why a page was refused; the guest finds 2 in sw_exit_info_1 and this in sw_exit_info_2."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class Port(NamedTuple):
    """An I/O instruction as IOIO's exit information tells it (APM vol. 2 figure 15-2)."""

    port: int
    size: int  # bytes; 0 when the guest set no size bit or several
    is_write: bool
    is_string: bool


def decode_io(info_1: int) -> Port:
    """The port access in sw_exit_info_1."""
    return Port(
        info_1 >> 16 & 0xFFFF,
        {1: 1, 2: 2, 4: 4}.get(info_1 >> 4 & 7, 0),
        not info_1 & 1,
        bool(info_1 & 4),
    )


class Event(NamedTuple):
    """One exit code: its name, the fields that must be valid, more of them for some values, and whether it is SNP's."""

    name: str
    needs: str = ""
    more: Callable[[GhcbRequest], str] = lambda request: ""
    snp_only: bool = False


def _io_needs(request: GhcbRequest) -> str:
    port = decode_io(request.info_1)
    return "sw_scratch" if port.is_string else "rax" if port.is_write else ""


EVENTS = {
    0x27: Event("READ_DR7"),
    0x37: Event("WRITE_DR7", "rax"),
    0x6E: Event("RDTSC"),
    0x6F: Event("RDPMC", "rcx"),
    0x72: Event("CPUID", "rax rcx", lambda r: "xcr0" if r.regs["rax"] & 0xFFFFFFFF == 0xD else ""),
    0x76: Event("INVD"),
    0x7B: Event("IOIO", "", _io_needs),
    0x7C: Event("MSR", "rcx", lambda r: "rax rdx" if r.info_1 else ""),
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


@dataclass(frozen=True)
class GhcbRequest:
    """A VMGEXIT's page as it was at one moment; `refused` is set when a host must not act on it."""

    name: str
    code: int
    info_1: int
    info_2: int
    scratch: int
    regs: dict[str, int]  # only what the guest marked valid
    refused: GhcbReason | None = None


def parse_ghcb(page: bytes | bytearray, snp: bool = False) -> GhcbRequest:
    """The request in a GHCB page; a page of any 4096 bytes is understood, what is wrong with it is in `refused`."""
    page = bytes(page)  # one copy, then checks and use agree whatever the guest writes meanwhile
    bitmap = GHCB.get(page, "valid_bitmap")
    regs = {
        name: GHCB.get(page, name)
        for name, (offset, size) in GHCB.fields.items()
        if offset < 0x3F0 and bitmap >> offset // 8 & 1
    }
    code, info_1, info_2, scratch = (
        GHCB.get(page, f"sw_{name}")
        for name in ("exit_code", "exit_info_1", "exit_info_2", "scratch")
    )
    event = EVENTS.get(code)
    request = GhcbRequest(
        event.name if event else f"{code:#x}?", code, info_1, info_2, scratch, regs
    )
    refused = (
        GhcbReason.INVALID_USAGE if GHCB.get(page, "ghcb_usage") else _refused(request, event, snp)
    )
    return replace(request, refused=refused)


def _refused(request: GhcbRequest, event: Event | None, snp: bool) -> GhcbReason | None:
    if not {"sw_exit_code", "sw_exit_info_1", "sw_exit_info_2"} <= request.regs.keys():
        return GhcbReason.MISSING_INPUT
    if event is None:
        return GhcbReason.INVALID_EVENT
    if event.snp_only and not snp:
        return GhcbReason.MISSING_INPUT
    valid = request.regs.keys()
    complete = set(event.needs.split()) <= valid and set(event.more(request).split()) <= valid
    return None if complete else GhcbReason.MISSING_INPUT


def scratch_offset(ghcb_gpa: int, scratch: int, size: int) -> int | None:
    """Where in the page a scratch area of `size` bytes lies; None when it is not wholly in the shared buffer, as version 2 wants."""
    start, room = SHARED_BUFFER
    offset = scratch - ghcb_gpa
    return offset if size >= 0 and start <= offset and offset + size <= start + room else None


def answer_ghcb(
    page: bytearray, regs: Mapping[str, int] | None = None, refused: GhcbReason | None = None
) -> None:
    """Write the host's answer into the page: registers, marked valid, or the reason of a refusal."""
    for name, value in {
        "sw_exit_info_1": 2 if refused else 0,
        "sw_exit_info_2": int(refused or 0),
        **(regs or {}),
    }.items():
        GHCB.put(page, name, value)
        GHCB.put(
            page, "valid_bitmap", GHCB.get(page, "valid_bitmap") | 1 << GHCB.fields[name][0] // 8
        )
