"""x87 and SSE arithmetic of x86-64 guests: the host's processor computes, the guest's rules decide.

SDM vol. 1 chapters 8 and 11: status words, masked and unmasked exceptions, #MF at the next waiting
x87 instruction, #XM at the SSE instruction itself.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from unicorn import x86_const as x86

from labkit.engines.exits import Exit
from labkit.engines.unicorn.isa.traps import Trap
from labkit.engines.unicorn.isa.x86_events import GP, MF, NM, UD, XM, canonical
from labkit.engines.unicorn.isa.x86_operands import Place, place, registers
from labkit.engines.unicorn.native.borrow import NAMES, Borrowed, borrowed

if TYPE_CHECKING:
    from labkit.engines.unicorn.isa.x86 import X86

__all__ = ["FLOAT", "MXCSR_MASK"]

MXCSR_MASK = 0xFFFF
_MP, _EM, _TS, _NE = 1 << 1, 1 << 2, 1 << 3, 1 << 5  # CR0
_OSFXSR, _OSXMMEXCPT = 1 << 9, 1 << 10  # CR4
_FNINIT = 0x37F  # the x87's control word then
_XMM = tuple((f"xmm{i}", 160 + 16 * i) for i in range(16))  # and where they lie in an FXSAVE area
_FLAGS, _ARITHMETIC = 0x3F, 0x8D5
_ES, _BUSY, _TOP = 1 << 7, 1 << 15, 7 << 11  # of the x87 status word
_BEFORE = 0b111  # invalid, denormal, divide by zero: found before anything is computed
_RANGE = 0b11000  # overflow and underflow
# They do not wait for an exception that is pending: FNINIT, FNCLEX, FNSTCW, FNSTSW, FNSAVE, FNSTENV
_NO_WAIT = frozenset(
    {"fninit", "fnclex", "fnstcw", "fnstsw", "fnsave", "fnstenv", "fndisi8087_nop", "fneni8087_nop"}
)
_CONTROL = _NO_WAIT | {"fldcw", "fldenv", "frstor", "wait", "fwait"}
_STORES = ("fst", "fist", "fbst", "fnst", "fnsave")


class _Float80(ctypes.Structure):
    _fields_ = [("mantissa", ctypes.c_uint64), ("sign", ctypes.c_uint16)]


def _sse_alone(cpu: X86) -> bytearray:
    """The guest's SSE registers in an FXSAVE area; the x87, which costs more, as after FNINIT."""
    area = bytearray(512)
    struct.pack_into("<H", area, 0, _FNINIT)
    struct.pack_into("<II", area, 24, cpu.regs.read("mxcsr"), MXCSR_MASK)
    _get_sse(cpu, area)
    return area


def _get_sse(cpu: X86, area: bytearray) -> None:
    read = cpu.regs.read
    for name, at in _XMM:
        area[at : at + 16] = read(name).to_bytes(16, "little")


def _fxsave(cpu: X86) -> bytearray:
    """The guest's x87 and SSE registers as FXSAVE64 lays them out (SDM vol. 1 10.5.1)."""
    read, handle = cpu.handle.read, cpu.handle
    control, status = read(x86.UC_X86_REG_FPCW) & 0xFFFF, read(x86.UC_X86_REG_FPSW) & 0xFFFF
    tags, top = read(x86.UC_X86_REG_FPTAG), status >> 11 & 7
    valid = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3)
    area = bytearray(512)
    struct.pack_into("<HHB", area, 0, control, status, valid)
    struct.pack_into("<II", area, 24, cpu.regs.read("mxcsr"), MXCSR_MASK)
    for i in range(8):
        register = handle.read_struct(x86.UC_X86_REG_FP0 + (top + i & 7), _Float80())
        struct.pack_into("<QH", area, 32 + 16 * i, register.mantissa, register.sign)
    _get_sse(cpu, area)
    return area


