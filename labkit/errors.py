"""The whole exception tree on one page.

Everything that labkit raises is a LabError, and its facts are attributes.
"""

from __future__ import annotations

from labkit.outside import printable

__all__ = [
    "BudgetExceeded",
    "Busy",
    "CompileError",
    "ElfError",
    "GuestAssertFailed",
    "GuestCrashed",
    "InvalidState",
    "KvmError",
    "LabError",
    "MemoryFault",
    "NotAvailable",
    "OutOfMemory",
    "PageFault",
    "PspError",
    "Stopped",
    "SymbolNotFound",
]


class LabError(Exception):
    """Root of every error labkit raises on purpose; keyword facts become attributes.

    Messages quote guests and files, so what a terminal would obey is spelled out in them.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(printable(message))
        self.facts = facts

    def __getattr__(self, name: str) -> object:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None


class NotAvailable(LabError):
    """Something that this machine or this build lacks; the message says what, and what to do."""


class InvalidState(LabError):
    """An argument or a call that the VM's present state does not allow."""


class Busy(InvalidState):
    """Another thread runs the VM; the message says who, and since when (facts: running)."""


class Stopped(LabError):
    """Somebody ended the run with vm.stop(), or with its button (facts: ucalls)."""


class CompileError(LabError):
    """The C compiler refused the guest, in the compiler's own words (facts: command, output)."""


class ElfError(LabError):
    """An ELF file that cannot be a guest (facts: path, what, found)."""


class SymbolNotFound(LabError):
    """The program has no such symbol (facts: name, near)."""


class MemoryFault(LabError):
    """A guest-physical access outside every memslot (facts: gpa, size)."""


class PageFault(LabError):
    """A guest-virtual access that the page tables do not allow (facts: gva, walk)."""


class OutOfMemory(LabError):
    """No free guest-physical pages are left (facts: nr_pages, free)."""


class GuestAssertFailed(LabError):
    """The guest reported ABORT (facts: vcpu, ucall, file, line, expr)."""


class GuestCrashed(LabError):
    """The guest ended without DONE: shutdown, halt, hole, refused insn (facts: vcpu, exit)."""


class BudgetExceeded(LabError):
    """The instruction budget ran out before the guest was done (facts: vcpu, insns)."""


class PspError(LabError):
    """The secure processor refused a command (facts: status, found, command if one was given)."""


class KvmError(LabError):
    """KVM refused an ioctl on an encrypted VM.

    Facts: errno, command, and status where the firmware was asked.
    """
