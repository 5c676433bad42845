"""The old way: struct ucall lies on the vCPU's stack, and the host translates its address through the guest's page tables.

As in the KVM selftests before the pool (get_ucall() with addr_gva2hva()). It works as long as the host can read guest page tables
and guest memory; the tables and the stack of an encrypted guest are ciphertext to it. A program for it is compiled with
LABKIT_UCALL_ON_STACK defined.
"""

from __future__ import annotations

from struct import Struct

from labkit.errors import InvalidState, MemoryFault, PageFault
from labkit.machine.space import AddressSpace
from labkit.paging.walk import Walk, walk
from labkit.ucall.abi import (
    GUEST_ERROR_STRING,
    GUEST_FILE,
    GUEST_LINE,
    OFFSET_BUFFER,
    UCALL_MAX_ARGS,
    UCALL_SIZE,
    UcallCmd,
    cmd_name,
    decode_text,
    has_text,
)
from labkit.ucall.pool import BadUcallExit, Strings, Ucall

__all__ = ["MARK", "StackUcalls"]

MARK = "ucall_is_on_stack"  # the symbol that such a program has
_FIELDS = {order: Struct(f"{mark}{1 + UCALL_MAX_ARGS}Q") for order, mark in (("little", "<"), ("big", ">"))}


class StackUcalls:
    """The host's side for one VM. There is no slot, so nobody can be told whose struct it was, nor when it was taken."""

    def __init__(self, space: AddressSpace) -> None:
        self.space = space

    def twin(self, space: AddressSpace) -> StackUcalls:
        """The same for a forked VM."""
        return StackUcalls(space)

    def begins(self, vcpu: int) -> None:
        """A vCPU begins anew: there is nothing to keep."""

    def saw(self, vcpu: int, locked: int, step: int) -> None:
        """A vCPU came back without a ucall: there is nothing to look at."""

    def take(self, value: int, vcpu: int, step: int, locked: int, strings: Strings) -> Ucall | BadUcallExit:
        """The ucall at a gva that a guest handed over, or why the host cannot read it. A bad gva is reported, whatever it is."""
        try:
            raw = self.space.read(value, UCALL_SIZE)
        except (InvalidState, PageFault, MemoryFault) as err:
            return BadUcallExit(value, "unreadable", f"struct ucall lies on the guest's stack: {err}. {self._seen(value)}", vcpu)
        fields = _FIELDS[self.space.mode.byteorder].unpack_from(raw)
        cmd, args = fields[0], fields[1:]
        text = decode_text(raw[OFFSET_BUFFER:]) if has_text(cmd) else None
        if cmd != UcallCmd.ABORT:
            return Ucall(cmd_name(cmd), args, text, vcpu, None, step)
        return Ucall(cmd_name(cmd), args, text, vcpu, None, step, strings(args[GUEST_FILE]), args[GUEST_LINE],
                     strings(args[GUEST_ERROR_STRING]))

    def host_walk(self, gva: int) -> Walk:
        """The walk that a host would make: through DRAM as it is, ciphertext included."""
        return walk(self.space.memory.read, self.space.mode, self.space.root_gpa, gva)

    def _seen(self, gva: int) -> str:
        return f"Its walk through DRAM ends so: {self.host_walk(gva).status}" if self.space.sealed else ""
