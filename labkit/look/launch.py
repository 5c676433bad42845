"""The launch of an encrypted guest, command by command, with the digest as it grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from labkit.checked import checked
from labkit.machine.memory import PAGE
from labkit.sev.commands import GuestState
from labkit.sev.policy import Policy, SnpPolicy, Status, policy_api, snp_policy_api
from labkit.sev.psp_guest import Measured
from labkit.sev.snp import SnpMeasured, SnpState
from labkit.shown import mimebundle, save

__all__ = ["LaunchProgress", "LaunchStep", "launch_steps", "policy_text"]


@dataclass(frozen=True)
class LaunchStep:
    """One command to the secure processor, and what came of it."""

    command: str  # "LAUNCH_UPDATE_DATA"
    kind: str = ""  # of its pages: "DATA", "VMSA", "NORMAL", "ZERO", ...; "" when it brings none
    gpa: int | None = None
    size: int = 0  # bytes
    digest: bytes = b""  # the launch digest after it
    refused: Status | None = None  # what the secure processor answered, if it refused
    found: str = ""  # why it was refused; "" when it was not

    @property
    def was_refused(self) -> bool:
        """Whether the secure processor or, with no status of its own, KVM refused it."""
        return self.refused is not None or self.found != ""

    @property
    def nr_pages(self) -> int:
        """How many pages it measured, begun ones included."""
        return -(-self.size // PAGE)


@checked
@dataclass(frozen=True, repr=False)
class LaunchProgress:
    """How far a launch is: the commands so far, the guest's state, what its owner can check."""

    protection: str  # "SEV-ES", "SNP"
    state: GuestState | SnpState
    steps: tuple[LaunchStep, ...]
    slots: tuple[tuple[int, int], ...] = ()  # memslots: (gpa, bytes)
    planned: tuple[tuple[int, int], ...] = ()  # what the launch will measure: (gpa, pages)
    policy: int = 0
    measurement: bytes = b""  # LAUNCH_MEASURE's blob, empty before
    expected: bytes = b""  # the owner's digest, empty when nobody computed one

    @property
    def digest(self) -> bytes:
        """The launch digest now."""
        for step in reversed(self.steps):
            if step.digest:
                return step.digest
        return b""

    @property
    def path(self) -> tuple[str, ...]:
        """The states on the way, the present one among them."""
        if isinstance(self.state, SnpState):
            return tuple(state.name for state in SnpState)
        return tuple(state.name for state in _path(self.state))

    @property
    def nr_pages(self) -> int:
        """Pages measured so far."""
        return sum(step.nr_pages for step in self._accepted)

    @property
    def nr_planned(self) -> int:
        """Pages to measure in all; 0 when nothing was planned.

        They are those of memory that were planned, and the VMSAs, which are none of it.
        """
        if not self.planned:
            return 0
        vmsas = sum(step.nr_pages for step in self._accepted if step.kind == "VMSA")
        return vmsas + sum(nr_pages for _, nr_pages in self.planned)

    @property
    def _accepted(self) -> list[LaunchStep]:
        return [step for step in self.steps if step.refused is None]

    @property
    def status(self) -> str:
        """Where the launch is, in one sentence, or what was refused last."""
        last = self.steps[-1] if self.steps else None
        if last is not None and last.was_refused:
            return _refusal(last)
        pages = str(self.nr_pages)
        if self.planned:
            pages += f" of {self.nr_planned}"
        digest = self.digest[:4].hex() or "none yet"
        return f"{self.state.name}: {pages} pages measured, digest {digest}…{self._checked}."

    @property
    def _checked(self) -> str:
        """What the owner's digest says of the launch; "" when nobody computed one."""
        if not self.expected:
            return ""
        if self.expected == self.digest:
            return ", as the owner computed"
        return ", not what the owner computed"

    def __repr__(self) -> str:
        return f"<LaunchProgress {self.protection}: {self.status}>"

    save = save

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        return mimebundle(self)


def _path(state: GuestState) -> tuple[GuestState, ...]:
    """The states through which a SEV guest goes when it is in this one on the way."""
    if state in (GuestState.SEND_UPDATE, GuestState.SENT):
        return (GuestState.RUNNING, GuestState.SEND_UPDATE, GuestState.SENT)
    if state is GuestState.RECEIVE_UPDATE:
        return (GuestState.UNINIT, GuestState.RECEIVE_UPDATE, GuestState.RUNNING)
    return (
        GuestState.UNINIT,
        GuestState.LAUNCH_UPDATE,
        GuestState.LAUNCH_SECRET,
        GuestState.RUNNING,
    )


def _refusal(step: LaunchStep) -> str:
    """Who refused a command, and why."""
    if step.refused is None:
        return f"{step.command} was refused by KVM: {step.found}."
    name, sentence = step.refused.name, step.refused.sentence
    said = f"{step.command} was refused: {name} ({step.refused:#04x}), {sentence}"
    return f"{said}; found {step.found}."


def launch_steps(measured: Iterable[Measured | SnpMeasured]) -> tuple[LaunchStep, ...]:
    """What the secure processor remembers of a guest (Guest.measured, SnpGuest.measured)."""
    return tuple(_step(one) for one in measured)


def _step(one: Measured | SnpMeasured) -> LaunchStep:
    if isinstance(one, SnpMeasured):
        return LaunchStep("SNP_LAUNCH_UPDATE", one.kind.name, one.gpa, PAGE, one.digest)
    command = f"LAUNCH_UPDATE_{one.command}"
    return LaunchStep(command, one.command, one.spa, one.size, one.digest)


def policy_text(policy: int, snp: bool = False) -> str:
    """A policy in words: "0x5: NODBG, ES; API 0.0 or later"."""
    bits: Iterable[SnpPolicy | Policy] = SnpPolicy if snp else Policy
    names = [str(bit.name) for bit in bits if policy & bit and bit is not SnpPolicy.RESERVED_ONE]
    major, minor = snp_policy_api(policy) if snp else policy_api(policy)
    demanded = ", ".join(names) or "nothing demanded"
    return f"{policy:#x}: {demanded}; API {major}.{minor} or later"
