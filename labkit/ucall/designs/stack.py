"""The old way: struct ucall lies on the vCPU's stack, and the host translates its address.

It goes through the guest's page tables, as the KVM selftests did before the pool (get_ucall() with
addr_gva2hva()). That works as long as the host can read guest page tables and guest memory; the
tables and the stack of an encrypted guest are ciphertext to it. A program for it is compiled with
LABKIT_UCALL_ON_STACK defined.
"""

from __future__ import annotations

from labkit.errors import InvalidState, MemoryFault, PageFault
from labkit.machine.space import AddressSpace
from labkit.ucall.abi import UCALL_SIZE
from labkit.ucall.calls import BadUcallExit, Fields, Strings, Ucall

__all__ = ["MARK", "StackUcalls"]

# The symbol that such a program has
MARK = "ucall_is_on_stack"


class StackUcalls:
    """The host's side for one VM.

    There is no slot, so nobody can be told whose struct it was, nor when it was taken.
    """

    def __init__(self, space: AddressSpace) -> None:
        self.space = space
        self._fields = Fields(space.mode.byteorder)

    def twin(self, space: AddressSpace) -> StackUcalls:
        """The same for a forked VM."""
        return StackUcalls(space)

    def begins(self, vcpu: int) -> None:
        """A vCPU begins anew: there is nothing to keep."""

    def saw(self, vcpu: int, locked: int, step: int) -> None:
        """A vCPU came back without a ucall: there is nothing to look at."""

    def take(
        self, value: int, vcpu: int, step: int, locked: int, strings: Strings
    ) -> Ucall | BadUcallExit:
        """The ucall at a gva that a guest handed over, or why the host cannot read it.

        A bad gva is reported, whatever it is. `step` is the VM's clock; `locked` is not needed.
        """
        try:
            raw = self.space.read(value, UCALL_SIZE)
        except (InvalidState, PageFault, MemoryFault) as err:
            why = f"struct ucall lies on the guest's stack: {err}. {self._seen(value)}"
            return BadUcallExit(value, "unreadable", why, vcpu)
        return self._fields.ucall(raw, 0, vcpu, None, step, strings)

    def _seen(self, gva: int) -> str:
        """What a host finds that follows ciphertext all the same; "" where nothing is encrypted."""
        if not self.space.sealed:
            return ""
        return f"Its walk through DRAM ends so: {self.space.host_walk(gva).status}"
