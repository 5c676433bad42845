"""What a guest said to its host: one ucall as a value, or why a value handed over is no ucall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from struct import Struct
from typing import Literal, NamedTuple

from labkit.engines.exits import Exit
from labkit.outside import plain
from labkit.ucall import abi
from labkit.ucall.abi import CMD_NAMES, CMDS_WITH_TEXT, UcallCmd, cmd_name, decode_text

__all__ = ["BadUcallExit", "Byteorder", "Fields", "Strings", "Ucall", "given"]

Byteorder = Literal["little", "big"]

MAX_CONSTANT = 4096  # characters of an expression with all its macros expanded

# The gva of a string constant -> its text, taken from the program and not from the guest
Strings = Callable[[int], str | None]

# A NamedTuple's own constructor is a Python function, which costs more than the tuple
_new_tuple = tuple.__new__


def given(args: tuple[int, ...]) -> tuple[int, ...]:
    """The arguments without the zeros at their end, which nobody gave."""
    nr_args = len(args)
    while nr_args and not args[nr_args - 1]:
        nr_args -= 1
    return args[:nr_args]


class Ucall(NamedTuple):
    """One call of a guest to its host, copied out of its slot.

    cmd is SYNC, PRINTF, ABORT, DONE, NONE, UNHANDLED, or "0x17?" for a number that is no command;
    args are seven u64; step is the VM's clock at the exit. slot is None where there is no pool.
    """

    cmd: str
    args: tuple[int, ...]

    # Of a PRINTF, an ABORT, an UNHANDLED
    text: str | None

    vcpu: int
    slot: int | None
    step: int = 0

    # Of an ABORT
    file: str | None = None
    line: int | None = None
    expr: str | None = None

    @property
    def kind(self) -> str:
        """What it is among events."""
        return "ucall"

    @property
    def given_args(self) -> tuple[int, ...]:
        """See `given`."""
        return given(self.args)

    @property
    def what(self) -> str:
        """One line for a person, for a table that has a column for the vCPU."""
        said = "" if self.text is None else f" {self.text!r}"
        where = f" at {self.file}:{self.line}: {self.expr}" if self.file else ""
        args = ", ".join(map(hex, self.given_args))
        return f"{self.cmd}{said}{where} args [{args}] slot {self.slot}"

    def __repr__(self) -> str:
        return f"<Ucall vCPU {self.vcpu} {self.what}>"


@dataclass(frozen=True)
class BadUcallExit(Exit):
    """A ucall exit with a value that is no slot in use: nothing was read through it.

    kind is "exhausted", "stale", "unaligned", "foreign", "no pool" or "unreadable".
    """

    value: int
    kind: str
    why: str
    vcpu: int
    end = "bad-ucall"

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}: {self.kind} ucall: {self.why}"


class Fields:
    """How one struct ucall is read, in a guest's byte order; nothing in it is followed."""

    def __init__(self, byteorder: Byteorder = "little") -> None:
        order = ">" if byteorder == "big" else "<"
        self._unpack = Struct(f"{order}{1 + abi.UCALL_MAX_ARGS}Q").unpack_from

    def ucall(
        self,
        data: bytes | bytearray | mmap,
        at: int,
        vcpu: int,
        slot: int | None,
        step: int,
        strings: Strings,
    ) -> Ucall:
        """The ucall at the offset `at` of data; strings finds the texts that an ABORT points to."""
        fields = self._unpack(data, at)
        cmd = fields[0]
        args = fields[1:]
        name = CMD_NAMES.get(cmd) or cmd_name(cmd)
        if cmd not in CMDS_WITH_TEXT:
            return _new_tuple(Ucall, (name, args, None, vcpu, slot, step, None, None, None))

        start = at + abi.OFFSET_BUFFER
        text = decode_text(data[start : start + abi.UCALL_BUFFER_LEN])
        if cmd != UcallCmd.ABORT:
            return Ucall(name, args, text, vcpu, slot, step)

        file = _one_line(strings(args[abi.GUEST_FILE]))
        line = args[abi.GUEST_LINE]
        expr = _one_line(strings(args[abi.GUEST_ERROR_STRING]))
        return Ucall(name, args, text, vcpu, slot, step, file, line, expr)


def _one_line(text: str | None) -> str | None:
    """A name or an expression out of a program's file, fit for a sentence."""
    return None if text is None else plain(text, MAX_CONSTANT)