def _put_x87(cpu: X86, area: bytes, busy: int = 0) -> None:
    """Give the guest the x87 registers of such an area."""
    control, status, valid = struct.unpack_from("<HHB", area, 0)
    top = status >> 11 & 7
    handle = cpu.handle
    for i in range(8):
        number, at = top + i & 7, 32 + 16 * i
        handle.write_struct(
            x86.UC_X86_REG_FP0 + number, _Float80(*struct.unpack_from("<QH", area, at))
        )
    tags = sum((0 if valid >> i & 1 else 3) << 2 * i for i in range(8))
    handle.write(x86.UC_X86_REG_FPCW, control)
    handle.write(x86.UC_X86_REG_FPTAG, tags)
    handle.write(x86.UC_X86_REG_FPSW, status | busy)


def _put_sse(cpu: X86, before: bytes, after: bytes) -> None:
    for i in range(16):
        part = slice(160 + 16 * i, 176 + 16 * i)
        if before[part] != after[part]:
            cpu.regs.write(f"xmm{i}", int.from_bytes(after[part], "little"))


def _blocked(cpu: X86, is_sse: bool) -> tuple[bool, Exit | None]:
    """(whether CR0 and CR4 keep the guest from the FPU, what came of that)."""
    cr0 = cpu.regs.read("cr0")
    if is_sse and (cr0 & _EM or not cpu.regs.read("cr4") & _OSFXSR):
        return True, cpu.deliver(UD)
    not_available = _TS if is_sse else _TS | _EM
    if cr0 & not_available:
        return True, cpu.deliver(NM)
    return False, None


class _Operand:
    """The memory operand of one instruction: read before, written behind it."""

    def __init__(self, cpu: X86, trap: Trap, where: Place | None, size: int) -> None:
        self.cpu, self.trap, self.where, self.size = cpu, trap, where, size
        self.gva = where.gva(cpu.regs) if where is not None else 0
        self.data = b""

    def fault(self, is_write: bool) -> tuple[bool, Exit | None]:
        """(whether the guest may not access it, what came of that)."""
        if self.where is None:
            return False, None
        last = self.gva + self.size - 1 & (1 << 64) - 1
        if not canonical(self.gva) or not canonical(last):
            vector = 12 if self.where.is_stack else GP
            return True, self.cpu.deliver(vector, 0)
        memory = self.cpu.core.memory
        access = 2 if is_write else 1  # UC_PROT_WRITE, UC_PROT_READ
        for at in (self.gva, last):
            if memory.translate(at, access) is None or not self._is_memory(at):
                # Nothing is computed where it faults, and a device answers Unicorn's own access
                return True, self.cpu.core.run_natively(self.trap)
        if not is_write:
            self.data = memory.read(self.gva, self.size) or b""
        return False, None

    def _is_memory(self, gva: int) -> bool:
        """Whether a memslot lies there."""
        gpa = self.cpu.core.memory.translate(gva)
        return gpa is None or self.cpu.core.vm.overlaps(gpa, 1)


def _execute(
    cpu: X86, host: Borrowed, trap: Trap, area: bytearray, operand: bytes
) -> tuple[bytearray, dict[str, int], bytes]:
    """The FXSAVE area, the other registers that it changed, and the operand, as it leaves them."""
    read = cpu.regs.read
    gprs = [read(name) for name in NAMES]
    all_flags = read("rflags")
    after, gprs_after, flags, operand = host.run(
        trap.data, bytes(area), gprs, all_flags & _ARITHMETIC | 2, operand
    )
    changed = {}
    for name, before, value in zip(NAMES, gprs, gprs_after, strict=True):
        if name != "rsp" and before != value:
            changed[name] = value
    if (all_flags ^ flags) & _ARITHMETIC:
        changed["rflags"] = all_flags & ~_ARITHMETIC | flags & _ARITHMETIC
    return bytearray(after), changed, operand


@lru_cache(maxsize=4096)
def _uses_mmx(data: bytes) -> bool:
    return any(name.startswith("mm") for name, _ in registers(data))


@lru_cache(maxsize=4096)
def _uses_stack_pointer(data: bytes) -> bool:
    return any(name in ("rsp", "esp", "sp", "spl") for name, _ in registers(data))


