"""x86-64 registers by their architectural names, over KVM's ioctls; the names are those of the default engine."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.arch.x86_cpu import IA32_TSC
from labkit.engines import need
from labkit.engines.kvm.abi import CONSTANTS, STRUCTS, call, msrs, struct
from labkit.errors import InvalidState

if TYPE_CHECKING:
    from labkit.engines.kvm.vcpu import KvmVcpu

__all__ = ["GPR", "NAMED_MSRS", "SAVED_MSRS", "Registers"]

GPR = {field[0]: i for i, field in enumerate(STRUCTS["kvm_regs"]._fields_)}
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8")
_DEBUG = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
NAMED_MSRS = {
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "sfmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "tsc_adjust": 0x3B,
}
SAVED_MSRS = (
    *NAMED_MSRS.values(),
    0xC000_0103,
    0x1A0,
    0x277,
    0x10,
)  # TSC_AUX, MISC_ENABLE, PAT; the TSC last: others move it
_XMM = tuple(f"xmm{i}" for i in range(16))
# Where a name lies in struct kvm_sregs: (member, its member)
_SREGS = {
    **{name: (name, "selector") for name in (*SEGMENTS, "tr", "ldt")},
    **{name: (name, "") for name in (*_CONTROL, "efer")},
    **{
        f"{table}_{part}": (table, part)
        for table in ("gdt", "idt", "tr", "ldt")
        for part in ("base", "limit")
    },
    "fs_base": ("fs", "base"),
    "gs_base": ("gs", "base"),
}
_WIDTHS = {
    **dict.fromkeys((*SEGMENTS, "tr", "ldt", "gdt_limit", "idt_limit"), 16),
    **dict.fromkeys(("tr_limit", "ldt_limit", "mxcsr"), 32),
    **dict.fromkeys(_XMM, 128),
}
NAMES = (
    *GPR,
    *SEGMENTS,
    *_CONTROL,
    *_DEBUG,
    "fs_base",
    "gs_base",
    "mxcsr",
    "gdt_base",
    "gdt_limit",
    "idt_base",
    "idt_limit",
    "tr",
    "tr_base",
    "tr_limit",
    "ldt",
    "efer",
    *NAMED_MSRS,
    *_XMM,
    "xcr0",
    "tsc_offset",
)
_BUSY_TSS = {
    "type": 11,
    "present": 1,
    "dpl": 0,
    "db": 0,
    "s": 0,
    "l": 0,
    "g": 0,
    "avl": 0,
    "unusable": 0,
}


class Registers:
    """Registers beyond the general ones, which lie in the run page; what was read is kept until the vCPU runs again."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu, self.fd = vcpu, vcpu.fd
        self.kept: dict[str, Any] = {}

    def get(self, what: str) -> Any:
        """The structure that KVM_GET_... gives: "SREGS", "DEBUGREGS", "FPU", "XCRS"."""
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

    def read_all(self) -> dict[str, int]:
        """Every register by name."""
        table = msrs(dict.fromkeys(NAMED_MSRS.values(), 0))
        if call(self.fd, "KVM_GET_MSRS", table) != len(NAMED_MSRS):
            return {name: self.read(name) for name in NAMES}
        found = dict(zip(NAMED_MSRS, (int(entry.data) for entry in table.entries), strict=True))
        return {name: found[name] if name in found else self.read(name) for name in NAMES}

    def read(self, name: str) -> int:
        """One register; raises InvalidState for a name that x86-64 does not have."""
        if name in GPR:
            return int(self.vcpu.gprs[GPR[name]])
        if name in _SREGS:
            member, part = _SREGS[name]
            found = getattr(self.get("SREGS"), member)
            return int(getattr(found, part) if part else found)
        if name in _DEBUG:
            regs = self.get("DEBUGREGS")
            return int(regs.db[int(name[2])] if name < "dr4" else getattr(regs, name))
        if name in _XMM:
            at = 16 * int(name[3:])
            return int.from_bytes(bytes(self.get("FPU").xmm[at : at + 16]), "little")
        if name == "mxcsr":
            return int(self.get("FPU").mxcsr)
        if name == "xcr0":
            return int(self.get("XCRS").xcrs[0].value)
        if name == "tsc_offset":
            return self.tsc_offset()
        if name in NAMED_MSRS:
            return self.msr(NAMED_MSRS[name])
        return self.msr(self._numbered(name))

    def tsc_offset(self, value: int | None = None) -> int:
        """What KVM adds to the host's TSC for this vCPU (KVM_VCPU_TSC_OFFSET), 0 where KVM does not say; sets it when given."""
        place = ctypes.c_uint64(value or 0)
        group, attr = CONSTANTS["KVM_VCPU_TSC_CTRL"], CONSTANTS["KVM_VCPU_TSC_OFFSET"]
        wish = struct("kvm_device_attr", group=group, attr=attr, addr=ctypes.addressof(place))
        if self.vcpu.vm.has("KVM_CAP_VCPU_ATTRIBUTES"):
            call(self.fd, "KVM_GET_DEVICE_ATTR" if value is None else "KVM_SET_DEVICE_ATTR", wish)
        elif value:
            raise InvalidState(
                "this KVM does not let the TSC's offset be set", name="tsc_offset", value=value
            )
        return int(place.value)

    def _numbered(self, name: str) -> int:
        table, _, number = name.partition("_")
        try:
            index = int(number, 0) if table == "msr" else -1
        except ValueError:
            index = -1
        if not 0 <= index < 1 << 32:
            raise InvalidState(f"x86-64 has no register {name!r}", name=name)
        return index

    def msr(self, index: int) -> int:
        """An MSR by number; raises InvalidState when this CPU has none."""
        table = msrs({index: 0})
        if index in self.vcpu.msrs:
            return self.vcpu.msrs[index]
        if call(self.fd, "KVM_GET_MSRS", table) == 1:
            return int(table.entries[0].data)
        value = self.vcpu.host_msr(index)
        if value is None:
            raise InvalidState(f"this CPU has no MSR '{index:#x}'", name=f"msr_{index:#x}")
        return value

    def set_msr(self, index: int, value: int) -> None:
        """Set an MSR by number; raises InvalidState when this CPU has none or does not take the value, NotAvailable for a fixed TSC."""
        if index == IA32_TSC:
            need(self.vcpu.vm, "tsc")
        if call(self.fd, "KVM_SET_MSRS", msrs({index: value})) != 1 and not self.vcpu.set_host_msr(
            index, value
        ):
            raise InvalidState(
                f"this CPU has no MSR '{index:#x}', or it does not take {value:#x}",
                name=f"msr_{index:#x}",
            )

    def write_many(self, regs: Mapping[str, int]) -> None:
        """Set several registers at once; tables and paging first, then segments, which are looked up in them."""
        for name, value in regs.items():
            width = _WIDTHS.get(name, 64)
            if not 0 <= value < 1 << width:
                raise InvalidState(
                    f"{name} takes {width} bits, not {value:#x}", name=name, value=value
                )
            if name not in GPR and name not in _WRITERS and name not in _SREGS:
                self.read(name)  # InvalidState for a name that does not exist
        groups: dict[str, dict[str, int]] = {}
        for name, value in regs.items():
            groups.setdefault(_group(name), {})[name] = value
        for group in ("SREGS", "segments", "DEBUGREGS", "FPU", "XCRS", "GPR", "other"):
            if group in groups:
                self._write_group(group, groups[group])

    def _write_group(self, group: str, regs: Mapping[str, int]) -> None:
        if group == "GPR":
            for name, value in regs.items():
                self.vcpu.gprs[GPR[name]] = value
            self.vcpu.page.fields.kvm_dirty_regs |= 1
        elif group == "other":
            for name, value in regs.items():
                if name == "tsc_offset":
                    need(self.vcpu.vm, "tsc")
                    self.tsc_offset(value)
                else:
                    self.set_msr(NAMED_MSRS.get(name) or self._numbered(name), value)
        else:
            what = "SREGS" if group == "segments" else group
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
            self._load_segment(state, name, value)
        elif name in _SREGS:
            member, part = _SREGS[name]
            setattr(getattr(state, member) if part else state, part or member, value)
            if name == "cr8":
                self.vcpu.page.fields.cr8 = value
            if member == "tr":
                _fill(state.tr, _BUSY_TSS)
        elif name in _DEBUG:
            if name < "dr4":
                state.db[int(name[2])] = value
            else:
                setattr(state, name, value)
        elif name in _XMM:
            at = 16 * int(name[3:])
            state.xmm[at : at + 16] = list(value.to_bytes(16, "little"))
        elif name == "mxcsr":
            state.mxcsr = value
        else:
            state.xcrs[0].value = value

    def _load_segment(self, state: Any, name: str, selector: int) -> None:
        segment = getattr(state, name)
        if not selector & ~3:
            ctypes.memset(ctypes.addressof(segment), 0, ctypes.sizeof(segment))
            segment.selector, segment.unusable, segment.dpl = selector, 1, selector & 3
            return
        table = state.ldt if selector & 4 else state.gdt
        at = table.base + (selector & ~7)
        raw = self.vcpu.memory.fetch(at, 8) if selector | 7 <= table.limit else b""
        call(
            self.fd, "KVM_TRANSLATE", struct("kvm_translation", linear_address=at)
        )  # it leaves the accessed bits of a CPU's own look-up
        word = int.from_bytes(raw, "little")
        if len(raw) < 8 or (name == "cs" and not word >> 53 & 1):  # L
            raise InvalidState(
                f"{name} = {selector:#x}: the {'LDT' if selector & 4 else 'GDT'} has no such segment",
                name=name,
            )
        limit, granular = word & 0xFFFF | word >> 32 & 0xF0000, word >> 55 & 1
        segment.base, segment.selector = word >> 16 & 0xFFFFFF | word >> 32 & 0xFF000000, selector
        segment.limit = limit << 12 | 0xFFF if granular else limit
        _fill(
            segment,
            {
                "type": word >> 40 & 15,
                "s": word >> 44 & 1,
                "dpl": word >> 45 & 3,
                "present": word >> 47 & 1,
                "avl": word >> 52 & 1,
                "l": word >> 53 & 1,
                "db": word >> 54 & 1,
                "g": granular,
                "unusable": 0,
            },
        )


def _fill(segment: Any, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(segment, name, value)


_WRITERS = {
    **dict.fromkeys(SEGMENTS, "segments"),
    **dict.fromkeys(_DEBUG, "DEBUGREGS"),
    **dict.fromkeys((*_XMM, "mxcsr"), "FPU"),
    "xcr0": "XCRS",
}


def _group(name: str) -> str:
    return "GPR" if name in GPR else _WRITERS.get(name) or ("SREGS" if name in _SREGS else "other")
