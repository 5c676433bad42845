"""The GHCB's MSR protocol: what a guest asks in MSR 0xc0010130 itself, and what a host answers.

Source: GHCB specification (AMD 56421) chapter 2; a bad request is answered as KVM does it
(sev_handle_vmgexit_msr_protocol() in arch/x86/kvm/svm/sev.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from labkit.bits import genmask

__all__ = [
    "KVM_SYSTEM_EVENT_SEV_TERM",
    "MSR_REQUESTS",
    "MSR_RESPONSES",
    "MsrHost",
    "MsrRequest",
    "answer_msr",
    "msr_response",
    "parse_msr",
    "term_text",
]

# Of KVM_EXIT_SYSTEM_EVENT: ndata 1, data[0] = the MSR's value
KVM_SYSTEM_EVENT_SEV_TERM = 6

# Name, high and low bit
Bits = tuple[tuple[str, int, int], ...]

_GFN: Bits = (("gfn", 63, 12),)

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

# By the request's name: (what the low twelve bits say, fields)
MSR_RESPONSES: dict[str, tuple[int, Bits]] = {
    "SEV_INFO": (0x001, (("max", 63, 48), ("min", 47, 32), ("c_bit", 31, 24))),
    "CPUID": (0x005, (("value", 63, 32), ("register", 31, 30))),
    "AP_RESET_HOLD": (0x007, (("result", 63, 12),)),
    "PREFERRED_GPA": (0x011, _GFN),
    "REGISTER_GPA": (0x013, _GFN),
    "PAGE_STATE": (0x015, (("error", 63, 32),)),
    "HV_FEATURES": (0x081, (("features", 63, 12),)),
}

# The gfn of PREFERRED_GPA that says: wherever
NO_PREFERENCE = genmask(51, 0)

# (set, reason), from the specification's table of reason codes
_TERM = {
    (0, 0): "general termination",
    (0, 1): "GHCB protocol not supported",
    (0, 2): "SNP features not supported",
}


class MsrRequest(NamedTuple):
    """What a guest wrote to MSR 0xc0010130.

    It is a request by name, "GHCB" for a page at `gpa`, "UNKNOWN" for anything else.
    """

    name: str
    fields: dict[str, int]
    snp_only: bool = False


def _refuse_change(gfn: int, op: int) -> int:
    return 1


@dataclass(frozen=True)
class MsrHost:
    """What a host tells a guest through the MSR.

    cpuid is (leaf, subleaf) -> (eax, ebx, ecx, edx); versions are the least and the greatest of the
    protocol; page_state is (gfn, 1 private | 2 shared) -> 0 or an error.
    """

    c_bit: int
    cpuid: Callable[[int, int], tuple[int, int, int, int]]
    snp: bool = False
    versions: tuple[int, int] = (1, 2)
    features: int = 0
    page_state: Callable[[int, int], int] = _refuse_change


def parse_msr(value: int) -> MsrRequest:
    """The request in an MSR value; any 64 bits are understood."""
    if not value & 0xFFF:
        return MsrRequest("GHCB", {"gpa": value})
    name, bits, snp_only = MSR_REQUESTS.get(value & 0xFFF, ("UNKNOWN", (), False))
    fields = {field: (value & genmask(hi, lo)) >> lo for field, hi, lo in bits}
    return MsrRequest(name, fields, snp_only)


def msr_response(name: str, **fields: int) -> int:
    """The MSR value of a response; a field too wide for its place is cut."""
    code, bits = MSR_RESPONSES[name]
    return code | sum(fields[field] << lo & genmask(hi, lo) for field, hi, lo in bits)


def answer_msr(value: int, host: MsrHost) -> int | None:
    """The MSR after VMGEXIT with this value; None ends the VM with SYSTEM_EVENT 6.

    What KVM does not know it leaves as it is.
    """
    request = parse_msr(value)
    if request.name == "TERM" or (request.snp_only and not host.snp):
        return None
    match request:
        case MsrRequest("SEV_INFO"):
            least, greatest = host.versions
            return msr_response("SEV_INFO", min=least, max=greatest, c_bit=host.c_bit)
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
    reason_set, reason = fields["reason_set"], fields["reason"]
    known = _TERM.get((reason_set, reason), "a reason of the guest's own")
    return f"the guest asked to be terminated: set {reason_set}, reason {reason} ({known})"