def _do_x87(cpu: X86, trap: Trap) -> Exit | None:
    """An x87 instruction (SDM vol. 1 8.7)."""
    name = trap.mnemonic.split()[-1]
    is_wait = trap.data.lstrip(b"\x66\x67\x40")[:1] == b"\x9b" and len(trap.data) == 1
    if is_wait:
        cr0 = cpu.regs.read("cr0")
        if cr0 & _MP and cr0 & _TS:
            return cpu.deliver(NM)
    else:
        blocked, exit = _blocked(cpu, is_sse=False)
        if blocked:
            return exit

    area = _fxsave(cpu)
    control, status = struct.unpack_from("<HH", area, 0)
    if name not in _NO_WAIT and status & ~control & _FLAGS:
        if not cpu.regs.read("cr0") & _NE:
            return cpu.core.refuse("an x87 exception while CR0.NE is clear: FERR# is not modelled")
        return cpu.deliver(MF)
    if is_wait:
        return cpu.retire(trap)

    host = borrowed()
    if host is None:
        return cpu.core.refuse("x87 needs a host of the same architecture")
    return _carry_out_x87(cpu, host, trap, name, area)


def _carry_out_x87(cpu: X86, host: Borrowed, trap: Trap, name: str, area: bytearray) -> Exit | None:
    where = place(trap.data, trap.gva)
    size = _x87_size(name, where)
    operand = _Operand(cpu, trap, where, size)
    is_store = name.startswith(_STORES)
    failed, exit = operand.fault(is_store)
    if failed:
        return exit

    control, status = struct.unpack_from("<HH", area, 0)
    before = bytes(area)
    is_control = name in _CONTROL
    if not is_control:
        struct.pack_into("<HH", area, 0, control | _FLAGS, status & ~(_FLAGS | _ES | _BUSY))
    elif name in ("fnstcw", "fnstenv", "fnsave", "fnstsw"):
        # With the masks as they are and no waiting behind it, the host takes no exception
        pass
    else:
        struct.pack_into("<HH", area, 0, control, status)
    data = operand.data or bytes(size if where is not None else 0)
    after, changed, written = _execute(cpu, host, trap, area, data)
    if not is_control:
        raised = struct.unpack_from("<H", after, 2)[0] & _FLAGS
        unmasked = raised & ~control
        if unmasked & _RANGE:
            return cpu.core.refuse(
                "an unmasked x87 overflow or underflow, whose scaled result is not modelled"
            )
        new_status = struct.unpack_from("<H", after, 2)[0]
        if unmasked & _BEFORE:
            after = bytearray(before)
            new_status = status & ~(1 << 9) | new_status & (1 << 9 | 1 << 6)
            written, changed = b"", {}
        new_status = (
            new_status & ~_FLAGS | status & (_FLAGS | 1 << 6) | raised | new_status & 1 << 6
        )
        struct.pack_into("<HH", after, 0, control, new_status & ~(_ES | _BUSY))
    control, status = struct.unpack_from("<HH", after, 0)
    busy = _ES | _BUSY if status & ~control & _FLAGS else 0
    if is_store and written:
        cpu.core.memory.write(operand.gva, written)
    _put_x87(cpu, bytes(after), busy)
    return cpu.retire(trap, **changed)


def _x87_size(name: str, where: Place | None) -> int:
    if where is None:
        return 0
    if name in ("fnsave", "frstor"):
        return 108
    if name in ("fnstenv", "fldenv"):
        return 28
    if name in ("fnstcw", "fldcw", "fnstsw"):
        return 2
    return 10 if name in ("fbld", "fbstp") else where.size


