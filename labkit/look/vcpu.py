"""One vCPU as a person looks at it: registers with what they mean, code, stack, what comes next."""

from __future__ import annotations

from labkit.engines.disasm import Decoded
from labkit.guest.lines import Line
from labkit.look.access import Operands
from labkit.look.snapshots import FrameRow, Insn, RegisterRow, StackRow, Touch, VcpuSnapshot
from labkit.look.touch import operands
from labkit.machine.registers import flags_text
from labkit.session.backtrace import Frame
from labkit.session.listing import Listing, read_code
from labkit.session.vcpu import Vcpu
from labkit.session.vm import Vm
from labkit.ucall.abi import BITMAP_BYTES

__all__ = ["look_at_vcpu", "status_of"]

INSNS_BEFORE, INSNS_AFTER = 4, 9  # rows of the disassembly around the program counter
STACK_ROWS = 6
SOURCE_ROWS = 12
STRING_BYTES = 24  # a string at a pointer is looked for in so many
MAX_INSN = 15
ENDED = ("done", "aborted", "unhandled", "halted", "shutdown", "stuck")


def look_at_vcpu(vm: Vm, vcpu: Vcpu, frame: int = 0) -> VcpuSnapshot:
    """One vCPU between two instructions; no register is marked as changed (`since` does that).

    frame: of the backtrace, the one whose source is shown (the last where there are fewer).
    Registers, stack and code of a vCPU that is sealed are not the host's to see.
    """
    if vcpu.sealed:
        return _sealed(vcpu)
    regs = vcpu.regs.all()
    pc = regs[vm.arch.pc]
    ops = operands(vm.arch.name, read_code(vcpu.peek, pc, MAX_INSN), regs, pc, vcpu.peek)
    listing = Listing.around(vm.arch.name, vm.program, vcpu.peek, pc, INSNS_BEFORE, INSNS_AFTER)
    trace = vcpu.backtrace()
    frame = max(0, min(frame, len(trace) - 1))
    line = vcpu.source_line() if frame == 0 else _line_of(trace[frame])
    return VcpuSnapshot(
        index=vcpu.index,
        step=vcpu.step_count,
        state=vcpu.state,
        mode=vm.arch.level(regs),
        pc=pc,
        where=vm.program.describe(pc) if vm.program is not None else hex(pc),
        symbol=listing.symbol,
        file=None if line is None else line.file,
        line=None if line is None else line.line,
        source=_source(vm, line),
        breakpoint_lines=_breakpoint_lines(vm, vcpu, line),
        disassembly=tuple(_insn(vm, vcpu, listing, insn, ops) for insn in listing.insns),
        registers=tuple(_register(vm, vcpu, name, regs[name]) for name in vm.arch.shown),
        stack=_stack(vm, vcpu, regs[vm.arch.sp]),
        touches=_touches(vcpu, ops),
        outlook=_outlook(vm, ops),
        next_slot=_next_slot(vm, ops),
        pc_name=vm.arch.pc,
        frames=tuple(FrameRow(one.where, one.file, one.line) for one in trace),
        frames_end=trace.why,
        frame=frame,
        why_no_source=_why_no_source(vm, line),
    )


def _line_of(frame: Frame) -> Line | None:
    """The line of the call in a frame."""
    if frame.file is None or frame.line is None:
        return None
    return Line(frame.file, frame.line, None)


def _sealed(vcpu: Vcpu) -> VcpuSnapshot:
    return VcpuSnapshot(
        index=vcpu.index,
        step=vcpu.step_count,
        state=vcpu.state,
        mode="",
        pc=0,
        where="",
        symbol="",
        file=None,
        line=None,
        source=(),
        breakpoint_lines=frozenset(),
        disassembly=(),
        registers=(),
        stack=(),
        touches=(),
        outlook="",
        sealed=vcpu.sealed,
    )


# --- registers and stack


