"""The commands of SEV's secure processor as a table: states before and after, and checks.

Source: SEV API (AMD 55766) chapter 6; the numbers of the states are those of GUEST_STATUS. Where it
leaves the order of checks open, it is that of the firmware's published source
(github.com/amd/AMD-ASPFW, sev_mcmd.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from labkit.errors import InvalidState

__all__ = ["RULES", "GuestState", "Request", "Rule", "Value"]

# What a field of a command holds
Value = int | bytes


class GuestState(IntEnum):
    """Where a guest's life is; UNINIT has no handle."""

    UNINIT = 0
    LAUNCH_UPDATE = 1
    LAUNCH_SECRET = 2
    RUNNING = 3
    SEND_UPDATE = 4
    RECEIVE_UPDATE = 5
    SENT = 6


# How many bits a field has in the command buffer
_FIELD_BITS = {"policy": 32, "handle": 32, "asid": 32, "spa": 52, "size": 32}


@dataclass(frozen=True)
class Request:
    """The fields of a command buffer; each command reads its own.

    es belongs to INIT; size is the bytes at spa, or the room for a result. Raises InvalidState for
    a number that its field cannot hold.
    """

    command: str
    handle: int = 0
    policy: int = 0
    asid: int = 0
    es: bool = True
    spa: int = 0
    size: int = 0
    header: bytes = b""
    data: bytes = b""
    pdh: bytes = b""
    session: bytes = b""

    @classmethod
    def of(cls, command: str, fields: Mapping[str, Value]) -> Request:
        """A request from named fields.

        Raises InvalidState for a name that no command has or a value that does not fit.
        """
        try:
            return cls(command, **fields)  # type: ignore[arg-type]
        except TypeError as err:
            raise InvalidState(f"{command} has no such field: {err}") from err

    def __post_init__(self) -> None:
        for name, bits in _FIELD_BITS.items():
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise InvalidState(
                    f"{self.command}: {name} has {bits} bits in the command buffer, not {value:#x}"
                )

    @property
    def length(self) -> int:
        """Bytes to work on."""
        return len(self.data) or self.size


class Rule(NamedTuple):
    """When a command may run, and where it leads.

    states are those that its guest may be in (none: no guest is asked for), to is the state after
    it (None: the same), checks are names of `psp_checks.CHECKS` in the firmware's order.
    """

    states: frozenset[GuestState]
    to: GuestState | None
    checks: tuple[str, ...]


def _rule(checks: str, states: Iterable[GuestState] = (), to: GuestState | None = None) -> Rule:
    return Rule(frozenset(states), to, tuple(checks.split()))


_S = GuestState
_ALIVE = frozenset(GuestState) - {_S.UNINIT}
_GUEST = "platform guest state"
_START = "sharer sharing version es_platform"
_DEBUG = "platform address blocks guest debug active"

RULES = {
    "INIT": _rule("uninitialised"),
    "SHUTDOWN": _rule(""),
    "PLATFORM_STATUS": _rule(""),
    "DF_FLUSH": _rule("platform"),
    "LAUNCH_START": _rule(f"platform session {_START}", {_S.UNINIT}, _S.LAUNCH_UPDATE),
    "LAUNCH_UPDATE_DATA": _rule(f"{_GUEST} active address blocks", {_S.LAUNCH_UPDATE}),
    "LAUNCH_UPDATE_VMSA": _rule(f"{_GUEST} es_guest active address page", {_S.LAUNCH_UPDATE}),
    "LAUNCH_MEASURE": _rule(f"{_GUEST} room", {_S.LAUNCH_UPDATE}, _S.LAUNCH_SECRET),
    "LAUNCH_SECRET": _rule("platform guest address blocks header state active", {_S.LAUNCH_SECRET}),
    "LAUNCH_FINISH": _rule(_GUEST, {_S.LAUNCH_SECRET}, _S.RUNNING),
    "GUEST_STATUS": _rule("platform"),
    "ACTIVATE": _rule("platform guest asid owned inactive state flushed", _ALIVE - {_S.SENT}),
    "DEACTIVATE": _rule("platform guest active", _ALIVE),
    "DECOMMISSION": _rule("platform guest inactive", _ALIVE, _S.UNINIT),
    "DBG_DECRYPT": _rule(_DEBUG, _ALIVE),
    "DBG_ENCRYPT": _rule(_DEBUG, _ALIVE),
    "SEND_START": _rule(f"{_GUEST} send", {_S.RUNNING}, _S.SEND_UPDATE),
    "SEND_UPDATE_DATA": _rule(f"{_GUEST} active blocks address", {_S.SEND_UPDATE}),
    "SEND_UPDATE_VMSA": _rule(f"{_GUEST} es_guest active blocks address", {_S.SEND_UPDATE}),
    "SEND_FINISH": _rule(_GUEST, {_S.SEND_UPDATE}, _S.SENT),
    "SEND_CANCEL": _rule(_GUEST, {_S.SEND_UPDATE}, _S.RUNNING),
    "RECEIVE_START": _rule(
        f"platform session session_given {_START}", {_S.UNINIT}, _S.RECEIVE_UPDATE
    ),
    "RECEIVE_UPDATE_DATA": _rule(f"{_GUEST} active blocks header address", {_S.RECEIVE_UPDATE}),
    "RECEIVE_UPDATE_VMSA": _rule(
        f"{_GUEST} es_guest active blocks header address", {_S.RECEIVE_UPDATE}
    ),
    "RECEIVE_FINISH": _rule(_GUEST, {_S.RECEIVE_UPDATE}, _S.RUNNING),
}
