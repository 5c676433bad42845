"""The shape of an architecture beside its page tables: registers, the ucall exit, exceptions, the tables it boots with.

README.md beside this file says how a fifth one is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from labkit.arch.desc import Field, PagingMode
from labkit.errors import InvalidState

__all__ = ["Arch", "BootTables", "Reading", "UcallExit"]


@dataclass(frozen=True)
class UcallExit:
    """How a ucall leaves the guest: the exit to look for, and where it has the struct's hva."""

    kind: str  # the exit's `end`: "pio", "mmio", "sbi", "diag"
    number: int  # port, extension, function code; for MMIO a gpa, which each VM has of its own
    register: str = ""  # with the hva; "": the exit's own data
    symbol: str = ""  # of the guest's pointer to the page of an MMIO exit


@dataclass(frozen=True)
class BootTables:
    """Where the machine's own tables lie, for the reset registers."""

    root_gpa: int
    gdt: int
    idt: int
    tss: int
    user: bool = False  # begin in the least privileged ring
    root: int = 0  # what the root register holds
    vectors: int = 0  # gva of the guest's exception vectors
    area: int = 0  # gpa of the vCPU's own memory


@dataclass(frozen=True)
class Reading:
    """How the text of an instruction says what it is about to do; x86-64 has a decoder that says more.

    `address` matches a memory operand, with groups disp, base, index and shift as far as there are; `loads` and `stores` give bytes
    by mnemonic, and `condition` whether a branch will be taken, given mnemonic, operands and a function that reads a register.
    """

    address: str
    loads: Mapping[str, int]
    stores: Mapping[str, int]
    condition: Callable[
        [str, Sequence[str], Callable[[str], int]], bool | None
    ]  # None: the instruction does not ask
    # Where a mnemonic takes registers of several widths: bytes by the first letter of a register.
    # `loads` and `stores` then give the bytes of 8-byte ones, of a pair 16.
    widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Arch:
    """One architecture as data; every room above reads it and none asks for its name."""

    name: str
    modes: tuple[PagingMode, ...]  # the first is the default
    pc: str
    sp: str
    flags: str
    shown: tuple[str, ...]  # registers that a person wants to see, in order
    arguments: tuple[str, ...]  # integer arguments of a C function
    root: str  # the register that says where the root table is
    root_field: Field  # and in which of its bits
    ucall: UcallExit
    flag_names: Mapping[str, int]  # name -> bit of the flags register
    vectors: Mapping[int, str]  # exception number -> its name in the manual
    page_faults: frozenset[int]  # those that come with a fault address
    stubs: str  # symbol of the guest's exception entries: a table of addresses when there is an `idt`, else code
    nr_vectors: int  # guest handlers that `exception_handlers` has room for
    stack_bias: int  # bytes below a 16-aligned top, as if a CALL had pushed a return address
    level: Callable[[Mapping[str, int]], str]  # registers -> "ring 0, long mode"
    reset: Callable[[BootTables], dict[str, int]]  # registers before the first instruction
    tables: Callable[[int, int], bytes] | None = (
        None  # the descriptor page, given its own gva; with a stack, for user guests
    )
    idt: Callable[[Sequence[int]], bytes] | None = None  # the exception table for these handlers
    reading: Reading | None = None
    tss_offset: int = 0  # of the task state inside the descriptor page
    cpu_id: str = ""  # register in which the selftests' guests look for the vCPU's index
    globals: Mapping[str, str] = field(
        default_factory=dict
    )  # register -> symbol whose address it holds
    area: int = 0  # bytes of physical memory that each vCPU needs for itself
    area_image: Callable[[BootTables], Mapping[int, bytes]] = field(
        default=lambda tables: {}
    )  # offset in it -> contents

    @property
    def mode(self) -> PagingMode:
        """The page-table format that guests begin with."""
        return self.modes[0]

    def with_paging(self, name: str) -> Arch:
        """The same architecture with another of its page-table formats; raises InvalidState, naming those there are."""
        found = next((mode for mode in self.modes if mode.name == name), None)
        if found is None:
            raise InvalidState(
                f"{self.name} has no paging mode {name!r}, only {', '.join(mode.name for mode in self.modes)}",
                name=name,
            )
        return replace(self, modes=(found, *(mode for mode in self.modes if mode is not found)))
