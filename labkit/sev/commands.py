"""The commands of SEV's secure processor as a table: states before and after, and checks in the firmware's order.

Source: SEV API (AMD 55766) chapter 6; the numbers of the states are those of GUEST_STATUS. Where it leaves the order open, it is that
of the firmware's published source (github.com/amd/AMD-ASPFW, sev_mcmd.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from labkit.errors import InvalidState

__all__ = ["RULES", "GuestState", "Request", "Rule"]


class GuestState(IntEnum):
    """Where a guest's life is; UNINIT has no handle."""

    UNINIT = 0
    LAUNCH_UPDATE = 1
    LAUNCH_SECRET = 2
    RUNNING = 3
    SEND_UPDATE = 4
    RECEIVE_UPDATE = 5
    SENT = 6


@dataclass(frozen=True)
class Request:
    """The fields of a command buffer; each command reads its own."""

    command: str
    handle: int = 0
    policy: int = 0
    asid: int = 0
    es: bool = True  # INIT
    spa: int = 0
    size: int = 0  # bytes at spa, or room for a result
    header: bytes = b""
    data: bytes = b""
    pdh: bytes = b""
    session: bytes = b""

    @classmethod
    def of(cls, command: str, fields: dict[str, Any]) -> Request:
        """A request from named fields; raises InvalidState for a name that no command has or a value that does not fit."""
        try:
            return cls(command, **fields)
        except TypeError as err:
            raise InvalidState(f"{command} has no such field: {err}") from err

    def __post_init__(self) -> None:
        for name, bits in (("policy", 32), ("handle", 32), ("asid", 32), ("spa", 52), ("size", 32)):
            if not 0 <= getattr(self, name) < 1 << bits:
                raise InvalidState(
                    f"{self.command}: {name} has {bits} bits in the command buffer, not {getattr(self, name):#x}"
                )

    @property
    def length(self) -> int:
        """Bytes to work on."""
        return len(self.data) or self.size


class Rule(NamedTuple):
    """When a command may run: guest states (none: no guest is asked for), the state after it, the checks in the firmware's order."""

    states: frozenset[GuestState]
    to: GuestState | None
    checks: tuple[str, ...]


def _rule(states: str, to: int | None, checks: str) -> Rule:
    return Rule(
        frozenset(GuestState(int(s)) for s in states),
        None if to is None else GuestState(to),
        tuple(checks.split()),
    )


_START, _UPDATE = "platform session", "platform guest state"
RULES = {
    "INIT": _rule("", None, "uninitialised"),
    "SHUTDOWN": _rule("", None, ""),
    "PLATFORM_STATUS": _rule("", None, ""),
    "DF_FLUSH": _rule("", None, "platform"),
    "LAUNCH_START": _rule("0", 1, f"{_START} sharer sharing version es_platform"),
    "LAUNCH_UPDATE_DATA": _rule("1", None, f"{_UPDATE} active address blocks"),
    "LAUNCH_UPDATE_VMSA": _rule("1", None, f"{_UPDATE} es_guest active address page"),
    "LAUNCH_MEASURE": _rule("1", 2, f"{_UPDATE} room"),
    "LAUNCH_SECRET": _rule("2", None, "platform guest address blocks header state active"),
    "LAUNCH_FINISH": _rule("2", 3, _UPDATE),
    "GUEST_STATUS": _rule("", None, "platform"),
    "ACTIVATE": _rule("12345", None, "platform guest asid owned inactive state flushed"),
    "DEACTIVATE": _rule("123456", None, "platform guest active"),
    "DECOMMISSION": _rule("123456", 0, "platform guest inactive"),
    "DBG_DECRYPT": _rule("123456", None, "platform address blocks guest debug active"),
    "DBG_ENCRYPT": _rule("123456", None, "platform address blocks guest debug active"),
    "SEND_START": _rule("3", 4, f"{_UPDATE} send"),
    "SEND_UPDATE_DATA": _rule("4", None, f"{_UPDATE} active blocks address"),
    "SEND_UPDATE_VMSA": _rule("4", None, f"{_UPDATE} es_guest active blocks address"),
    "SEND_FINISH": _rule("4", 6, _UPDATE),
    "SEND_CANCEL": _rule("4", 3, _UPDATE),
    "RECEIVE_START": _rule("0", 5, f"{_START} session_given sharer sharing version es_platform"),
    "RECEIVE_UPDATE_DATA": _rule("5", None, f"{_UPDATE} active blocks header address"),
    "RECEIVE_UPDATE_VMSA": _rule("5", None, f"{_UPDATE} es_guest active blocks header address"),
    "RECEIVE_FINISH": _rule("5", 3, _UPDATE),
}
