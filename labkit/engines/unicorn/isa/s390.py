"""s390x on Unicorn: its interruptions, and DIAGNOSE.

Interruptions go by way of the guest's own lowcore (Principles of Operation, chapter 6).
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar

from unicorn import s390x_const as s390
from unicorn import unicorn_const as uc

from labkit.engines.base import Capability
from labkit.engines.disasm import disassemble
from labkit.engines.exits import DiagExit, Exit, HaltExit
from labkit.engines.unicorn.isa.plain import probe
from labkit.engines.unicorn.isa.s390_host import CC, HostInsns, host_kind, size_of
from labkit.engines.unicorn.isa.s390_table import mend
from labkit.engines.unicorn.isa.traps import Trap
from labkit.errors import InvalidState, NotAvailable

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.core import Core

__all__ = ["S390x"]

MASK64 = (1 << 64) - 1
SVC = 2  # QEMU's EXCP_SVC
OPERATION, PRIVILEGED, ADDRESSING, SPECIFICATION, FIXED_POINT_DIVIDE = 1, 2, 5, 6, 9
TRANSLATIONS = frozenset({0x10, 0x11, 0x38, 0x39, 0x3A, 0x3B})
NULLIFYING = TRANSLATIONS | {
    0x14,
    0x1C,
    0x80,
}  # the old PSW names the instruction itself (figure 6-1)
PROBLEM, WAIT = 1 << 48, 1 << 49
_PLAIN = {
    **{f"r{i}": getattr(s390, f"UC_S390X_REG_R{i}") for i in range(16)},
    "pc": s390.UC_S390X_REG_PC,
    "pswm": s390.UC_S390X_REG_PSWM,
    **{f"cr{i}": getattr(s390, f"UC_S390X_REG_CR{i}") for i in range(16)},
    **{f"a{i}": getattr(s390, f"UC_S390X_REG_A{i}") for i in range(16)},
    "fpc": s390.UC_S390X_REG_FPC,
}
_KINDS = {0x83: "diag", 0x44: "execute"}
_KINDS2 = {0xB205: "clock", 0xB27C: "clock", 0xB2B2: "lpswe", 0xB204: "set_clock"}
# Targets of EXECUTE for which Unicorn has a helper: SVC, MVC, ...
_IN_HELPER = frozenset({0x0A, 0xD0, 0xD2, 0xD4, 0xD5, 0xD6, 0xD7, 0xDC, 0xDD})
# LAN to LAA, CSY to CDSG
_LOCKED = frozenset(
    {0xE4, 0xE6, 0xE7, 0xE8, 0xEA, 0xF4, 0xF6, 0xF7, 0xF8, 0xFA, 0x14, 0x30, 0x31, 0x3E}
)
_RESET_MASK = 0x180000000  # 64-bit addresses


def _after(code: bytes) -> bytes:
    """The CPU state behind the interruption that this code ends in."""
    return probe(S390x, code, {_PLAIN["pswm"]: _RESET_MASK})


def _set_prefix(prefix: int) -> bytes:
    """SPX 16, with its operand."""
    return bytes.fromhex("b2100010").ljust(16, b"\0") + struct.pack(">I", prefix)


def _places(form: str, *runs: tuple[bytes, tuple[int, ...]]) -> list[int]:
    """Offsets at which each of these CPU states has, in this form, the facts that go with it."""
    size = len(runs[0][0])
    return [
        at
        for at in range(0, size - 8, 4)
        if all(struct.unpack_from(form, blob, at) == facts for blob, facts in runs)
    ]


@cache
def _offsets() -> tuple[int, int, int]:
    """Where a saved CPU state has the program interruption code, the SVC code, and the prefix.

    The instruction's length is behind either code.
    """
    unaligned_csg = _after(bytes.fromhex("eb0200040030")), (SPECIFICATION, 6)
    dsgr_by_zero = _after(bytes.fromhex("b90d0002")), (FIXED_POINT_DIVIDE, 4)
    program = _places("<2I", unaligned_csg, dsgr_by_zero)

    calls = [(_after(bytes([0x0A, number])), (number, 2)) for number in (0x5A, 0xA5)]
    service = _places("<2I", *calls)

    moves = [(_after(_set_prefix(prefix)), (prefix,)) for prefix in (0x123_4000, 0x2B_C000)]
    prefix = _places("<Q", *moves)

    if not len(program) == len(service) == len(prefix) == 1:
        raise NotAvailable(
            "libunicorn's s390x state does not show interruptions and prefix "
            f"({program}, {service}, {prefix}); this build cannot be used"
        )
    return program[0], service[0], prefix[0]


_diag_exit = lru_cache(256)(DiagExit)  # as arm64's


class S390x(HostInsns):
    """The quirks of s390x, one per vCPU."""

    uc_arch, uc_mode = uc.UC_ARCH_S390X, uc.UC_MODE_BIG_ENDIAN
    settings: ClassVar[tuple[tuple[int, int], ...]] = (
        (uc.UC_CTL_CPU_MODEL, s390.UC_CPU_S390X_MAX),
    )
    two_blocks, two_blocks_count = struct.pack(">2I", 0xA7F40002, 0xA7F40000), 3  # J +4; J +0
    plain, special, longest = _PLAIN, ("prefix",), 6
    capabilities: ClassVar[tuple[Capability, ...]] = (
        Capability(
            "edat",
            False,
            "Unicorn walks pages of 4 KiB only, whatever CR0 says, "
            "so there are no larger ones to map",
        ),
        Capability(
            "set_clock",
            False,
            "SCK is refused; "
            "where its row in libunicorn is not mended (other systems than Linux) it crashes",
        ),
    )
    hot = ("pswm", *(f"r{i}" for i in range(16)))
    first = ("prefix", "cr0", "cr1", "pswm")

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.fault_trace = self._teid, self._set_teid
        mend()
        self.handle.write(_PLAIN["pswm"], _RESET_MASK)

    # --- registers

    def _read_special(self, name: str) -> int:
        if name != "prefix":
            return super()._read_special(name)
        return int(struct.unpack_from("<Q", self.handle.context(), _offsets()[2])[0])

    def _write_special(self, name: str, value: int) -> None:
        if name != "prefix":
            super()._write_special(name, value)
        if value & ~0x7FFFE000:
            raise InvalidState(
                f"prefix = {value:#x}: it is a multiple of 8 KiB below 2 GiB",
                name=name,
                value=value,
            )

        def patch(context: int) -> None:
            ctypes.c_uint64.from_address(context + _offsets()[2]).value = value

        self.handle.patch_context(patch)
        self.core.forget_translations()

    def write(self, name: str, value: int) -> None:
        """Set one register; a new address space needs new translations."""
        super().write(name, value)
        if name in ("cr0", "cr1", "pswm"):
            self.core.forget_translations()

    # --- interruptions

    def is_fetch_fault(self, vector: int | None) -> bool:
        """An instruction that could not be fetched, and so never began.

        Nothing is at the program counter.
        """
        if vector is None or vector == SVC or self._program()[0] not in TRANSLATIONS:
            return False
        return not self.core.memory.fetch(self.pc(), 1)

    def _program(self) -> tuple[int, int]:
        code, length = struct.unpack_from("<2I", self.handle.context(), _offsets()[0])
        return code, length

    def exception(self, vector: int) -> Exit | None:
        """An interruption that Unicorn reported."""
        pc = self.pc()
        if vector == SVC:
            code, length = struct.unpack_from("<2I", self.handle.context(), _offsets()[1])
            return self._enter(
                0x40, 0x140, 0x1C0, {0x88: struct.pack(">2H", length, code)}, pc + length, pc, code
            )
        return self._deliver(self._program()[0], pc)

    def hole(self, pc: int) -> Exit | None:
        """Storage that is not there: an addressing exception, as KVM has it."""
        return self._deliver(ADDRESSING, pc)

    def _teid(self) -> int:
        """The translation-exception identification.

        It is a doubleword of the lowcore, which Unicorn writes when a look of ours finds nothing.
        """
        return int.from_bytes(self.core.vm.read(self.read("prefix") + 0xA8, 8), "big")

    def _set_teid(self, value: int) -> None:
        self.core.vm.write(self.read("prefix") + 0xA8, value.to_bytes(8, "big"))

    def _deliver(self, code: int, pc: int) -> Exit | None:
        """A program interruption (6.5)."""
        data = self.core.memory.fetch(pc, 6)
        known = next(disassemble("s390x", data, pc), None) is not None
        if code == OPERATION and known:
            return self.core.refuse("Unicorn does not have this instruction")
        # At the start of a page, Unicorn wants the page before too
        if code in TRANSLATIONS and data and not known:
            code = OPERATION

        length = size_of(data[0]) if data and not pc & 1 else 2
        at = pc if code in NULLIFYING else pc + length
        error = self._teid() if code in TRANSLATIONS or code == 4 else 0
        return self._enter(
            code, 0x150, 0x1D0, {0x8C: struct.pack(">2H", length, code)}, at, pc, error
        )

    def _enter(
        self, code: int, old: int, new: int, facts: dict[int, bytes], at: int, pc: int, error: int
    ) -> Exit | None:
        """Exchange PSWs.

        The old one, with where to go on, goes into the lowcore, the new one comes out of it.
        """
        prefix = self.read("prefix")
        for offset, data in {
            **facts,
            old: struct.pack(">2Q", self.read("pswm"), at & MASK64),
        }.items():
            self.core.vm.write(prefix + offset, data)
        mask, handler = struct.unpack(">2Q", self.core.vm.read(prefix + new, 16))
        self.write("pswm", mask)
        self.handle.flush_tlb()
        return self.raised(code, error, pc, handler)

    # --- sensitive instructions

    def scan(self, data: bytes, gva: int) -> dict[int, Trap]:
        """The sensitive instructions of a block."""
        if gva & 1:
            return {gva: Trap("odd", gva, data[:2], "", "")}

        found = {}
        at = 0
        while at < len(data):
            insn = data[at : at + size_of(data[at])]
            kind = self._kind(insn) or host_kind(data, at)
            if kind:
                found[gva + at] = Trap(kind, gva + at, insn, "", "", kind != "locked")
            at += len(insn)
        return found

    @staticmethod
    def _kind(insn: bytes) -> str | None:
        first = insn[0]
        if (first == 0xEB and insn[-1] in _LOCKED) or first in (0xBA, 0xBB):  # CS, CDS
            return "locked"
        if first == 0xC6 and not insn[1] & 15:  # EXRL
            return "execute"
        return _KINDS.get(first) or _KINDS2.get(first << 8 | insn[1])

    def _is_problem_state(self) -> bool:
        return bool(self.was[1] & PROBLEM)

    def _do_diag(self, trap: Trap) -> Exit | None:
        if self._is_problem_state():
            return self._deliver(PRIVILEGED, trap.gva)
        code = self._address(trap.data) & 0xFFFF
        value = self.was[2 + (trap.data[1] & 15)]
        self.retire(trap)
        return _diag_exit(code, value)

    def _do_clock(self, trap: Trap) -> Exit | None:
        """STORE CLOCK: one tick an instruction, at 1 GHz.

        Bit 51 of the TOD clock is a microsecond.
        """
        gva, tod = self._address(trap.data), self.clock() * 4096 // 1000
        if not self.core.memory.write(gva, struct.pack(">Q", tod & MASK64)):
            return self.core.refuse(f"STORE CLOCK to gva {gva:#x}, which cannot be written")
        self.retire(trap, pswm=self.read("pswm") & ~CC)
        return None

    def _do_set_clock(self, trap: Trap) -> Exit | None:
        if self._is_problem_state():
            return self._deliver(PRIVILEGED, trap.gva)
        return self.core.refuse("SET CLOCK: the clock is the VM's")

    def _do_lpswe(self, trap: Trap) -> Exit | None:
        """LOAD PSW EXTENDED; one that waits is a halt, for no interruption ever comes."""
        gva = self._address(trap.data)
        data = self.core.memory.read(gva, 16)
        if self._is_problem_state():
            return self._deliver(PRIVILEGED, trap.gva)
        if gva & 7:
            return self._deliver(SPECIFICATION, trap.gva)
        if data is None:
            return self.core.refuse(f"LPSWE from gva {gva:#x}, which cannot be read")
        mask, pc = struct.unpack(">2Q", data)
        self.retire(trap, pswm=mask)
        self.handle.flush_tlb()
        self.set_pc(pc)
        return HaltExit() if mask & WAIT else None

    def _do_odd(self, trap: Trap) -> Exit | None:
        """Unicorn runs instructions at odd addresses."""
        return self._deliver(SPECIFICATION, trap.gva)

    def _do_execute(self, trap: Trap) -> Exit | None:
        """EXECUTE and its target are one instruction.

        Unicorn has a helper for some targets and makes blocks of others: it counts two.
        """
        core, data = self.core, trap.data
        if len(data) == 6:  # EXRL
            gva = trap.gva + 2 * int.from_bytes(data[2:], "big", signed=True) & MASK64
        else:
            gva = self._address(data, data[1] & 15)
        target = core.memory.fetch(gva, 6)
        if gva & 1:
            return self._deliver(SPECIFICATION, trap.gva)
        if target and self._is_the_hosts(target):
            return core.refuse(
                f"EXECUTE of an instruction at gva {gva:#x} that Unicorn does not carry out"
            )

        with core.passing(trap):
            return self._execute(trap, 1 if not target or target[0] in _IN_HELPER else 2)

    def _is_the_hosts(self, insn: bytes) -> bool:
        """Whether Unicorn must not carry out this target of an EXECUTE."""
        kind = self._kind(insn) or host_kind(insn, 0)
        return kind not in (None, "locked", "execute")

    def _execute(self, trap: Trap, count: int) -> Exit | None:
        """Let Unicorn carry it out, which counts so many instructions for one."""
        core = self.core
        before, after = self.handle.context(), core.insns + 1
        while True:
            exit = core.run_each(count)
            if exit is not None:
                return exit
            if core.ended_by != "edge" or self.pc() != trap.gva:
                core.recount(after)
                return None
            # It stopped between the two, and would forget the target
            self.handle.set_context(before)
