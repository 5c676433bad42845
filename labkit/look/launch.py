"""The launch of an encrypted guest, command by command, with the digest as it grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from labkit.sev.commands import GuestState
from labkit.sev.policy import Policy, SnpPolicy, Status, policy_api, snp_policy_api
from labkit.sev.psp import Measured
from labkit.sev.snp import SnpMeasured, SnpState
from labkit.shown import mimebundle

__all__ = ["LaunchProgress", "LaunchStep", "launch_steps", "policy_text"]

PAGE = 4096
Range = tuple[int, int]  # gpa, number of pages


@dataclass(frozen=True)
class LaunchStep:
    """One command to the secure processor, and what came of it."""

    command: str  # "LAUNCH_UPDATE_DATA"
    kind: str = (
        ""  # of the pages: "DATA", "VMSA", "NORMAL", "ZERO", ...; "" when the command brings none
    )
    gpa: int | None = None
    size: int = 0  # bytes
    digest: bytes = b""  # the launch digest after it
    refused: Status | None = None
    found: str = ""  # why it was refused; "" when it was not

    @property
    def nr_pages(self) -> int:
        """How many pages it measured, begun ones included."""
        return -(-self.size // PAGE)


@dataclass(frozen=True, repr=False)
class LaunchProgress:
    """How far a launch is: the commands so far, where the guest's state stands, and what its owner can check."""

    protection: str  # "SEV-ES", "SNP"
    state: GuestState | SnpState
    steps: tuple[LaunchStep, ...]
    slots: tuple[Range, ...] = ()  # memslots: gpa, bytes
    planned: tuple[Range, ...] = ()  # what will be measured before the launch ends
    policy: int = 0
    measurement: bytes = b""  # LAUNCH_MEASURE's blob, empty before
    expected: bytes = b""  # the owner's digest, empty when nobody computed one

    @property
    def digest(self) -> bytes:
        """The launch digest now."""
        return next((step.digest for step in reversed(self.steps) if step.digest), b"")

    @property
    def path(self) -> tuple[str, ...]:
        """The states on the way, the present one among them."""
        if isinstance(self.state, SnpState):
            return tuple(state.name for state in SnpState)
        sending, receiving = GuestState.SEND_UPDATE, GuestState.RECEIVE_UPDATE
        if self.state in (sending, GuestState.SENT):
            return tuple(state.name for state in (GuestState.RUNNING, sending, GuestState.SENT))
        middle = (
            (receiving,)
            if self.state is receiving
            else (GuestState.LAUNCH_UPDATE, GuestState.LAUNCH_SECRET)
        )
        return tuple(state.name for state in (GuestState.UNINIT, *middle, GuestState.RUNNING))

    @property
    def nr_pages(self) -> int:
        """Pages measured so far."""
        return sum(step.nr_pages for step in self.steps if step.refused is None)

    @property
    def nr_planned(self) -> int:
        """Pages to measure in all: those of memory that were planned, and the VMSAs, which are none of it."""
        vmsas = [
            step.nr_pages for step in self.steps if step.kind == "VMSA" and step.refused is None
        ]
        return sum(nr for _, nr in self.planned) + sum(vmsas) * bool(self.planned)

    @property
    def status(self) -> str:
        """Where the launch is, in one sentence, or what was refused last."""
        last = self.steps[-1] if self.steps else None
        if last is not None and last.refused is None and last.found:
            return f"{last.command} was refused by KVM: {last.found}."
        if last is not None and last.refused is not None:
            return f"{last.command} was refused: {last.refused.name} ({last.refused:#04x}), {last.refused.sentence}; found {last.found}."
        of = f" of {self.nr_planned}" if self.planned else ""
        owner = (
            ""
            if not self.expected
            else ", as the owner computed"
            if self.expected == self.digest
            else ", not what the owner computed"
        )
        return f"{self.state.name}: {self.nr_pages}{of} pages measured, digest {self.digest[:4].hex() or 'none yet'}…{owner}."

    def __repr__(self) -> str:
        return f"<LaunchProgress {self.protection}: {self.status}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


def launch_steps(measured: Iterable[Measured | SnpMeasured]) -> tuple[LaunchStep, ...]:
    """The steps that the secure processor remembers of a guest (Guest.measured, SnpGuest.measured)."""
    return tuple(
        LaunchStep(f"LAUNCH_UPDATE_{one.command}", one.command, one.spa, one.size, one.digest)
        if isinstance(one, Measured)
        else LaunchStep("SNP_LAUNCH_UPDATE", one.kind.name, one.gpa, PAGE, one.digest)
        for one in measured
    )


def policy_text(policy: int, snp: bool = False) -> str:
    """A policy in words: "0x5: NODBG, ES; API 0.0 or later"."""
    names = [
        str(bit.name)
        for bit in (SnpPolicy if snp else Policy)
        if policy & bit and bit is not SnpPolicy.RESERVED_ONE
    ]
    major, minor = snp_policy_api(policy) if snp else policy_api(policy)
    return f"{policy:#x}: {', '.join(names) or 'nothing demanded'}; API {major}.{minor} or later"
