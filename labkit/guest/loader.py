"""Puts a program into an address space, and tells it what the selftests' host library tells its guests."""

from __future__ import annotations

from labkit.arch.x86_cpu import CpuModel
from labkit.bits import align_up
from labkit.errors import InvalidState
from labkit.guest.elf import Segment
from labkit.guest.program import Program
from labkit.machine.memory import PAGE
from labkit.machine.space import AddressSpace
from labkit.machine.vm import STACK_PAGES, Machine

__all__ = ["DEFAULT_MEMORY", "kernel_globals", "load_program", "memory_for", "program_string"]

DEFAULT_MEMORY, _SPARE = (
    8 << 20,
    2 << 20,
)  # bytes; to spare: page tables, and what guests and tests allocate
STRING_LIMIT = 4096  # the text of an assertion is its condition with all macros expanded


def load_program(program: Program, space: AddressSpace) -> None:
    """Allocate, map and fill every segment (kvm_vm_elf_load); a page shared by two segments gets the rights of both."""
    rights: dict[int, tuple[bool, bool]] = {}  # page number -> (writable, executable)
    for segment in program.segments:
        for page in range(segment.gva // PAGE, -(-(segment.gva + segment.memsz) // PAGE)):
            writable, executable = rights.get(page, (False, False))
            rights[page] = (writable or segment.writable, executable or segment.executable)
    pages = sorted(rights)
    start = 0
    for i in range(1, len(pages) + 1):
        if (
            i == len(pages)
            or pages[i] != pages[i - 1] + 1
            or rights[pages[i]] != rights[pages[start]]
        ):
            _map_run(space, pages[start], i - start, *rights[pages[start]])
            start = i
    for segment in program.segments:
        _fill(space, segment)


def _map_run(
    space: AddressSpace, page: int, nr_pages: int, writable: bool, executable: bool
) -> None:
    if page == 0:
        raise InvalidState(
            "the program wants guest page 0, which stays unmapped so that null pointers fault"
        )
    gpa = space.alloc_pages(nr_pages, "code" if executable else "data")
    space.map(page * PAGE, gpa, nr_pages, writable=writable, nx=not executable)


def _fill(space: AddressSpace, segment: Segment) -> None:
    if segment.data:
        space.write(segment.gva, segment.data)


def kernel_globals(program: Program, machine: Machine, cpu: CpuModel) -> None:
    """Exception stubs and the globals that kvm_util's host half writes into every guest, as far as the program has them."""
    space, symbols, arch = machine.space, program.symbols, machine.arch
    if arch.stubs in symbols:
        gva = symbols[arch.stubs].gva
        if arch.idt is None:
            machine.vectors_gva = gva
        elif machine.idt_gva:
            raw = space.read(gva, 8 * arch.nr_vectors)
            machine.install_handlers(
                [int.from_bytes(raw[i : i + 8], program.byteorder) for i in range(0, len(raw), 8)]
            )
    machine.preset = {
        register: symbols[name].gva for register, name in arch.globals.items() if name in symbols
    }
    vendor = b"".join(part.to_bytes(4, "little") for part in (cpu.leaf(0, 0)[i] for i in (1, 3, 2)))
    values = {
        "exception_handlers": machine.handlers_gva,
        "host_cpu_is_intel": vendor == b"GenuineIntel",
        "host_cpu_is_amd": vendor == b"AuthenticAMD",
        "guest_tsc_khz": cpu.tsc_khz,
        "is_forced_emulation_enabled": 0,
    }
    for name, value in values.items():
        symbol = symbols.get(name)
        if symbol is not None and symbol.kind == "object" and symbol.size in (1, 2, 4, 8):
            space.write(symbol.gva, int(value).to_bytes(symbol.size, program.byteorder))


def program_string(program: Program | None, gva: int) -> str | None:
    """A string constant of the program, from its file and not from the guest's memory; None when there is none."""
    segment = program.segment_at(gva) if program is not None else None
    if segment is None:
        return None
    raw = segment.data[gva - segment.gva : gva - segment.gva + STRING_LIMIT]
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace") if b"\0" in raw else None


def memory_for(program: Program, nr_vcpus: int, pool: int) -> int:
    """Bytes for slot 0 when nobody said: 8 MiB, or what program, stacks and a ucall pool of so many bytes need and some to spare."""
    stacks = (
        nr_vcpus * 2 * (STACK_PAGES + 1) * PAGE
    )  # each vCPU's own and, for guests at CPL3, one for exceptions
    wanted = sum(align_up(s.memsz, PAGE) + PAGE for s in program.segments) + stacks + pool + _SPARE
    return max(DEFAULT_MEMORY, align_up(wanted, 1 << 21))