def _register(vm: Vm, vcpu: Vcpu, name: str, value: int) -> RegisterRow:
    """One register with what its value means: flag names, a symbol, a string, what it points to."""
    if name == vm.arch.flags:
        return RegisterRow(name, value, flags_text(vm.arch, value))
    if name == vm.arch.pc:
        where = vm.program.describe(value) if vm.program is not None else ""
        return RegisterRow(name, value, where)

    label = _label(vm, value)
    if not label:
        return RegisterRow(name, value, "")
    text = ""
    if name not in (vm.arch.root, vm.arch.sp):
        text = _string_at(vcpu, value)
    return RegisterRow(name, value, text or label, points_to=value)


def _label(vm: Vm, value: int) -> str:
    """What a value points to, if it is a pointer; small numbers are taken for none."""
    if value < 0x1000:
        return ""
    return vm.names.label(value)


def _string_at(vcpu: Vcpu, gva: int) -> str:
    """A short printable string at gva, in quotes; "" when there is none."""
    raw = read_code(vcpu.peek, gva, STRING_BYTES).split(b"\0", 1)[0]
    if len(raw) < 3:
        return ""
    for byte in raw:
        if not 32 <= byte < 127 and byte not in b"\t\n":
            return ""
    text = raw.decode("ascii")
    if len(raw) == STRING_BYTES:
        return repr(text[:20]) + "..."
    return repr(text)


def _stack(vm: Vm, vcpu: Vcpu, sp: int) -> tuple[StackRow, ...]:
    """The words from the stack pointer up, as far as memory goes."""
    data = read_code(vcpu.peek, sp, 8 * STACK_ROWS)
    rows = []
    for offset in range(0, len(data) - 7, 8):
        value = int.from_bytes(data[offset : offset + 8], vm.arch.mode.byteorder)
        note = _return_to(vm, value) or _label(vm, value)
        rows.append(StackRow(sp + offset, value, note))
    return tuple(rows)


def _return_to(vm: Vm, value: int) -> str:
    """A word on the stack as a return address; "" where it does not point into a function."""
    if vm.program is None:
        return ""
    found = vm.program.symbol_at(value)
    if found is None or found[0].kind != "func":
        return ""
    note = f"ret to {vm.program.describe(value)}"
    line = vm.program.line_at(value)
    return note if line is None else f"{note}  {line.file}:{line.line}"


# --- source and code


