"""x86-64 registers by their architectural names, over KVM's ioctls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.engines.kvm.abi import call, msrs, struct
from labkit.engines.kvm.msr import (
    number_of,
    read_msr,
    read_tsc_offset,
    write_msr,
    write_tsc_offset,
)
from labkit.engines.kvm.places import GPR, NAMED_MSRS, NAMES, PLACES, SEGMENTS, WIDTHS
from labkit.engines.kvm.segments import load_segment, make_busy_tss
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["Registers"]

# In the order in which they are written: tables and paging first, then segments, which are looked
# up in them.
GROUPS = ("SREGS", "segments", "DEBUGREGS", "FPU", "XSAVE", "XCRS", "GPR", "MSR")
SAME = {"FPU": "XSAVE", "XSAVE": "FPU"}  # structures that hold the same registers


class Registers:
    """One vCPU's registers; KVM's structures are kept until the vCPU runs again."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu = vcpu
        self.fd = vcpu.fd
        self.kept: dict[str, Any] = {}

    def get(self, what: str) -> Any:
        """The structure that KVM_GET_... gives: "SREGS", "DEBUGREGS", "FPU", "XSAVE", "XCRS"."""
        if what not in self.kept:
            self.kept[what] = struct(f"kvm_{what.lower()}")
            call(self.fd, f"KVM_GET_{what}", self.kept[what])
        return self.kept[what]

    def put(self, what: str) -> None:
        """Write a structure back; KVM's refusal is an InvalidState that names it."""
        try:
            call(self.fd, f"KVM_SET_{what}", self.kept[what])
        except OSError as err:
            raise InvalidState(
                f"vCPU {self.vcpu.index}: KVM does not take this state: {err.strerror}"
            ) from err
        finally:
            del self.kept[what]
            self.kept.pop(SAME.get(what, ""), None)

    # --- reading

    def read_all(self) -> dict[str, int]:
        """Every register by name."""
        found: dict[str, int] = {}
        table = msrs(dict.fromkeys(NAMED_MSRS.values(), 0))
        if call(self.fd, "KVM_GET_MSRS", table) == len(NAMED_MSRS):
            values = (int(entry.data) for entry in table.entries)
            found = dict(zip(NAMED_MSRS, values, strict=True))
        return {name: found[name] if name in found else self.read(name) for name in NAMES}

    def read(self, name: str) -> int:
        """One register; raises InvalidState for a name that x86-64 does not have."""
        if name in GPR:
            return self.vcpu.gprs[GPR[name]]
        if name in PLACES:
            place = PLACES[name]
            return place.get(self.get(place.what))
        if name == "tsc_offset":
            return read_tsc_offset(self.vcpu)
        return read_msr(self.vcpu, _msr_number(name))

    # --- writing

    def write_many(self, regs: Mapping[str, int]) -> None:
        """Set several registers at once, in the order that they need.

        Raises InvalidState for a name or a value that does not fit.
        """
        groups: dict[str, dict[str, int]] = {}
        for name, value in regs.items():
            self._check(name, value)
            groups.setdefault(_group_of(name), {})[name] = value
        for group in GROUPS:
            if group in groups:
                self._write_group(group, groups[group])

    def _check(self, name: str, value: int) -> None:
        width = WIDTHS.get(name, 64)
        if not 0 <= value < 1 << width:
            raise InvalidState(f"{name} takes {width} bits, not {value:#x}", name=name, value=value)
        if _group_of(name) == "MSR":
            self.read(name)  # raises for one that does not exist

    def _write_group(self, group: str, regs: Mapping[str, int]) -> None:
        if group == "GPR":
            for name, value in regs.items():
                self.vcpu.gprs[GPR[name]] = value
            self.vcpu.page.registers_changed()
        elif group == "MSR":
            for name, value in regs.items():
                self._write_msr(name, value)
        else:
            self._write_structure("SREGS" if group == "segments" else group, regs)

    def _write_msr(self, name: str, value: int) -> None:
        if name == "tsc_offset":
            write_tsc_offset(self.vcpu, value)
        else:
            write_msr(self.vcpu, _msr_number(name), value)

    def _write_structure(self, what: str, regs: Mapping[str, int]) -> None:
        """Those of one structure: all of them, or none."""
        state = self.get(what)
        try:
            for name, value in regs.items():
                self._change(state, name, value)
        except InvalidState:
            del self.kept[what]
            raise
        self.put(what)

    def _change(self, state: Any, name: str, value: int) -> None:
        if name in SEGMENTS:
            load_segment(self.vcpu, state, name, value)
            return
        PLACES[name].set(state, value)
        if name == "cr8":
            self.vcpu.page.fields.cr8 = value
        elif name in ("tr", "tr_base", "tr_limit"):
            make_busy_tss(state)


def _group_of(name: str) -> str:
    if name in GPR:
        return "GPR"
    if name in SEGMENTS:
        return "segments"
    return PLACES[name].what if name in PLACES else "MSR"


def _msr_number(name: str) -> int:
    return NAMED_MSRS[name] if name in NAMED_MSRS else number_of(name)
