"""Puts a program into an address space, and tells it what the selftests' host library tells it."""

from __future__ import annotations

from typing import NamedTuple

from labkit.arch.x86_cpu import CpuModel
from labkit.bits import align_up
from labkit.errors import InvalidState
from labkit.guest.elf import Segment
from labkit.guest.program import Program
from labkit.machine.memory import PAGE
from labkit.machine.space import AddressSpace
from labkit.machine.vm import STACK_PAGES, Machine

__all__ = ["DEFAULT_MEMORY", "kernel_globals", "load_program", "memory_for", "program_string"]

DEFAULT_MEMORY = 8 << 20  # bytes
_SPARE = 2 << 20  # bytes for page tables, and for what guests and tests allocate
STRING_LIMIT = 4096  # the text of an assertion is its condition with all macros expanded


class _Rights(NamedTuple):
    """What a program wants to do with a page."""

    writable: bool
    executable: bool


class _Run(NamedTuple):
    """Neighbouring pages with equal rights."""

    page: int  # the first one's number
    nr_pages: int
    rights: _Rights


def load_program(program: Program, space: AddressSpace) -> None:
    """Allocate, map and fill every segment (kvm_vm_elf_load).

    A page shared by two segments gets the rights of both. Raises InvalidState for a program that
    wants guest page 0 or an address that cannot exist, OutOfMemory.
    """
    for run in _runs(_rights_by_page(program)):
        _map_run(space, run)
    for segment in program.segments:
        if segment.data:
            space.write(segment.gva, segment.data)


def _rights_by_page(program: Program) -> dict[int, _Rights]:
    """The rights of every page that a segment touches, by page number."""
    rights: dict[int, _Rights] = {}
    for segment in program.segments:
        for page in _pages(segment):
            before = rights.get(page, _Rights(False, False))
            rights[page] = _Rights(
                before.writable or segment.writable,
                before.executable or segment.executable,
            )
    return rights


def _pages(segment: Segment) -> range:
    return range(segment.gva // PAGE, align_up(segment.end, PAGE) // PAGE)


def _runs(rights: dict[int, _Rights]) -> list[_Run]:
    """The pages in order, neighbours with equal rights together."""
    runs: list[_Run] = []
    for page, wanted in sorted(rights.items()):
        if runs and page == runs[-1].page + runs[-1].nr_pages and wanted == runs[-1].rights:
            runs[-1] = runs[-1]._replace(nr_pages=runs[-1].nr_pages + 1)
        else:
            runs.append(_Run(page, 1, wanted))
    return runs


def _map_run(space: AddressSpace, run: _Run) -> None:
    if run.page == 0:
        raise InvalidState(
            "the program wants guest page 0, which stays unmapped so that null pointers fault"
        )
    kind = "code" if run.rights.executable else "data"
    gpa = space.alloc_pages(run.nr_pages, kind)
    space.map(
        run.page * PAGE,
        gpa,
        run.nr_pages,
        writable=run.rights.writable,
        nx=not run.rights.executable,
    )


def kernel_globals(program: Program, machine: Machine, cpu: CpuModel) -> None:
    """Tell the guest what kvm_util's host half tells it, as far as the program has the names.

    The exception stubs go into the machine's table, some registers get a symbol's address, and the
    globals that every test has are written.
    """
    _install_stubs(program, machine)

    symbols = program.symbols
    machine.preset = {}
    for register, name in machine.arch.globals.items():
        if name in symbols:
            machine.preset[register] = symbols[name].gva

    values = {
        "exception_handlers": machine.handlers_gva,
        "host_cpu_is_intel": cpu.vendor == "GenuineIntel",
        "host_cpu_is_amd": cpu.vendor == "AuthenticAMD",
        "guest_tsc_khz": cpu.tsc_khz,
        "is_forced_emulation_enabled": 0,
    }
    for name, value in values.items():
        symbol = symbols.get(name)
        if symbol is not None and symbol.kind == "object" and symbol.size in (1, 2, 4, 8):
            data = int(value).to_bytes(symbol.size, program.byteorder)
            machine.space.write(symbol.gva, data)


def _install_stubs(program: Program, machine: Machine) -> None:
    """Let exceptions enter the guest where its library says: by a table of stubs, or by code."""
    arch = machine.arch
    stubs = program.symbols.get(arch.stubs)
    if stubs is None:
        return
    if arch.idt is None:
        machine.vectors_gva = stubs.gva
    elif machine.idt_gva:
        table = machine.space.read(stubs.gva, 8 * arch.nr_vectors)
        handlers = [
            int.from_bytes(table[at : at + 8], program.byteorder) for at in range(0, len(table), 8)
        ]
        machine.install_handlers(handlers)


def program_string(program: Program | None, gva: int) -> str | None:
    """A string constant of the program, from its file and not from the guest's memory.

    None when there is none, or none that ends within STRING_LIMIT bytes.
    """
    if program is None:
        return None
    segment = program.segment_at(gva)
    if segment is None:
        return None

    start = gva - segment.gva
    raw = segment.data[start : start + STRING_LIMIT]
    if b"\0" not in raw:
        return None
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def memory_for(program: Program, nr_vcpus: int, pool: int) -> int:
    """Bytes for slot 0 when nobody said: 8 MiB, or what the program needs and some to spare.

    That is the program, stacks for nr_vcpus, and a ucall pool of so many bytes.
    """
    segments = sum(align_up(segment.memsz, PAGE) + PAGE for segment in program.segments)
    # Each vCPU has a stack of its own and, for guests at CPL3, one for exceptions.
    stacks = nr_vcpus * 2 * (STACK_PAGES + 1) * PAGE
    wanted = segments + stacks + pool + _SPARE
    return max(DEFAULT_MEMORY, align_up(wanted, 1 << 21))
