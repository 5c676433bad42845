"""arm64 on Unicorn: its exceptions, and its sensitive instructions.

Exceptions go into the guest's own vectors (Arm ARM D1.3).
"""

from __future__ import annotations

import ctypes
import re
import struct
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from unicorn import arm64_const as arm
from unicorn import unicorn_const as uc

from labkit.engines.disasm import disassemble
from labkit.engines.exits import Exit, HaltExit, HypercallExit, MmioExit
from labkit.engines.unicorn.isa import arm64_align
from labkit.engines.unicorn.isa.arm64_align import SA, SA0, A, Access
from labkit.engines.unicorn.isa.arm64_watch import Watch
from labkit.engines.unicorn.isa.plain import PlainQuirks, common_words, probe
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.native.lib import Handle, RegBatch, check
from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core

__all__ = ["Arm64"]

MASK64 = (1 << 64) - 1
UDEF, PREFETCH_ABORT, DATA_ABORT = 1, 3, 4  # QEMU's EXCP_*
EC_PC_ALIGNMENT, EC_DATA_ABORT, EC_SP_ALIGNMENT, EC_WATCHPOINT = 0x22, 0x24, 0x26, 0x34
IL = 1 << 25
# Exception classes of a breakpoint and of a software step, from a lower level and from the same
_DEBUG = frozenset({0x30, 0x31, 0x32, 0x33})
NOT_SUPPORTED = -1  # SMCCC
SYSTEM = {  # op0, op1, CRn, CRm, op2
    "sctlr_el1": (3, 0, 1, 0, 0),
    "cpacr_el1": (3, 0, 1, 0, 2),
    "ttbr0_el1": (3, 0, 2, 0, 0),
    "ttbr1_el1": (3, 0, 2, 0, 1),
    "tcr_el1": (3, 0, 2, 0, 2),
    "spsr_el1": (3, 0, 4, 0, 0),
    "elr_el1": (3, 0, 4, 0, 1),
    "sp_el0": (3, 0, 4, 1, 0),
    "sp_el1": (3, 4, 4, 1, 0),
    "esr_el1": (3, 0, 5, 2, 0),
    "far_el1": (3, 0, 6, 0, 0),
    "par_el1": (3, 0, 7, 4, 0),
    "mair_el1": (3, 0, 10, 2, 0),
    "vbar_el1": (3, 0, 12, 0, 0),
    "contextidr_el1": (3, 0, 13, 0, 1),
    "tpidr_el1": (3, 0, 13, 0, 4),
    "tpidr_el0": (3, 3, 13, 0, 2),
    "tpidrro_el0": (3, 3, 13, 0, 3),
    "cntfrq_el0": (3, 3, 14, 0, 0),
}
_SCR_EL3, _HCR_EL2 = (3, 6, 1, 1, 0), (3, 4, 1, 1, 0)
# The assembler's name for any system register: s3_0_c1_c0_0
_NUMBERED = re.compile(r"s(\d+)_(\d+)_c(\d+)_c(\d+)_(\d+)")
_PLAIN = {
    **{f"x{i}": getattr(arm, f"UC_ARM64_REG_X{i}") for i in range(31)},
    "sp": arm.UC_ARM64_REG_SP,
    "pc": arm.UC_ARM64_REG_PC,
    "pstate": arm.UC_ARM64_REG_PSTATE,
}
_KINDS = (  # mask, value, kind; the first that fits
    (0xFFFFFFFF, 0xD503207F, "halt"),  # WFI
    (0xFFFFFFDF, 0xD503205F & ~0x20, "pause"),  # WFE
    (0xFFFFFFFF, 0xD503203F, "pause"),  # YIELD
    (0xFFE0001F, 0xD4000002, "call"),  # HVC
    (0xFFE0001F, 0xD4000003, "call"),  # SMC
    (0xFFFFFF80, 0xD53BE000, "counter"),  # MRS of CNTFRQ_EL0 to CNTVCTSS_EL0
    (0x3FA00000, 0x08000000, "exclusive"),  # LDXR, STXR
    (0x3FA07C00, 0x08A07C00, "locked"),  # CAS
    (0xBFA07C00, 0x08207C00, "locked"),  # CASP
    (0xFF20EC00, 0xF8204000, "locked"),  # LDSMAX, LDSMIN of 64 bits
    (0x3F20EC00, 0x38204000, "signed"),  # of fewer, which Unicorn compares without a sign
    (0xFFF8F000, 0xD5100000, "debug"),  # MSR of a debug register
    (0xFFFFFFE0, 0xD5181000, "sctlr"),  # MSR SCTLR_EL1
    (0x3B200C00, 0x38200000, "locked"),  # LDADD to SWP
)
_STORE = (0x3FC00000, 0x39000000)  # STR, STRH, STRB with an unsigned offset
# What may be undefined where the guest runs it; anything else that capstone knows Unicorn lacks
# fmt: off
_PRIVILEGED = frozenset({
    "udf", "mrs", "msr", "hvc", "smc", "sys", "at", "tlbi", "dc", "ic", "eret", "brk", "hlt",
    "drps",
})
# fmt: on