def _do_sse(cpu: X86, trap: Trap) -> Exit | None:
    """SSE arithmetic, or a comparison of strings (SDM vol. 1 11.5)."""
    blocked, exit = _blocked(cpu, is_sse=True)
    if blocked:
        return exit
    host = borrowed()
    if host is None:
        return cpu.core.refuse("SSE arithmetic needs a host of the same architecture")
    if _uses_stack_pointer(trap.data):
        return cpu.core.refuse("SSE arithmetic with RSP as a register operand is not modelled")

    where = place(trap.data, trap.gva)
    operand = _Operand(cpu, trap, where, where.size if where is not None else 0)
    is_aligned = where is None or where.size != 16 or trap.mnemonic.startswith("pcmp")
    if not is_aligned and operand.gva & 15:
        return cpu.deliver(GP, 0) if canonical(operand.gva) else cpu.deliver(*_beyond(where))
    failed, exit = operand.fault(is_write=False)
    if failed:
        return exit
    return _carry_out_sse(cpu, host, trap, operand.data)


def _beyond(where: Place | None) -> tuple[int, int]:
    return (12 if where is not None and where.is_stack else GP), 0


def _carry_out_sse(cpu: X86, host: Borrowed, trap: Trap, data: bytes) -> Exit | None:
    uses_mmx = _uses_mmx(trap.data) or "pi" in trap.mnemonic
    area = _fxsave(cpu) if uses_mmx else _sse_alone(cpu)
    mxcsr = cpu.regs.read("mxcsr")
    before = bytes(area)
    struct.pack_into("<I", area, 24, mxcsr & ~_FLAGS | _FLAGS << 7)
    if uses_mmx and struct.unpack_from("<H", before, 2)[0] & ~before[0] & _FLAGS:
        return cpu.deliver(MF)
    after, changed, _ = _execute(cpu, host, trap, area, data)

    raised = struct.unpack_from("<I", after, 24)[0] & _FLAGS
    unmasked = raised & ~(mxcsr >> 7)
    cpu.regs.write("mxcsr", mxcsr | raised)
    if unmasked:
        if unmasked & _BEFORE:
            cpu.regs.write("mxcsr", mxcsr | raised & _BEFORE)
        return cpu.deliver(XM if cpu.regs.read("cr4") & _OSXMMEXCPT else UD)
    _put_sse(cpu, before, bytes(after))
    if uses_mmx:
        struct.pack_into("<H", after, 0, struct.unpack_from("<H", before, 0)[0])
        _put_x87(cpu, bytes(after))
    return cpu.retire(trap, **changed)


def _do_ldmxcsr(cpu: X86, trap: Trap) -> Exit | None:
    blocked, exit = _blocked(cpu, is_sse=True)
    if blocked:
        return exit
    operand = _Operand(cpu, trap, place(trap.data, trap.gva), 4)
    failed, exit = operand.fault(is_write=False)
    if failed:
        return exit
    value = int.from_bytes(operand.data, "little")
    if value & ~MXCSR_MASK:
        return cpu.deliver(GP, 0)
    return cpu.retire(trap, mxcsr=value)


def _do_fxrstor(cpu: X86, trap: Trap) -> Exit | None:
    """FXRSTOR and FXRSTOR64, which differ in pointers that are not kept (SDM vol. 2)."""
    cr0 = cpu.regs.read("cr0")
    if cr0 & (_TS | _EM):
        return cpu.deliver(NM)
    operand = _Operand(cpu, trap, place(trap.data, trap.gva), 512)
    if operand.gva & 15 and canonical(operand.gva):
        return cpu.deliver(GP, 0)
    failed, exit = operand.fault(is_write=False)
    if failed:
        return exit
    area = operand.data
    (mxcsr,) = struct.unpack_from("<I", area, 24)
    if mxcsr & ~MXCSR_MASK:
        return cpu.deliver(GP, 0)
    _put_x87(cpu, area)
    _put_sse(cpu, bytes(_fxsave(cpu)), area)
    return cpu.retire(trap, mxcsr=mxcsr)


FLOAT: dict[str, Callable[[X86, Trap], Exit | None]] = {
    "x87": _do_x87,
    "sse": _do_sse,
    "ldmxcsr": _do_ldmxcsr,
    "fxrstor": _do_fxrstor,
}
"""By the kind of trap."""
