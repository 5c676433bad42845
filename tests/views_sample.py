"""An invented run to draw: 4 vCPUs, a pool with leaks, real page tables in a small memory.

Every view test starts from it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labkit.arch.x86 import X86_PXXV48_4K
from labkit.look.snapshots import (
    EventMark,
    Insn,
    MemoryMap,
    MemoryRange,
    RegisterRow,
    Selection,
    StackRow,
    Touch,
    VcpuSnapshot,
    VmSnapshot,
)
from labkit.paging.build import PageTableBuilder
from labkit.paging.entries import U64
from labkit.paging.scan import PageTable, scan
from labkit.ucall.snapshot import PoolSnapshot, Slot, SlotState

POOL_GVA, POOL_GPA = 0x9040602000, 0x40000
OFFSET, SIZE = 64, 1096  # of slot 0 in the pool, and of a slot
HVA = 0x7F3A5C000000  # of gpa 0
STEP, EARLIER = 1277, 1180
SOURCE = """static struct ucall *ucall_alloc(void)
{
    for (u64 i = 0; i < UCALL_SLOTS; i++) {
        if (test_and_set_bit(i, ucall_pool->in_use)) // try & take
            continue;
        struct ucall *uc = &ucall_pool->ucalls[i];
        memset(uc->args, 0, sizeof(uc->args));
        return uc;
    }
    ucall_exit(UCALL_FAILED);
    return NULL;
}""".splitlines()
CODE = [
    ("40125c", "1c", "mov", "rdx, [rip + 0x3f5d]", "ucall_pool"),
    ("401263", "23", "test", "rdx, rdx", ""),
    ("401266", "26", "je", "0x4012b8", "to line 40"),
    ("401268", "28", "xor", "eax, eax", ""),
    ("40126a", "2a", "nop", "", ""),
    ("40126c", "2c", "lock bts", "[rdx], rax", "bit 1 of in_use is 0"),
    ("401271", "31", "jb", "0x4012ae", "not taken: CF will be 0"),
    ("401273", "33", "imul", "rcx, rax, 0x448", "sizeof ucall"),
    ("40127a", "3a", "lea", "rbx, [rdx + rcx + 0x40]", "&ucalls[i]"),
    ("40127f", "3f", "lea", "rdi, [rbx + 8]", "uc->args"),
    ("401283", "43", "xor", "esi, esi", ""),
    ("401285", "45", "mov", "edx, 0x38", ""),
]
REGS = [
    ("rip", 0x40126C, "ucall_alloc+0x2c"),
    ("rax", 1, "was 0; the bit to try"),
    ("rbx", 0, ""),
    ("rcx", 1, "nr_args"),
    ("rdx", POOL_GVA, "ucall_pool, shared"),
    ("rsi", 0x408E10, '"hello"'),
    ("rdi", 1, "UCALL_SYNC"),
    ("rbp", 0, ""),
    ("rsp", 0x41FEE8, "stack of vCPU 1"),
    ("r8", 0x80, ""),
    ("r9", 0, ""),
    ("r10", 0, ""),
    ("r11", 0x246, ""),
    ("r12", 0, ""),
    ("r13", 0, ""),
    ("r14", 0, ""),
    ("r15", 0, ""),
    ("rflags", 0x202, "IF; CF cleared"),
    ("cr3", 0x180000, "PML4"),
]
STACK = [
    (0x41FEE8, 0x401341, "ret to ucall+0x41"),
    (0x41FEF0, 1, "saved rbx"),
    (0x41FEF8, 0x40D018, "uc"),
    (0x41FF00, 0x401018, "ret to guest_code+0x88"),
    (0x41FF08, 1, "vcpu index"),
    (0x41FF10, 0, ""),
]
# fmt: off
EVENTS = [  # step, vCPU, what
    (62, 0, "S"), (128, 1, "S"), (190, 2, "P"), (252, 3, "P"), (330, 0, "P"), (402, 1, "S"),
    (468, 2, "S"), (530, 3, "P"), (606, 0, "S"), (668, 1, "P"), (742, 2, "S"), (804, 3, "P"),
    (872, 0, "S"), (930, 1, "S"), (1010, 3, "D"), (1104, 2, "P"), (1206, 0, "P"),
]
# fmt: on
CMDS = {"S": "SYNC", "P": "PRINTF", "D": "DONE"}


def pool(
    nr_slots: int = 512, text: str = "vCPU 2: 128 pages touched\n", **changes: object
) -> PoolSnapshot:
    """Slots 0 and 2 held, 3 to 5 leaked by vCPU 3, 6 its DONE; 0 and 1 changed."""
    held = [
        _slot(0, "held", 0, 1182, "SYNC", (7,)),
        _slot(2, "held", 2, 1080, "PRINTF", (), text),
        *(_slot(i, "leaked", 3, 228 + i * 90, "PRINTF", (), "hello\n") for i in (3, 4, 5)),
        _slot(6, "done", 3, 986, "DONE", ()),
    ]
    in_use = np.zeros(nr_slots, bool)
    owner = np.full(nr_slots, -1, np.int16)
    since = np.full(nr_slots, -1, np.int64)
    done = np.zeros(nr_slots, bool)
    leaked = np.zeros(nr_slots, bool)
    for slot in held:
        in_use[slot.index] = True
        owner[slot.index] = slot.vcpu
        since[slot.index] = slot.since
        done[slot.index] = slot.state == "done"
        leaked[slot.index] = slot.state == "leaked"

    changed = np.zeros(nr_slots, bool)
    changed[:2] = True
    uses = np.zeros(nr_slots, np.int32)
    uses[:7] = (6, 5, 4, 1, 1, 1, 1)
    made = PoolSnapshot(
        step=STEP,
        nr_slots=nr_slots,
        gva=POOL_GVA,
        gpa=POOL_GPA,
        slot_size=SIZE,
        slots_offset=OFFSET,
        nr_pages=-(-(OFFSET + nr_slots * SIZE) // 4096),
        in_use=in_use,
        owner=owner,
        held_since=since,
        done=done,
        leaked=leaked,
        changed=changed,
        changed_since=EARLIER,
        uses=uses,
        held=(*held, _slot(1, "free", None, None, "NONE", ())),
        next_slot=1,
    )
    return replace(made, **changes)


def earlier() -> PoolSnapshot:
    """The same pool at step 1180: slot 1 was held, slot 0 was not."""
    in_use = pool().in_use.copy()
    in_use[:2] = False, True
    return pool(step=EARLIER, in_use=in_use)


def _slot(
    i: int,
    state: SlotState,
    vcpu: int | None,
    since: int | None,
    cmd: str,
    args: tuple[int, ...],
    text: str | None = None,
) -> Slot:
    at = OFFSET + i * SIZE
    return Slot(
        index=i,
        state=state,
        vcpu=vcpu,
        since=since,
        cmd=cmd,
        args=(args + (0,) * 7)[:7],
        text=text,
        gva=POOL_GVA + at,
        gpa=POOL_GPA + at,
        hva=HVA + POOL_GPA + at,
        hva_ok=True,
    )


def page_table(c_bit: int | None = None, late: bool = False, inverted: bool = False) -> PageTable:
    """Code, data, stacks, pool and test memory as a selftest has them.

    late adds two pages, drops one and changes two.
    """
    memory = bytearray(0x200000)
    tables = iter(range(0x180000, 0x190000, 0x1000))
    mode = X86_PXXV48_4K if c_bit is None else X86_PXXV48_4K.with_c_bit(c_bit, inverted)

    def read(gpa: int, n: int) -> bytes:
        return bytes(memory[gpa : gpa + n])

    def write(gpa: int, data: bytes) -> None:
        memory[gpa : gpa + len(data)] = data

    build = PageTableBuilder(read, write, lambda _size: next(tables), mode)
    secret = {} if c_bit is None else {"c": True}
    shared = {} if c_bit is None else {"c": False}
    build.map(0x400000, 0x10000, 8, writable=False, **secret)
    build.map(0x408000, 0x18000, 6, nx=True, **secret)
    build.map(0x41C000, 0x20000, 20, nx=True, **secret)
    build.map(POOL_GVA, POOL_GPA, 138, nx=True, **shared)
    build.map(0x9040696000, 0x100000, 4, nx=True, **shared)
    build.map(0x90406A0000, 0xD0000, 48, nx=True, **secret)
    if late:
        build.map(0x90406D0000, 0x104000, 2, nx=True, **shared)
        build.unmap(0x9040697000)
        build.protect(0x90406A4000, writable=False, **shared)
    return scan(read, mode, build.root_gpa, step=STEP if late else EARLIER, names=_Names())


class _Names:
    """What lies where in the sample."""

    SPANS = (
        (0x400000, 0x408000, "code"),
        (0x408000, 0x40E000, "data, bss"),
        (0x41C000, 0x430000, "stacks of 4 vCPUs"),
        (POOL_GVA, POOL_GVA + 138 * 4096, "ucall pool"),
        (0x9040696000, 0x904069A000, "mailbox"),
        (0x90406A0000, 0x90406D0000, "test_mem"),
    )

    def label(self, gva: int) -> str:
        return next((name for low, high, name in self.SPANS if low <= gva < high), "")

    def labels(self, gvas: U64, gpas: U64) -> list[str]:
        return [self.label(gva) for gva in gvas.tolist()]


def memory(protected: bool = False) -> MemoryMap:
    """2 MiB in one memslot."""
    parts = (
        (0x10, 8, "code"),
        (0x18, 6, "data"),
        (0x20, 20, "stacks"),
        (0x40, 138, "ucall pool"),
        (0xD0, 48, "test_mem"),
        (0x100, 4, "mailbox"),
        (0x180, 8, "page tables"),
    )
    ranges = []
    for gfn, nr_pages, kind in parts:
        secret = protected and kind not in ("ucall pool", "mailbox")
        ranges.append(MemoryRange(gfn * 4096, nr_pages, kind, secret))
    return MemoryMap(((0, 0x200000),), tuple(ranges), STEP)


def vcpu(index: int = 1, state: str = "running", late: bool = True) -> VcpuSnapshot:
    """At the locked instruction of ucall_alloc; one step earlier rax and rflags were different."""
    insns = [
        Insn(int(gva, 16), int(offset, 16), b"", mnemonic, ops, comment, gva == "40126c", False)
        for gva, offset, mnemonic, ops, comment in CODE
    ]
    then = {} if late else {"rax": 0, "rflags": 0x203, "rip": 0x40126A}
    rows = []
    for name, value, note in REGS:
        is_pointer = value > 0x1000 and name != "cr3"
        changed = name in ("rax", "rflags")
        points_to = value if is_pointer else None
        rows.append(RegisterRow(name, then.get(name, value), note, changed, points_to))
    touches = (
        Touch("reads", POOL_GVA, POOL_GPA, 8, 0x7D, None, "in_use[0]"),
        Touch("writes", POOL_GVA, POOL_GPA, 8, 0x7D, 0x7F, "in_use[0]"),
    )
    return VcpuSnapshot(
        index=index,
        step=STEP if late else STEP - 1,
        state=state,
        mode="ring 0, long mode",
        pc=0x40126C,
        where="ucall_alloc+0x2c",
        symbol="ucall_alloc",
        file="ucall.c",
        line=34,
        source=tuple(enumerate(SOURCE, 31)),
        breakpoint_lines=frozenset({38}),
        disassembly=tuple(insns),
        registers=tuple(rows),
        stack=tuple(StackRow(*row) for row in STACK),
        touches=touches,
        outlook="Bit 1 of in_use is clear: slot 1 will be its own.",
    )


def fresh_vcpu() -> VcpuSnapshot:
    """The same vCPU as it is looked at first: nothing is marked as changed."""
    seen = vcpu()
    return replace(seen, registers=tuple(replace(row, changed=False) for row in seen.registers))


def sealed_vcpu(why: str = "SEV-ES keeps them in the VMSA") -> VcpuSnapshot:
    """The same vCPU with registers that the host cannot see."""
    return replace(vcpu(), registers=(), stack=(), touches=(), sealed=why)


def selection() -> Selection:
    """Slot 2."""
    at = OFFSET + 2 * SIZE
    return Selection(
        kind="slot",
        label="vCPU 2, PRINTF",
        gva=POOL_GVA + at,
        gpa=POOL_GPA + at,
        hva=HVA + POOL_GPA + at,
        size=SIZE,
        path=("PML4[0x1]", "PDPT[0x41]", "PD[0x3]", "PT[0x2]"),
        slot=2,
    )


def vm(c_bit: int | None = None, late: bool = True, **changes: object) -> VmSnapshot:
    """The whole VM at step 1277, or at step 1180."""
    made = VmSnapshot(
        name="alloc4",
        arch="x86_64",
        engine="unicorn",
        protection="no encryption" if c_bit is None else f"SEV, C-bit {c_bit}, running",
        state="running",
        schedule="round robin",
        step=STEP if late else EARLIER,
        vcpu=1,
        vcpus=tuple(vcpu(i, "done" if i == 3 else "running", late) for i in range(4)),
        pool=pool() if late else earlier(),
        page_table=page_table(c_bit, late),
        memory=memory(c_bit is not None),
        selection=selection(),
        events=tuple(EventMark(step, cpu, kind, CMDS[kind]) for step, cpu, kind in EVENTS),
        status=(
            "vCPU 1 is about to run lock bts [rdx], rax at ucall_alloc+0x2c, line 34. "
            "Bit 1 of in_use is clear: slot 1 will be its own."
        ),
    )
    shown = replace(made, **changes)
    in_front = [one for one in shown.vcpus if one.index == shown.vcpu] or list(shown.vcpus)
    return replace(shown, front=in_front[0] if in_front else None)
