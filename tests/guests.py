"""Small machines for the engine's tests: assembly text on a VM without program.

In ring 0 or 3, with handlers that halt.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from elftools.elf.elffile import ELFFile

import labkit as lk
from labkit.guest.compilers import find_compiler

CODE = 0x1000_0000
DATA = 0x2000_0000
HANDLERS = 0x3000_0000
STACKS = 0x4000_0000
TABLES = 0x5000_0000
PAGES = 4  # of code, of data, and of each of the three stacks
KERNEL_CS, KERNEL_SS = 0x08, 0x10
USER_CS, USER_SS = 0x33, 0x2B  # Linux's own
# 0x28 data, 0x30 code, 0x38 not present
MORE_SEGMENTS = (0x00CFF3000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF & ~(1 << 47))
# of the guest's own stack, of ring 0's, and of IST 1's
STACK_TOP, RING0_TOP, IST_TOP = (STACKS + 0x10000 * i + PAGES * 4096 for i in range(3))


@cache
def asm(text: str) -> bytes:
    """Machine code of Intel-syntax assembly; `;` or a newline ends a statement."""
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "code.s", Path(work) / "code.o"
        source.write_text(f".intel_syntax noprefix\n{text}\n")
        compiler = find_compiler()
        target = ("-target", "x86_64-freestanding") if compiler.family == "zig" else ()
        done = subprocess.run(
            [*compiler.command, *target, "-c", source, "-o", output], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return ELFFile(io.BytesIO(output.read_bytes())).get_section_by_name(".text").data()


def asm_all(*texts: str) -> list[bytes]:
    """Several snippets in one run of the assembler."""
    mark = bytes.fromhex("0f1f8478564312")
    return asm(f"\n.byte {','.join(map(hex, mark))}\n".join(texts)).split(mark)


def bare(
    code: str | bytes,
    *,
    user: bool = False,
    nr_vcpus: int = 1,
    handler: str | bytes = b"\xf4",
    **kw: object,
) -> lk.Vm:
    """A VM at CODE; `user` starts in ring 3.

    Exception v enters `handler`, of at most 16 bytes, at HANDLERS + 16 * v.
    """
    vm = lk.Vm.create_barebones(**kw)
    vm.machine.boot()
    space = vm.machine.space
    for gva, nr_pages, rights in (
        (CODE, PAGES, True),
        (DATA, PAGES, True),
        (HANDLERS, 1, False),
        (STACKS, PAGES, True),
        (STACKS + 0x10000, PAGES, False),
        (STACKS + 0x20000, PAGES, False),
    ):
        space.map(gva, space.alloc_pages(nr_pages, "test"), nr_pages, user=rights)
    space.write(CODE, asm(code) if isinstance(code, str) else code)
    space.write(
        HANDLERS, (asm(handler) if isinstance(handler, str) else handler).ljust(16, b"\xcc") * 256
    )
    vm.machine.install_handlers([HANDLERS + 16 * vector for vector in range(256)])
    for index, segment in enumerate(MORE_SEGMENTS):
        space.write(vm.machine.tables_gva + 0x28 + 8 * index, segment.to_bytes(8, "little"))
    tss = vm.machine.tables_gva + vm.arch.tss_offset
    space.write(tss + 4, RING0_TOP.to_bytes(8, "little"))
    space.write(tss + 0x24, IST_TOP.to_bytes(8, "little"))
    for _ in range(nr_vcpus):
        start(vm.add_vcpu(CODE), user)
    return vm


def start(vcpu: lk.Vcpu, user: bool = False) -> None:
    """Registers that both rings share: flags, stack, data pointers; then the ring."""
    vcpu.cpu.set_regs(
        {
            "rsp": STACK_TOP - 256,
            "rsi": DATA,
            "rdi": DATA + 0x100,
            "rflags": 0x202,
            "gdt_limit": 0x3F,
        }
    )
    if user:
        vcpu.cpu.set_regs({"cs": USER_CS, "ss": USER_SS})


def set_gate(
    vm: lk.Vm,
    vector: int,
    gva: int | None = None,
    *,
    kind: int = 0x8E,
    ist: int = 0,
    selector: int = KERNEL_CS,
) -> None:
    """Rewrite one IDT entry.

    `kind` is the access byte (0xEE: callable from ring 3; 0x8F: a trap gate; 0x0E: not present).
    """
    gva = HANDLERS + 16 * vector if gva is None else gva
    gate = (
        (gva & 0xFFFF, 2),
        (selector, 2),
        (ist, 1),
        (kind, 1),
        (gva >> 16 & 0xFFFF, 2),
        (gva >> 32, 8),
    )
    vm.write(
        vm.machine.idt_gva + 16 * vector,
        b"".join(value.to_bytes(size, "little") for value, size in gate),
    )


def frame(vcpu: lk.Vcpu, error: bool = False) -> dict[str, int]:
    """What an exception pushed: rip, cs, rflags, rsp, ss, and the error code when there is one."""
    names = ["rip", "cs", "rflags", "rsp", "ss"]
    if error:
        names.insert(0, "error")
    raw = vcpu.read(vcpu.regs.rsp, 8 * len(names))
    return {name: int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i, name in enumerate(names)}


def lacks(vm: lk.Vm, name: str) -> str:
    """Why a VM's engine declares that it cannot do this, "" when it can."""
    for capability in vm.capabilities:
        if capability.name == name and not capability.have:
            return capability.why
    return ""


def go(vcpu: lk.Vcpu, most: int = 100) -> object:
    """Run to the next exit, counted where the engine can count in the ring that the vCPU is in."""
    in_ring_3 = vcpu.regs.cs & 3
    if in_ring_3 and lacks(vcpu.vm, "step_user"):
        return vcpu.run()
    return vcpu.run(most)
