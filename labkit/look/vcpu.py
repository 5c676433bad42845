"""Makes the snapshots that people look at from a live VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import LabError
from labkit.look.eyes import BLOCK
from labkit.look.snapshots import (
    Insn,
    MemoryMap,
    MemoryRange,
    RegisterRow,
    Selection,
    StackRow,
    Touch,
    VcpuSnapshot,
)
from labkit.look.touch import Operands, operands
from labkit.machine.registers import flags_text
from labkit.session.listing import Listing, read_code
from labkit.ucall.abi import BITMAP_BYTES, OFFSET_ARGS, OFFSET_BUFFER, OFFSET_HVA, UCALL_SIZE

if TYPE_CHECKING:
    from labkit.session.vcpu import Vcpu

__all__ = ["label_gva", "look_at_memory", "look_at_vcpu", "next_slot", "select", "status_of"]

BEFORE, AFTER, STACK_ROWS, SOURCE_ROWS = 4, 9, 6, 12


def label_gva(vm: Any, gva: int) -> str:
    """What lies at a gva, as briefly as possible: a symbol, a pool field, a stack, or what the page was allocated for."""
    walk = vm.machine.space.walk(gva)
    if walk.gpa is None:
        return ""
    pool = vm._pool
    if pool is not None and 0 <= walk.gpa - pool.gpa < BITMAP_BYTES + 512 * UCALL_SIZE:
        return _pool_field(walk.gpa - pool.gpa)
    stack = vm.machine.stack_of(gva)
    if stack is not None:
        return f"stack of vCPU {stack}"
    if vm.program is not None and (found := vm.program.symbol_at(gva)) is not None:
        return str(found[0].name) + (f"+{found[1]:#x}" if found[1] else "")
    return next(
        (
            use.kind
            for use in vm.machine.space.uses
            if use.gpa <= walk.gpa < use.gpa + 4096 * use.nr_pages
        ),
        "",
    )


def _pool_field(offset: int) -> str:
    if offset < BITMAP_BYTES:
        return f"in_use[{offset // 8}]"
    index, inside = divmod(offset - BITMAP_BYTES, UCALL_SIZE)
    if inside < OFFSET_ARGS:
        name = "cmd"
    elif inside < OFFSET_BUFFER:
        name = f"args[{(inside - OFFSET_ARGS) // 8}]"
    else:
        name = "buffer" if inside < OFFSET_HVA else "hva"
    return f"ucalls[{index}]" + (f".{name}" if inside else "")


def _string_at(vcpu: Vcpu, gva: int) -> str:
    """A short printable string at gva, in quotes; "" when there is none."""
    raw = read_code(vcpu.peek, gva, 24).split(b"\0", 1)[0]
    if len(raw) < 3 or not all(32 <= b < 127 or b in (9, 10) for b in raw):
        return ""
    return repr(raw.decode("ascii")) if len(raw) < 24 else repr(raw.decode("ascii")[:20]) + "..."


def _note(vm: Any, vcpu: Vcpu, name: str, value: int) -> tuple[str, int | None]:
    arch = vm.arch
    if name == arch.flags:
        return flags_text(arch, value), None
    if name == arch.pc:
        return vm.program.describe(value) if vm.program else "", None
    if value < 0x1000:
        return "", None
    label = label_gva(vm, value)
    if not label:
        return "", None
    text = _string_at(vcpu, value) if name not in (arch.root, arch.sp) else ""
    return text or label, value


def look_at_vcpu(vm: Any, vcpu: Vcpu) -> VcpuSnapshot:
    """One vCPU: registers with what they mean, code, source, stack, and what the next instruction does."""
    if vcpu.sealed:
        return VcpuSnapshot(
            vcpu.index,
            vcpu.step_count,
            vcpu.state,
            "",
            0,
            "",
            "",
            None,
            None,
            (),
            frozenset(),
            (),
            (),
            (),
            (),
            "",
            vcpu.sealed,
        )
    regs = vcpu.regs.all()
    before, vcpu.seen = vcpu.seen, dict(regs)
    pc = regs[vm.arch.pc]
    ops = operands(vm.arch.name, read_code(vcpu.peek, pc, 15), regs, pc, vcpu.peek)
    listing = Listing.around(vm.arch.name, vm.program, vcpu.peek, pc, BEFORE, AFTER)
    rows = []
    for name in vm.arch.shown:
        note, points = _note(vm, vcpu, name, regs[name])
        changed = before is not None and name != vm.arch.pc and before.get(name) != regs[name]
        rows.append(RegisterRow(name, regs[name], note, changed, points))
    line = vcpu.source_line()
    lines = {
        at.line
        for gva in vcpu.breakpoints
        if vm.program and (at := vm.program.line_at(gva)) and line and at.file == line.file
    }
    return VcpuSnapshot(
        vcpu.index,
        vcpu.step_count,
        vcpu.state,
        vm.arch.level(regs),
        pc,
        vm.program.describe(pc) if vm.program else hex(pc),
        listing.symbol,
        line.file if line else None,
        line.line if line else None,
        _source(vm, line),
        frozenset(lines),
        _insns(vm, vcpu, listing, ops),
        tuple(rows),
        _stack(vm, vcpu, regs[vm.arch.sp]),
        _touches(vm, ops),
        _outlook(vm, ops),
    )


def _source(vm: Any, line: Any) -> tuple[tuple[int, str], ...]:
    text = vm.program.source(line.file) if line is not None else None
    if not text:
        return ()
    first = max(1, min(line.line - SOURCE_ROWS // 3, len(text) - SOURCE_ROWS + 1))
    return tuple(
        (n, text[n - 1]) for n in range(first, min(len(text), first + SOURCE_ROWS - 1) + 1)
    )


def _insns(vm: Any, vcpu: Vcpu, listing: Listing, ops: Operands) -> tuple[Insn, ...]:
    out = []
    for insn in listing.insns:
        data = read_code(vcpu.peek, insn.gva, insn.size)
        comment = _comment(vm, vcpu, ops if insn.gva == listing.pc else None, insn, data)
        out.append(
            Insn(
                insn.gva,
                insn.gva - listing.start,
                data,
                insn.mnemonic,
                insn.op_str,
                comment,
                insn.gva == listing.pc,
                insn.gva in vcpu.breakpoints,
            )
        )
    return tuple(out)


def _comment(vm: Any, vcpu: Vcpu, now: Operands | None, insn: Any, data: bytes) -> str:
    """For every instruction its symbols; for the one about to run its outcome."""
    if now is not None and now.taken is not None:
        return "taken" if now.taken else "not taken"
    if now is not None and now.bit is not None:
        gva, bit, is_set = now.bit
        return f"bit {bit} of {label_gva(vm, gva) or hex(gva)} is {int(is_set)}"
    target = (
        insn.op_str if insn.mnemonic in ("call", "jmp") and insn.op_str.startswith("0x") else ""
    )
    if target and vm.program is not None:
        return str(vm.program.describe(int(target, 16)))
    if "[rip" in insn.op_str:
        static = operands(vm.arch.name, data, {**_ZEROS, "rip": insn.gva}, insn.gva, vcpu.peek)
        return label_gva(vm, static.accesses[0].gva) if static.accesses else ""
    if now is not None and now.accesses:
        return label_gva(vm, now.accesses[0].gva)
    return ""


_ZEROS = {"rflags": 0, "rsp": 0}


def _stack(vm: Any, vcpu: Vcpu, sp: int) -> tuple[StackRow, ...]:
    data = read_code(vcpu.peek, sp, 8 * STACK_ROWS)
    rows = []
    for at in range(0, len(data) - 7, 8):
        value = int.from_bytes(data[at : at + 8], vm.arch.mode.byteorder)
        symbol = vm.program.symbol_at(value) if vm.program else None
        code = symbol is not None and symbol[0].kind == "func"
        line = vm.program.line_at(value) if code else None
        note = (
            f"ret to {vm.program.describe(value)}" + (f"  {line.file}:{line.line}" if line else "")
            if code
            else ""
        )
        rows.append(
            StackRow(sp + at, value, note or (label_gva(vm, value) if value >= 0x1000 else ""))
        )
    return tuple(rows)


def _touches(vm: Any, ops: Operands) -> tuple[Touch, ...]:
    out = []
    for access in ops.accesses:
        gpa = vm.machine.space.walk(access.gva).gpa
        note = label_gva(vm, access.gva) if gpa is not None else "not mapped"
        for kind, does in (("reads", access.reads), ("writes", access.writes)):
            if does:
                out.append(
                    Touch(
                        kind,
                        access.gva,
                        gpa,
                        access.size,
                        access.before or 0,
                        access.after if kind == "writes" else None,
                        note,
                    )
                )
    return tuple(out)


def next_slot(vm: Any, ops: Operands) -> int | None:
    """The pool slot that the next instruction will take, if it is a test-and-set of a clear bit of in_use."""
    if vm._pool is None or ops.bit is None or ops.bit[2]:
        return None
    word = ops.bit[0] - vm._pool.gva
    return (
        word * 8 + ops.bit[1]
        if 0 <= word < BITMAP_BYTES and any(a.writes and a.after != a.before for a in ops.accesses)
        else None
    )


def _outlook(vm: Any, ops: Operands) -> str:
    slot = next_slot(vm, ops)
    if slot is not None:
        return f"Bit {slot} of in_use is clear: slot {slot} will be its own."
    if (
        ops.bit is not None
        and vm._pool is not None
        and 0 <= ops.bit[0] - vm._pool.gva < BITMAP_BYTES
        and ops.bit[2]
    ):
        return f"Bit {(ops.bit[0] - vm._pool.gva) * 8 + ops.bit[1]} of in_use is set."
    if ops.taken is not None and ops.target is not None:
        return f"The jump {'will be' if ops.taken else 'will not be'} taken."
    hole = next((a for a in ops.accesses if a.before is None), None)
    return f"gva {hole.gva:#x} is not mapped: it will fault." if hole else ""


def look_at_memory(vm: Any) -> MemoryMap:
    """Guest-physical memory by use."""
    space = vm.machine.space
    merged: list[MemoryRange] = []
    for use in space.uses:
        last = merged[-1] if merged else None
        kind = (
            None if last is None else (last.kind, last.protected, last.gpa + 4096 * last.nr_pages)
        )
        if last is not None and kind == (use.kind, space.is_protected(use.gpa), use.gpa):
            merged[-1] = MemoryRange(
                last.gpa, last.nr_pages + use.nr_pages, use.kind, last.protected
            )
        else:
            merged.append(MemoryRange(use.gpa, use.nr_pages, use.kind, space.is_protected(use.gpa)))
    return MemoryMap(
        tuple((slot.gpa, slot.size) for slot in vm.memory.slots), tuple(merged), vm.step
    )


def status_of(cpu: VcpuSnapshot) -> str:
    """What a vCPU is about to do, in one or two sentences."""
    if cpu.sealed:
        return f"vCPU {cpu.index} is {cpu.state}; its registers are sealed: {cpu.sealed}."
    insn = next((i for i in cpu.disassembly if i.current), None)
    if cpu.state in ("done", "aborted", "unhandled", "halted", "shutdown", "stuck"):
        return f"vCPU {cpu.index} is {cpu.state} at {cpu.where}."
    if insn is None:
        return f"vCPU {cpu.index}: no instruction at {cpu.pc:#x}."
    line = f", line {cpu.line}" if cpu.line else ""
    what = f"{insn.mnemonic} {insn.op_str}".strip()
    return f"vCPU {cpu.index} is about to run {what} at {cpu.where}{line}. {cpu.outlook}".strip()


def select(vm: Any, kind: str, value: int) -> Selection | None:
    """The selection rail for a slot, an address or a page: the path from what was chosen to host memory."""
    slot = value if kind == "slot" else None
    if kind == "slot":
        if vm._pool is None or not 0 <= value < 512:
            return None
        gva, size = vm._pool.gva + BITMAP_BYTES + UCALL_SIZE * value, UCALL_SIZE
        held = next(
            (
                s
                for s in vm._pool.snapshot(vm.step, frozenset()).held
                if s.index == value and s.state != "free"
            ),
            None,
        )
        label = (
            "free"
            if held is None
            else f"{'owner unknown' if held.vcpu is None else f'vCPU {held.vcpu}'}, {held.cmd}"
        )
    elif kind in ("gva", "register", "byte", "entry"):
        gva, size, label = value, 1, label_gva(vm, value)
    elif kind in ("page", "block"):
        size = 4096 if kind == "page" else BLOCK
        gva = next(iter(vm.page_table().maps(value & -size)), None)
        label = "" if gva is None else label_gva(vm, gva)
    else:
        return None
    walk = vm.machine.space.walk(gva) if gva is not None else None
    gpa = walk.gpa if walk is not None else value & -size
    try:
        hva = vm.memory.hva(gpa) if gpa is not None else None
    except LabError:
        hva = None
    return Selection(
        kind, label, gva, gpa, hva, size, tuple(map(str, walk.steps)) if walk else (), slot
    )