class _CpReg(ctypes.Structure):
    """`uc_arm64_cp_reg`."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("crn", "crm", "op0", "op1", "op2")] + [
        ("val", ctypes.c_uint64)
    ]


def _cp(op0: int, op1: int, crn: int, crm: int, op2: int, value: int = 0) -> _CpReg:
    return _CpReg(crn, crm, op0, op1, op2, value)


def _open(handle: Handle) -> None:
    """Leave the reset state, AArch32 under EL3 and EL2, for EL1 in AArch64."""
    for register, bits in ((_SCR_EL3, 0x401), (_HCR_EL2, 1 << 31)):
        before = handle.read_struct(arm.UC_ARM64_REG_CP_REG, _cp(*register)).val
        check(
            handle.write_struct(arm.UC_ARM64_REG_CP_REG, _cp(*register, before | bits)),
            "execution state",
        )
    handle.write(arm.UC_ARM64_REG_PSTATE, 0x3C5)


def _one_page(insn: int) -> bytes:
    """An instruction at 0 and, at 0x1000, a table of 1 GiB blocks that maps the first."""
    return struct.pack("<I", insn).ljust(4096, b"\0") + struct.pack("<Q", 0x401)  # valid, accessed


def _with_mmu(handle: Handle) -> None:
    _open(handle)
    for name, value in (
        ("tcr_el1", 25 | 1 << 23),
        ("ttbr0_el1", 0x1000),
        ("sctlr_el1", 0x30D00801),
    ):
        handle.write_struct(arm.UC_ARM64_REG_CP_REG, _cp(*SYSTEM[name], value))


@cache
def _offsets() -> tuple[int, int]:
    """Where a saved CPU state has the last exception's syndrome and fault address.

    Found by two faults of which both are known.
    """
    wanted = (
        (0xF9000020, 0x4567_89A8, 0x9600_0045),
        (0xF9400020, 0x7654_3210, 0x9600_0005),
    )  # STR, LDR; translation fault, level 1
    found = [
        (
            probe(Arm64, _one_page(insn), {_PLAIN["x1"]: gva}, _with_mmu),
            struct.pack("<I", syndrome),
            struct.pack("<Q", gva),
        )
        for insn, gva, syndrome in wanted
    ]
    for at in range(0, len(found[0][0]) - 16, 8):
        if all(
            blob[at : at + 4] == syndrome and blob[at + 8 : at + 16] == gva
            for blob, syndrome, gva in found
        ):
            return at, at + 8
    raise NotAvailable(
        "libunicorn's arm64 state does not show an exception's syndrome; this build cannot be used"
    )


@cache
def _exclusive() -> int:
    """Where a saved CPU state has the address that the monitor watches.

    Found by LDXR x5, [x1] and LDXR x5, [x2].
    """
    runs = [
        (probe(Arm64, _one_page(0xC85F7C05 | base << 5), {_PLAIN[f"x{base}"]: gva}, _with_mmu), gva)
        for base, gva in ((1, 0x800), (2, 0x908))
    ]
    found = common_words(*runs)
    if len(found) != 1:
        raise NotAvailable(
            "libunicorn's arm64 state does not show the exclusive monitor; "
            "this build cannot be used"
        )
    return found[0]


@cache
def _store(data: bytes) -> tuple[int, int, tuple[str, str], int]:
    """(bytes, offset, base and source register, mask) of a store with an unsigned offset.

    The mask has the bits of the source that are stored: none of XZR.
    """
    word = int.from_bytes(data, "little")
    size = 1 << (word >> 30)
    base, source = word >> 5 & 31, word & 31

    base_name = "sp" if base == 31 else f"x{base}"
    source_name = f"x{source % 31}"  # x0 stands in for XZR, of which nothing is stored
    mask = 0 if source == 31 else (1 << 8 * size) - 1
    return size, (word >> 10 & 0xFFF) * size, (base_name, source_name), mask


# A frozen dataclass takes long to make, and ucalls come by few addresses
_mmio_exit = lru_cache(256)(MmioExit)


def _kind(word: int) -> str | None:
    """How the host carries out an instruction; None when Unicorn may."""
    if word & 0x3FFFFC00 == 0x38BFC000:  # LDAPR, among the atomics
        return None
    for mask, value, kind in _KINDS:
        if word & mask == value:
            if kind != "exclusive":
                return kind
            is_load = word >> 22 & 1
            return None if is_load else "locked"
    return None


class Arm64(PlainQuirks):
    """The quirks of arm64, one per vCPU."""

    uc_arch, uc_mode = uc.UC_ARCH_ARM64, uc.UC_MODE_ARM
    settings: ClassVar[tuple[tuple[int, int], ...]] = (
        (uc.UC_CTL_CPU_MODEL, arm.UC_CPU_ARM64_MAX),
        (uc.UC_CTL_UC_PAGE_SIZE, 4096),
    )
    two_blocks = struct.pack("<2I", 0x14000001, 0xD503207F)  # B +4; WFI
    plain, special = _PLAIN, tuple(SYSTEM)
    vectors = {f"v{i}": getattr(arm, f"UC_ARM64_REG_V{i}") for i in range(32)}
    first = ("pstate", "mair_el1", "tcr_el1", "ttbr0_el1", "sctlr_el1")

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        _open(self.handle)
        self._operands: dict[bytes, RegBatch] = {}  # of such stores
        self.watch = Watch(self)
        self._devices: set[int] = set()  # stores that went to where no memslot is

    # --- registers

    def _read_special(self, name: str) -> int:
        return int(self.handle.read_struct(arm.UC_ARM64_REG_CP_REG, _cp(*self._number(name))).val)

    def _write_special(self, name: str, value: int) -> None:
        check(
            self.handle.write_struct(arm.UC_ARM64_REG_CP_REG, _cp(*self._number(name), value)),
            f"{name} = {value:#x}",
        )
        if name in ("sctlr_el1", "tcr_el1", "ttbr0_el1", "mair_el1"):
            self.core.forget_translations()

    def _number(self, name: str) -> tuple[int, int, int, int, int]:
        if name in SYSTEM:
            return SYSTEM[name]
        match = _NUMBERED.fullmatch(name)
        if match is None:
            raise InvalidState(f"arm64 has no register {name!r}", name=name)
        op0, op1, crn, crm, op2 = map(int, match.groups())
        return op0, op1, crn, crm, op2

    # --- exceptions

    def monitor_offset(self) -> int:
        """Where the address of the last LDXR is."""
        return _exclusive()

    def _syndrome(self) -> tuple[int, int]:
        """(ESR, fault address) of the last exception that Unicorn reported."""
        blob = self.handle.context()
        syndrome_at, address_at = _offsets()
        (esr,) = struct.unpack_from("<I", blob, syndrome_at)
        (gva,) = struct.unpack_from("<Q", blob, address_at)
        return esr, gva

    def is_fetch_fault(self, vector: int | None) -> bool:
        """An instruction that could not be fetched, and so never began."""
        return vector == PREFETCH_ABORT and self._syndrome()[0] >> 26 not in _DEBUG

    def came_before(self, vector: int | None) -> bool:
        """A breakpoint or a step of the guest's own: the instruction at the PC never began."""
        return vector in (UDEF, PREFETCH_ABORT) and self._syndrome()[0] >> 26 in _DEBUG

    def exception(self, vector: int) -> Exit | None:
        """An exception that Unicorn reported; its syndrome is in the CPU state."""
        pc = self.pc()
        esr, gva = self._syndrome()
        is_named = esr >> 26 != 0
        if vector == UDEF and (pc & 3 or not is_named):
            return self._undefined(pc)
        if vector == PREFETCH_ABORT and pc & 3:
            return self._deliver(pc, EC_PC_ALIGNMENT << 26 | IL, pc)
        has_address = vector in (PREFETCH_ABORT, DATA_ABORT) and esr >> 26 not in _DEBUG
        return self._deliver(pc, esr, gva if has_address else None)

    def _undefined(self, pc: int) -> Exit | None:
        if pc & 3:
            return self._deliver(pc, EC_PC_ALIGNMENT << 26 | IL, pc)
        insn = next(disassemble("arm64", self.core.memory.fetch(pc, 4), pc), None)
        if insn is not None and insn.mnemonic not in _PRIVILEGED:
            return self.core.refuse("Unicorn does not have this instruction")
        return self._deliver(pc, IL, None)

    def _deliver(self, pc: int, esr: int, far: int | None) -> Exit | None:
        """Enter EL1 (Arm ARM D1.3.1, pseudocode AArch64.TakeException)."""
        pstate, sctlr = self.read("pstate"), self.read("sctlr_el1")
        el, own_stack = pstate >> 2 & 3, pstate & 1
        if el == 0:
            source = 2
        elif own_stack:
            source = 1
        else:
            source = 0

        changes_stack = source != 1  # EL1 has a stack pointer of its own
        if changes_stack:
            self.write("sp_el0", self.read("sp"))
            stack = self.read("sp_el1")
        fresh = 0x3C5
        if not sctlr >> 23 & 1:  # SPAN
            fresh |= 1 << 22  # PAN
        self.write_many({"pstate": fresh, "spsr_el1": pstate, "elr_el1": pc, "esr_el1": esr})
        if changes_stack:
            self.write("sp", stack)
        if far is not None:
            self.write("far_el1", far)

        handler = self.read("vbar_el1") + 0x200 * source & MASK64
        return self.raised(64 * 4 * source + (esr >> 26), esr, pc, handler)

    # --- sensitive instructions

    def scan(self, data: bytes, gva: int) -> dict[int, Trap]:
        """The sensitive instructions of a block."""
        found = {}
        sctlr, level = self.read("sctlr_el1"), self.read("pstate") >> 2 & 3
        for i, (word,) in enumerate(struct.iter_unpack("<I", data[: len(data) & -4])):
            at = gva + 4 * i
            kind = "device" if at in self._devices else _kind(word)
            check = None
            if kind is None:
                access = arm64_align.access(word, at)
                unaligned = access and arm64_align.check(access, sctlr, level)
                if unaligned:
                    kind, check = unaligned
            if kind is not None:
                insn = data[4 * i : 4 * i + 4]
                found[at] = Trap(kind, at, insn, "", "", kind != "locked", check)
        return found

    def hole(self, pc: int) -> Exit | None:
        """Memory that is not there is a device's.

        A plain store to it will be carried out by the host from now on.
        """
        exit = self.core.meet_hole()
        data = self.core.memory.fetch(pc, 4)
        mask, value = _STORE
        is_store = len(data) == 4 and int.from_bytes(data, "little") & mask == value
        if is_store and pc not in self._devices:
            self._devices.add(pc)
            self.core.guard(Trap("device", pc, data, "", ""))
        return exit

    def _do_device(self, trap: Trap) -> Exit | None:
        """A store that went to a device before.

        When it goes elsewhere now, it is Unicorn's again.
        """
        size, offset, names, mask = _store(trap.data)
        batch = self._operands.get(trap.data)
        if batch is None:
            batch = self._operands[trap.data] = RegBatch(
                self.handle, tuple(_PLAIN[name] for name in names)
            )
        base, value = batch.read()
        gva = base + offset & MASK64
        gpa = self.core.memory.translate(gva, uc.UC_PROT_WRITE)
        if gpa is None or gva & size - 1 or self.core.vm.overlaps(gpa, size):
            self._devices.discard(trap.gva)
            self.core.unguard(trap.gva)
            return None
        self.core.retire()
        self.set_pc(trap.gva + len(trap.data))
        return _mmio_exit(gpa, size, True, value & mask)

    def _do_halt(self, trap: Trap) -> Exit:
        self.retire(trap)
        return HaltExit()

    def _do_debug(self, trap: Trap) -> Exit | None:
        """Watchpoints may begin or end."""
        exit = self.core.run_natively(trap)
        self.watch.arm()
        return exit

    def refused(self) -> Exit | None:
        """A watchpoint was hit; its instruction has not run (Arm ARM D17.2.37)."""
        hit = self.watch.take()
        assert hit is not None, "only watchpoints refuse"
        gva, is_store = hit
        level = self.read("pstate") >> 2 & 3
        esr = (EC_WATCHPOINT + (level > 0)) << 26 | IL | is_store << 6 | 0x22
        return self._deliver(self.pc(), esr, gva)

    def _do_sctlr(self, trap: Trap) -> Exit | None:
        """Alignment checks may begin or end: code is looked through anew."""
        if not self.read("pstate") >> 2 & 3:
            return self.core.run_natively(trap)
        target = trap.data[0] & 31
        value = 0 if target == 31 else self.read(f"x{target}")
        changed = (value ^ self.read("sctlr_el1")) & (A | SA | SA0)
        self.retire(trap, sctlr_el1=value)
        self.core.forget_translations(code=bool(changed))
        self.core.sync()
        return None

    def _access_of(self, trap: Trap) -> tuple[Access, int]:
        """The memory access of a trap, and where it goes now."""
        access = arm64_align.access(int.from_bytes(trap.data, "little"), trap.gva)
        assert access is not None, "it was one when the trap was made"
        values = {
            number: self.read("sp" if number == 31 else f"x{number}")
            for number in (access.base, access.index)
            if number >= 0
        }
        return access, access.gva(values)

    def _do_unaligned(self, trap: Trap) -> Exit | None:
        """An alignment fault (Arm ARM D17.2.40: DFSC 0b100001)."""
        access, gva = self._access_of(trap)
        return self._abort(trap.gva, 0x21 | access.is_write << 6, gva)

    def _do_stack(self, trap: Trap) -> Exit | None:
        """The stack pointer is not at a multiple of 16."""
        return self._deliver(trap.gva, EC_SP_ALIGNMENT << 26 | IL, None)

    def _abort(self, pc: int, iss: int, gva: int) -> Exit | None:
        """A data abort from the present level."""
        level = self.read("pstate") >> 2 & 3
        return self._deliver(pc, (EC_DATA_ABORT + (level > 0)) << 26 | IL | iss, gva)

    def _do_signed(self, trap: Trap) -> Exit | None:
        """LDSMAX and LDSMIN of 8, 16 and 32 bits."""
        word = int.from_bytes(trap.data, "little")
        size, source, base, target = 1 << (word >> 30), word >> 16 & 31, word >> 5 & 31, word & 31
        gva = self.read("sp" if base == 31 else f"x{base}")
        if gva & size - 1:
            return self._abort(trap.gva, 0x21, gva)
        gpa = self.core.memory.translate(gva, uc.UC_PROT_WRITE)
        if gpa is None or not self.core.vm.overlaps(gpa, size):
            return self.core.run_natively(trap)

        bits = 8 * size
        old = int.from_bytes(self.core.memory.read(gva, size) or b"", "little")
        other = 0 if source == 31 else self.read(f"x{source}") & (1 << bits) - 1
        choose = min if word >> 12 & 1 else max
        new = choose(old, other, key=lambda value: value - (value >> bits - 1 << bits))
        self.core.memory.write(gva, new.to_bytes(size, "little"))
        if target == 31:  # XZR
            self.retire(trap)
        else:
            self.retire(trap, **{f"x{target}": old})
        return None

    def _do_call(self, trap: Trap) -> Exit:
        """HVC and SMC, which KVM takes for SMCCC calls.

        Nothing is supported until the host says so.
        """
        if self.read("pstate") >> 2 & 3 == 0:
            return self._deliver(trap.gva, IL, None)  # type: ignore[return-value]
        nr, *args = (self.read(f"x{i}") for i in range(5))
        self.retire(trap, x0=NOT_SUPPORTED)
        self.awaits = [_PLAIN["x0"]]
        return HypercallExit(nr, tuple(args))

    def _do_counter(self, trap: Trap) -> None:
        """The counter and its frequency (Arm ARM D12).

        One tick an instruction, as many hertz as a guest is told.
        """
        word = int.from_bytes(trap.data, "little")
        is_frequency = word >> 5 & 7 == 0
        value = self.core.vm.cpu.tsc_khz * 1000 if is_frequency else self.clock()
        target = word & 31
        if target == 31:  # XZR
            self.retire(trap)
        else:
            self.retire(trap, **{f"x{target}": value})

    def extra_state(self) -> dict[str, object]:
        """What save() must keep beside Unicorn's own state."""
        return super().extra_state() | {"devices": sorted(self._devices)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put `extra_state` back."""
        super().set_extra_state(state)
        self._devices = set(state["devices"])
        self.watch.arm()