def _source(vm: Vm, line: Line | None) -> tuple[tuple[int, str], ...]:
    """(number, text) of the lines around one, which comes a third from the top."""
    text = vm.program.source(line.file) if vm.program is not None and line is not None else None
    if not text or line is None:
        return ()
    last_start = len(text) - SOURCE_ROWS + 1
    first = max(1, min(line.line - SOURCE_ROWS // 3, last_start))
    last = min(len(text), first + SOURCE_ROWS - 1)
    return tuple((number, text[number - 1]) for number in range(first, last + 1))


def _why_no_source(vm: Vm, line: Line | None) -> str:
    if vm.program is None or line is None:
        return ""
    why = vm.program.why_no_source(line.file)
    return why or ("" if line.text is not None else "it has no such line")


def _breakpoint_lines(vm: Vm, vcpu: Vcpu, line: Line | None) -> frozenset[int]:
    """The lines of the file in front that hold a breakpoint."""
    lines = set()
    for gva in vcpu.breakpoints:
        at = vm.program.line_at(gva) if vm.program is not None else None
        if at is not None and line is not None and at.file == line.file:
            lines.add(at.line)
    return frozenset(lines)


def _insn(vm: Vm, vcpu: Vcpu, listing: Listing, insn: Decoded, ops: Operands) -> Insn:
    data = read_code(vcpu.peek, insn.gva, insn.size)
    current = insn.gva == listing.pc
    comment = _outcome(vm, ops) if current else ""
    if not comment:
        comment = _comment(vm, vcpu, insn, data)
    if not comment and current and ops.accesses:
        comment = vm.names.label(ops.accesses[0].gva)
    return Insn(
        gva=insn.gva,
        offset=insn.gva - listing.start,
        data=data,
        mnemonic=insn.mnemonic,
        op_str=insn.op_str,
        comment=comment,
        current=current,
        breakpoint=insn.gva in vcpu.breakpoints,
    )


def _outcome(vm: Vm, ops: Operands) -> str:
    """What the next instruction will decide: a jump that is taken, a bit that is tested."""
    if ops.taken is not None:
        return "taken" if ops.taken else "not taken"
    if ops.bit is not None:
        gva, bit, is_set = ops.bit
        return f"bit {bit} of {vm.names.label(gva) or hex(gva)} is {int(is_set)}"
    return ""


def _comment(vm: Vm, vcpu: Vcpu, insn: Decoded, data: bytes) -> str:
    """What the text of any instruction names: the target of a call, an address relative to rip."""
    is_branch = insn.mnemonic in ("call", "jmp") and insn.op_str.startswith("0x")
    if is_branch and vm.program is not None:
        return vm.program.describe(int(insn.op_str, 16))
    if "[rip" not in insn.op_str:
        return ""
    regs = {"rflags": 0, "rsp": 0, "rip": insn.gva}
    static = operands(vm.arch.name, data, regs, insn.gva, vcpu.peek)
    if not static.accesses:
        return ""
    return vm.names.label(static.accesses[0].gva)


# --- what the next instruction does


def _touches(vcpu: Vcpu, ops: Operands) -> tuple[Touch, ...]:
    vm, touches = vcpu.vm, []
    translation = vcpu.translation()
    for access in ops.accesses:
        gpa = vm.machine.space.walk(access.gva, translation).gpa
        note = "not mapped" if gpa is None else vm.names.label(access.gva)
        before = access.before or 0
        if access.reads:
            touches.append(Touch("reads", access.gva, gpa, access.size, before, None, note))
        if access.writes:
            after = access.after
            touches.append(Touch("writes", access.gva, gpa, access.size, before, after, note))
    return tuple(touches)


def _pool_bit(vm: Vm, ops: Operands) -> int | None:
    """The slot whose bit of in_use the next instruction tests; None when it tests no such bit."""
    if vm.host_pool is None or ops.bit is None:
        return None
    gva, bit, _ = ops.bit
    offset = gva - vm.host_pool.gva
    if not 0 <= offset < BITMAP_BYTES:
        return None
    return offset * 8 + bit


def _next_slot(vm: Vm, ops: Operands) -> int | None:
    """The slot that the next instruction will take: a test-and-set of a clear bit of in_use."""
    slot = _pool_bit(vm, ops)
    if slot is None or ops.bit is None or ops.bit.is_set:
        return None
    for access in ops.accesses:
        if access.writes and access.after != access.before:
            return slot
    return None


def _outlook(vm: Vm, ops: Operands) -> str:
    """What the next instruction will do, in one sentence, where there is something to foresee."""
    slot = _next_slot(vm, ops)
    if slot is not None:
        return f"Bit {slot} of in_use is clear: slot {slot} will be its own."
    tested = _pool_bit(vm, ops)
    if tested is not None and ops.bit is not None and ops.bit.is_set:
        return f"Bit {tested} of in_use is set."
    if ops.taken is not None and ops.target is not None:
        return f"The jump {'will be' if ops.taken else 'will not be'} taken."
    for access in ops.accesses:
        if access.before is None:
            return f"gva {access.gva:#x} is not mapped: it will fault."
    return ""


def status_of(vcpu: VcpuSnapshot) -> str:
    """What a vCPU is about to do, in one or two sentences."""
    if vcpu.sealed:
        return f"vCPU {vcpu.index} is {vcpu.state}; its registers are sealed: {vcpu.sealed}."
    if vcpu.state in ENDED:
        return f"vCPU {vcpu.index} is {vcpu.state} at {vcpu.where}."
    current = [insn for insn in vcpu.disassembly if insn.current]
    if not current:
        return f"vCPU {vcpu.index}: no instruction at {vcpu.pc:#x}."
    what = f"{current[0].mnemonic} {current[0].op_str}".strip()
    line_here = vcpu.line if vcpu.frame == 0 else vcpu.frames[0].line
    line = f", line {line_here}" if line_here else ""
    said = f"vCPU {vcpu.index} is about to run {what} at {vcpu.where}{line}."
    return f"{said} {vcpu.outlook}".strip()
