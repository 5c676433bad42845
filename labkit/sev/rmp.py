"""SNP's reverse map: who owns each page of DRAM, and what the hardware says to an access that does not fit.

Source: APM vol. 2 (24593) 15.36, RMPUPDATE and PVALIDATE in vol. 3; error-code bits in 15.36.10. Where the model
simplifies: all pages are 4 KiB (no PSMASH), and there is one privilege level (VMPL0), because labkit's guests run at that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from labkit.bits import bit
from labkit.sev.cipher import PAGE
from labkit.sev.vmsa import VMSA_GPA

__all__ = [
    "PAGE_NOT_VALIDATED",
    "NestedTable",
    "Rmp",
    "RmpEntry",
    "RmpFault",
    "RmpStatus",
    "guest_access",
    "host_access",
]

PAGE_NOT_VALIDATED = 0x404  # #VC error code
_PRESENT, _WRITE, _RMP, _FINAL, _ENCRYPTED = bit(0), bit(1), bit(31), bit(32), bit(34)


@dataclass(frozen=True)
class RmpEntry:
    """One page's entry; a page without one is shared, the hypervisor's own."""

    assigned: bool = False
    asid: int = 0
    gpa: int = 0
    validated: bool = False
    immutable: bool = False
    vmsa: bool = False

    @property
    def state(self) -> str:
        """The page's state by the name that SNP ABI (56860) gives it."""
        if not self.assigned:
            return "HYPERVISOR"
        if not self.asid:
            return "FIRMWARE"
        return (
            ("PRE_SWAP" if self.validated else "PRE_GUEST")
            if self.immutable
            else ("GUEST_VALID" if self.validated else "GUEST_INVALID")
        )


@dataclass(frozen=True)
class RmpFault:
    """What the CPU raises: "#NPF" (exit to the host), "#VC" (in the guest) or "#PF" (in the host), with its error code."""

    kind: str
    error_code: int
    why: str


class RmpStatus(IntEnum):
    """What RMPUPDATE and PVALIDATE leave in EAX."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_SIZEMISMATCH = 6


def host_access(entry: RmpEntry, is_write: bool) -> RmpFault | None:
    """What a host's access to the page meets: reads pass (and see ciphertext), writes only to its own pages."""
    if is_write and entry.assigned:
        return RmpFault(
            "#PF",
            _PRESENT | _WRITE | _RMP,
            f"host write to a page in state {entry.state} of ASID {entry.asid}",
        )
    return None


def guest_access(
    entry: RmpEntry, asid: int, gpa: int, private: bool, is_write: bool
) -> RmpFault | None:
    """What an access of an SNP guest meets, after its own and the nested tables said yes; `private` is C=1, fetch or page walk."""
    code = _PRESENT | _FINAL | _RMP | _WRITE * is_write | _ENCRYPTED * private
    gpa &= -PAGE
    if not private:
        return (
            RmpFault("#NPF", code, f"shared write to a page in state {entry.state}")
            if is_write and entry.assigned
            else None
        )
    if not entry.assigned or entry.asid != asid or entry.immutable:
        return RmpFault(
            "#NPF",
            code,
            f"private access of ASID {asid} to a page in state {entry.state} of ASID {entry.asid}",
        )
    if entry.gpa != gpa:
        return RmpFault(
            "#NPF",
            code,
            f"the page belongs at gpa {entry.gpa:#x}, the nested table has it at {gpa:#x}",
        )
    if entry.vmsa and is_write:
        return RmpFault("#NPF", code, "guest write to a VMSA")
    if not entry.validated:
        return RmpFault(
            "#VC", PAGE_NOT_VALIDATED, f"gpa {gpa:#x} was never validated, or was taken away since"
        )
    return None


class Rmp:
    """The table: entries by system physical page, changed by the host's RMPUPDATE and the guest's PVALIDATE."""

    def __init__(self) -> None:
        self.entries: dict[int, RmpEntry] = {}
        self.on_change: Callable[[int], None] | None = (
            None  # told of each page whose entry is another one now
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Rmp:
        """For snapshots: whoever is told of changes is not part of the table."""
        twin = memo[id(self)] = Rmp()
        twin.entries = dict(self.entries)
        return twin

    def entry(self, spa: int) -> RmpEntry:
        """The entry of the page that holds spa."""
        return self.entries.get(spa & -PAGE, RmpEntry())

    def update(self, spa: int, new: RmpEntry | None = None) -> RmpStatus:
        """RMPUPDATE: give the page away, or (None) take it back; what was validated no longer is."""
        new = new or RmpEntry()
        if (
            spa % PAGE
            or new.gpa % PAGE
            or new.validated
            or new.vmsa
            or (not new.assigned and (new.asid or new.gpa or new.immutable))
        ):
            return RmpStatus.FAIL_INPUT
        if self.entry(spa).immutable:
            return RmpStatus.FAIL_PERMISSION
        self.set(spa, new)
        return RmpStatus.SUCCESS

    def set(self, spa: int, entry: RmpEntry) -> None:
        """Write an entry as the firmware does, without checks."""
        self.entries[spa & -PAGE] = entry
        if entry == RmpEntry():
            del self.entries[spa & -PAGE]
        if self.on_change is not None:
            self.on_change(spa & -PAGE)

    def pvalidate(
        self, spa: int, asid: int, gpa: int, validate: bool, size: int = PAGE
    ) -> tuple[RmpStatus, bool] | RmpFault:
        """PVALIDATE of a guest whose gpa the nested table has at spa: (EAX, CF = nothing changed), or the fault it meets instead."""
        if gpa % PAGE:
            return RmpStatus.FAIL_INPUT, False
        fault = guest_access(replace(self.entry(spa), validated=True), asid, gpa, True, False)
        if fault:
            return fault
        if size != PAGE:
            return RmpStatus.FAIL_SIZEMISMATCH, False
        old = self.entry(spa)
        self.set(spa, replace(old, validated=validate))
        return RmpStatus.SUCCESS, old.validated == validate

    def page_state_change(self, spa: int, asid: int, gpa: int, op: int) -> int:
        """A hypervisor's answer to a page-state request (1 private, 2 shared): 0, or the error for GHCBData[63:32]."""
        entry = self.entry(spa)
        if (
            op not in (1, 2)
            or gpa >= VMSA_GPA
            or (entry.assigned and (entry.asid, entry.gpa) != (asid, gpa))
        ):
            return 1
        if op == 1 and entry.assigned:
            return 0  # private already: leaving it alone keeps what the guest validated
        return int(self.update(spa, RmpEntry(True, asid, gpa) if op == 1 else None))


class NestedTable:
    """Which page of DRAM stands behind a gpa: its own, but for pairs that a host has exchanged."""

    def __init__(self, pages: Mapping[int, int] | None = None) -> None:
        self.pages = dict(pages or {})

    def __copy__(self) -> NestedTable:
        return NestedTable(self.pages)

    def spa(self, gpa: int) -> int:
        """Where a gpa is in DRAM."""
        return self.pages.get(gpa & -PAGE, gpa & -PAGE) + gpa % PAGE

    def gpa(self, spa: int) -> int:
        """The gpa that a page of DRAM stands behind."""
        return next((gpa for gpa, page in self.pages.items() if page == spa), spa)

    def exchange(self, gpa: int, other: int) -> None:
        """Exchange the pages behind two gpas."""
        pages = {gpa & -PAGE: self.spa(other & -PAGE), other & -PAGE: self.spa(gpa & -PAGE)}
        self.pages |= pages
