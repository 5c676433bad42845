"""The commands that a host gives for one guest, kept as they went: what a launch looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from labkit.errors import KvmError, PspError
from labkit.sev.commands import Value
from labkit.sev.kvm import kvm_command
from labkit.sev.kvm_host import KvmVm
from labkit.sev.policy import Status
from labkit.sev.psp_bodies import Result

__all__ = ["Done", "issue"]


@dataclass(frozen=True)
class Done:
    """One command of the launch, as it went.

    nr_measured is how many pages were measured by then. refused is what was found, "" when the
    command was carried out; status is the firmware's, None where KVM itself refused.
    """

    command: str
    nr_measured: int
    refused: str = ""
    status: Status | None = None


def issue(
    vm: KvmVm,
    name: str,
    fields: dict[str, Value],
    done: list[Done],
    nr_measured: Callable[[], int],
) -> Result:
    """Give KVM a command, and append to `done` how it went.

    Gives what the firmware gives; raises KvmError where it was refused, InvalidState (and keeps no
    record) for fields that it cannot have.
    """
    try:
        result = kvm_command(vm, name, **fields)
    except KvmError as err:
        found, status = _why(name, err)
        done.append(Done(name, nr_measured(), found, status))
        raise
    done.append(Done(name, nr_measured()))
    return result


def _why(name: str, err: KvmError) -> tuple[str, Status | None]:
    """What was found, and the firmware's status where that refused."""
    refusal = err.__cause__
    if isinstance(refusal, PspError):
        status = refusal.facts["status"]
        assert isinstance(status, Status)
        return str(refusal.facts["found"]), status
    return str(err).removeprefix(f"{name}: "), None
