"""The shape of an architecture beside its page tables.

Registers, the ucall exit, exceptions, the tables that it boots with. README.md beside this file
says how a fifth one is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from labkit.arch.desc import Field, PagingMode
from labkit.errors import InvalidState

__all__ = ["Arch", "BootTables", "Condition", "Reading", "UcallExit"]

# Whether a branch will be taken, given mnemonic, operands and a function that reads a register;
# None when the instruction does not ask.
Condition = Callable[[str, Sequence[str], Callable[[str], int]], bool | None]


@dataclass(frozen=True)
class UcallExit:
    """How a ucall leaves the guest: the exit to look for, and where it has the struct's hva.

    kind is the exit's `end`: "pio", "mmio", "sbi", "diag". number is its port, extension or
    function code; for MMIO a gpa, which each VM has of its own. The hva is in `register`, or, when
    that is "", in the exit's own data.
    """

    kind: str
    number: int
    register: str = ""
    symbol: str = ""  # of the guest's pointer to the page of an MMIO exit


@dataclass(frozen=True)
class BootTables:
    """Where the machine's own tables lie, for the reset registers.

    gvas, where nothing else is said.
    """

    root_gpa: int
    gdt: int
    idt: int
    tss: int
    user: bool = False  # begin in the least privileged ring
    root: int = 0  # what the root register holds
    vectors: int = 0  # the guest's exception vectors
    area: int = 0  # gpa of the vCPU's own memory


@dataclass(frozen=True)
class Reading:
    """How the text of an instruction says what it is about to do.

    x86-64 has none: it has a decoder that says more. `address` matches a memory operand, with
    groups disp, base, index and shift as far as there are; `loads` and `stores` give bytes by
    mnemonic.
    """

    address: str
    loads: Mapping[str, int]
    stores: Mapping[str, int]
    condition: Condition

    # Where a mnemonic takes registers of several widths: bytes by the first letter of a register.
    # `loads` and `stores` then give the bytes of 8-byte ones, of a pair 16.
    widths: Mapping[str, int] = field(default_factory=dict)


def _no_image(tables: BootTables) -> Mapping[int, bytes]:
    """Memory of a vCPU's own that begins empty, or that there is none of."""
    return {}


@dataclass(frozen=True)
class Arch:
    """One architecture as data; every room above reads it and none asks for its name.

    Registers are named as the engines and the manual name them. README.md beside this file goes
    through the fields for who adds an architecture.
    """

    name: str
    modes: tuple[PagingMode, ...]  # page-table formats; the first is the default

    # Registers: the program counter, the stack pointer, the flags, those that a person wants to see
    # (in order), and the integer arguments of a C function.
    pc: str
    sp: str
    flags: str
    shown: tuple[str, ...]
    arguments: tuple[str, ...]

    # The register that says where the root table is, and in which of its bits.
    root: str
    root_field: Field

    ucall: UcallExit
    flag_names: Mapping[str, int]  # name -> bit of the flags register

    # Exceptions: their names in the manual by number, and those that come with a fault address.
    vectors: Mapping[int, str]
    page_faults: frozenset[int]

    # The symbol of the guest's exception entries: a table of addresses when there is an `idt`, else
    # code; and the guest handlers that `exception_handlers` has room for.
    stubs: str
    nr_vectors: int

    stack_bias: int  # bytes below a 16-aligned top, as if a CALL had pushed a return address
    level: Callable[[Mapping[str, int]], str]  # registers -> "ring 0, long mode"
    reset: Callable[[BootTables], dict[str, int]]  # registers before the first instruction

    # The descriptor page, given its own gva and the top of a stack for ring 0 (0: no user guests).
    tables: Callable[[int, int], bytes] | None = None
    tss_offset: int = 0  # of the task state in it

    idt: Callable[[Sequence[int]], bytes] | None = None  # the exception table for these handlers
    reading: Reading | None = None
    cpu_id: str = ""  # the register in which the selftests' guests look for the vCPU's index

    # Register -> symbol whose address it holds.
    globals: Mapping[str, str] = field(default_factory=dict)

    # Bytes of physical memory that each vCPU needs for itself (0: none), which is its alignment
    # too; and what it begins with, by offset.
    area: int = 0
    area_image: Callable[[BootTables], Mapping[int, bytes]] = _no_image

    @property
    def mode(self) -> PagingMode:
        """The page-table format that guests begin with."""
        return self.modes[0]

    def with_paging(self, name: str) -> Arch:
        """The same architecture with another of its page-table formats.

        Raises InvalidState, with the names of those there are.
        """
        for mode in self.modes:
            if mode.name == name:
                others = (other for other in self.modes if other is not mode)
                return replace(self, modes=(mode, *others))
        known = ", ".join(mode.name for mode in self.modes)
        raise InvalidState(f"{self.name} has no paging mode {name!r}, only {known}", name=name)
