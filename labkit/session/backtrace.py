"""Who called whom: the frames of a vCPU from the program counter out to its entry function."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.arch.dwarf import CFA_ABOVE_SP, DWARF_REGISTERS, RESTORED_BY
from labkit.errors import LabError
from labkit.guest.frames import FrameRule
from labkit.machine.memory import PAGE
from labkit.machine.vm import STACK_PAGES

if TYPE_CHECKING:
    from labkit.session.vcpu import Vcpu

__all__ = ["Backtrace", "Frame", "backtrace"]

MAX_FRAMES = 128  # a stack that was written over may go round in a circle
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Frame:
    """One function that has not returned yet."""

    pc: int  # where it goes on: for all but the innermost, behind its call
    where: str  # "ucall_alloc+0x2c"
    file: str | None
    line: int | None  # of the call, for all but the innermost
    cfa: int | None  # gva of the end of its frame; None where nobody knows

    def __str__(self) -> str:
        line = "" if self.file is None else f" at {self.file}:{self.line}"
        return f"{self.pc:#x} in {self.where}{line}"


@dataclass(frozen=True)
class Backtrace:
    """The frames, the innermost first, and why they end there ("" at the entry function)."""

    frames: tuple[Frame, ...]
    why: str = ""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        return self.frames[index]

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)

    def __repr__(self) -> str:
        rows = [f"#{number} {frame}" for number, frame in enumerate(self.frames)]
        if self.why:
            rows.append(f"(ends here: {self.why})")
        return "\n".join(rows)


def backtrace(vcpu: Vcpu) -> Backtrace:
    """The frames of a vCPU, by the program's call frame information.

    The stack is the guest's: a word of it that leads nowhere ends the trace with the reason.
    """
    vm = vcpu.vm
    names = DWARF_REGISTERS[vm.arch.name]
    regs = vcpu.regs.all()
    known = {number: regs[name] for number, name in names.items() if name in regs}
    stack_pointer = next(number for number, name in names.items() if name == vm.arch.sp)
    pc = vcpu.pc
    frames: list[Frame] = []
    is_restored = _is_restored(vcpu)
    while len(frames) < MAX_FRAMES:
        look_up = pc - 1 if frames else pc  # of a caller the call, not what lies behind it
        rule = vm.program.frame_rule(look_up) if vm.program is not None else None
        cfa = None if rule is None else _cfa(rule, known)
        frames.append(_frame(vcpu, pc, look_up, cfa))
        if rule is None or cfa is None:
            return Backtrace(tuple(frames), f"no call frame information at {pc:#x}")

        if is_restored:
            is_restored = False
        elif _begins_here(vcpu, cfa):
            return Backtrace(tuple(frames))
        else:
            caller = _caller(rule, cfa, known, _reader(vcpu))
            if caller is None:
                return Backtrace(tuple(frames), f"the stack around {cfa:#x} is not mapped")
            if stack_pointer not in rule.saved:
                caller[stack_pointer] = cfa - CFA_ABOVE_SP.get(vm.arch.name, 0)
            known = caller
        pc = known.get(rule.returns, 0)
        if pc == 0:
            return Backtrace(tuple(frames))
    return Backtrace(tuple(frames), f"more than {MAX_FRAMES} frames")


def _frame(vcpu: Vcpu, pc: int, look_up: int, cfa: int | None) -> Frame:
    program = vcpu.vm.program
    if program is None:
        return Frame(pc, f"{pc:#x}", None, None, cfa)
    line = program.line_at(look_up)
    where = program.describe(pc)
    if line is None:
        return Frame(pc, where, None, None, cfa)
    return Frame(pc, where, line.file, line.line, cfa)


def _cfa(rule: FrameRule, known: dict[int, int]) -> int | None:
    base = known.get(rule.cfa_register)
    return None if base is None else base + rule.cfa_offset & MASK64


def _begins_here(vcpu: Vcpu, cfa: int) -> bool:
    """Whether a frame ends where the vCPU's stack does: then nobody called its function."""
    stacks = vcpu.vm.machine.stacks
    return vcpu.index < len(stacks) and cfa == stacks[vcpu.index] + STACK_PAGES * PAGE


def _is_restored(vcpu: Vcpu) -> bool:
    """Whether the function in front has given all registers back already, untold."""
    pattern = RESTORED_BY.get(vcpu.vm.arch.name)
    if pattern is None:
        return False
    before = [insn for insn in vcpu.disassemble().insns if insn.gva < vcpu.pc]
    return bool(before) and re.match(pattern, before[-1].text) is not None


def _reader(vcpu: Vcpu) -> Callable[[int], int | None]:
    """Reads a word of the stack as the guest sees it; None where nothing is mapped."""
    order = vcpu.vm.arch.mode.byteorder

    def read(gva: int) -> int | None:
        try:
            return int.from_bytes(vcpu.peek(gva & MASK64, 8), order)
        except LabError:
            return None

    return read


def _caller(
    rule: FrameRule, cfa: int, known: dict[int, int], read: Callable[[int], int | None]
) -> dict[int, int] | None:
    """The registers as the caller has them; None where the stack cannot be read."""
    caller = dict(known)
    for number, offset in rule.saved.items():
        value = read(cfa + offset)
        if value is None:
            return None
        caller[number] = value
    return caller
