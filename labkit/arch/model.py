"""The shape of an architecture beside its page tables: registers, the ucall exit, exceptions, the tables it boots with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from labkit.arch.desc import PagingMode

__all__ = ["Arch", "BootTables", "UcallExit"]


@dataclass(frozen=True)
class UcallExit:
    """How a ucall leaves the guest: the exit to look for, and the register that holds the struct's hva."""

    kind: str  # "pio"
    number: int  # the port
    register: str


@dataclass(frozen=True)
class BootTables:
    """Where the machine's own tables lie, for the reset registers."""

    root_gpa: int
    gdt: int
    idt: int
    tss: int
    user: bool = False  # begin in the least privileged ring


@dataclass(frozen=True)
class Arch:
    """One architecture as data; every room above reads it and none asks for its name."""

    name: str
    mode: PagingMode
    pc: str
    sp: str
    flags: str
    shown: tuple[str, ...]  # registers that a person wants to see, in order
    arguments: tuple[str, ...]  # integer arguments of a C function
    ucall: UcallExit
    flag_names: Mapping[str, int]  # name -> bit of the flags register
    vectors: Mapping[int, str]  # exception number -> its name in the manual
    nr_vectors: int
    stack_bias: int  # bytes below a 16-aligned top, as if a CALL had pushed a return address
    level: Callable[[Mapping[str, int]], str]  # registers -> "ring 0, long mode"
    reset: Callable[[BootTables], dict[str, int]]  # registers before the first instruction
    tables: Callable[[int, int], bytes]  # the descriptor page, given its own gva; with a stack for exceptions, one for user guests
    idt: Callable[[Sequence[int]], bytes]  # the exception table for these handlers
    tss_offset: int  # of the task state inside the descriptor page
