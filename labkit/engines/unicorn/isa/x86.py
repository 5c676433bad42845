"""x86-64 on Unicorn: what the host does at each sensitive instruction, as KVM does at a VM exit."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from unicorn import unicorn_const as uc
from unicorn import x86_const

from labkit.arch.x86_cpu import APIC_BASE, IA32_TSC, IA32_TSC_ADJUST
from labkit.engines.base import Capability
from labkit.engines.exits import Exit, HaltExit, HypercallExit, PioExit
from labkit.engines.unicorn.isa.quirks import FaultTrace
from labkit.engines.unicorn.isa.sealed import HANDLERS
from labkit.engines.unicorn.isa.traps import SIZES, Trap, pio_form, scan
from labkit.engines.unicorn.isa.x86_control import CONTROL
from labkit.engines.unicorn.isa.x86_debug import DEBUG, Watch
from labkit.engines.unicorn.isa.x86_events import DB, GP, UD, VC, X86Events, canonical
from labkit.engines.unicorn.isa.x86_float import FLOAT
from labkit.engines.unicorn.isa.x86_forms import ABSENT
from labkit.engines.unicorn.isa.x86_msrs import has_memory_types
from labkit.engines.unicorn.isa.x86_owed import OWED
from labkit.engines.unicorn.isa.x86_random import RANDOM
from labkit.engines.unicorn.isa.x86_regs import NATIVE_MSRS, PLAIN, X86Registers
from labkit.engines.unicorn.native.borrow import borrowed
from labkit.engines.unicorn.native.lib import RegBatch

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core

__all__ = ["X86"]

MASK64 = (1 << 64) - 1
KVM_ENOSYS = -1000  # include/uapi/linux/kvm_para.h
_OSXSAVE, _TSD = 1 << 18, 1 << 2  # CR4
_TF, _BS = 1 << 8, 1 << 14  # RFLAGS, DR6
_BSP = 1 << 8  # IA32_APIC_BASE
_TSC_AUX = 0xC000_0103
_NATIVE = {index: name for name, index in NATIVE_MSRS.items()}
_BASES = {0xC000_0100: "fs_base", 0xC000_0101: "gs_base"}
# MSRs that hold a gva
_POINTERS = frozenset(
    {0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102}
)


_NO_SIMD = Capability(
    "simd", False, "x87 and SSE arithmetic run on an x86-64 host; on another they are refused"
)


class X86(X86Events):
    """The quirks of x86-64, one per vCPU."""

    uc_arch, uc_mode = uc.UC_ARCH_X86, uc.UC_MODE_64
    settings: ClassVar[tuple[tuple[int, int], ...]] = (
        (uc.UC_CTL_CPU_MODEL, x86_const.UC_CPU_X86_EPYC_ROME),  # it has SMAP
    )
    capabilities: ClassVar[tuple[Capability, ...]] = () if borrowed() else (_NO_SIMD,)
    two_blocks = b"\xeb\x00\xf4"
    pc_name, longest, two_blocks_count = "rip", 15, 0

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.cpu, self._sealed = core.vm.cpu, core.vm.level > 1
        self._handlers = _HANDLERS | HANDLERS if self._sealed else _HANDLERS
        self._absent = frozenset(
            name
            for name, (leaf, register, at) in ABSENT.items()
            if not self.cpu.leaf(leaf, 0)[register] >> at & 1
        )
        self.extra = {"xcr0": 1, "tsc_offset": 0, "tsc_adjust": 0}
        self.regs = X86Registers(core.handle, self.extra, self._host_msr, core.memory.read)
        self.msrs: dict[int, int] = {}  # written so far; reset values are the VM's
        self._retired = False
        # What `complete` sets: [bytes of rax], or [bytes, gva]
        self.awaits: list[int] | None = None
        self.random = random.Random(f"labkit {core.index}")
        self._hot = RegBatch(
            core.handle, tuple(PLAIN[name] for name in ("rip", "rax", "rdx", "rdi", "cs", "rflags"))
        )
        self._pair = RegBatch(core.handle, (PLAIN["rip"], PLAIN["rax"]))
        self.fault_trace: FaultTrace | None = (
            partial(core.handle.read, PLAIN["cr2"]),
            partial(core.handle.write, PLAIN["cr2"]),
        )
        # As reset and FNINIT leave them, and KVM gives them to a guest
        core.handle.write(x86_const.UC_X86_REG_MXCSR, 0x1F80)
        core.handle.write(x86_const.UC_X86_REG_FPCW, 0x37F)
        core.handle.write(x86_const.UC_X86_REG_FPTAG, 0xFFFF)
        self.read, self.read_all = self.regs.read, self.regs.read_all
        self.owed = 0  # bits of DR6 that the instruction before has earned
        self.watch = Watch(self)

    # --- what the run loop asks

    def write_many(self, regs: Mapping[str, int]) -> None:
        """Set several registers."""
        self.regs.write_many(regs)
        if any(name.startswith("dr") for name in regs):
            self.watch.arm()

    def deliver_owed(self) -> Exit | None:
        """The trap for a data breakpoint of the guest that was hit."""
        return self.watch.deliver()

    def exception(self, vector: int) -> Exit | None:
        """An exception that Unicorn reported; its instruction has hit no breakpoint."""
        self.owed = 0
        return super().exception(vector)

    def pc(self) -> int:
        """RIP."""
        pc = self.regs.pc
        return self.arrive() if pc < 0 else pc

    def arrive(self) -> int:
        """Read what a trap asks for most in one call; returns RIP."""
        regs = self.regs
        regs.pc, self._rax, self._rdx, regs.rdi, self._cs, self._flags = self._hot.read()
        return regs.pc

    def leave(self) -> int:
        """RIP, once more: from here on the CPU changes what was read."""
        regs = self.regs
        pc = regs.pc if regs.pc >= 0 else self.arrive()
        regs.pc = -1
        return pc

    def set_pc(self, gva: int) -> None:
        """Set RIP."""
        self.regs.write("rip", gva & MASK64)

    def monitor_offset(self) -> int:
        """Atomic instructions are single ones."""
        return 0

    def hole(self, pc: int) -> Exit | None:
        """Memory that is not there is a device's.

        With encrypted registers the guest must ask for it (APM vol. 2 15.35: #NPF as #VC).
        """
        if self.core.vm.level > 1:
            return self.deliver(VC, 0x400)
        return self.core.meet_hole()

    def is_drained(self) -> bool:
        """RCX is zero: a REP instruction has no iteration left."""
        return self.regs.read("rcx") == 0

    def scan(self, data: bytes, gva: int) -> Mapping[int, Trap]:
        """Find the sensitive instructions of a block."""
        return scan(data, gva, self._sealed, self._absent)

    def do(self, trap: Trap) -> Exit | None:
        """Carry out one sensitive instruction as the host of a guest that hides nothing."""
        return _HANDLERS[trap.kind](self, trap)

    def trap(self, trap: Trap) -> Exit | None:
        """Carry out one sensitive instruction; None when the run goes on."""
        stepped, self._retired = self._flags & _TF, False
        exit = self._handlers[trap.kind](self, trap)
        # The guest steps itself (SDM vol. 3B 17.3.1.4)
        if stepped and self._retired and self.regs.read("rflags") & _TF:
            self.regs.write("dr6", self.regs.read("dr6") | _BS)
            self.core.unretire()
            return self.deliver(DB) or exit
        return exit

    def extra_state(self) -> dict[str, object]:
        """What save() must keep beside Unicorn's own state."""
        return {
            "extra": dict(self.extra),
            "msrs": {str(index): value for index, value in self.msrs.items()},
            "random": list(self.random.getstate()[1]),
            "pending": list(self.pending),
            "awaits": self.awaits,
            "hits": self.owed,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put `extra_state` back."""
        self.extra.update(state["extra"])
        self.msrs = {int(index): value for index, value in state["msrs"].items()}
        self.random.setstate((3, tuple(state["random"]), None))
        self.pending = list(state["pending"])
        self.awaits = state["awaits"]
        self.owed = state["hits"]
        self.watch.arm()

    def complete(self, value: int) -> bool:
        """Give the value that the last IN, INS or hypercall returns; False when there was none."""
        if self.awaits is None:
            return False
        size = self.awaits[0]
        value &= (1 << 8 * size) - 1
        if len(self.awaits) == 2:
            self.core.memory.write(self.awaits[1], value.to_bytes(size, "little"))
            return True

        if size < 4:  # the rest of RAX stays
            value |= self.regs.read("rax") & -1 << 8 * size
        self.regs.write("rax", value)
        return True

    # --- small words for the handlers

    def retire(self, trap: Trap, **regs: int) -> Exit | None:
        """The instruction is done, and left these registers."""
        self._retired = True
        self.core.retire()
        if regs:
            self.regs.write_many({name: value & MASK64 for name, value in regs.items()})
        self.set_pc(trap.gva + len(trap.data))
        return None

    def privileged(self) -> bool:
        """Whether the guest runs at CPL0."""
        return self.regs.read("cs") & 3 == 0

    # --- one handler per kind

    def _do_pio(self, trap: Trap) -> Exit | None:
        """IN and OUT (SDM vol. 1 18.5)."""
        immediate, out, size = pio_form(trap.data)
        port = self._rdx & 0xFFFF if immediate is None else immediate
        if self._cs & 3 and not self.port_allowed(port, size):
            return self.deliver(GP, 0)
        self.core.retire()
        self._retired = True
        rax, mask = self._rax, (1 << 8 * size) - 1
        behind = self.regs.pc = trap.gva + len(trap.data) & MASK64
        if out:
            self._pair.write(behind, rax)
            return PioExit(port, size, True, rax & mask)

        self._pair.write(behind, 0 if size == 4 else rax & ~mask)
        self.awaits = [size]
        return _in_exit(port, size)

    def port_allowed(self, port: int, size: int) -> bool:
        """Whether a guest at CPL3 may use a port (SDM vol. 1 19.5)."""
        if self.regs.read("rflags") >> 12 & 3 == 3:
            return True

        base, limit = self.regs.read("tr_base"), self.regs.read("tr_limit")
        ring = self.regs.read("cs") & 3
        self.regs.set_ring(0)
        offset = self.core.memory.read(base + 0x66, 2) or b"\xff\xff"
        at = int.from_bytes(offset, "little") + port // 8
        bits = self.core.memory.read(base + at, 2) if at + 1 <= limit else None
        self.regs.set_ring(ring)
        if bits is None:
            return False
        wanted = (1 << size) - 1 << port % 8
        return not int.from_bytes(bits, "little") & wanted

    def _do_string_pio(self, trap: Trap) -> Exit | None:
        """INS and OUTS, one iteration a step."""
        word, prefixes = trap.mnemonic.split()[-1], trap.data[:-1]
        size, port = SIZES[word[-1]], self.regs.read("rdx") & 0xFFFF
        if not self.privileged() and not self.port_allowed(port, size):
            return self.deliver(GP, 0)
        mask = 0xFFFFFFFF if 0x67 in prefixes else MASK64
        is_rep = 0xF2 in prefixes or 0xF3 in prefixes
        rcx = self.regs.read("rcx") & mask
        if is_rep and not rcx:
            return self.retire(trap)

        is_in = word.startswith("in")
        pointer = "rdi" if is_in else "rsi"
        index = self.regs.read(pointer) & mask
        gva = index + (0 if is_in else self._segment_base(prefixes)) & MASK64
        if not canonical(gva):
            return self.deliver(GP, 0)
        access = uc.UC_PROT_WRITE if is_in else uc.UC_PROT_READ
        for at in (gva, gva + size - 1):
            if self.core.memory.translate(at, access) is None:
                return self.page_fault(at, write=is_in)

        goes_down = self.regs.read("rflags") >> 10 & 1
        changed = {pointer: index + (-size if goes_down else size) & mask}
        if is_rep:
            changed["rcx"] = rcx - 1
        self.retire(trap, **changed)
        if is_rep and rcx > 1:
            self.set_pc(trap.gva)
            self.core.resume_here()

        if not is_in:
            data = self.core.memory.read(gva, size) or b""
            return PioExit(port, size, True, int.from_bytes(data, "little"))
        self.awaits = [size, gva]
        self.complete(0)
        return PioExit(port, size, False, 0)

    def _segment_base(self, prefixes: bytes) -> int:
        """What an FS or GS prefix adds to an address."""
        if 0x64 in prefixes:
            return self.regs.read("fs_base")
        return self.regs.read("gs_base") if 0x65 in prefixes else 0

    def _do_halt(self, trap: Trap) -> Exit | None:
        if not self.privileged():
            return self.deliver(GP, 0)
        self.retire(trap)
        return HaltExit()

    def _do_cpuid(self, trap: Trap) -> None:
        leaf, sub = self.regs.read("rax") & 0xFFFFFFFF, self.regs.read("rcx") & 0xFFFFFFFF
        a, b, c, d = self.cpu.seen_by(self.core.index, self.regs.read("cr4"), leaf, sub)
        self.retire(trap, rax=a, rbx=b, rcx=c, rdx=d)

    def _tsc(self) -> int:
        return (self.core.vm.retired() + self.extra["tsc_offset"]) & MASK64

    def _do_rdtsc(self, trap: Trap) -> Exit | None:
        """RDTSC and RDTSCP: one cycle an instruction of the whole VM."""
        if self.regs.read("cr4") & _TSD and not self.privileged():
            return self.deliver(GP, 0)
        tsc = self._tsc()
        changed = {"rax": tsc & 0xFFFFFFFF, "rdx": tsc >> 32}
        if trap.mnemonic == "rdtscp":
            changed["rcx"] = self.msrs.get(_TSC_AUX, 0)
        return self.retire(trap, **changed)

    def _read_msr(self, index: int) -> int | None:
        if index == IA32_TSC:
            return self._tsc()
        if index == IA32_TSC_ADJUST:
            return self.extra["tsc_adjust"]
        if index in _NATIVE or index in _BASES:
            return self.regs.read(_NATIVE.get(index) or _BASES[index])
        value = self.msrs.get(index, self.cpu.msrs.get(index))
        if index == APIC_BASE and self.core.index and value is not None and index not in self.msrs:
            value &= ~_BSP
        return value

    def _write_msr(self, index: int, value: int) -> bool:
        if index in (IA32_TSC, IA32_TSC_ADJUST):
            before = self._tsc() if index == IA32_TSC else self.extra["tsc_adjust"]
            by = value - before
            for name in ("tsc_offset", "tsc_adjust"):  # either MSR moves both (SDM vol. 3B 18.17.3)
                self.extra[name] = self.extra[name] + by & MASK64
        elif index in _POINTERS and not canonical(value):
            return False
        elif index == NATIVE_MSRS["efer"]:
            return self._write_efer(value)
        elif index in _NATIVE or index in _BASES:
            self.regs.write(_NATIVE.get(index) or _BASES[index], value)
        elif index in self.cpu.msrs and index not in self.cpu.read_only_msrs:
            if not has_memory_types(index, value):
                return False
            self.msrs[index] = value
        else:
            return False
        return True

    def _write_efer(self, value: int) -> bool:
        """Reserved bits, and LME while paging is on, give #GP (SDM vol. 3A 4.1.1)."""
        before = self.regs.read("efer")
        if value & ~0xD01 or (value ^ before) & 0x100:
            return False
        self.regs.write("efer", value & ~0x400 | before & 0x400)
        return True

    def _host_msr(self, index: int, value: int | None = None) -> int | None:
        """Read or set an MSR as KVM_GET_MSRS and KVM_SET_MSRS do.

        That is read-only ones too, and the TSC apart from TSC_ADJUST.
        """
        if value is None:
            return self._read_msr(index)
        if index == IA32_TSC:
            self.extra["tsc_offset"] = self.extra["tsc_offset"] + value - self._tsc() & MASK64
        elif index == IA32_TSC_ADJUST:
            self.extra["tsc_adjust"] = value
        elif index in self.cpu.read_only_msrs and index in self.cpu.msrs:
            self.msrs[index] = value
        elif not self._write_msr(index, value):
            return None
        return value

    def _do_rdmsr(self, trap: Trap) -> Exit | None:
        value = self._read_msr(self.regs.read("rcx") & 0xFFFFFFFF) if self.privileged() else None
        if value is None:
            return self.deliver(GP, 0)
        return self.retire(trap, rax=value & 0xFFFFFFFF, rdx=value >> 32)

    def _do_wrmsr(self, trap: Trap) -> Exit | None:
        value = (self.regs.read("rdx") & 0xFFFFFFFF) << 32 | self.regs.read("rax") & 0xFFFFFFFF
        if not self.privileged() or not self._write_msr(self.regs.read("rcx") & 0xFFFFFFFF, value):
            return self.deliver(GP, 0)
        return self.retire(trap)

    def _do_hypercall(self, trap: Trap) -> Exit | None:
        """VMCALL and VMMCALL both reach the host.

        So they do under KVM, which patches one into the other.
        """
        if not self.privileged():
            return self.retire(trap, rax=-1)  # -KVM_EPERM
        nr, *args = (self.regs.read(name) for name in ("rax", "rbx", "rcx", "rdx", "rsi"))
        self.retire(trap, rax=KVM_ENOSYS)
        self.awaits = [8]
        return HypercallExit(nr, tuple(args))

    def _do_icebp(self, trap: Trap) -> Exit | None:
        self.set_pc(trap.gva + len(trap.data))
        return self.deliver(DB)

    def _do_pause(self, trap: Trap) -> Exit | None:
        """Let nothing happen: Unicorn would leave its loop at PAUSE.

        At a place of our own choosing that can be told from other reasons.
        """
        return self.retire(trap)

    def _do_undefined(self, trap: Trap) -> Exit | None:
        return self.deliver(UD)

    _do_unknown = _do_undefined

    def _do_vector(self, trap: Trap) -> Exit | None:
        return self.core.refuse(
            "a VEX, EVEX or XOP instruction, which Unicorn executes wrongly without a word; "
            "CPUID announces no AVX: compile the guest without it"
        )

    def _do_lock_neg(self, trap: Trap) -> Exit | None:
        return self.core.refuse("LOCK NEG, whose SF and PF Unicorn takes from the old value")

    def _do_refused(self, trap: Trap) -> Exit | None:
        if not self.regs.read("cr4") & _OSXSAVE:
            return self.deliver(UD)
        return self.core.refuse(
            "the XSAVE family, whose state components Unicorn does not keep as XCR0 says"
        )


_HANDLERS: dict[str, Callable[[X86, Trap], Exit | None]] = (
    {
        name.removeprefix("_do_"): handler
        for name, handler in vars(X86).items()
        if name.startswith("_do_")
    }
    | CONTROL
    | DEBUG
    | FLOAT
    | OWED
    | RANDOM
)


@cache
def _in_exit(port: int, size: int) -> PioExit:
    return PioExit(port, size, False, 0)
