"""riscv64 on Unicorn: its traps, and its sensitive instructions.

Traps go into the guest's own handler in S-mode.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from unicorn import riscv_const as riscv
from unicorn import unicorn_const as uc

from labkit.arch.riscv import GPRS
from labkit.engines.disasm import disassemble
from labkit.engines.exits import Exit, HaltExit, SbiExit
from labkit.engines.unicorn.isa.plain import PlainQuirks, common_words, probe
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.native.lib import IntrHook, RegBatch
from labkit.errors import NotAvailable

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core

__all__ = ["Riscv64"]

MASK64 = (1 << 64) - 1
FETCH_FAULTS, ILLEGAL, BREAKPOINT, ECALL_U = (0, 1, 12), 2, 3, 8
AS_STORE = {4: 6, 5: 7, 13: 15}  # what an AMO or SC that could not load gets
WITH_ADDRESS = frozenset({0, 1, 4, 5, 6, 7, 12, 13, 15})
SIE, SPIE, SPP, FS = 1 << 1, 1 << 5, 1 << 8, 3 << 13  # of sstatus
NOT_SUPPORTED = -2  # SBI_ERR_NOT_SUPPORTED
_CSRS = {
    name: getattr(riscv, f"UC_RISCV_REG_{name.upper()}")
    for name in (
        "sstatus",
        "stvec",
        "sscratch",
        "sepc",
        "scause",
        "stval",
        "satp",
        "sie",
        "sip",
        "scounteren",
    )
}
_PRIV, _PC = riscv.UC_RISCV_REG_PRIV, riscv.UC_RISCV_REG_PC
_PLAIN = {
    **{name: getattr(riscv, f"UC_RISCV_REG_X{i}") for i, name in enumerate(GPRS)},
    "pc": _PC,
    "priv": _PRIV,
}
_AMO = 0x2F
# What may be illegal where the guest runs it; anything else that capstone knows Unicorn lacks
_PRIVILEGED = ("csr", "unimp", "c.unimp", "sret", "mret", "sfence", "wfi", "rd", "h")
_FLOATING = frozenset({0x07, 0x27, 0x43, 0x47, 0x4B, 0x4F, 0x53})  # major opcodes of F and D
_KINDS = (  # mask, value, kind
    (0xFFFFFFFF, 0x00000073, "ecall"),
    (0xFFFFFFFF, 0x10500073, "halt"),
    (0xFE0FA07F, 0xC0002073, "counter"),  # a read of a CSR from cycle to hpmcounter31
    (0x0000007F, _AMO, "locked"),  # AMO, SC; LR is taken out
)


def _is_lr(word: int) -> bool:
    """Whether this is LR, the one load among the atomic instructions."""
    return word & 0xF800007F == 0x1000002F


def _is_floating(word: int) -> bool:
    """Whether this is an instruction of F or D, or accesses their CSRs; Unicorn has all of them."""
    if word & 3 != 3:
        return word & 3 in (0, 2) and word >> 13 & 7 in (1, 5)
    if word & 0x7F in _FLOATING:
        return True
    is_csr = word & 0x7F == 0x73 and word >> 12 & 3 != 0
    return is_csr and word >> 20 in (1, 2, 3)  # fflags, frm, fcsr


def _after(insn: int, register: str, gva: int) -> bytes:
    """The CPU state after an instruction at 0 that uses a register.

    It runs under Sv39 with a 1 GiB page.
    """
    image = struct.pack("<I", insn | GPRS.index(register) << 15).ljust(4096, b"\0") + struct.pack(
        "<Q", 0xCF
    )
    return probe(
        Riscv64, image, {_PRIV: 1, riscv.UC_RISCV_REG_SATP: 8 << 60 | 1, _PLAIN[register]: gva}
    )


@cache
def _offsets() -> tuple[int, int]:
    """Where a saved CPU state has the address of the last fault, and that of the last LR."""
    faults = common_words(
        *(
            (_after(0x3003, name, gva), gva)
            for name, gva in (("a1", 0x4567_8980), ("a2", 0x7654_3210))
        )
    )  # LD
    loads = common_words(
        *((_after(0x1000302F, name, gva), gva) for name, gva in (("a1", 0x800), ("a2", 0x908)))
    )  # LR.D
    if not len(faults) == len(loads) == 1:
        raise NotAvailable(
            "libunicorn's riscv64 state does not show faults and reservations "
            f"({faults}, {loads}); this build cannot be used"
        )
    return faults[0], loads[0]


class Riscv64(PlainQuirks):
    """The quirks of riscv64, one per vCPU."""

    uc_arch, uc_mode = uc.UC_ARCH_RISCV, uc.UC_MODE_RISCV64
    settings: ClassVar[tuple[tuple[int, int], ...]] = (
        (uc.UC_CTL_CPU_MODEL, riscv.UC_CPU_RISCV64_SIFIVE_U54),
    )
    two_blocks = struct.pack("<2I", 0x0040006F, 0x10500073)  # JAL zero, +4; WFI
    plain, special = _PLAIN, tuple(_CSRS)
    first, hot = ("priv", "satp"), ("priv", *(f"a{i}" for i in range(8)))

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._answer = RegBatch(core.handle, (_PC, _PLAIN["a0"]))
        self.handle.write(_PRIV, 1)
        self.handle.hook(uc.UC_HOOK_INTR, IntrHook(lambda _h, _v, _d: self._back()))

    def _back(self) -> None:
        """Unicorn moves on by four whatever the exception is."""
        self.handle.write(_PC, self.handle.read(_PC) - 4 & MASK64)

    # --- registers

    def _read_special(self, name: str) -> int:
        return self._as_machine(lambda: self.handle.read(self._csr(name)))

    def _write_special(self, name: str, value: int) -> None:
        self._as_machine(lambda: self.handle.write(self._csr(name), value))
        if name == "satp":
            self.core.forget_translations()

    def _csr(self, name: str) -> int:
        if name not in _CSRS:
            super()._read_special(name)
        return int(_CSRS[name])

    def _as_machine(self, access: Callable[[], int]) -> int:
        """Access a CSR in M-mode.

        What libunicorn gives and takes depends on the level that the guest happens to have.
        """
        level = self.handle.read(_PRIV)
        self.handle.write(_PRIV, 3)
        value = access()
        self.handle.write(_PRIV, level)
        return value

    # --- exceptions

    def monitor_offset(self) -> int:
        """Where the address of the last LR is."""
        return _offsets()[1]

    def is_fetch_fault(self, vector: int | None) -> bool:
        """An instruction that could not be fetched, and so never began."""
        return vector in FETCH_FAULTS and self._fault_gva() >= self.pc()

    def _fault_gva(self) -> int:
        return int.from_bytes(self.handle.context()[_offsets()[0] :][:8], "little")

    def exception(self, vector: int) -> Exit | None:
        """A trap that Unicorn reported."""
        pc = self.pc()
        gva = self._fault_gva() if vector in WITH_ADDRESS else 0
        # At the start of a page, Unicorn wants the page before too
        wants_page_before = vector in FETCH_FAULTS and gva < pc
        if vector == ILLEGAL or wants_page_before:
            return self._illegal(pc)

        word = int.from_bytes(self.core.memory.fetch(pc, 4), "little")
        if word & 0x7F == _AMO and not _is_lr(word):
            vector = AS_STORE.get(vector, vector)
        return self._deliver(pc, vector, gva)

    def _illegal(self, pc: int) -> Exit | None:
        data = self.core.memory.fetch(pc, 4)
        is_compressed = not data or data[0] & 3 != 3
        if is_compressed:
            data = data[:2]
        insn = next(disassemble("riscv64", data, pc), None)
        is_owed = _is_floating(int.from_bytes(data, "little"))  # FS is off, or no such rounding
        if insn is not None and not is_owed and not insn.mnemonic.startswith(_PRIVILEGED):
            return self.core.refuse("Unicorn does not have this instruction")
        return self._deliver(pc, ILLEGAL, int.from_bytes(data, "little"))

    def invalid(self) -> Exit | None:
        """EBREAK, of which Unicorn says that there is no such instruction."""
        return self._deliver(self.pc(), BREAKPOINT, self.pc())

    def _deliver(self, pc: int, cause: int, stval: int) -> Exit | None:
        """Enter S-mode (Privileged Architecture 12.1.1, 12.1.2).

        All synchronous exceptions are delegated to it.
        """
        before = self.read("sstatus")
        status = before & ~(SPP | SPIE | SIE)
        if self.read("priv"):
            status |= SPP
        if before & SIE:
            status |= SPIE
        self.write_many({"priv": 1, "sstatus": status, "sepc": pc, "scause": cause, "stval": stval})
        return self.raised(cause, stval, pc, self.read("stvec") & -4)

    # --- sensitive instructions

    def scan(self, data: bytes, gva: int) -> dict[int, Trap]:
        """The sensitive instructions of a block."""
        found = {}
        at = 0
        while at + 2 <= len(data):
            size = 2 if data[at] & 3 != 3 else 4
            insn = data[at : at + size]
            if len(insn) == size and (kind := self._kind(int.from_bytes(insn, "little"))):
                found[gva + at] = Trap(kind, gva + at, insn, "", "", kind != "locked")
            at += size
        return found

    def _kind(self, word: int) -> str | None:
        """How the host carries out an instruction; None when Unicorn may."""
        if _is_floating(word):
            return "illegal" if not self.read("sstatus") & FS else None
        if word & 3 != 3 or _is_lr(word):
            return None
        return next((kind for mask, value, kind in _KINDS if word & mask == value), None)

    def _do_illegal(self, trap: Trap) -> Exit | None:
        """Floating point that is off, of which Unicorn carries out some."""
        return self._deliver(trap.gva, ILLEGAL, int.from_bytes(trap.data, "little"))

    def _do_ecall(self, trap: Trap) -> Exit | None:
        _, level, *args, function, extension = self.was
        if not level:
            return self._deliver(trap.gva, ECALL_U, 0)
        self.core.retire()
        self._pc = trap.gva + len(trap.data) & MASK64
        self._answer.write(self._pc, NOT_SUPPORTED & MASK64)
        self.awaits = [_PLAIN["a0"]]
        return SbiExit(extension, function, tuple(args))

    def _do_halt(self, trap: Trap) -> Exit:
        self.retire(trap)
        return HaltExit()

    def _do_counter(self, trap: Trap) -> Exit | None:
        """cycle, time and instret: one tick an instruction.

        There is no other counter; U-mode needs scounteren (Privileged Architecture 12.1.5).
        """
        word = int.from_bytes(trap.data, "little")
        number, rd = word >> 20 & 31, word >> 7 & 31
        allowed = 7 if self.read("priv") else 7 & self.read("scounteren")
        if not allowed >> number & 1:
            return self._deliver(trap.gva, ILLEGAL, word)
        if rd:
            self.retire(trap, **{GPRS[rd]: self.clock()})
        else:
            self.retire(trap)
        return None
