"""SNP's reverse map: who owns each page of DRAM, and what an access that does not fit meets.

Source: APM vol. 2 (24593) 15.36, RMPUPDATE and PVALIDATE in vol. 3; error-code bits in 15.36.10.
Where the model simplifies: all pages are 4 KiB (no PSMASH), and there is one privilege level
(VMPL0), because labkit's guests run at that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

from labkit.bits import bit
from labkit.machine.memory import PAGE
from labkit.sev.vmsa import VMSA_GPA

__all__ = [
    "PAGE_NOT_VALIDATED",
    "PRIVATE",
    "SHARED",
    "Rmp",
    "RmpEntry",
    "RmpFault",
    "RmpStatus",
    "guest_access",
    "host_access",
]

# Error code of a #VC
PAGE_NOT_VALIDATED = 0x404

# Bits of a page fault's error code
_PRESENT, _WRITE, _RMP, _FINAL, _ENCRYPTED = bit(0), bit(1), bit(31), bit(32), bit(34)

# What a page-state request can ask for
PRIVATE, SHARED = 1, 2


@dataclass(frozen=True)
class RmpEntry:
    """One page's entry; a page without one is shared, the hypervisor's own.

    gpa is where the guest with that ASID has the page; immutable pages are the firmware's to
    change.
    """

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
        if self.immutable:
            return "PRE_SWAP" if self.validated else "PRE_GUEST"
        return "GUEST_VALID" if self.validated else "GUEST_INVALID"


# One for all pages without an entry
_NO_ENTRY = RmpEntry()


@dataclass(frozen=True)
class RmpFault:
    """What the CPU raises, with its error code.

    kind is "#NPF" (exit to the host), "#VC" (in the guest) or "#PF" (in the host).
    """

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
    """What a host's access to the page meets, None: nothing.

    Reads pass (and see ciphertext), writes only to its own pages.
    """
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
    """What an access of an SNP guest meets, None: nothing.

    Its own and the nested tables said yes already. `private` is C=1, a fetch or a page walk.
    """
    code = _PRESENT | _FINAL | _RMP
    if is_write:
        code |= _WRITE
    if private:
        code |= _ENCRYPTED

    if private:
        return _private_access(entry, asid, gpa & -PAGE, is_write, code)
    if is_write and entry.assigned:
        return RmpFault("#NPF", code, f"shared write to a page in state {entry.state}")
    return None


def _private_access(
    entry: RmpEntry, asid: int, gpa: int, is_write: bool, code: int
) -> RmpFault | None:
    if not entry.assigned or entry.asid != asid or entry.immutable:
        why = f"private access of ASID {asid} to a page in state {entry.state} of ASID {entry.asid}"
        return RmpFault("#NPF", code, why)
    if entry.gpa != gpa:
        why = f"the page belongs at gpa {entry.gpa:#x}, the nested table has it at {gpa:#x}"
        return RmpFault("#NPF", code, why)
    if entry.vmsa and is_write:
        return RmpFault("#NPF", code, "guest write to a VMSA")
    if not entry.validated:
        why = f"gpa {gpa:#x} was never validated, or was taken away since"
        return RmpFault("#VC", PAGE_NOT_VALIDATED, why)
    return None


class Rmp:
    """The table: entries by system physical page.

    The host changes it with RMPUPDATE, the guest with PVALIDATE. `on_change` is told of each page
    whose entry is another one now.
    """

    def __init__(self) -> None:
        self.entries: dict[int, RmpEntry] = {}
        self.on_change: Callable[[int], None] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Rmp:
        """For snapshots: whoever is told of changes is not part of the table."""
        twin = Rmp()
        memo[id(self)] = twin
        twin.entries = dict(self.entries)
        return twin

    def entry(self, spa: int) -> RmpEntry:
        """The entry of the page that holds spa."""
        return self.entries.get(spa & -PAGE, _NO_ENTRY)

    def update(self, spa: int, new: RmpEntry | None = None) -> RmpStatus:
        """RMPUPDATE: give the page away, or (None) take it back.

        What was validated no longer is. An entry that only PVALIDATE or the firmware could make is
        FAIL_INPUT, a page that is the firmware's FAIL_PERMISSION.
        """
        if new is None:
            new = _NO_ENTRY
        is_aligned = not spa % PAGE and not new.gpa % PAGE
        has_facts_of_nobody = not new.assigned and (new.asid or new.gpa or new.immutable)
        if not is_aligned or new.validated or new.vmsa or has_facts_of_nobody:
            return RmpStatus.FAIL_INPUT
        if self.entry(spa).immutable:
            return RmpStatus.FAIL_PERMISSION
        self.set(spa, new)
        return RmpStatus.SUCCESS

    def set(self, spa: int, entry: RmpEntry) -> None:
        """Write an entry as the firmware does, without checks."""
        page = spa & -PAGE
        if entry == _NO_ENTRY:
            self.entries.pop(page, None)
        else:
            self.entries[page] = entry
        if self.on_change is not None:
            self.on_change(page)

    def pvalidate(
        self, spa: int, asid: int, gpa: int, validate: bool, size: int = PAGE
    ) -> tuple[RmpStatus, bool] | RmpFault:
        """PVALIDATE of a guest whose gpa the nested table has at spa.

        Gives (EAX, CF), CF saying that nothing changed, or the fault that the guest meets instead.
        """
        if gpa % PAGE:
            return RmpStatus.FAIL_INPUT, False
        old = self.entry(spa)
        fault = guest_access(replace(old, validated=True), asid, gpa, private=True, is_write=False)
        if fault:
            return fault
        if size != PAGE:
            return RmpStatus.FAIL_SIZEMISMATCH, False
        self.set(spa, replace(old, validated=validate))
        return RmpStatus.SUCCESS, old.validated == validate

    def page_state_change(self, spa: int, asid: int, gpa: int, op: int) -> int:
        """A hypervisor's answer to a page-state request (1 private, 2 shared).

        Gives 0, or the error for GHCBData[63:32].
        """
        entry = self.entry(spa)
        belongs_elsewhere = entry.assigned and (entry.asid, entry.gpa) != (asid, gpa)
        if op not in (PRIVATE, SHARED) or gpa >= VMSA_GPA or belongs_elsewhere:
            return 1
        if op == SHARED:
            return int(self.update(spa, None))
        if entry.assigned:
            # Private already: leaving it alone keeps what the guest validated
            return 0
        return int(self.update(spa, RmpEntry(assigned=True, asid=asid, gpa=gpa)))
